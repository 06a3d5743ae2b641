"""Training on mixed views: the same pixels and targets, and the labels of both samples in proportion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from softcache_train import Loader, train
from softcache_train import config as configs
from softcache_train.loader import normalise
from softcache_train.objectives import cross_entropy, kd
from softcache_train.online import LiveTeacher

import softcache as sc
from softcache.cache import Cache
from softcache.errors import MismatchError
from softcache.recipe import gather, render
from softcache.source import Source

RECIPE = "crop(16, pad=2)|flip|mix(p=0.9)"


@pytest.fixture(scope="module")
def mixed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("mixed") / "cache"
    return toys.build(path, Source(images, split="train"), recipe=RECIPE, views=4)


def make(cache: Cache, source: Source, **options: Any) -> Loader:
    return Loader(cache, source, **{"global_batch": 16, "workers": 0} | options)


def run(cache: Cache, source: Source, out: Path, **options: Any):
    common = {"student": "toys:plain", "epochs": 3, "global_batch": 25, "lr": 0.01, "workers": 0}
    val = options.pop("val_source", None)
    return train(configs.check({**common, "out": str(out), **options}), cache, source, val_source=val)


# --- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
def test_a_batch_shows_the_mixed_views_at_any_size(mixed: Cache, source: Source, size):
    """What the teacher said of the mix (which the toy teacher can be asked again) beside the student's own size."""
    batch = make(mixed, source, size=size).batch(1, 2)
    assert batch.lam.dtype == torch.float32 and batch.partner_labels.dtype == torch.int64
    spec = mixed.identity["teacher"]["input_spec"]
    kinds = set()
    for row, (sample, view) in enumerate(zip(batch.index.tolist(), batch.views, strict=True)):
        images = gather(sample, view, source.image)
        expected = normalise(render(images[sample], view, size, images)[None], spec)[0]
        assert torch.equal(batch.images[row], expected)
        said = toys.teacher(render(images[sample], view, (16, 16), images)[None])[0]
        np.testing.assert_allclose(batch["logits"].values[row], said, atol=5e-3)
        assert batch.labels[row] == source.labels[sample]
        if view.mix is None:
            assert batch.lam[row] == 1 and batch.partner_labels[row] == batch.labels[row]
        else:
            assert batch.lam[row] == np.float32(view.mix.blend.lam / 32767)
            assert batch.partner_labels[row] == source.labels[view.mix.partner]
        kinds.add("none" if view.mix is None else bool(view.mix.blend.width))
    assert kinds == {"none", True, False}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_ranks_change_nothing(mixed: Cache, source: Source, workers: int):
    alone = list(make(mixed, source))
    parts = [list(make(mixed, source, workers=workers, rank=rank, world=2)) for rank in range(2)]
    for whole, *shares in zip(alone, *parts, strict=True):
        for name in ("images", "labels", "partner_labels", "lam"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole, name))


def test_a_live_teacher_is_shown_the_mix(mixed: Cache, source: Source):
    class Teacher:
        class input_spec:  # noqa: N801
            size = (16, 16)

        def __call__(self, pixels):
            return {"logits": toys.teacher(pixels)}

    teacher: Any = Teacher()
    live = make(mixed, source, size=(8, 8), target_source=LiveTeacher(teacher, mixed.targets.values()))
    for a, b in zip(live, make(mixed, source, size=(8, 8)), strict=True):
        torch.testing.assert_close(a["logits"].values, b["logits"].values, atol=5e-3, rtol=1e-3)
        assert torch.equal(a.images, b.images)


def test_an_unmixed_cache_says_so(cache: Cache, source: Source):
    batch = make(cache, source).batch(0, 0)
    assert torch.equal(batch.lam, torch.ones(16)) and torch.equal(batch.partner_labels, batch.labels)


@pytest.mark.parametrize("size", [None, 24])
def test_with_targets_gives_what_the_loader_gives(mixed: Cache, source: Source, size):
    dataset = sc.with_targets(source, mixed, size=size)
    whole = make(mixed, source, size=(size, size) if size else None, global_batch=120)
    for epoch in range(mixed.views):
        dataset.set_epoch(epoch)
        batch = whole.batch(epoch, 0)
        place = {sample: row for row, sample in enumerate(batch.index.tolist())}
        for item in (dataset[i] for i in range(0, len(dataset), 7)):
            row = place[item["index"]]
            assert item["view"] == batch.view
            assert np.array_equal(item["image"], batch.images[row].numpy())
            assert np.array_equal(item["logits"], batch["logits"].values[row].numpy())
            assert (item["label"], item["partner_label"]) == (batch.labels[row], batch.partner_labels[row])
            assert item["lam"].dtype == np.float32 and item["lam"] == batch.lam[row].numpy()


def test_with_targets_of_an_unmixed_cache_has_no_partners(cache: Cache, source: Source):
    assert not {"lam", "partner_label"} & set(sc.with_targets(source, cache)[0])


