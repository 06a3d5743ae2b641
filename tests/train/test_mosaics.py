"""Training on mosaics: the very pixels, and no label where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from softcache_train import Loader, train
from softcache_train import config as configs
from softcache_train.loader import normalise

import softcache as sc
from softcache.cache import Cache
from softcache.errors import SpecError
from softcache.recipe import gather, render
from softcache.source import Source

RECIPE = "2: crop(16, pad=2)|flip|mosaic(p=0.7)|mixup(p=0.5); crop(16, pad=2)|flip"


@pytest.fixture(scope="module")
def mosaics(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("mosaics") / "cache"
    return toys.build(path, Source(images, split="train"), recipe=RECIPE, views=4)


def make(cache: Cache, source: Source, **options) -> Loader:
    return Loader(cache, source, **{"global_batch": 120, "workers": 0} | options)


def run(cache: Cache, source: Source, out: Path, **options):
    common = {"student": "toys:plain", "epochs": 2, "global_batch": 25, "lr": 0.01, "workers": 0}
    return train(configs.check({**common, "out": str(out), **options}), cache, source)


@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
def test_a_batch_shows_the_mosaics_at_any_size(mosaics: Cache, source: Source, size):
    """What the teacher said of each (the toy teacher can be asked again) beside the student's own size."""
    loader, spec, kinds = make(mosaics, source, size=size), mosaics.identity["teacher"]["input_spec"], set()
    for epoch in range(4):
        batch = loader.batch(epoch, 0)
        for row, (sample, view) in enumerate(zip(batch.index.tolist(), batch.views, strict=True)):
            images = gather(sample, view, source.image)
            expected = normalise(render(images[sample], view, size, images)[None], spec)[0]
            assert torch.equal(batch.images[row], expected)
            said = toys.teacher(render(images[sample], view, (16, 16), images)[None])[0]
            np.testing.assert_allclose(batch["logits"].values[row], said, atol=5e-3)
            assert batch.labels[row] == (-1 if view.mosaic else source.labels[sample])
            if view.mix:
                theirs = -1 if view.mix.view.mosaic else source.labels[view.mix.partner]
                assert batch.partner_labels[row] == theirs
            else:
                assert batch.partner_labels[row] == batch.labels[row]
            kinds.add((batch.view < 2, view.mosaic is None, view.mix is None))
    assert kinds == {(True, a, b) for a in (True, False) for b in (True, False)} | {(False, True, True)}


def test_workers_and_ranks_change_nothing(mosaics: Cache, source: Source):
    alone = list(make(mosaics, source, global_batch=30))
    parts = [list(make(mosaics, source, global_batch=30, workers=3, rank=rank, world=2)) for rank in range(2)]
    for whole, *shares in zip(alone, *parts, strict=True):
        for name in ("images", "labels", "partner_labels", "lam"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole, name))


def test_with_targets_gives_what_the_loader_gives_and_warns(mosaics: Cache, source: Source):
    with pytest.warns(UserWarning, match="mosaics, which show four samples"):
        dataset = sc.with_targets(source, mosaics)
    whole = make(mosaics, source)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        batch = whole.batch(epoch, 0)
        place = {sample: row for row, sample in enumerate(batch.index.tolist())}
        for item in (dataset[i] for i in range(0, len(dataset), 11)):
            row = place[item["index"]]
            assert item["view"] == batch.view
            assert np.array_equal(item["image"], batch.images[row].numpy())
            assert (item["label"], item["partner_label"]) == (batch.labels[row], batch.partner_labels[row])
            assert item["lam"] == batch.lam[row].numpy()


def test_the_loop_learns_from_the_teacher_alone(mosaics: Cache, source: Source, tmp_path: Path, capsys):
    with pytest.raises(SpecError, match=r"mosaics.*no one label.*alpha=1"):
        run(mosaics, source, tmp_path / "ce", alpha=0.5)
    assert run(mosaics, source, tmp_path / "kd", alpha=1).top1 is None
    assert "mixes every sample into the views of others; give val_split" in capsys.readouterr().err


def test_fresh_views_of_mosaics_are_refused(mosaics: Cache, cache: Cache, source: Source):
    for one, recipe in ((mosaics, "flip"), (cache, "crop(16)|mosaic")):
        with pytest.raises(SpecError, match=r"'(mosaic|mixup)': views of several"):
            make(one, source, policy="frozen", recipe=recipe)
