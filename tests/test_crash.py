"""Promises 1 and 4: whatever happens to a build, running it again ends with the same bytes, and redoes nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import softcache as sc
from softcache import testing
from softcache.errors import DamageError, NotBuilt, SoftcacheError, StoreError
from softcache.store import Data, Disk, Store

SMALL = {
    "teacher": testing.toy_teacher(),
    "recipe": "random_resized_crop(8)|flip",
    "targets": ["logits=full(u8)", "map=int8"],
    "block_rows": 8,
    "progress": False,
}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs of a real disk take minutes and prove no more."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="softcache-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def images() -> sc.Source:
    return sc.Source(testing.ToyImages(12))


@pytest.fixture(scope="module")
def reference(images: sc.Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The manifest of an undisturbed build, and how many disk operations it takes."""
    disk = testing.CountingDisk()
    root = tmp_path_factory.mktemp("reference") / "cache"
    sc.build(Store(root, disk), source=images, **SMALL)
    return (root / "softcache.json").read_bytes(), disk.operations


def assert_resumes_to(manifest: bytes, root: Path, images: sc.Source) -> None:
    """Build again on a sound disk: nothing committed is redone, and every byte is right."""
    before = committed(root)
    cache = sc.build(root, source=images, **SMALL)
    assert (root / "softcache.json").read_bytes() == manifest
    assert sc.verify(cache, read_data=True) == []
    assert before == {name: inode for name, inode in committed(root).items() if name in before}
    assert not list(root.rglob("*.tmp"))


def committed(root: Path) -> dict[str, int]:
    """The inodes of the files of every block that has a receipt."""
    found = {}
    for receipt in root.glob("receipts/v*-b*.json"):
        view, block = (int(part[1:]) for part in receipt.stem.split("-"))
        for path in [receipt, *root.glob(f"[tv]*/**/c.{view}.{block}.*")]:
            found[str(path.relative_to(root))] = path.stat().st_ino
    return found


# -- failing disks -------------------------------------------------------------------------------------------


def test_an_error_at_every_operation_is_survived(images, reference, tmp_path):
    manifest, operations = reference
    assert operations > 100
    for at in range(1, operations + 1):
        root = tmp_path / "cache"
        with pytest.raises(StoreError, match=r"run the same command again"):
            sc.build(Store(root, testing.FailingDisk(at)), source=images, **SMALL)
        assert_resumes_to(manifest, root, images)
        shutil.rmtree(root)


def test_a_disk_that_fills_up_at_any_size_is_survived(images, reference, tmp_path):
    manifest, _ = reference
    full = 0
    for capacity in range(0, 60_000, 1_501):
        root = tmp_path / "cache"
        try:
            sc.build(Store(root, testing.FullDisk(capacity)), source=images, **SMALL)
        except StoreError as e:
            assert "the disk is full" in str(e)
            full += 1
        assert_resumes_to(manifest, root, images)
        shutil.rmtree(root)
    assert full > 10


