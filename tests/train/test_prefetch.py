"""Work ahead of the step changes nothing but when it is done, takes bounded memory, and overwrites nothing in use."""

from __future__ import annotations

import gc
import os
import signal
import threading
import tracemalloc

import numpy as np
import pytest
import torch
import toys
from softcache_train import Loader, prefetch
from softcache_train.online import LiveTeacher
from softcache_train.prefetch import Buffers, ahead, together
from softcache_train.targets import CacheTargets, Dense, Hard, Parts, Sampled
from test_loader import assert_same, make

import softcache as sc
from softcache import reader
from softcache.errors import DamageError, SourceError, SpecError
from softcache.source import Source
from softcache.source.kept import Kept
from softcache.testing import ToyImages, ToyTeacher

ARRANGED = [
    {"shuffle": "blocks"},
    {"views_per_image": 3, "global_batch": 15},
    {"views_per_image": 3, "global_batch": 15, "shuffle": "blocks"},
]
arranged = pytest.mark.parametrize("options", ARRANGED, ids=["blocks", "views", "both"])


# -- deterministic and elastic, however it is arranged ---------------------------------------------------------


@arranged
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(cache, source, workers, options):
    for a, b in zip(
        make(cache, source, workers=workers, **options), make(cache, source, **options), strict=True
    ):
        assert_same(a, b)


@arranged
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_see_one_global_batch(cache, source, world, options):
    alone = make(cache, source, **options)
    team = [make(cache, source, rank=rank, world=world, **options) for rank in range(world)]
    each = options.get("views_per_image", 1)
    for whole, *parts in zip(alone, *team, strict=True):
        # in each of its parts a batch holds the shares one after the other
        for values in (lambda b: b.images, lambda b: b["logits"].values, lambda b: torch.tensor(b.index)):
            shares = [values(p).unflatten(0, (each, -1)) for p in parts]
            assert torch.equal(torch.cat(shares, 1).flatten(0, 1), values(whole))


@arranged
@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_goes_on_in_mid_epoch(cache, source, workers, options):
    whole = list(make(cache, source, **options))
    resumed = make(cache, source, workers=workers, **options)
    resumed.step = 3
    for a, b in zip(resumed, whole[3:], strict=True):
        assert_same(a, b)
    assert (resumed.epoch, resumed.step) == (1, 0)


@arranged
def test_epochs_of_a_cycle_show_every_sample_in_every_view_once(cache, source, options):
    loader, seen = make(cache, source, **{"global_batch": 15, **options}), []
    for _ in range(cache.views // options.get("views_per_image", 1)):
        for batch in loader:
            parts = np.split(batch.index, len(batch.numbers))
            seen += [(s, n) for n, part in zip(batch.numbers, parts, strict=True) for s in part.tolist()]
    assert sorted(seen) == [(s, n) for s in range(120) for n in range(3)]


def test_an_epoch_by_blocks_opens_a_few_files_at_a_time(cache, source, monkeypatch):
    """The samples of the first batches stand in few blocks; of a globally shuffled epoch, in all."""
    monkeypatch.setattr(reader, "SLAB_BYTES", 100)
    loader = make(cache, source, samples=np.arange(120), global_batch=5)
    assert loader.order.blocks is not None and loader.order.blocks.rows == 1  # no row fits: nothing to gain
    monkeypatch.setattr(reader, "SLAB_BYTES", 16 * 3 * sum(a.row_bytes for a in cache.arrays.values()))
    loader = make(cache, source, global_batch=5)
    assert loader.order.blocks is not None and loader.order.blocks.rows == 3
    for step in (0, 5, 19):
        places = cache.grid.positions(
            np.concatenate([loader.order.rows(0, s) for s in range(step, step + 2)])
        )
        assert len(np.unique(places // 3)) <= 2 * 16


# -- several views an image ------------------------------------------------------------------------------------


def test_a_batch_of_several_views_is_that_of_each_of_them(cache, source):
    loader = make(cache, source, views_per_image=3, global_batch=15)
    batch = loader.batch(1, 2)
    assert len(batch) == 15 and len(batch.index) == 15 and len(batch.views) == 15
    assert len(set(batch.numbers)) == 3 and batch.view == batch.numbers[0]
    first = batch.index[:5]
    assert len(set(first)) == 5 and np.array_equal(batch.index, np.tile(first, 3))
    for turn, number in enumerate(batch.numbers):
        part = slice(5 * turn, 5 * turn + 5)
        assert batch.views[part] == cache.read_views(number, first)
        said = cache.read(number, first)["logits"].values
        assert np.array_equal(batch["logits"].values[part].numpy(), said)
        assert torch.equal(batch.labels[part], batch.labels[:5])
    assert not torch.equal(batch.images[:5], batch.images[5:10])


def test_an_image_is_decoded_once_for_all_its_views(cache, source, monkeypatch):
    from softcache_train import loader as module

    monkeypatch.setattr(module, "DECODED_BYTES", 0)
    loader, calls = make(cache, source, views_per_image=3, global_batch=15), []
    image = source.image
    monkeypatch.setattr(source, "image", lambda i: calls.append(i) or image(i))
    loader.batch(0, 0)
    assert len(calls) == len(set(calls)) == 5


def test_a_live_teacher_and_fresh_views_know_of_several_views(cache, source):
    class Teacher:
        class input_spec:  # noqa: N801
            size = (16, 16)

        def __call__(self, pixels):
            return {"logits": toys.teacher(pixels)}

    options = {"views_per_image": 3, "global_batch": 15, "size": (8, 8)}
    live = LiveTeacher(Teacher(), cache.targets.values())
    a, b = (
        make(cache, source, target_source=live, **options).batch(0, 1),
        make(cache, source, **options).batch(0, 1),
    )
    torch.testing.assert_close(a["logits"].values, b["logits"].values, atol=5e-3, rtol=1e-3)
    assert torch.equal(a.images, b.images)
    fresh = make(cache, source, policy="frozen", recipe="crop(16, pad=4)|flip", **options).batch(0, 1)
    assert fresh.numbers == (0, 0, 0) and len(set(fresh.views)) > 5
    rows = fresh.index[:5]
    for turn in range(3):
        shown = make(cache, source, policy="frozen", recipe="crop(16, pad=4)|flip").policy.views(
            turn, 0, rows
        )
        assert fresh.views[5 * turn : 5 * turn + 5] == shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"views_per_image": 2}, "does not divide the 3 views"),
        ({"views_per_image": 3}, "does not divide global_batch=16"),
        ({"views_per_image": 3, "global_batch": 3, "world": 2}, "1 image a batch leave some of 2 ranks none"),
        ({"shuffle": "block"}, "did you mean 'blocks'"),
        ({"shuffle": 3}, "one of auto, global, blocks"),
    ],
)
def test_arrangements_that_cannot_be_understood_are_refused(cache, source, options, told):
    with pytest.raises(SpecError, match=told):
        make(cache, source, **options)


