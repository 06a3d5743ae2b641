"""The tool that leaves a class out, shortened: every method has a row, and labels alone never say 3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_response_method_has_a_row(tmp_path):
    pytest.importorskip("sklearn")
    command = [
        sys.executable,
        ROOT / "tools" / "omit_class.py",
        "--seeds",
        "1",
        "--epochs",
        "3",
        "--json",
        "-o",
        tmp_path / "o",
    ]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["ce (labels)"][0]["threes"] == 0
    assert found["kd, T=8"][0]["shifted_threes"] > 0.5
    assert all(f"| {name} |" in run.stderr for name in found) and len(found) == 10
