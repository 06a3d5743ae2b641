"""docs/sharing.md, walked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import softcache as sc

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from quickstart import walk  # noqa: E402


def test_the_walk(small_path: Path, small_folder: Path, tmp_path: Path):
    (tmp_path / "caches").mkdir()
    shutil.copytree(small_path, tmp_path / "caches" / "ours")
    shutil.copytree(small_folder, tmp_path / "images")
    said = "".join(step.printed for step in walk((ROOT / "docs" / "sharing.md").read_text(), tmp_path))
    name = sc.open(small_path).digest
    assert f"the same cache, {name}" in said and said.count(f"{name} is whole (every byte read)") == 3
    assert "16 of 20 samples, 4 steps an epoch" in said and "files.bin: mended" in said
    assert "0 files (0.0 MB) to be deleted" in said and "younger than 24 hours" in said
