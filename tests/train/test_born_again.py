"""Generations of students: each one's cache names the cache that its teacher learned from."""

from __future__ import annotations

import json

import pytest
import toys
from softcache_train import load_student
from softcache_train.cli import main

import softcache as sc
from softcache.errors import SpecError

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


def test_weights_that_say_nothing_have_no_parent(source, tmp_path):
    assert "parent" not in toys.build(tmp_path / "c", source, views=1).identity["teacher"]
