"""The write rate is that of a disk whose cache is full, and nothing is left of the measuring."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softcache import drive
from softcache.errors import StoreError
from softcache.store import Disk
from softcache.testing import FullDisk

MB = 1_000_000


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Throttled(Disk):
    """Takes ``cache`` bytes at ``fast`` a second and all others at ``slow``; every fsync costs ``sync`` seconds. Nothing
    is written."""

    def __init__(self, clock: Clock, cache: float, fast: float, slow: float, sync: float = 0.001):
        self.clock, self.cache, self.fast, self.slow, self.sync = clock, cache, fast, slow, sync
        self.written, self.names = 0, set[str]()

    def write(self, fd: int, path: Path, data: bytes | memoryview) -> None:
        quick = max(0.0, min(len(data), self.cache - self.written))
        self.clock.now += quick / self.fast + (len(data) - quick) / self.slow
        self.written += len(data)
        self.names |= {file.name for file in path.iterdir()}

    def sync_file(self, fd: int, path: Path) -> None:
        self.clock.now += self.sync


@pytest.mark.parametrize("cache", [0, 30 * MB, 300 * MB, 1500 * MB])
def test_the_rate_is_the_slow_one(tmp_path: Path, cache: int):
    clock = Clock()
    disk = Throttled(clock, cache, fast=2000 * MB, slow=100 * MB)
    found = drive.sustained(tmp_path, 10**12, disk, clock=clock)
    assert found.bytes_per_second == pytest.approx(100 * MB, rel=0.05)
    assert found.sync_seconds == pytest.approx(0.001, rel=0.1)
    assert found.settled is (cache > 0)  # without a drop nobody knows what comes
    assert found.written < cache + 1100 * MB and found.seconds < drive.MOST_SECONDS + 0.2
    if cache >= 300 * MB:
        assert found.first_bytes_per_second > 1000 * MB
        assert found.seconds < 5  # it stops once the rate has settled
    assert disk.names == set() and not list(tmp_path.iterdir())
    assert found.writing(1000 * MB, 500) == pytest.approx(10 + 1, rel=0.1)


def test_no_more_is_written_than_the_cache_will_have(tmp_path: Path):
    clock = Clock()
    disk = Throttled(clock, 300 * MB, fast=2000 * MB, slow=100 * MB)
    found = drive.sustained(tmp_path, 50 * MB, disk, clock=clock)
    assert found.written == 50 * MB and disk.written < 51 * MB
    assert found.bytes_per_second > 1500 * MB and found.settled  # its cache takes all of it
    few = drive.sustained(tmp_path, 0, Throttled(clock, 0, MB, MB), clock=clock)
    assert few.bytes_per_second > 0


def test_the_bounds_hold(tmp_path: Path):
    clock = Clock()
    disk = Throttled(clock, 10**12, fast=2000 * MB, slow=MB)
    found = drive.sustained(tmp_path, 10**12, disk, most_bytes=64 << 20, clock=clock)
    assert found.written == 64 << 20 and not found.settled
    slow = Throttled(clock, 0, fast=MB, slow=MB)
    found = drive.sustained(tmp_path, 10**12, slow, most_seconds=3, clock=clock)
    assert found.seconds < 3 + drive._PIECE / MB + 0.1
    assert found.bytes_per_second == pytest.approx(MB, rel=0.01)


def test_a_little_of_what_is_free_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.statvfs(tmp_path)
    values = list(real)
    values[1], values[4] = 4096, (40 * MB) // 4096  # f_frsize, f_bavail
    monkeypatch.setattr(drive.os, "fstatvfs", lambda fd: os.statvfs_result(values))
    clock = Clock()
    found = drive.sustained(tmp_path, 10**12, Throttled(clock, 0, MB, MB), most_seconds=1000, clock=clock)
    assert 9 * MB < found.written <= 10 * MB


def test_a_disk_that_fills_tells_what_was_measured_until_then(tmp_path: Path):
    found = drive.sustained(tmp_path, 10**12, FullDisk(40 * MB), most_bytes=100 * MB)
    assert 30 * MB < found.written <= 40 * MB and not found.settled
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match=r"cannot write to .*No space left"):
        drive.sustained(tmp_path, 10**12, FullDisk(100))
    assert not list(tmp_path.iterdir())


class Broken(Disk):
    def __init__(self, what: BaseException):
        self.what = what

    def sync_file(self, fd: int, path: Path) -> None:
        raise self.what


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), MemoryError()])
def test_nothing_is_left_whatever_happens(tmp_path: Path, what: BaseException):
    files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError if isinstance(what, OSError) else type(what)):
        drive.sustained(tmp_path, 10**12, Broken(what))
    assert not list(tmp_path.iterdir()) and len(list(Path("/proc/self/fd").iterdir())) == files


def test_a_folder_that_takes_nothing_is_told(tmp_path: Path):
    with pytest.raises(StoreError, match="cannot write to"):
        drive.sustained(tmp_path / "nowhere", 10)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_it_leaves_nothing_and_the_space_is_free_again(tmp_path: Path, how: signal.Signals):
    root = str(Path(drive.__file__).parents[1])
    code = (
        "import sys, time; from pathlib import Path; from softcache import drive\n"
        "from softcache.store import Disk\n"
        "class Slow(Disk):\n"
        "    def write(self, fd, path, data):\n"
        "        super().write(fd, path, data); time.sleep(0.05); print('written', flush=True)\n"
        "drive.sustained(Path(sys.argv[1]), 10**10, Slow(), most_bytes=200_000_000, most_seconds=60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root},
        text=True,
    )
    assert process.stdout is not None
    for _ in range(10):
        assert process.stdout.readline() == "written\n"
    assert not list(tmp_path.iterdir())
    process.send_signal(how)
    process.wait(timeout=30)
    assert not list(tmp_path.iterdir())


def test_a_real_disk(tmp_path: Path):
    start = time.monotonic()
    found = drive.sustained(tmp_path, 24 * MB)
    assert found.written == 24 * MB and found.settled and found.bytes_per_second > MB
    assert 0 < found.sync_seconds < 1 and found.seconds <= time.monotonic() - start
