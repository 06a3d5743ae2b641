"""What all tests share."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

BESIDE = Path(__file__).resolve().parents[1].parent / "shared"
MEMORY = Path("/dev/shm")

# a first example may import torch, and test machines are busy
settings.register_profile("softcache", deadline=None)
settings.load_profile("softcache")


def has_room(memory: Path) -> bool:
    """Can the folders of all tests lie there, and commands be run in them?"""
    if not os.access(memory, os.W_OK):
        return False
    found = os.statvfs(memory)
    return found.f_bavail * found.f_frsize > 4 << 30 and not found.f_flag & os.ST_NOEXEC


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make their data themselves
if has_room(MEMORY):  # for tmp_path: a build's fsyncs to a disk take longer than the build, and prove no more
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (CIFAR-10, weights, logits), read in place."""
    data = Path(os.environ.get("SOFTCACHE_SHARED", BESIDE)) / "data"
    if not data.is_dir():
        pytest.skip(f"no real data at {data}; set SOFTCACHE_SHARED to the folder that holds data/")
    return data


# One small cache that holds every kind of target: 20 samples in blocks of 8, 8 and 4, two views; ``map`` has
# rows of 4096 bytes and is sharded, the rest is plain.
SMALL: dict[str, Any] = {
    "recipe": "random_resized_crop(8)|flip",
    "targets": {"logits": "full(u8)", "map": "int8", "vector": "f16"},
    "views": 2,
    "block_rows": 8,
    "batch": 4,
    "progress": False,
}


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 20 PNG files in four classes. Copy it before you change it."""
    from softcache.testing import make_image_folder

    return make_image_folder(tmp_path_factory.mktemp("images"), per_class=5)


@pytest.fixture(scope="session")
def small_path(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small cache. Copy it before you change it."""
    import softcache as sc
    from softcache.testing import toy_teacher

    path = tmp_path_factory.mktemp("small") / "cache"
    sc.build(path, source=small_folder, teacher=toy_teacher(), **SMALL)
    return path


@pytest.fixture
def small_cache(small_path: Path):
    """The small cache, freshly opened."""
    import softcache as sc

    return sc.open(small_path)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """moto's object store on 127.0.0.1."""
    import s3

    with s3.moto() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket; this process has what it needs to use it."""
    import s3

    s3.use(monkeypatch, endpoint)
    return s3.make_bucket(endpoint, f"bucket-{secrets.token_hex(6)}")


@pytest.fixture
def small_copy(small_path: Path, tmp_path: Path) -> Path:
    """A copy of the small cache, to be damaged."""
    return Path(shutil.copytree(small_path, tmp_path / "copy"))
