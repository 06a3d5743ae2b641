"""Students that can answer early: how good each answer is."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
import toys
from softcache_train import students, validation
from softcache_train.cli import main
from softcache_train.cost import cost, cost_of_exit
from softcache_train.loader import normalise

SPEC = {"mean": [0.5] * 3, "std": [0.25] * 3, "color": "RGB"}


def images(count: int, size: int = 16) -> validation.Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return validation.Images(pixels, np.arange(count) % 4, "")


@pytest.mark.parametrize("name", ["toys:exits", "resnet8_exits"])
def test_each_exit_is_scored_and_the_mean_of_their_logits(name, monkeypatch):
    monkeypatch.setattr(validation, "BATCH", 20)  # and a rest
    torch.manual_seed(0)
    model, held = students.make(name, 4), images(50, 32 if name.startswith("resnet") else 16)
    found = validation.score(model, held, SPEC, torch.device("cpu"))
    assert model.training
    model.eval()
    labels = torch.from_numpy(held.labels)
    with torch.no_grad():
        said = [model.at_exit(normalise(held.pixels, SPEC), i + 1) for i in range(len(found["exits"]))]
    said.append(sum(said) / len(said))
    expected = [(logits.argmax(1) == labels).sum().item() / 50 for logits in said]
    assert [*found["exits"], found["ensemble"]] == expected
    assert found["top1"] == found["exits"][-1] == validation.accuracy(model, held, SPEC, torch.device("cpu"))
    assert len(set(expected)) > 1


def test_a_student_with_one_answer_has_one_score():
    model = toys.plain(4)
    assert set(validation.score(model, images(5), SPEC, torch.device("cpu"))) == {"top1"}
    assert validation.score(model, images(0), SPEC, torch.device("cpu")) == {"top1": None}


@pytest.fixture
def asked(cache, images, tmp_path):
    config = tmp_path / "own.yaml"
    options = "student: toys:exits\nepochs: 2\nglobal_batch: 25\nlr: 0.01\nworkers: 0\n"
    heard = "[exit1, exit2, exit1.embedding, exit2.embedding]"
    config.write_text(options + f"objectives:\n  - own_exits: {{student: {heard}}}\n")
    where = ["--cache", str(cache.path), "--source", str(images), "--split", "train"]
    return [str(config), *where, "-o", str(tmp_path / "out")]


def test_the_log_the_history_and_the_result_tell_of_every_exit(asked, tmp_path, capsys):
    assert main([*asked, "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    history = json.loads((tmp_path / "out" / "checkpoint.json").read_text())["history"]
    for entry, line in zip(
        history, [one for one in told.err.splitlines() if one.startswith("epoch")], strict=True
    ):
        assert len(entry["exits"]) == 2 and entry["top1"] == entry["exits"][1]
        assert all(f"exit {i} {top1:.2%}" in line for i, top1 in enumerate(entry["exits"], 1))
        assert f"ensemble {entry['ensemble']:.2%}" in line
    assert (result["exits"], result["ensemble"]) == (history[-1]["exits"], history[-1]["ensemble"])

    assert main(asked) == 0  # a finished run says it again
    _, exits, *_ = capsys.readouterr().out.splitlines()
    assert exits.startswith(f"exit 1 {result['exits'][0]:.2%}, exit 2")


def test_up_to_an_exit_a_student_costs_what_runs(monkeypatch):
    model, ran = students.make("resnet8_exits", 7), []

    def parameters(*names):
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())

    stem = ("conv1", "bn1", "layer1")
    every = (*stem, "exit1", "layer2", "exit2", "layer3", "linear")
    of_exits = [(*stem, "exit1"), (*stem, "layer2", "exit2"), (*stem, "layer2", "layer3", "linear")]
    for name in every:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    images = torch.zeros(1, 3, 32, 32).expand(3, -1, -1, -1)
    for number, names in enumerate(of_exits, start=1):
        found = cost_of_exit(model, number, images)
        assert (found.parameters, found.megabytes) == (parameters(*names), 4 * parameters(*names) / 1e6)
        assert set(ran) == set(names) and found.milliseconds > 0 and not model.training
        ran.clear()
    assert cost(model, images).parameters == parameters(*every)

    ticks = iter([0, 5, 10, 11, 20, 22])  # three images, of 5, 1 and 2 seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert cost_of_exit(model, 1, images).milliseconds == 2000


def test_compare_has_a_row_for_each_exit(asked, tmp_path, capsys):
    config, *where = asked
    options = (tmp_path / "own.yaml").read_text().partition("objectives")[0]
    (tmp_path / "labels.yaml").write_text(options + "objectives: [ce]\n")
    assert main(["compare", str(tmp_path / "labels.yaml"), config, *where, "--seeds", "2", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    parts = ["", ", exit 1", ", exit 2", ", ensemble"]
    assert [*rows] == [name + part for name in ("labels", "own") for part in parts]
    assert rows["own"]["top1"] == rows["own, exit 2"]["top1"]
    assert (
        rows["own, ensemble"]["parameters"] == rows["own"]["parameters"] > rows["own, exit 2"]["parameters"]
    )
    for i, name in enumerate(("own, exit 1", "own, exit 2", "own, ensemble")):
        for seed, top1 in rows[name]["top1"].items():
            run = json.loads((tmp_path / "out" / "own" / seed / "checkpoint.json").read_text())["history"][-1]
            assert top1 == [*run["exits"], run["ensemble"]][i]
        gains = [100 * (rows[name]["top1"][s] - rows["labels"]["top1"][s]) for s in "01"]
        assert rows[name]["gain"] == pytest.approx(sum(gains) / 2) and rows[name]["milliseconds"] > 0
