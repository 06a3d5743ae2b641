"""Codecs chosen for a budget or a fidelity: once for a cache, by a rule, with reasons that are kept."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plan import written

import softcache as sc
from softcache import choice, cli, inventory, measure, sizes
from softcache.card import markdown
from softcache.choice import Limits, choose
from softcache.chosen import FILE, Choice
from softcache.commission import Commission
from softcache.errors import MismatchError, SpecError, StoreError
from softcache.store import Store
from softcache.testing import FailingDisk, ToyImages, ToyTeacher, make_image_folder, toy_teacher

QUIET = {"progress": False}


class Thousand:
    """A thousand classes with tails as networks have them, and a map."""

    input_spec = ToyTeacher.input_spec
    weights_digest = "11" * 32

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows = pixels.reshape(len(pixels), -1).astype(np.float64)
        keys = np.random.default_rng(0).normal(size=(rows.shape[1], 1000)) / 900
        maps = np.random.default_rng(1).normal(size=(rows.shape[1], 16 * 8 * 8)) / 900
        logits = (rows - 128) @ keys * 3
        return {
            "logits": (logits + 2.5 * np.maximum(logits, 0)).astype(np.float32),
            "map": np.maximum((rows - 128) @ maps, 0).reshape(-1, 16, 8, 8).astype(np.float32),
        }


def thousand() -> Thousand:
    return Thousand()


BIG: dict[str, Any] = {
    "source": ToyImages(600),
    "teacher": Thousand(),
    "ignore_labels": True,
    "views": 2,
    "recipe": "random_resized_crop(8)|flip",
}


# -- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "bytes"),
    [
        ("20GB", 20 * 10**9), ("1.5 TiB", 3 * 2**39), ("300 kB", 300_000), ("5MiB", 5 << 20), ("7", 7), (" 8 b ", 8),
        ("2g", 2 * 10**9), (".5MB", 500_000), (12345, 12345), ("1PB", 10**15),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(said: Any, bytes: int):
    assert sizes.read(said) == bytes


@pytest.mark.parametrize(
    "said", ["", "GB", "20XB", "-3GB", "0", "0GB", "1e3", "nan", "inf", "2 0GB", "0.1b", 0, -1, True, 1.5, "9" * 40, None]
)  # fmt: skip
def test_what_is_no_size(said: Any):
    with pytest.raises(SpecError, match="no number of bytes: say 20GB"):
        sizes.read(said)


# -- the rule, against every combination -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tried() -> choice.Tried:
    asked = BIG | {"targets": {"logits": "full(u8)", "map": "int8"}}
    from softcache.builder import build
    from softcache.commission import commission

    bound = inspect.signature(build).bind("", **asked)
    bound.apply_defaults()
    return choice.try_all(choice.try_out(commission(bound.arguments, lambda text: None), 64))


def eligible(tried: choice.Tried) -> list[list[Any]]:
    return [[one for one in some if one.same and one.error is not None] for some in tried.candidates.values()]


def test_a_budget_takes_the_combination_whose_worst_target_loses_least(tried: choice.Tried):
    every = list(itertools.product(*eligible(tried)))
    total = {combo: choice._needed(tried, {one.target: one for one in combo}) for combo in every}
    sizes_of = sorted(total.values())
    assert len(set(sizes_of)) > 20
    for budget in (
        sizes_of[0],
        sizes_of[len(sizes_of) // 3],
        sizes_of[len(sizes_of) // 2],
        sizes_of[-1],
        10**15,
    ):
        found = choose(tried, Limits(budget, None))
        fitting = [combo for combo in every if total[combo] <= budget]
        assert total[tuple(found[name] for name in tried.candidates)] <= budget
        errors = sorted((one.error for one in found.values()), reverse=True)
        best = min(sorted((one.error for one in combo), reverse=True) for combo in fitting)
        assert errors == best


def test_a_fidelity_takes_the_fewest_bytes_that_have_it(tried: choice.Tried):
    logits = {one.codec: one for one in tried.candidates["logits"] if one.kl is not None}
    for most in (1e-3, 1e-2, 0.1, 1, 100):
        found = choose(tried, Limits(None, most))
        meeting = [one for one in logits.values() if one.kl <= most]
        assert found["logits"].kl <= most
        assert tried.bytes_per_view(found["logits"]) == min(map(tried.bytes_per_view, meeting))
        assert found["map"].codec == "int8"  # as asked for
    assert choose(tried, Limits(None, 100))["logits"].codec == "packed(16)"


def test_both(tried: choice.Tried):
    fine, most = choose(tried, Limits(None, 1e-2)), 1e-2
    everything = choice._needed(
        tried, {n: max(some, key=tried.bytes_per_view) for n, some in tried.candidates.items()}
    )
    found = choose(tried, Limits(everything, most))
    assert found["logits"] is fine["logits"] and found["map"].codec == "f16"  # what is left goes to the map
    small = {
        n: min((o for o in some if o.same), key=tried.bytes_per_view) for n, some in tried.candidates.items()
    }
    least = choice._needed(tried, small | {"logits": fine["logits"]})
    assert choose(tried, Limits(least, most))["logits"] is fine["logits"]
    with pytest.raises(
        SpecError, match=r"within a budget of .* with T²·KL of at most 0.01 nats: the smallest, logits="
    ):
        choose(tried, Limits(least - 1, most))


def test_what_nothing_meets_says_what_comes_nearest(tried: choice.Tried):
    with pytest.raises(SpecError, match=r"comes nearest, with .*; say --max-kl") as e:
        choose(tried, Limits(None, 1e-12))
    assert "full(f16)" in str(e.value)
    needed = float(str(e.value).rpartition("--max-kl ")[2])
    assert choose(tried, Limits(None, needed))["logits"].codec == "full(f16)"
    with pytest.raises(
        SpecError, match=r"the smallest, logits=packed\(16\), map=int., take .*Say --budget"
    ) as e:
        choose(tried, Limits(1000, None))
    needed = sizes.read(str(e.value).partition("--budget ")[2].partition(",")[0])
    choose(tried, Limits(needed, None))


@pytest.mark.parametrize("max_kl", [0, -1, float("nan"), float("inf")])
def test_a_kl_that_is_none(max_kl: float):
    with pytest.raises(SpecError, match=r"max_kl .* nats above 0"):
        sc.build("/nowhere", source=ToyImages(3), teacher=toy_teacher(), max_kl=max_kl)


def test_a_fidelity_of_what_has_no_probabilities(tmp_path: Path):
    for targets in ({"map": "int8"}, {"logits": "argmax"}):
        with pytest.raises(SpecError, match="max_kl is of logits"):
            sc.build(
                tmp_path / "c",
                source=ToyImages(9),
                teacher=toy_teacher(),
                targets=targets,
                max_kl=1e-3,
                **QUIET,
            )
    assert not (tmp_path / "c").exists()


# -- builds ----------------------------------------------------------------------------------------------------


def test_a_build_keeps_its_choice_and_the_reasons(tmp_path: Path, capsys):
    out = tmp_path / "c"
    plain = sc.plan(**BIG, targets={"logits": "full(f16)", "map": "f16"})
    budget = plain.predicted_bytes // 3
    cache = sc.build(out, **BIG, targets={"logits": "full(f16)", "map": "f16"}, budget=budget)
    told = capsys.readouterr().err
    assert "chosen for a budget of" in told
    made = cache.manifest.choice
    assert (
        made.budget == budget and made.max_kl is None and made.asked == {"logits": "full(f16)", "map": "f16"}
    )
    assert made.chosen == {name: target.spec for name, target in cache.targets.items()} != made.asked
    assert written(out) <= budget and written(out) == pytest.approx(made.bytes, rel=0.05)
    assert {one.target for one in made.considered} == {"logits", "map"} and len(made.considered) > 10
    assert made.why[0].startswith("chosen for a budget of") and len(made.why) == 3
    assert "choice" not in json.loads((out / "receipts" / "identity.json").read_text())
    assert sc.verify(cache, read_data=True) == []
    # the very cache that is built where the codecs are named, but for the manifest
    named = sc.build(tmp_path / "named", **BIG, targets=made.chosen, **QUIET)
    assert named.manifest.identity == cache.manifest.identity and named.manifest.files == cache.manifest.files
    assert named.manifest.choice is None and named.digest != cache.digest
    # again: nothing is computed, and nothing chosen
    before = cache.digest
    again = sc.build(out, **BIG, targets={"logits": "full(f16)", "map": "f16"}, budget=f"{budget}b", **QUIET)
    assert again.digest == before and again.teacher_rows == 0
    assert cli.main(["show", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(line in text for line in made.why)
    assert all(line in markdown(cache) for line in made.why)
    assert cli.main(["show", "--json", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["choice"]["chosen"] == made.chosen


def test_an_extension_that_passes_the_budget_says_so(tmp_path: Path, capsys):
    same: dict[str, Any] = {"source": ToyImages(40), "teacher": toy_teacher()}
    cache = sc.build(tmp_path / "c", **same, budget="25kB", **QUIET)
    assert inventory.size(cache) == written(cache.path) < 25_000
    sc.extend(cache.path, **same, targets={"vector": "f16"})
    assert written(cache.path) < 25_000 and "budget" not in capsys.readouterr().err
    sc.extend(cache.path, **same, targets={"map": "f16"})
    told = (
        f"takes {measure.size(written(cache.path))} now, and its codecs were chosen for a budget of 25.0 kB"
    )
    assert f"NOTE: {cache.path} {told}" in capsys.readouterr().err
    plain = sc.build(tmp_path / "plain", **same, **QUIET)
    sc.extend(plain.path, **same, targets={"map": "f16"})
    assert "budget" not in capsys.readouterr().err


def test_a_fidelity_is_had_by_the_rows_that_are_read(tmp_path: Path):
    cache = sc.build(tmp_path / "c", **BIG, max_kl=2, **QUIET)
    assert cache.targets["logits"].spec == "packed(256)"
    samples = np.arange(cache.samples)
    images, worst = ToyImages(600), 0.0
    for T in (1, 2, 4, 8):  # noqa: N806
        kl = []
        for k in range(2):
            kept = cache.read(k, samples)["logits"].log_probs(T)
            views = cache.read_views(k, samples)
            pixels = np.stack(
                [sc.render(images[i][0], v, (8, 8)) for i, v in zip(samples, views, strict=True)]
            )
            z = Thousand()(pixels)["logits"].astype(np.float64) / T
            z -= np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) + z.max(1, keepdims=True)
            kl.append((np.exp(z) * (z - kept)).sum(axis=1).mean())
        worst = max(worst, T * T * float(np.mean(kl)))
    assert 0.2 < worst < 2


def test_other_wishes_are_refused_and_a_build_that_did_not_choose(tmp_path: Path):
    small = {"source": ToyImages(40), "teacher": toy_teacher(), **QUIET}
    sc.build(tmp_path / "c", **small, max_kl=1e-2)
    with pytest.raises(MismatchError, match=r"max_kl is 0\.01 there and 0\.02 here"):
        sc.build(tmp_path / "c", **small, max_kl=2e-2)
    with pytest.raises(MismatchError, match="budget is None there and 20000000 here"):
        sc.build(tmp_path / "c", **small, max_kl=1e-2, budget="20MB")
    with pytest.raises(MismatchError, match="targets is"):
        sc.build(tmp_path / "c", **small, max_kl=1e-2, targets={"logits": "full(u8)"})
    sc.build(tmp_path / "d", **small)
    with pytest.raises(MismatchError, match="begun without a choice of codecs"):
        sc.build(tmp_path / "d", **small, budget="20MB")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.tex").write_text("x")
    with pytest.raises(MismatchError, match="holds something else"):
        sc.build(tmp_path / "e", **small, budget="20MB")


def test_a_choice_that_is_lost_is_taken_from_the_manifest_and_a_manifest_from_it(tmp_path: Path):
    options = {"source": ToyImages(40), "teacher": toy_teacher(), "max_kl": 1e-2, **QUIET}
    digest = sc.build(tmp_path / "c", **options).digest
    (tmp_path / "c" / FILE).unlink()
    assert [damage.file for damage in sc.verify(tmp_path / "c")] == [FILE]
    assert sc.build(tmp_path / "c", **options).digest == digest
    assert sc.verify(tmp_path / "c", read_data=True) == []
    (tmp_path / "c" / "softcache.json").unlink()
    assert sc.build(tmp_path / "c", **options).digest == digest


# -- once ------------------------------------------------------------------------------------------------------


class Counted(ToyTeacher):
    """Counts its answers, and may answer otherwise in a pilot of another time."""

    calls = 0

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        type(self).calls += 1
        return super().__call__(pixels)


def test_whatever_operation_fails_the_first_choice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {
        "source": ToyImages(12), "teacher": toy_teacher(), "targets": {"logits": "full(f16)"}, "budget": "1MB", **QUIET,
    }  # fmt: skip
    whole = sc.build(tmp_path / "whole", **options)
    known = Choice.model_validate_json((tmp_path / "whole" / FILE).read_bytes())
    decided: list[int] = []

    def decide(asked: Any, wanted: Any) -> Any:
        decided.append(1)
        return None, None

    monkeypatch.setattr(choice, "decide", decide)
    monkeypatch.setattr(choice, "record", lambda tried, chosen, wanted: known)
    for at in range(1, 400):
        out = tmp_path / str(at)
        decided.clear()
        try:
            sc.build(Store(out, FailingDisk(at)), **options)
        except StoreError:
            there = (out / FILE).exists()
            assert len(decided) == 1
            cache = sc.build(out, **options)
            assert len(decided) == 1 + (not there)
            assert cache.digest == whole.digest
        else:
            break
    assert at > 40


def test_a_second_builder_keeps_to_the_first_ones_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It looked before there was one, decided otherwise, and came second."""
    options: dict[str, Any] = {"source": ToyImages(30), "teacher": toy_teacher(), "budget": "1MB", **QUIET}
    real = choice.decide

    def late(asked: Any, wanted: Any) -> Any:
        monkeypatch.setattr(choice, "decide", real)
        sc.build(tmp_path / "c", **options)
        tried, _ = real(asked, wanted)
        return tried, {"logits": next(o for o in tried.candidates["logits"] if o.codec == "argmax")}

    monkeypatch.setattr(choice, "decide", late)
    cache = sc.build(tmp_path / "c", **options)
    assert cache.targets["logits"].spec == "full(f16)" and cache.teacher_rows == 0