def test_a_truly_full_disk_gives_one_line_and_loses_nothing(images, reference, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs privileges this run does not have")
    try:
        with pytest.raises(StoreError, match="the disk is full"):
            sc.build(mount / "cache", source=images, **SMALL)
        subprocess.run(["mount", "-o", "remount,size=4m", str(mount)], check=True)
        assert_resumes_to(reference[0], mount / "cache", images)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


class Noting(Store):
    """Notes what was put when :meth:`put` returned: from then on it must survive."""

    def __init__(self, root: Path, disk: Disk):
        super().__init__(root, disk)
        self.kept: dict[str, bytes] = {}

    def put(self, name: str, data: Data) -> None:
        super().put(name, data)
        self.kept[name] = self.path(name).read_bytes()


def lose_power_everywhere(disk_type, images, reference, tmp_path, step=1) -> None:
    """Power loss at every operation and after the last, for file systems that keep names early and late."""
    manifest, operations = reference
    for at in [*range(1, operations + 1, step), operations + 1]:
        for eager in (True, False):
            root = tmp_path / "cache"
            disk = disk_type(root, at)
            store = Noting(root, disk)
            if at > operations:
                sc.build(store, source=images, **SMALL)
            else:
                with pytest.raises(testing.PowerLoss):
                    sc.build(store, source=images, **SMALL)
            disk.power_loss(eager)
            for name, data in store.kept.items():
                assert (root / name).is_file(), f"{name} was put, and is lost"
                assert (root / name).read_bytes() == data
            assert_resumes_to(manifest, root, images)
            shutil.rmtree(root)


def test_power_loss_at_every_operation_is_survived(images, reference, tmp_path):
    lose_power_everywhere(testing.ForgetfulDisk, images, reference, tmp_path)


class WithoutFileSync(testing.ForgetfulDisk):
    def keep_file(self, path: Path) -> None:
        pass


class WithoutFolderSync(testing.ForgetfulDisk):
    def keep_folder(self, path: Path) -> None:
        pass


class WithoutShardFolderSync(testing.ForgetfulDisk):
    def keep_folder(self, path: Path) -> None:
        if path == self.root or self.root not in path.parents or path.name == "receipts":
            super().keep_folder(path)  # all but the folders of shards and constants


class WithoutSyncOfTheCommit(testing.ForgetfulDisk):
    def keep_folder(self, path: Path) -> None:
        if path != self.root or not (self.root / "softcache.json").exists():
            super().keep_folder(path)


MUTANTS = [WithoutFileSync, WithoutFolderSync, WithoutShardFolderSync, WithoutSyncOfTheCommit]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_an_fsync_the_power_loss_test_fails(mutant, images, reference, tmp_path):
    with pytest.raises((AssertionError, SoftcacheError)):
        lose_power_everywhere(mutant, images, reference, tmp_path, step=3)


def test_the_receipt_comes_after_its_shards_and_the_manifest_last(images, tmp_path):
    store = Noting(tmp_path / "cache", Disk())
    sc.build(store, source=images, **SMALL)
    order = list(store.kept)
    ranks = [order.index(n) for n in ("ids/bytes/c.0", "receipts/identity.json", "view/geometry/c.0.0.0")]
    ranks += [order.index(n) for n in ("receipts/v0000-b000000.json", "canary/pixels/c.0.0.0.0", "files.bin")]
    ranks += [order.index(n) for n in ("softcache.json", "zarr.json")]
    assert ranks == sorted(ranks)


def test_a_flipped_bit_in_a_receipt_of_an_unfinished_build_is_found(images, tmp_path):
    root = tmp_path / "cache"
    sc.build(root, source=images, **SMALL)
    (root / "softcache.json").unlink()
    receipt = root / "receipts" / "v0000-b000000.json"
    receipt.write_bytes(receipt.read_bytes().replace(b'"correct":', b'"correct":1', 1))
    with pytest.raises(DamageError, match=r"v0000-b000000\.json.*delete it and build again"):
        sc.build(root, source=images, **SMALL)


def test_a_shard_lost_from_an_unfinished_build_is_not_sealed_in(images, tmp_path):
    root = tmp_path / "cache"
    sc.build(root, source=images, **SMALL)
    manifest = (root / "softcache.json").read_bytes()
    (root / "softcache.json").unlink()
    (root / "targets" / "map" / "value" / "c.0.1.0.0.0").unlink()
    with pytest.raises(DamageError, match=r"c\.0\.1\.0\.0\.0 is missing.*delete.*v0000-b000001\.json"):
        sc.build(root, source=images, **SMALL)
    (root / "receipts" / "v0000-b000001.json").unlink()
    assert_resumes_to(manifest, root, images)


@pytest.mark.parametrize("damage", [testing.remove, testing.truncate, testing.empty])
@pytest.mark.parametrize("name", ["targets/map/value/c.0.1.0.0.0", "view/geometry/c.0.0.0", "files.bin", "ids/bytes/c.0",
                                  "canary/pixels/c.0.0.0.0", "receipts/v0000-b000001.json", "zarr.json"])  # fmt: skip
def test_building_again_mends_what_is_missing_or_cut(images, reference, tmp_path, name, damage):
    root = tmp_path / "cache"
    sc.build(root, source=images, **SMALL)
    damage(root / name)
    assert sc.verify(root)
    cache = sc.build(root, source=images, **SMALL)
    assert (root / "softcache.json").read_bytes() == reference[0]
    assert sc.verify(cache, read_data=True) == []
    assert cache.teacher_rows <= SMALL["block_rows"]


@pytest.mark.parametrize("place", [".claims", "ids", "targets", "receipts"])
def test_a_link_in_the_folder_leads_nowhere(images, tmp_path, place):
    root, victim = tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    sc.build(root, source=images, **SMALL)
    (root / "softcache.json").unlink()
    shutil.rmtree(root / place, ignore_errors=True)
    (root / place).symlink_to(victim)
    with pytest.raises(SoftcacheError):
        sc.build(root, source=images, **SMALL)
    assert [p.name for p in victim.iterdir()] == ["thesis.txt"]


def test_a_pipe_or_a_hard_link_at_a_temporary_name_is_not_written_into(images, tmp_path):
    root, outside = tmp_path / "cache", tmp_path / "outside"
    sc.build(root, source=images, **SMALL)
    manifest = (root / "softcache.json").read_bytes()
    outside.write_text("somebody else's")
    for name in ("softcache.json", "receipts/v0000-b000001.json"):
        (root / name).unlink()
    os.mkfifo(root / "softcache.json.tmp")
    os.link(outside, root / "receipts" / "v0000-b000001.json.tmp")
    assert_resumes_to(manifest, root, images)
    assert outside.read_text() == "somebody else's"


# -- kill -9 of real processes ---------------------------------------------------------------------------------


@dataclass
class Build:
    """A build command over a folder of real PNG files, with the numpy teacher, and its undisturbed outcome."""

    command: list[str]
    manifest: bytes
    rows: dict[str, str]  # digest of a row's pixels → the receipt of its block
    seconds: float

    def start(self, root: Path, log: Path, delay: float = 0.0) -> subprocess.Popen[bytes]:
        env = os.environ | {"SOFTCACHE_TOY_LOG": str(log), "SOFTCACHE_TOY_DELAY": str(delay)}
        return subprocess.Popen([*self.command, "-o", str(root)], env=env, stderr=subprocess.PIPE)

    def logged(self, log: Path) -> list[str]:
        """The receipts of the rows the teacher was asked for (the probe's and padding's black rows left out)."""
        words = log.read_text().split() if log.exists() else []
        return [self.rows[w] for w in words if w in self.rows]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Build:
    base = tmp_path_factory.mktemp("toy")
    source = testing.make_image_folder(base / "images", per_class=16)
    command = [sys.executable, "-m", "softcache.cli", "build", "--source", str(source)]
    command += [
        "--teacher",
        "softcache.testing:toy_teacher",
        "--recipe",
        "random_resized_crop(8, scale=(0.08, 0.4))|flip",  # smaller than what the map's probe shows
        "--views",
        "3",
    ]
    command += ["--target", "logits=full(u8)", "--target", "map=int8", "--block-rows", "8"]
    build = Build(command, b"", {}, 0.0)
    start = time.monotonic()
    assert build.start(base / "cache", base / "log", delay=0.01).wait() == 0
    build.seconds = time.monotonic() - start
    build.manifest = (base / "cache" / "softcache.json").read_bytes()
    build.rows = rows_of(sc.open(base / "cache"), sc.Source(source))
    assert len(build.logged(base / "log")) == 64 * 3, "a row must be known by its pixels"
    return build


def rows_of(cache: sc.Cache, source: sc.Source) -> dict[str, str]:
    found = {}
    for block in cache.grid.blocks():
        for sample in cache.grid.samples_of(block):
            view = cache.read_views(block.view, np.array([sample]))[0]
            found[testing.row_digest(sc.render(source.image(int(sample)), view, (8, 8)))] = block.name
    return found


def wait_for_receipts(root: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and len(list(root.glob("receipts/v*.json"))) < count:
        time.sleep(0.0005)


def kill_until_done(toy: Build, tmp_path: Path, kills: int, rng: random.Random) -> int:
    """Kill build after build of one cache, at the n-th receipt or at any moment, until it is done."""
    root, done = tmp_path / "cache", 0
    while done < kills:
        shutil.rmtree(root, ignore_errors=True)
        finished = False
        while not finished:
            before = committed(root)
            log = tmp_path / f"log-{time.monotonic_ns()}"
            process = toy.start(root, log, delay=0.01)
            if done >= kills:
                assert process.wait() == 0, process.stderr.read().decode()
            elif rng.random() < 0.5:
                wait_for_receipts(root, len(list(root.glob("receipts/v*.json"))) + rng.randint(1, 4), process)
            else:
                time.sleep(rng.uniform(0, 1.1 * toy.seconds))
            finished = process.poll() == 0
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += not finished
            held = {
                name.removeprefix("receipts/").removesuffix(".json") for name in before if "receipts" in name
            }
            again = held & set(toy.logged(log))
            assert not again, f"committed blocks went through the teacher again: {again}"
            now = committed(root)
            assert all(now[name] == inode for name, inode in before.items()), (
                "a committed file was written again"
            )
        assert (root / "softcache.json").read_bytes() == toy.manifest
        assert sc.verify(root, read_data=True) == []
    return done


def test_twenty_five_kills(toy: Build, tmp_path: Path):
    assert kill_until_done(toy, tmp_path, 25, random.Random(0)) >= 25


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_hundred_kills(toy: Build, tmp_path: Path):
    assert kill_until_done(toy, tmp_path, 500, random.Random(1)) >= 500


def test_ctrl_c_is_clean_and_resumes(toy: Build, tmp_path: Path):
    root = tmp_path / "cache"
    process = toy.start(root, tmp_path / "log", delay=0.02)
    wait_for_receipts(root, 3, process)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in message.decode() and "Traceback" not in message.decode()
    assert toy.start(root, tmp_path / "log").wait() == 0
    assert (root / "softcache.json").read_bytes() == toy.manifest


def test_builders_started_at_one_moment_all_succeed(toy: Build, tmp_path: Path):
    for _ in range(4):
        root = tmp_path / "cache"
        processes = [toy.start(root, tmp_path / "log") for _ in range(4)]
        for process in processes:
            _, message = process.communicate()
            assert process.returncode == 0, message.decode()
        assert (root / "softcache.json").read_bytes() == toy.manifest
        assert sc.verify(root, read_data=True) == []
        shutil.rmtree(root)


@pytest.mark.parametrize("builders", [2, 4])
def test_several_builders_one_killed(builders: int, toy: Build, tmp_path: Path):
    root = tmp_path / "cache"
    processes = [toy.start(root, tmp_path / f"log-{i}", delay=0.02) for i in range(builders)]
    wait_for_receipts(root, 5, processes[0])
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    for process in processes[1:]:
        assert process.wait() == 0, process.stderr.read().decode()
    assert (root / "softcache.json").read_bytes() == toy.manifest
    assert sc.verify(root, read_data=True) == []
    logged = [name for i in range(1, builders) for name in toy.logged(tmp_path / f"log-{i}")]
    assert len(logged) == len(set(logged)) * 8, "two living builders computed the same block"


def test_ranks_share_the_blocks(toy: Build, tmp_path: Path):
    root = tmp_path / "cache"
    for rank in range(2):
        toy.command += ["--rank", str(rank), "--world", "2"]
        process = toy.start(root, tmp_path / f"log-{rank}", delay=0.02)
        del toy.command[-4:]
        if rank == 0:
            first = process
    assert first.wait() == 0 and process.wait() == 0
    assert (root / "softcache.json").read_bytes() == toy.manifest
    shares = [len(set(toy.logged(tmp_path / f"log-{rank}"))) for rank in range(2)]
    assert sum(shares) == 24 and min(shares) > 4


def test_readers_during_a_build_see_whole_shards_or_not_built(toy: Build, tmp_path: Path):
    root = tmp_path / "cache"
    process = toy.start(root, tmp_path / "log", delay=0.01)
    whole = torn = 0
    seen = {}
    while process.poll() is None:
        try:
            cache = sc.open(root)
            for id in cache.ids[::8]:
                for view in range(3):
                    try:
                        row = cache[id, view]
                        seen[id, view] = (row["logits"].values, row["map"].values)
                        whole += 1
                    except NotBuilt:
                        torn += 1
        except SoftcacheError as e:
            assert "is no cache" in str(e) or isinstance(e, NotBuilt), e
    assert whole and torn
    cache = sc.open(root)
    for (id, view), (logits, map_) in seen.items():
        assert (cache[id, view]["logits"].values == logits).all()
        assert (cache[id, view]["map"].values == map_).all()


def test_a_build_without_torch_starts_fast_enough_and_never_imports_it(toy: Build, tmp_path: Path):
    code = "import sys; from softcache.cli import main; rc = main(sys.argv[1:]); print('torch' in sys.modules, rc)"
    command = [sys.executable, "-c", code, *toy.command[3:], "-o", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]


@pytest.mark.slow
def test_three_kills_with_a_real_network(shared_data: Path, tmp_path: Path):
    command = [sys.executable, "-m", "softcache.cli", "build", "--source", str(shared_data / "cifar10")]
    command += ["--split", "test", "--limit", "192", "--recipe", "crop(32, pad=4)|flip", "--views", "2"]
    command += ["--teacher", "softcache_train.students:resnet56", "--block-rows", "32"]
    command += ["--weights", str(shared_data / "weights" / "cifar10_resnet56.safetensors")]
    command += ["--target", "logits=full(f16)", "--target", "layer3=int8"]
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    root = tmp_path / "killed"
    for receipts in (2, 5, 9):
        before = committed(root)
        process = subprocess.Popen([*command, "-o", str(root)], stderr=subprocess.DEVNULL)
        wait_for_receipts(root, receipts, process)
        process.kill()
        process.wait()
        assert len(list(root.glob("receipts/v*.json"))) < 12
        assert all(committed(root)[name] == inode for name, inode in before.items())
    done = subprocess.run([*command, "-o", str(root)], check=True, capture_output=True, text=True)
    assert "of 12 blocks are committed" in done.stderr
    assert (root / "softcache.json").read_bytes() == (tmp_path / "whole" / "softcache.json").read_bytes()
    assert sc.verify(root, read_data=True) == []