# -- ahead of the step -----------------------------------------------------------------------------------------


class Noting(CacheTargets):
    """Notes which thread asked, and how often."""

    def __call__(self, *args, **more):
        self.__dict__.setdefault("threads", []).append(threading.current_thread())
        return super().__call__(*args, **more)


def test_targets_are_read_ahead_by_another_thread_and_not_far(cache, source):
    targets = Noting(cache)
    loader = iter(make(cache, source, workers=2, global_batch=5, target_source=targets))
    next(loader)
    loader.close()  # type: ignore[attr-defined]
    assert 1 < len(targets.threads) <= 2 + 2
    assert set(targets.threads) != {threading.main_thread()} and len(set(targets.threads)) == 1


def test_a_live_teacher_is_asked_by_the_thread_that_iterates(cache, source):
    class Live(Noting):
        size = (16, 16)

    targets = Live(cache)
    next(iter(make(cache, source, workers=2, target_source=targets)))
    assert targets.threads == [threading.main_thread()]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_goes_wrong_is_raised_at_its_step(workers):
    def read(step):
        if step == 4:
            raise DamageError("the fourth")
        return step

    done = []
    with pytest.raises(DamageError, match="the fourth"):
        for step, asked, made in ahead(range(9), workers, read, lambda asked: -asked):
            done.append((step, asked, made))
    assert done == [(i, i, -i) for i in range(4)]
    assert not [t for t in threading.enumerate() if t.name.startswith("softcache-re")]


