"""docs/quickstart.md, walked as a user would: its files saved, its commands run in order, its outputs compared."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from quickstart import PAGE, Step, export_photos, masked, walk  # noqa: E402


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute of one core; several where the machine is busy
def test_the_walk(shared_data: Path, tmp_path: Path):
    for library in ("torch", "torchvision", "pyarrow"):
        pytest.importorskip(library)
    export_photos(shared_data / "cifar10", tmp_path / "photos")
    steps = list(walk(PAGE.read_text(), tmp_path))
    for step in steps:
        missing = [line for line in masked(step.quoted) if line not in {"…", *masked(step.printed)}]
        assert not missing, f"the page quotes what is not printed; run tools/quickstart.py\n{step.printed}"

    said = {word: step.printed for step in steps for word in step.commands.split()}
    teacher = percent(r"top-1 of what was cached against the labels: (\S+)%", said["build-cache"])
    student = percent(r"top-1 (\S+)% after", said["softcache-train"])
    assert teacher > 50 and student > 45  # of three classes
    assert "is whole (every byte read)" in said["--read-data"]
    planned = re.search(r"([\d.]+) kB \(([\d.]+) bytes a view, of everything", said["plan"])
    assert planned
    files = [f for f in (tmp_path / "caches" / "photos").rglob("*") if f.is_file()]
    assert float(planned[1]) * 1000 == pytest.approx(sum(f.stat().st_size for f in files), rel=0.1)


def percent(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_a_page_is_walked_in_order_and_stops_at_what_fails(tmp_path: Path):
    page = (
        "```yaml\n# a.yaml\nviews: 3\n```\n\n```bash\ncat a.yaml > b\necho done\n```\n\n```text\ndone\n```\n\n"
        "```bash\ncat b\nfalse\ntouch c\n```\n"
    )
    steps = walk(page, tmp_path)
    assert next(steps) == Step("cat a.yaml > b\necho done\n", "done\n", "done\n")
    with pytest.raises(RuntimeError, match="views: 3"):
        next(steps)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("printed", "same", "other"),
    [
        ("0:22, 41.7 kB", "1:02, 3.1 MB", "0:22, 41.7 rows"),
        ("epoch   1/24  loss 1.6e-05", "epoch  16/16  loss 0.3", "epoch   1/24  kd 1.6"),
        (f"{'0a' * 32} is whole", f"{'f1' * 32} is whole", f"{'0a' * 32} is damaged"),
        (
            "1 student  caching pays: 2.0 times as fast",
            "1 student caching DOES NOT PAY: 2 times as long",
            "x",
        ),
    ],
)
def test_outputs_are_compared_by_their_words(printed: str, same: str, other: str):
    assert masked(printed) == masked(same) != masked(other)
