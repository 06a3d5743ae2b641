"""tools/share_roundtrip.py: a cache is built, pushed, pulled in part, verified, and teaches there what it teaches here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import softcache as sc
from softcache.errors import NotPulled

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import share_roundtrip as tool  # noqa: E402


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute of one core; several where the machine is busy
def test_what_was_pulled_teaches_the_same_student(shared_data: Path, tmp_path: Path, capsys):
    for library in ("torch", "moto", "obstore", "pyarrow"):
        pytest.importorskip(library)
    found = tool.roundtrip(tmp_path, shared_data, images=64)
    assert found["equal"], found
    losses = [epoch["loss"] for epoch in found["built"]["curve"]]
    assert len(losses) == tool.EPOCHS == len(set(losses)) and all(map(math.isfinite, losses))

    built, pulled = sc.open(tmp_path / "here" / "cache"), sc.open(tmp_path / "there" / "cache")
    assert pulled.digest == built.digest and {*built.targets} == {"logits", "layer3"}
    assert [folder.name for folder in (pulled.path / "targets").iterdir()] == ["logits"]
    with pytest.raises(NotPulled, match="layer3"):
        pulled[pulled.ids[0], 0]["layer3"]
    moved = {step["step"]: step["bytes"] for step in found["steps"] if step["bytes"]}
    shards = sum(f.stat().st_size for f in (built.path / "targets" / "layer3").rglob("c.*"))
    assert 0 < moved["pull --targets logits"] <= moved["push"] - shards

    tool.tell(found)
    said = capsys.readouterr().out
    assert said.count(repr(losses[-1])) == 2 and "NOT EQUAL" not in said


def test_what_is_gone_cannot_be_imported(monkeypatch: pytest.MonkeyPatch):
    here = f"print(*filter(find_spec, {tool.TEACHERS!r}))"
    monkeypatch.setitem(tool.COMMANDS, "look", f"from importlib.util import find_spec; main = lambda: {here}")
    assert "softcache.teachers" in tool.command(["look"]).split()
    assert tool.command(["look"], tool.TEACHERS).split() == []
    with pytest.raises(SystemExit, match=r"softcache --help\nexited with 1:[^$]*softcache\.cli halted"):
        tool.command(["softcache", "--help"], ["softcache.cli"])


def run(path: Path, loss: float, weights: str = "0a" * 32) -> dict:
    """What the tool reads of a run with this last loss."""
    entry = {"epoch": 1, "loss": loss, "ce": 2.5, "kd": 0.5, "top1": 0.25}
    entry["step_ms"] = path.stat().st_ino  # no two runs take the same time
    state = {"history": [entry], "files": {"model": {"file": "m", "sha256": weights}}}
    (path / "checkpoint.json").write_text(json.dumps(state))
    return tool.learned(path)


@pytest.mark.parametrize(
    ("other", "status", "says"),
    [
        ({"loss": 0.7}, 0, "equal"),
        ({"loss": math.nextafter(0.7, 1)}, 1, "NOT EQUAL"),
        ({"loss": 0.7, "weights": "0b" * 32}, 1, "NOT EQUAL"),
    ],
)
def test_one_bit_is_not_equal(other, status, says, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    built, pulled = run(tmp_path / "a", 0.7), run(tmp_path / "b", **other)
    found = {"images": 64, "views": 4, "bytes": 9, "steps": [{"step": "push", "bytes": 9, "seconds": 1.0}]}
    found |= {"built": built, "pulled": pulled, "equal": built == pulled}
    monkeypatch.setattr(tool, "roundtrip", lambda *_: found)
    (tmp_path / "cifar10").mkdir()
    assert tool.main(["--data", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert says in said and ("NOT EQUAL" in said) == bool(status)
    assert tool.main(["--data", str(tmp_path), "--json"]) == status
    assert json.loads(capsys.readouterr().out) == found


def test_without_data_it_says_so(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as e:
        tool.main(["--data", str(tmp_path)])
    assert e.value.code == 1 and "no CIFAR-10 in" in capsys.readouterr().err