# --- the loss ---------------------------------------------------------------------------------------


def test_cross_entropy_of_mixed_labels_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    y, other = (torch.randint(0, 5, (9,), generator=generator) for _ in range(2))
    lam = torch.rand(9, generator=generator, dtype=torch.float64)
    log_p = z.numpy() - np.log(np.exp(z.numpy()).sum(axis=1, keepdims=True))
    rows = np.arange(9)
    each = lam.numpy() * log_p[rows, y] + (1 - lam.numpy()) * log_p[rows, other]
    assert cross_entropy(z, y, other, lam).item() == pytest.approx(-each.mean(), rel=1e-12)
    # it is the cross entropy with the mixed label
    soft = lam[:, None] * F.one_hot(y, 5) + (1 - lam)[:, None] * F.one_hot(other, 5)
    torch.testing.assert_close(cross_entropy(z, y, other, lam), F.cross_entropy(z, soft))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, y, other, lam), z.requires_grad_())
    plain = cross_entropy(z, y, y, torch.ones(9))
    torch.testing.assert_close(plain, cross_entropy(z, y))


def test_a_row_with_an_unknown_label_adds_nothing():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    y, other = torch.tensor([0, 1, -1, -1]), torch.tensor([2, -1, 1, -1])
    lam = torch.tensor([0.3, 0.6, 0.5, 0.5])
    loss = cross_entropy(z, y, other, lam)
    first = cross_entropy(z[:1], y[:1], other[:1], lam[:1])
    torch.testing.assert_close(loss, first / 4)


def test_labels_of_another_length_are_refused():
    with pytest.raises(MismatchError, match="partner_labels and lam"):
        cross_entropy(torch.zeros(3, 2), torch.zeros(3).long(), torch.zeros(2).long(), torch.ones(3))


# --- a run ------------------------------------------------------------------------------------------


def test_the_loop_takes_the_loss_of_both_labels(mixed: Cache, source: Source, tmp_path: Path):
    """One epoch in one full batch with a learning rate of next to nothing: the logged loss is that of the first
    student, which is made again here."""
    run(mixed, source, tmp_path, epochs=1, global_batch=120, lr=1e-12, alpha=0.25, T=2, seed=3)
    entry = json.loads((tmp_path / "checkpoint.json").read_text())["history"][0]
    torch.manual_seed(3)
    student = toys.plain(4)
    batch = make(mixed, source, global_batch=120, seed=3).batch(0, 0)
    logits = student(batch.images)
    soft = batch.lam[:, None] * F.one_hot(batch.labels, 4)
    soft += (1 - batch.lam)[:, None] * F.one_hot(batch.partner_labels, 4)
    assert entry["ce"] == pytest.approx(F.cross_entropy(logits, soft).item(), rel=1e-5)
    assert entry["kd"] == pytest.approx(kd(logits, batch["logits"], 2).item(), rel=1e-5)


def test_it_learns_and_validates_on_whole_images(mixed: Cache, source: Source, images: Path, tmp_path: Path):
    held = Source(images, split="test")
    assert run(mixed, source, tmp_path, val_source=held, epochs=40, alpha=0.5, T=1).top1 > 0.8


def test_no_sample_is_held_out_where_all_are_seen(mixed: Cache, source: Source, tmp_path: Path, capsys):
    assert run(mixed, source, tmp_path, epochs=1).top1 is None
    assert "mixes every sample into the views of others; give val_split" in capsys.readouterr().err


def test_a_run_resumed_in_mid_epoch_ends_with_the_same_weights(mixed, source, tmp_path, monkeypatch):
    from softcache_train.progress import Progress

    run(mixed, source, tmp_path / "whole")
    step, taken = Progress.step, []

    def stop(self, number):
        step(self, number)
        taken.append(number)
        if len(taken) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(mixed, source, tmp_path / "stopped", checkpoint_every=2)
    run(mixed, source, tmp_path / "stopped", checkpoint_every=2)
    ours, theirs = (next((tmp_path / name).glob("model-*")).read_bytes() for name in ("whole", "stopped"))
    assert ours == theirs


def test_one_class_and_an_odd_number_of_samples(tmp_path: Path):
    class Reds(toys.Dataset):
        """Every picture is red, of four classes that the teacher knows."""

        def __init__(self) -> None:
            super().__init__(11)
            self.items = [item for item in self.items if item[1] == 3]

    source = Source(Reds())
    cache = toys.build(tmp_path / "c", source, recipe=RECIPE)
    assert len(source) == 11 and sc.verify(cache, read_data=True) == []
    result = run(cache, source, tmp_path / "run", global_batch=11, epochs=2, alpha=0.5)
    assert result.epochs == 2
    batch = make(cache, source, global_batch=11).batch(0, 0)
    assert set(batch.labels.tolist()) == set(batch.partner_labels.tolist()) == {3}
