"""A student learns from ``anchored`` as from any other logits: from a Loader, a DataLoader, and tars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import softcache_train as st
import torch

import softcache as sc
from softcache.exchange import webdataset
from softcache.testing import make_image_folder, toy_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[sc.Cache, Path]:
    base = tmp_path_factory.mktemp("anchored")
    source = make_image_folder(base / "images", per_class=5)
    cache = sc.build(
        base / "cache", source=source, teacher=toy_teacher(), recipe="random_resized_crop(8)|flip", views=3, batch=4,
        targets={"logits": "anchored(1, extra=1, views=2)"}, block_rows=8, progress=False,
    )  # fmt: skip
    return cache, source


def expected(cache: sc.Cache, view: int, samples: np.ndarray, z: torch.Tensor, T: float) -> float:  # noqa: N803
    p = cache.read(view, samples, "logits")["logits"].log_probs(T)
    q = torch.log_softmax(z.double() / T, 1).numpy()
    return float(T**2 * (np.exp(p) * (p - q)).sum(axis=1).mean())


def test_a_loader_has_the_caches_own_values(made):
    cache, source = made
    loader = st.Loader(cache, sc.Source(source), global_batch=4, seed=0)
    for _ in range(3):
        for batch in loader:
            z = torch.randn(4, 4)
            loss = st.kd(z, batch["logits"].to("cpu"), T=3.0)
            assert loss.item() == pytest.approx(expected(cache, batch.view, batch.index, z, 3.0), rel=1e-4)


def test_a_data_loader_stacks_it(made):
    cache, source = made
    dataset = sc.with_targets(sc.Source(source), cache)
    dataset.set_epoch(2)
    z, samples = torch.randn(5, 4), [3, 0, 11, 7, 19]
    batch = torch.utils.data.default_collate([dataset[i] for i in samples])
    loss = st.kd(z, batch["logits"], T=2.0)
    view = int(batch["view"][0])
    assert loss.item() == pytest.approx(expected(cache, view, np.array(samples), z, 2.0), rel=1e-4)


def test_tars_are_read_with_the_bases_beside_them(made, tmp_path: Path):
    cache, source = made
    webdataset.export(cache, tmp_path / "tars", source=sc.Source(source), embed="views")
    seen = 0
    for batch in st.TarLoader(tmp_path / "tars", global_batch=4, seed=0, window=8):
        z = torch.randn(4, 4)
        loss = st.kd(z, batch["logits"], T=3.0)
        assert loss.item() == pytest.approx(expected(cache, batch.view, batch.index, z, 3.0), rel=1e-4)
        seen += len(batch.index)
    assert seen == 20