def test_killed_after_its_choice_it_goes_on_with_that(tmp_path: Path):
    folder = make_image_folder(tmp_path / "images", per_class=10)
    log, out = tmp_path / "log", tmp_path / "c"
    words = [
        "build",
        "--source",
        folder,
        "--teacher",
        "softcache.testing:toy_teacher",
        "--no-progress",
        "-o",
        out,
    ]
    words += [
        "--target",
        "logits=full(f16)",
        "--target",
        "map=f16",
        "--budget",
        "200kB",
        "--batch",
        "4",
        "--block-rows",
        "8",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(inspect.getfile(sc)).parents[1])}
    slow = {"SOFTCACHE_TOY_DELAY": "0.2", "SOFTCACHE_TOY_LOG": str(log)}
    command = [sys.executable, "-m", "softcache.cli", *map(str, words)]
    with subprocess.Popen(command, env=environment | slow, stderr=subprocess.PIPE, text=True) as process:
        while not (out / FILE).exists():
            time.sleep(0.02)
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
        process.send_signal(signal.SIGKILL)
        process.communicate()
    chosen = (out / FILE).read_bytes()
    assert not list(out.glob("receipts/v*"))
    log.unlink()
    subprocess.run(command, env=environment | {"SOFTCACHE_TOY_LOG": str(log)}, check=True, timeout=120)
    assert (out / FILE).read_bytes() == chosen
    cache = sc.open(out)
    assert {n: t.spec for n, t in cache.targets.items()} == Choice.model_validate_json(chosen).chosen
    assert written(out) <= 200_000 and sc.verify(cache, read_data=True) == []
    rows = sum(len(line.split()) for line in log.read_text().splitlines())
    assert rows <= 40 + 100  # the build's, the picture of noise, and the probe's: no second pilot


