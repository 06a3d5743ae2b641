"""Generations of students: each one's cache names the cache that its teacher learned from."""

from __future__ import annotations

import json

import pytest
import toys
from softcache_train import born_again, load_student
from softcache_train.cli import main

import softcache as sc
from softcache import cli
from softcache.errors import MismatchError, SpecError

CONFIG = "student: resnet8\nepochs: 1\nglobal_batch: 25\nlr: 0.01\nworkers: 0\nalpha: 1\nT: 1\n"


@pytest.fixture
def asked(cache, images, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    return [
        "born-again",
        str(tmp_path / "c.yaml"),
        *(
            "--cache",
            str(cache.path),
            "--source",
            str(images),
            "--split",
            "train",
            "-o",
            str(tmp_path / "out"),
        ),
    ]


def test_a_chain_can_be_followed_back_to_the_first_cache(asked, cache, tmp_path, capsys):
    assert main([*asked, "--generations", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [g["number"] for g in found] == [1, 2, 3]
    second, third = (sc.open(tmp_path / "out" / name) for name in ("1.cache", "2.cache"))
    assert second.identity["teacher"]["parent"] == cache.digest
    assert third.identity["teacher"]["parent"] == second.digest
    assert [(g["cache"], g["parent"]) for g in found] == [
        (cache.digest, None),
        (second.digest, cache.digest),
        (third.digest, second.digest),
    ]
    assert "parent" not in cache.identity["teacher"]
    assert second.read_views(1, [3, 5]) == cache.read_views(1, [3, 5])  # the very views of the first cache
    student = load_student(tmp_path / "out" / "1")
    assert student.input_spec["size"] == second.identity["teacher"]["input_spec"]["size"]
    a, b = (
        json.loads((tmp_path / "out" / n / "checkpoint.json").read_text())["config"]["seed"] for n in "12"
    )
    assert a != b

    assert main([*asked, "--generations", "3"]) == 0  # everything is there
    told = capsys.readouterr().out
    assert all(one.digest[:12] in told for one in (cache, second, third))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--generations", "0"], "at least one"),
        (["--set", "teacher=toys:teacher_factory"], "leave the live teacher out"),
    ],
)
def test_what_cannot_be_passed_on_is_refused(asked, more, says, capsys):
    assert main([*asked, *more]) == SpecError.exit_code
    assert says in capsys.readouterr().err


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, not in their own, which takes seconds to begin; the list of what was said."""
    said = []

    def command(*words):
        said.append([str(word) for word in words])
        assert cli.main(said[-1]) == 0

    monkeypatch.setattr(born_again, "softcache", command)
    return said


@pytest.fixture
def some(tmp_path):
    """The first cache of a chain, of some of 48 images, and the command line for three generations."""
    toys.write_imagefolder(tmp_path / "images", "train", 12, seed=0)

    def make(corrupt=False, **options):
        source = sc.Source(tmp_path / "images", split="train", limit=options.pop("limit", None))
        if corrupt:
            (tmp_path / "images" / "train" / source.ids[3]).write_bytes(b"not an image")
        cache = toys.build(
            tmp_path / "first", source, views=2, block_rows=16, skip_corrupt=corrupt, **options
        )
        (tmp_path / "c.yaml").write_text(CONFIG.replace("25", "15"))
        where = [
            "--cache",
            str(cache.path),
            "--source",
            str(tmp_path / "images"),
            "-o",
            str(tmp_path / "out"),
        ]
        return cache, ["born-again", str(tmp_path / "c.yaml"), *where, "--generations", "3"]

    return make


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 36}, {"--limit=36"}),
        ({"corrupt": True}, {"--skip-corrupt"}),
        ({"ignore_labels": True}, {"--ignore-labels"}),
        (
            {"limit": 40, "corrupt": True, "ignore_labels": True},
            {"--limit=40", "--skip-corrupt", "--ignore-labels"},
        ),
    ],
)
def test_every_generation_is_of_the_very_samples_of_the_first(some, here, tmp_path, options, says):
    first, command = some(**options)
    assert main(command) == 0
    assert len(here) == 2
    for words in here:
        assert {w for w in words if w.startswith(("--limit", "--skip", "--ignore"))} == says
    for name in ("1.cache", "2.cache"):
        made = sc.open(tmp_path / "out" / name)
        assert (made.ids, made.classes, made.invalid.tolist()) == (
            first.ids,
            first.classes,
            first.invalid.tolist(),
        )
        assert made.identity["source"] == first.identity["source"]
        good = next(i for i in range(first.samples) if i not in first.invalid)
        assert made.read_views(1, [good]) == first.read_views(1, [good])


def test_samples_that_no_build_would_take_are_refused_before_anything_is_trained(some, tmp_path, capsys):
    _, command = some()
    toys.write_imagefolder(tmp_path / "more", "train", 14, seed=0)
    command[command.index("--source") + 1] = str(tmp_path / "more")
    assert main(command) == MismatchError.exit_code
    assert "48 samples" in (told := capsys.readouterr().err) and "would take others" in told
    assert not (tmp_path / "out").exists()
    assert main([*command, "--generations", "1"]) == 0  # which builds nothing


def test_a_generation_of_other_samples_is_refused(some, tmp_path, monkeypatch, capsys):
    _, command = some(limit=36)
    monkeypatch.setattr(
        born_again, "softcache", lambda *words: cli.main([str(w).replace("=36", "=35") for w in words])
    )
    assert main(command) == MismatchError.exit_code
    assert "is of other samples than" in capsys.readouterr().err


def test_a_chain_begins_with_one_cache(some, capsys):
    cache, command = some()
    assert main([*command, "--cache", str(cache.path)]) == SpecError.exit_code
    assert "give one --cache" in capsys.readouterr().err


def test_weights_that_say_nothing_have_no_parent(source, tmp_path):
    assert "parent" not in toys.build(tmp_path / "c", source, views=1).identity["teacher"]
