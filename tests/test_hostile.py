"""Promise 5: hostile caches do no harm. Every attack of the corpus, and files changed at random, watched and limited."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import guard, mutate

import softcache as sc
from softcache.errors import MAX_MESSAGE, DamageError, SoftcacheError
from softcache.hostile import HOSTILE, sign
from softcache.manifest import MANIFEST

HERE = Path(__file__).parent


def run(module: str, *arguments: str) -> dict[str, Any]:
    """A module of tests/hostile in a process of its own, which prints JSON."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"hostile.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stderr + done.stdout)[-5000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def came() -> dict[str, Any]:
    """What came of every attack, and the memory it took."""
    return run("corpus")


@pytest.mark.parametrize("name", HOSTILE)
def test_an_attack_does_no_harm(came: dict[str, Any], name: str):
    attack, found = HOSTILE[name], came["attacks"][name]
    error = attack.error.__name__ if attack.error else ""
    assert (found["step"], found["error"]) == (attack.step, error), found["message"]
    assert len(found["message"]) <= MAX_MESSAGE and found["message"].isprintable()
    assert float(found["seconds"]) < 10


def test_no_attack_takes_memory(came: dict[str, Any]):
    assert came["memory"]["in_use"] < 800 << 20


def test_files_changed_at_random_do_no_harm():
    found = run("fuzz", "--seconds", "8")  # tools/fuzz.py goes on for as long as is wanted
    assert found["memory"]["addresses"] <= found["limit"]
    assert all(one["tried"] >= 20 for one in found["readers"].values())
    assert sum(sum(one["raised"].values()) for one in found["readers"].values()) > 50


def test_signing_changes_no_good_cache(small_copy: Path):
    before = {p: p.read_bytes() for p in small_copy.rglob("*") if p.is_file()}
    sign(small_copy)
    assert before == {p: p.read_bytes() for p in small_copy.rglob("*") if p.is_file()}
    assert sc.verify(small_copy, read_data=True) == []


# -- the watch itself, which must be able to fail --------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        "__import__('os').system('true')",
        "eval(compile('1', 'evil', 'eval'))",
        "__import__('pickle').loads(b'cos\\nsystem\\n.')",
        "__import__('antigravity')",
        "open('/etc/passwd')",
        "open(root / 'x', 'w')",
        "__import__('os').remove(root / 'x')",
        "__import__('socket').socket()",
        "__import__('subprocess').run(['true'])",
        "__import__('os').listdir('/')",
        "__import__('time').sleep(9)",
    ],
)
def test_the_watch_sees_harm(tmp_path: Path, harm: str):
    code = f"""
import os, pickle, pathlib, socket, subprocess, time
from hostile import guard
root = pathlib.Path({str(tmp_path)!r})
run = eval("lambda: " + {harm!r})
try:
    with guard.watched(root, seconds=0.5):
        run()
except (guard.Breach, guard.Hung):
    print('{{"seen": true}}')
"""
    (tmp_path / "watch.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "watch.py")], env=environment, capture_output=True, text=True
    )
    assert json.loads(done.stdout or "{}") == {"seen": True}, done.stderr


def test_the_watch_lets_reading_pass(small_copy: Path):
    with guard.watched(small_copy):
        sc.open(small_copy).read(0, np.arange(20))


def test_a_tree_is_put_back(small_copy: Path):
    from random import Random

    before = {p: p.read_bytes() for p in small_copy.rglob("*") if p.is_file()}
    tree, random = mutate.Tree(small_copy), Random(0)
    for _ in range(60):
        mutate.OF_CACHES[mutate.choose(random, mutate.OF_CACHES)][1](random, tree)
        tree.restore()
    assert {p: p.read_bytes() for p in small_copy.rglob("*") if p.is_file()} == before


# -- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\u202e", "x" * 100_000, "\ud800", "\x9b31m"], ids=ascii)
def test_a_message_is_one_short_line(text: str):
    told = str(SoftcacheError(f"the id {text} is missing"))
    assert told.isprintable() and len(told) <= MAX_MESSAGE
    assert told.startswith("the id ") and told.endswith(" is missing")


def test_what_verify_prints_commands_no_terminal(small_copy: Path, capsys):
    from softcache.cli import main

    (small_copy / "\x1b]0;owned\x07\n").write_bytes(b"")
    (small_copy / os.fsdecode(b"\xff")).write_bytes(b"")
    assert main(["verify", str(small_copy)]) == 2
    assert "\x1b" not in (told := capsys.readouterr().out) and len(told.splitlines()) == 2


def test_a_report_that_contradicts_itself_is_damage(small_copy: Path):
    sign(small_copy, lambda value: value["report"].update(teacher_top1=None))
    with pytest.raises(DamageError, match="labelled"):
        sc.open(small_copy)


def test_a_table_is_as_large_as_its_manifest_says(small_copy: Path):
    with (small_copy / "files.bin").open("ab") as file:
        file.truncate(1 << 40)  # sparse: takes no room on the disk
    (damage,) = sc.verify(small_copy)
    assert damage.file == "files.bin" and (small_copy / MANIFEST).exists()
    shutil.rmtree(small_copy)
