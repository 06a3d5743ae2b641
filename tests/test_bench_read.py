"""The comparison of readers compares what it says, and every reader's rows with the truth before a clock runs."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import bench_read
from read_peers import CASES, REQUIREMENTS, timing
from read_peers.records import Sizes, make
from read_peers.worker import Bench

SIZES = Sizes(rows=3_000, maps=20, small=300)
HERE = [n for n in REQUIREMENTS if n == "softcache" or find_spec(bench_read.MODULES.get(n, n))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make(folder, SIZES)
    return folder


@pytest.mark.parametrize("reader", ["softcache", "memmap", "h5py"])
def test_every_way_gives_the_records_and_is_measured(reader: str, data: Path):
    bench = Bench(reader, str(data), rounds=2, seconds=0.001)
    bench.prepare()
    for found in (bench.warm(), bench.write()):
        assert {"rows", "maps"} <= set(found)
        for case in found.values():
            assert case["ways"]
            for way in case["ways"].values():
                assert len(way["rates"]) == len(way["memmap"]) == 2 and min(way["rates"] + way["memmap"]) > 0


def test_a_reader_that_gives_another_row_is_found_out(data: Path):
    path = data / "h5py" / "rows" / "records.h5"
    shutil.rmtree(data / "h5py", ignore_errors=True)
    bench = Bench("h5py", str(data), rounds=2, seconds=0.001)
    bench.prepare()
    (data / "h5py" / "rows.done").unlink()
    bench._write = lambda module, case: _write_wrong(path, bench)
    with pytest.raises(SystemExit, match="not what was written"):
        bench.prepare()
    shutil.rmtree(data / "h5py")


def _write_wrong(path: Path, bench: Bench) -> None:
    from read_peers import by_h5py

    arrays = {name: np.array(values) for name, values in bench.arrays(CASES["rows"]).items()}
    arrays["value"][:, -1] ^= 1
    by_h5py.write(arrays, path.parent, False)


def test_a_stream_that_repeats_or_leaves_out_a_row_is_found_out(data: Path):
    bench = Bench("memmap", str(data), rounds=2, seconds=0.001)
    truth = [bench.truth[name] for name in CASES["rows"].arrays]
    everything = [values[:] for values in truth]
    bench._check_stream("all", iter([everything]), truth)
    with pytest.raises(SystemExit, match="twice"):
        bench._check_stream("again", iter([everything, [values[:1] for values in truth]]), truth)
    with pytest.raises(SystemExit, match="did not come"):
        bench._check_stream("short", iter([[values[1:] for values in truth]]), truth)


def test_orders_hold_every_row_once_and_shuffle_as_far_as_they_say():
    case, disk = CASES["maps"], np.random.default_rng(0).permutation(1024)
    for order in ("sequential", "shuffled", "blocks"):
        rows = np.concatenate(timing.batches(order, 1024, case, disk))
        assert np.array_equal(np.sort(rows), np.arange(1024))
    assert np.array_equal(np.concatenate(timing.batches("sequential", 1024, case, disk)), disk)
    place = np.argsort(disk)
    windows = np.concatenate(timing.batches("blocks", 1024, case, disk)).reshape(-1, 4 * case.block)
    for window in windows:
        assert len(np.unique(place[window] // case.block)) == 4


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder that is not in memory, as the tests' own may be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_what_is_put_out_of_memory_is_out(on_disk: Path):
    path = on_disk / "file"
    path.write_bytes(bytes(1 << 20))
    assert timing.put_out([path]) < 0.02
    with path.open("rb") as file:
        file.read()


def test_a_ratio_is_to_memmap_before_where_the_reader_slows_it():
    way: dict[str, Any] = {"rates": [10.0, 12.0, 14.0], "memmap": [100.0, 100.0, 100.0]}
    assert bench_read.ratio(way, [105.0, 100.0, 95.0]) == (0.12, False)
    assert bench_read.ratio(way, [1000.0, 1000.0, 1000.0]) == (0.012, True)


@pytest.mark.slow
def test_the_whole_command_with_the_readers_that_are_here(on_disk: Path, capsys):
    plan = bench_read.Plan("tiny", SIZES, rounds=2, seconds=0.001)
    found = bench_read.measured(plan, on_disk, HERE, here=True)
    assert set(found) == set(HERE)
    assert not [(r, s) for r, stages in found.items() for s, one in stages.items() if "failed" in one]
    bench_read.tables(found, plan.stages)
    said = capsys.readouterr().out
    assert all(reader in said for reader in HERE) and "cold page cache" in said
    bench_read.records(plan, on_disk)  # makes nothing again
    assert (on_disk / "tiny" / "softcache" / "rows.done").exists()