def test_a_shard_that_vanishes_in_mid_epoch_is_named_with_what_to_do(cache, source, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(reader, "SLAB_BYTES", 1)
    folder = shutil.copytree(cache.path, tmp_path / "c")
    loader = make(sc.open(folder), source, workers=2, global_batch=5, shuffle="blocks")
    batches = iter(loader)
    next(batches)
    for path in (folder / "targets" / "logits").rglob("c.*"):
        path.unlink()
    with pytest.raises(DamageError, match=r"targets/logits/.*is missing: .*softcache repair"):
        list(make(sc.open(folder), source, workers=2))
    del batches


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_stay_what_they_are(cache, source, workers):
    kept = [(b, b.images.clone(), b["logits"].values.clone()) for b in make(cache, source, workers=workers)]
    part = kept[0][0].images[3, 1]
    expected = part.clone()
    del kept[0]
    gc.collect()
    list(make(cache, source, workers=workers))
    assert torch.equal(part, expected)  # of a batch that is gone
    for batch, images, logits in kept:
        assert torch.equal(batch.images, images) and torch.equal(batch["logits"].values, logits)


def test_buffers_are_used_again_once_nobody_holds_them():
    buffers = Buffers(3)
    assert buffers._again  # no accelerator where tests run
    first = buffers.images((2, 3))
    where, row = first.data_ptr(), first[1]
    assert buffers.images((2, 3)).data_ptr() != where
    del first
    assert buffers.images((2, 3)).data_ptr() != where  # row is a part of it
    del row
    assert buffers.images((2, 3)).data_ptr() == where
    assert buffers.images((3, 2)).data_ptr() != where
    held = [buffers.array((4,)) for _ in range(9)]
    assert len({a.ctypes.data for a in held}) == 9 and len(buffers._kept[(4,), "uint8"]) == 3
    del held
    again = {buffers.array((4,)).ctypes.data for _ in range(9)}
    assert len(again) == 1


def test_an_epoch_goes_through_few_buffers(cache, source):
    loader = make(cache, source, workers=2, global_batch=5)
    seen = {batch.images.data_ptr() for batch in loader}
    assert len(seen) <= 2 + 4 < len(loader)


def test_images_and_targets_are_pinned_where_there_is_cuda(cache, source, monkeypatch):
    """A machine without it: what is asked of torch is noted, and done without."""
    asked, empty = [], torch.empty

    def noted(*shape, pin_memory=False, **more):
        asked.append(pin_memory)
        return empty(*shape, **more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(prefetch.torch, "empty", noted)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: asked.append(t.shape) or t)
    loader = make(cache, source)
    batch = loader.batch(0, 0)
    assert asked == [batch["logits"].values.shape, True]
    assert not loader._buffers._kept


def wide_cache(path, samples):
    """Rows of 36 and of 4096 bytes, in blocks of 16."""
    source = Source(ToyImages(samples))
    targets = {"logits": "full(u8)", "map": "int8"}
    return sc.build(
        path, source=source, teacher=ToyTeacher(), targets=targets, progress=False, block_rows=16, batch=16
    ), source


def test_memory_does_not_depend_on_the_size_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "SLAB_BYTES", 20_000)
    monkeypatch.setattr(reader, "_OPEN_FILES", 30)

    def peak(samples):
        cache, source = wide_cache(tmp_path / str(samples), samples)
        loader = Loader(sc.open(cache.path), source, global_batch=8, workers=2)
        assert loader.order.blocks is not None
        loader.image.room = loader.image._left = 0
        tracemalloc.start()
        for batch in loader:
            del batch
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(32)  # what is imported now is none of a later epoch's
    rows = 8 * (5 * 4096 + 5 * 3 * 8 * 8 + 400)  # a batch: codes, floats and pixels
    assert peak(480) < 6 * rows + 300_000 < 480 * 4096  # the codes of one view


# -- processes -------------------------------------------------------------------------------------------------


def test_processes_render_what_threads_do_and_name_what_they_cannot_read(cache, images, source):
    options = {"workers": 2, "processes": True}
    loader = make(cache, source, **options)
    for a, b in zip(loader, make(cache, source), strict=True):
        assert_same(a, b)
    assert (loader.epoch, loader.step) == (1, 0)
    pool = loader._spawned._pool
    for a, b in zip(range(3), loader, strict=False):  # the same processes
        assert a == loader.step - 1 and len(b) == 16
    for pid in list(pool._processes):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(SourceError, match="a process that decodes images was ended from outside"):
        list(loader)


def test_an_unreadable_image_is_named_by_a_process(tmp_path):
    folder = toys.write_imagefolder(tmp_path / "images", "train", 10, seed=0)
    source = Source(folder, split="train")
    cache = toys.build(tmp_path / "c", source)
    loader = make(cache, source, workers=1, processes=True, global_batch=40)
    (folder / "train" / "red" / "007.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"red/007\.png"):
        list(loader)


def test_a_source_that_cannot_be_handed_over_is_refused(tmp_path):
    class Local(toys.Dataset):
        pass

    source = Source(Local(10))
    cache = toys.build(tmp_path / "c", source)
    with pytest.raises(SpecError, match=r"processes=True: .*cannot be handed to other processes"):
        make(cache, source, workers=1, processes=True)
    assert make(cache, source, workers=0, processes=True)._spawned is None


def test_processes_share_the_room_for_decoded_images(source):
    from softcache_train import rendering

    pool = rendering.Processes(Kept(source, 100), 3)
    assert pool._pool._initargs[0].room == 33
    pool.close()


# -- targets of several batches --------------------------------------------------------------------------------


def test_targets_of_several_parts_are_those_of_one():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(1, 3)
    assert torch.equal(together([Dense(a), Dense(b)]).values, torch.cat([a, b]))
    hard = together([Hard(torch.tensor([1]), 4), Hard(torch.tensor([2]), 4)])
    assert hard.values.tolist() == [1, 2] and hard.classes == 4
    parts = together([Parts({"x": a, "y": a}), Parts({"x": b, "y": b})])
    assert parts.values.keys() == {"x", "y"} and len(parts.values["y"]) == 3
    drawn = together([Sampled(a.long(), a[:, 0], 2.0, 9), Sampled(b.long(), b[:, 0], 2.0, 9)])
    assert drawn.values.shape == (3, 3)
    assert drawn.entropy.shape == (3,) and (drawn.T, drawn.classes) == (2.0, 9)
