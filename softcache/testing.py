"""For tests, ours and yours: disks that fail, a toy dataset and teacher, and ways to damage a cache.

The toy teacher needs numpy alone, so that a build process starts fast enough to be killed a thousand times.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softcache.store import Disk
from softcache.targets import Layout

# -- disks -------------------------------------------------------------------------------------------------


class CountingDisk(Disk):
    """Calls :meth:`before` in front of every operation, which may raise; counts the operations."""

    def __init__(self) -> None:
        self.operations = 0
        self._lock = threading.Lock()

    def before(self, operation: str, path: Path, size: int) -> None:
        with self._lock:
            self.operations += 1

    def make_folder(self, path: Path) -> None:
        self.before("make_folder", path, 0)
        super().make_folder(path)

    def write(self, fd: int, path: Path, data: bytes | memoryview) -> None:
        self.before("write", path, len(data))
        super().write(fd, path, data)

    def sync_file(self, fd: int, path: Path) -> None:
        self.before("sync_file", path, 0)
        super().sync_file(fd, path)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target, 0)
        super().rename(source, target)

    def sync_folder(self, path: Path) -> None:
        self.before("sync_folder", path, 0)
        super().sync_folder(path)


class FailingDisk(CountingDisk):
    """The operation number ``at`` (from 1) fails with ``EIO``; the others succeed."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def before(self, operation: str, path: Path, size: int) -> None:
        super().before(operation, path, size)
        if self.operations == self.at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


