"""A small cache and the images it was built from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys

from softcache.cache import Cache
from softcache.source import Source


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An ImageFolder: 120 images in ``train``, 60 others of the same ids in ``test``."""
    root = tmp_path_factory.mktemp("images")
    toys.write_imagefolder(root, "train", 30, seed=0)
    return toys.write_imagefolder(root, "test", 15, seed=10_000)


@pytest.fixture(scope="session")
def source(images) -> Source:
    return Source(images, split="train")


@pytest.fixture(scope="session")
def cache(images, tmp_path_factory) -> Cache:
    """Three views of all 120 images."""
    return toys.build(tmp_path_factory.mktemp("cache") / "toy", Source(images, split="train"))
