"""What the trainer is fed: the views the teacher saw, its own words, in an order that nothing upsets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from softcache_train import Loader, loader
from softcache_train.online import LiveTeacher
from softcache_train.targets import CacheTargets, Dense

from softcache.errors import MismatchError, SpecError, UnreadableImage
from softcache.recipe import render
from softcache.source import Source

SPEC = {"size": [16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "color": "RGB"}


def make(cache, source, **options):
    return Loader(cache, source, **{"global_batch": 16, "workers": 0, "input_spec": SPEC} | options)


def assert_same(a, b):
    assert np.array_equal(a.index, b.index) and a.view == b.view and a.views == b.views
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert a.targets.keys() == b.targets.keys()
    assert all(torch.equal(a[name].values, b[name].values) for name in a.targets)


def test_a_batch_is_what_the_cache_and_the_source_say(cache, source):
    batch = make(cache, source).batch(epoch=2, step=3)
    assert batch.images.dtype == torch.float32 and batch.images.shape == (16, 3, 16, 16)
    assert len(batch) == 16 and batch.labels.dtype == torch.int64
    mean, std = np.float32(SPEC["mean"]), np.float32(SPEC["std"])
    for row, sample in enumerate(batch.index):
        id = cache.ids[sample]
        assert cache[id, batch.view].view == batch.views[row]
        pixels = render(source.image(source.index(id)), batch.views[row], (16, 16))
        expected = (np.float32(pixels) / 255 - mean) / std
        np.testing.assert_allclose(batch.images[row].permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-6)
        assert cache.classes[batch.labels[row]] == id.split("/")[0]
        said = torch.log_softmax(batch["logits"].values[row], 0).numpy()
        np.testing.assert_allclose(said, cache[id, batch.view]["logits"].dense(), atol=1e-5)
        teacher = toys.teacher(pixels[None])[0]
        np.testing.assert_allclose(batch["logits"].values[row], teacher, atol=5e-3)


def test_the_student_may_see_another_size_and_colour_order(cache, source):
    batch = make(cache, source, size=(8, 12)).batch(0, 0)
    assert batch.images.shape == (16, 3, 8, 12)
    assert make(cache, source, size=9).batch(0, 0).images.shape == (16, 3, 9, 9)
    flat = {"mean": [0, 0, 0], "std": [1, 1, 1], "size": [16, 16]}
    rgb = make(cache, source, input_spec={**flat, "color": "RGB"}).batch(0, 0)
    bgr = make(cache, source, input_spec={**flat, "color": "BGR"}).batch(0, 0)
    assert torch.equal(rgb.images.flip(1), bgr.images)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_workers_change_nothing(cache, source, workers):
    threaded, inline = make(cache, source, workers=workers), make(cache, source)
    for _ in range(2):
        for a, b in zip(threaded, inline, strict=True):
            assert_same(a, b)
    assert (threaded.epoch, threaded.step) == (2, 0)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_see_one_global_batch(cache, source, world):
    alone = make(cache, source)
    team = [make(cache, source, rank=rank, world=world) for rank in range(world)]
    for whole, *parts in zip(alone, *team, strict=True):
        assert np.array_equal(np.concatenate([p.index for p in parts]), whole.index)
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p["logits"].values for p in parts]), whole["logits"].values)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_goes_on_in_mid_epoch(cache, source, workers):
    alone = make(cache, source)
    whole = [*alone, *alone]
    resumed = make(cache, source, workers=workers)
    seen = []
    for batch in resumed:
        seen.append(batch)
        if resumed.step == 3:
            break
    assert (resumed.epoch, resumed.step) == (0, 3)
    other = make(cache, source, workers=workers)
    other.epoch, other.step = resumed.epoch, resumed.step
    for batch in itertools.chain(other, other):
        seen.append(batch)
    for a, b in zip(seen, whole, strict=True):
        assert_same(a, b)


def test_an_epoch_shows_every_sample_once_and_a_cycle_every_view(cache, source):
    loader = make(cache, source, global_batch=15)
    views = []
    for _ in range(cache.views):
        batches = list(loader)
        assert sorted(np.concatenate([b.index for b in batches])) == list(range(120))
        views.append({b.view for b in batches})
    assert sorted(itertools.chain(*views)) == [0, 1, 2]


def test_samples_choose(cache, source):
    chosen = np.arange(0, 120, 2)
    seen = np.concatenate([b.index for b in make(cache, source, samples=chosen, global_batch=10)])
    assert sorted(seen) == chosen.tolist()


def test_images_are_decoded_once_while_they_fit(cache, images, monkeypatch):
    def count(source):
        calls = []
        image = source.image
        monkeypatch.setattr(source, "image", lambda i: calls.append(i) or image(i))
        return calls

    roomy = Source(images, split="train")
    loader_ = make(cache, roomy)
    calls = count(roomy)
    first = [b for _ in range(2) for b in loader_]
    assert len(calls) == len(set(calls)) <= 120
    monkeypatch.setattr(loader, "DECODED_BYTES", 10 * 16 * 16 * 3)
    tight = Source(images, split="train")
    loader_ = make(cache, tight)
    calls = count(tight)
    for a, b in zip(first, [b for _ in range(2) for b in loader_], strict=True):
        assert_same(a, b)
    assert len(calls) > 200


def test_a_live_teacher_says_what_the_cache_holds(cache, source):
    class Teacher:
        class input_spec:  # noqa: N801
            size = (16, 16)

        def __call__(self, pixels):
            return {"logits": toys.teacher(pixels)}

    live = make(
        cache, source, size=(8, 8), workers=2, target_source=LiveTeacher(Teacher(), cache.targets.values())
    )
    for a, b in zip(live, make(cache, source, size=(8, 8)), strict=True):
        torch.testing.assert_close(a["logits"].values, b["logits"].values, atol=5e-3, rtol=1e-3)
        assert torch.equal(a.images, b.images)


def test_classes_are_matched_by_name(tmp_path):
    built = toys.build(tmp_path / "c", Source(toys.Dataset(5)))
    shuffled = Source(toys.Dataset(5, classes=("red", "blue", "grey", "green")))
    batch = make(built, shuffled, global_batch=20).batch(0, 0)
    agree = batch["logits"].values.argmax(1) == batch.labels
    assert agree.float().mean() > 0.8
    assert batch.labels.tolist() == [int(i) // 5 for i in batch.index]


def test_another_source_is_refused(cache, images, tmp_path):
    with pytest.raises(MismatchError, match="ids are not in"):
        make(cache, Source(images, split="test"))
    with pytest.raises(MismatchError, match="pixels"):
        make(toys.build(tmp_path, Source(toys.Dataset(30))), Source(toys.Dataset(30, seed=77)))


def test_a_constant_target_is_refused(cache, source):
    class Stuck(CacheTargets):
        def __call__(self, view, samples, pixels=None):
            return {"logits": Dense(torch.ones(len(samples), 4))}

    with pytest.raises(MismatchError, match="'logits' is the same for all 16 samples"):
        next(iter(make(cache, source, target_source=Stuck(cache))))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_became_unreadable_is_named(cache, images, workers, monkeypatch):
    source = Source(images, split="train")
    loader_ = make(cache, source, workers=workers, global_batch=15)
    image = source.image

    def broken(i):
        if source.ids[i] == "red/007.png":
            raise UnreadableImage("cannot read the image 'red/007.png'")
        return image(i)

    monkeypatch.setattr(source, "image", broken)
    with pytest.raises(UnreadableImage, match=r"red/007\.png"):
        list(loader_)


def test_invalid_samples_are_left_out_and_refused(tmp_path):
    folder = toys.write_imagefolder(tmp_path / "images", "train", 10, seed=0)
    path = folder / "train" / "grey" / "003.png"
    path.write_bytes(path.read_bytes()[:60])
    source = Source(folder, split="train")
    cache = toys.build(tmp_path / "c", source, skip_corrupt=True)
    bad = cache.index("grey/003.png")
    seen = np.concatenate([b.index for b in make(cache, source, global_batch=13)])
    assert len(seen) == 39 and bad not in seen
    with pytest.raises(SpecError, match=r"grey/003\.png"):
        make(cache, source, samples=np.arange(40))


def test_options_that_do_not_fit(cache, source):
    with pytest.raises(SpecError, match="does not fit 120 samples"):
        make(cache, source, global_batch=121)
    with pytest.raises(SpecError, match="leaves some of 3 ranks no row"):
        make(cache, source, global_batch=2, world=3)
    with pytest.raises(MismatchError, match="no target 'logit'"):
        make(cache, source, targets=["logit"]).batch(0, 0)
    with pytest.raises(SpecError, match="did you mean 'logits'"):
        make(cache, source).batch(0, 0)["logit"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": -1}, "workers=-1: it is a whole number, at least 0"),
        ({"processes": "yes"}, "processes='yes': True or False"),
        ({"workers": True}, "workers=True"),
        ({"global_batch": 0}, "global_batch=0: it is a whole number, at least 1"),
        ({"global_batch": 2.5}, "global_batch=2.5"),
        ({"world": 0}, "world=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2, "world": 2}, "rank=2: the ranks of world=2 are 0 to 1"),
        ({"samples": np.arange(110, 130)}, "from 0 to 119"),
        ({"samples": np.arange(-1, 30)}, "from 0 to 119"),
        ({"samples": np.zeros((30, 2), int)}, "indices into cache.ids"),
        ({"samples": np.ones(120, bool)}, "whole numbers, not bool"),
        ({"targets": 3}, "asked for by name, such as 'logits', not as 3"),
        ({"size": 0}, r"size=0: it is \(h, w\) in whole pixels, at least 1, or both in one number"),
        ({"size": (0, 3)}, r"size=\(0, 3\): it is"),
    ],
)
def test_options_that_cannot_be_understood_are_refused_at_once(cache, source, options, told):
    with pytest.raises(SpecError, match=told):
        make(cache, source, **options)


def test_a_string_is_one_target(cache, source):
    assert list(make(cache, source, targets="logits").batch(0, 0).targets) == ["logits"]
    with pytest.raises(MismatchError, match="no target 'logit'"):
        make(cache, source, targets="logit")


def test_one_sample_many_times_is_no_constant_target(cache, source):
    batch = make(cache, source, samples=[1, 1], global_batch=2).batch(0, 0)
    assert batch.index.tolist() == [1, 1] and batch["logits"].constant()


def test_no_targets_reads_none(cache, source):
    assert make(cache, source, targets=[]).batch(0, 0).targets == {}


def test_grey_and_transparent_images_are_rgb(tmp_path):
    folder = toys.write_imagefolder(tmp_path / "images", "train", 10, seed=0)
    Image.fromarray(toys.picture("grey", 5)[..., 0]).save(folder / "train" / "grey" / "000.png")
    source = Source(folder, split="train")
    cache = toys.build(tmp_path / "c", source)
    batch = make(cache, source, global_batch=40).batch(0, 0)
    assert batch.images.shape == (40, 3, 16, 16)