class FullDisk(CountingDisk):
    """Holds ``capacity`` bytes: the write that goes past it stores its first half and fails with ``ENOSPC``."""

    def __init__(self, capacity: int):
        super().__init__()
        self.left = capacity

    def write(self, fd: int, path: Path, data: bytes | memoryview) -> None:
        if len(data) > self.left:
            super().write(fd, path, memoryview(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.left -= len(data)
        super().write(fd, path, data)


class PowerLoss(BaseException):
    """The machine went off in the middle of an operation."""


@dataclass(eq=False)
class _Inode:
    """A file or (``written is None``) a folder; ``durable`` is what a power loss leaves of its content."""

    written: bytes | None
    durable: bytes = b""


class ForgetfulDisk(CountingDisk):
    """A disk that keeps only what was fsynced.

    Operation number ``at`` and all later ones raise :class:`PowerLoss`. :meth:`power_loss` then rewrites the real
    folder to what is left, in one of the two ways a file system may have worked: names reach the disk as soon as they
    are changed (``eager``), or only when their folder is synced. Content that was not synced is lost in both.
    """

    def __init__(self, root: Path, at: int | None = None):
        super().__init__()
        self.root, self.at = root, at
        self._now: dict[Path, _Inode] = {}
        for path in sorted(root.rglob("*")) if root.exists() else ():
            data = None if path.is_dir() else path.read_bytes()
            self._now[path] = _Inode(data, data or b"")
        if root.exists():
            self._now[root] = _Inode(None)
        self._synced = dict(self._now)

    def before(self, operation: str, path: Path, size: int) -> None:
        super().before(operation, path, size)
        if self.at is not None and self.operations >= self.at:
            raise PowerLoss

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self._now[path] = _Inode(None)

    def write(self, fd: int, path: Path, data: bytes | memoryview) -> None:
        super().write(fd, path, data)
        self._now.setdefault(path, _Inode(b"")).written = path.read_bytes()  # it may come in parts

    def sync_file(self, fd: int, path: Path) -> None:
        super().sync_file(fd, path)
        self.keep_file(path)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.keep_folder(path)

    def keep_file(self, path: Path) -> None:
        """What fsync of a file does; a test that takes it out must see data lost."""
        inode = self._now[path]
        inode.durable = inode.written or b""

    def keep_folder(self, path: Path) -> None:
        """What fsync of a folder does; likewise."""
        self._synced = {p: i for p, i in self._synced.items() if p.parent != path}
        self._synced |= {p: i for p, i in self._now.items() if p.parent == path}

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._now[target] = self._now.pop(source)

    def power_loss(self, eager: bool) -> None:
        """Leave in the real folder what the disk holds after the power came back."""
        entries = self._now if eager else self._synced
        shutil.rmtree(self.root, ignore_errors=True)
        for path, inode in sorted(entries.items()):
            if path == self.root or path.parent.is_dir():  # a file in a lost folder is lost
                if inode.written is None:
                    path.mkdir(exist_ok=True)
                else:
                    path.write_bytes(inode.durable)


# -- a toy dataset and teacher -----------------------------------------------------------------------------


class ToyImages:
    """A map-style dataset: ``n`` random images of varying size, with labels of four classes."""

    classes = ("ant", "bee", "cow", "dog")

    def __init__(self, n: int, seed: int = 0):
        self.targets = [i % len(self.classes) for i in range(n)]
        self._seed = seed

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng((self._seed, i))
        height, width = rng.integers(10, 20, 2)
        return rng.integers(0, 256, (height, width, 3), np.uint8), self.targets[i]


def make_image_folder(path: Path, per_class: int = 6, seed: int = 0) -> Path:
    """The images of :class:`ToyImages` as PNG files in class folders."""
    from PIL import Image

    images = ToyImages(per_class * len(ToyImages.classes), seed)
    for i in range(len(images)):
        image, label = images[i]
        folder = path / images.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return path


class ToyTeacher:
    """Exact arithmetic on pixels: ``logits`` (4), ``map`` (16, 16, 16) and ``vector`` (24), the same on every machine.

    Each call appends a line to the file that the environment variable ``SOFTCACHE_TOY_LOG`` names: a digest of every
    row of pixels. ``SOFTCACHE_TOY_DELAY`` makes a call take that many seconds.
    """

    input_spec = {"size": (8, 8)}  # noqa: RUF012 - what a user's teacher carries
    weights_digest = hashlib.sha256(b"toy").hexdigest()

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        if log := os.environ.get("SOFTCACHE_TOY_LOG"):
            line = " ".join(row_digest(row) for row in pixels) + "\n"
            fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, line.encode())
            os.close(fd)
        time.sleep(float(os.environ.get("SOFTCACHE_TOY_DELAY", 0)))
        rows = pixels.reshape(len(pixels), -1).astype(np.int64)
        logits = np.stack([(rows * (k + 1) % 251).sum(axis=1) % 509 for k in range(4)], axis=1)
        tiled = np.tile(rows, -(-4096 // rows.shape[1]))[:, :4096]
        return {
            "logits": (logits / 32 - 8).astype(np.float32),
            "map": (tiled.reshape(-1, 16, 16, 16) % 97 / 8).astype(np.float32),
            "vector": (rows[:, :24] / 16).astype(np.float32),
        }


def row_digest(pixels: np.ndarray) -> str:
    """16 hex digits for one row's pixels."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8).hexdigest()


def toy_teacher() -> ToyTeacher:
    """The factory: ``--teacher softcache.testing:toy_teacher``."""
    return ToyTeacher()


class ToyDetector:
    """As exact: ``detections`` of 21 anchors, ``queries`` of two layers of five, the map ``p3`` (6, 5, 7), and constants.

    ``SOFTCACHE_TOY_DELAY`` as for :class:`ToyTeacher`.
    """

    input_spec = {"size": (16, 16)}  # noqa: RUF012
    classes = ToyImages.classes
    weights_digest = hashlib.sha256(b"toy detector").hexdigest()
    layouts = {  # noqa: RUF012
        "detections": Layout(
            {"logits": 4, "boxes": 4, "distribution": 16}, levels=((4, 4), (2, 2), (1, 1)), head="toy"
        ),
        "queries": Layout(
            {"embedding": 8, "logits": 5, "boxes": 4, "reference": 4}, "softmax", background=4, layers=2
        ),
    }

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(float(os.environ.get("SOFTCACHE_TOY_DELAY", 0)))
        rows = pixels.reshape(len(pixels), -1).astype(np.int64)
        seen = rows.cumsum(axis=1) + np.arange(rows.shape[1]) * 7

        def numbers(prime: int, *shape: int) -> np.ndarray:
            return np.resize(seen.T, (math.prod(shape), len(rows))).T.reshape(-1, *shape) * prime % 1009

        def answer(items: int, layout: Layout) -> np.ndarray:
            parts = {}
            for prime, (name, columns) in zip((3, 5, 11, 13), layout.columns.items(), strict=False):
                values = numbers(prime, items, columns) / 61 - 12
                if name in ("boxes", "reference"):
                    values = np.sort(values.reshape(-1, items, 2, 2) / 15 + 0.5, axis=2).reshape(-1, items, 4)
                parts[name] = values.astype(np.float32)
            return np.concatenate(list(parts.values()), axis=2)

        return {
            "detections": answer(21, self.layouts["detections"]),
            "queries": answer(10, self.layouts["queries"]),
            "p3": (numbers(17, 6, 5, 7) / 256 - 2).astype(np.float32),
        }

    def constants(self) -> dict[str, np.ndarray]:
        return {
            "query_embed": np.arange(40, dtype=np.float32).reshape(5, 8),
            "head": np.arange(9, dtype=np.uint8),
        }


def toy_detector() -> ToyDetector:
    """The factory: ``--teacher softcache.testing:toy_detector``."""
    return ToyDetector()


# -- damage ------------------------------------------------------------------------------------------------


def flip_bit(path: Path, bit: int = 0) -> None:
    """Flip one bit, counted from the start of the file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    """Append a zero byte."""
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    """Leave nothing in the file."""
    path.write_bytes(b"")


def zero(path: Path) -> None:
    """Zeros of the same length: what some file systems leave after a crash."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path) -> None:
    """Delete the file."""
    path.unlink()


def replace_by_link(path: Path) -> None:
    """Move the file aside and put a symbolic link to it in its place."""
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    path.symlink_to(aside)


DAMAGES: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (flip_bit, truncate, lengthen, empty, zero, remove, replace_by_link)
}
