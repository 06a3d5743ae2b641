"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

BESIDE = Path(__file__).resolve().parents[1].parent / "shared"

# a first example may import torch, and test machines are busy
settings.register_profile("softcache", deadline=None)
settings.load_profile("softcache")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (CIFAR-10, weights, logits), read in place."""
    data = Path(os.environ.get("SOFTCACHE_SHARED", BESIDE)) / "data"
    if not data.is_dir():
        pytest.skip(f"no real data at {data}; set SOFTCACHE_SHARED to the folder that holds data/")
    return data