# -- plan ------------------------------------------------------------------------------------------------------


def test_plan_chooses_and_prints_the_command_that_builds_it(tmp_path: Path, capsys):
    folder = make_image_folder(tmp_path / "images", per_class=60)
    out = tmp_path / "c d"
    said = [
        "--source",
        str(folder),
        "--teacher",
        "softcache.testing:toy_teacher",
        "--views",
        "3",
        "--batch",
        "16",
    ]
    said += ["--target", "logits=full(f16)", "--target", "map=f16", "--recipe", "random_resized_crop(8)|flip"]
    asked = [*said, "--budget", "2.5MB", "--input-size", "8,8"]
    assert cli.main(["plan", *asked, "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "chosen for a budget of 2.5 MB" in text and "→ " in text
    command = next(line for line in text.splitlines() if line.startswith("build-cache "))
    assert cli.build_cache([*shlex.split(command)[1:], "--no-progress"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cache = sc.open(out)
    assert found["choice"]["chosen"] == {n: t.spec for n, t in cache.targets.items()}
    assert {r["target"]: r["codec"] for r in found["codecs"] if r["chosen"]} == found["choice"]["chosen"]
    assert written(out) <= 2_500_000
    assert found["predicted_bytes"] == pytest.approx(written(out), rel=0.03)
    assert cache.views == 3 and cache.identity["teacher"]["batch"] == 16
    with pytest.raises(SystemExit, match="1"):
        cli.main(["plan", *said, "--budget", "nonsense"])
    assert "is not BYTES, such as 20GB" in capsys.readouterr().err


def test_a_choice_that_was_left_does_not_enter_a_build_that_chose_nothing(tmp_path: Path):
    """A build that chose and stopped before it began leaves its choice: another must not put it into its own manifest."""
    toy: dict[str, Any] = {
        "source": ToyImages(12),
        "teacher": toy_teacher(),
        "recipe": "flip",
        "views": 1,
        "progress": False,
    }
    begin, path = Commission.job, tmp_path / "cache"

    def stops(self: Commission, store: Store, *more: Any) -> Any:
        assert store.root != path, "stopped"
        return begin(self, store, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Commission, "job", stops)
        with pytest.raises(AssertionError, match="stopped"):
            sc.build(path, **toy, budget="1GB")
    assert (path / FILE).is_file()
    with pytest.raises(MismatchError, match=r"codecs were chosen for .*repeat --budget"):
        sc.build(path, **toy, targets={"logits": "argmax"})
    assert sc.build(path, **toy, budget="1GB").complete
