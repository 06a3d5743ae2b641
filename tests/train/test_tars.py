"""Batches from tars: the same pixels, labels and targets as from the cache and its source."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import softcache_train as st
import torch
from hypothesis import given
from hypothesis import strategies as h
from softcache_train import tars
from softcache_train.tars import TarLoader, shuffled

import softcache as sc
from softcache.errors import DamageError, SpecError, StoreError
from softcache.exchange.webdataset import export
from softcache.keyed import Permutation, in_turn
from softcache.testing import flip_bit, make_image_folder, toy_teacher

SMALL = {"views": 2, "block_rows": 8, "batch": 4, "progress": False}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[sc.Cache, sc.Source]:
    """28 samples in blocks of 8, one of which cannot be read; several kinds of targets."""
    images = make_image_folder(tmp_path_factory.mktemp("images"), per_class=7)
    sorted(images.rglob("*.png"))[5].write_bytes(b"no image")
    targets = {"logits": "topk(2)", "map": "int8", "vector": "f16"}
    path, recipe = (
        tmp_path_factory.mktemp("small") / "cache",
        "random_resized_crop(8)|flip|color_jitter(0.3)",
    )
    source = sc.Source(images)
    cache = sc.build(
        path, source=source, teacher=toy_teacher(), recipe=recipe, targets=targets, skip_corrupt=True, **SMALL
    )
    return cache, source


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory) -> tuple[sc.Cache, sc.Source]:
    source = sc.Source(make_image_folder(tmp_path_factory.mktemp("tiles"), per_class=6))
    path, recipe = (
        tmp_path_factory.mktemp("mosaics") / "cache",
        "random_resized_crop(8)|mosaic(p=0.7)|mixup(0.4, p=0.6)",
    )
    return sc.build(path, source=source, teacher=toy_teacher(), recipe=recipe, **SMALL), source


@pytest.fixture(scope="module")
def exports(small, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tars")
    for embed in ("nothing", "images", "views"):
        export(small[0], root / embed, embed=embed, source=small[1])
    return {embed: root / embed for embed in ("nothing", "images", "views")}


def of_loader(loader: st.Loader, rows: np.ndarray, view: int) -> st.loader.Batch:
    """What a loader gives for these rows."""
    asked = st.loader._Asked(rows, (view,), [loader.cache.read_views(view, rows)], None)
    loader._ask = lambda epoch, step: asked  # pyright: ignore
    return loader.batch(0, 0)


def same(a: st.loader.Batch, loader: st.Loader) -> None:
    """A batch is what a loader of the cache gives for its rows."""
    b = of_loader(loader, a.index, a.view)
    assert a.views == b.views and a.targets.keys() == b.targets.keys()
    for field in ("images", "labels", "partner_labels", "lam"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
        assert getattr(a, field).dtype == getattr(b, field).dtype
    for name, target in b.targets.items():
        assert type(target) is type(a[name])
        for key, value in vars(target).items():
            found = getattr(a[name], key)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@given(h.integers(1, 300), h.integers(1, 400), h.integers(0, 9))
def test_a_window_is_shuffled_and_holds_no_more_than_it_says(count: int, window: int, seed: int):
    order = np.array(list(shuffled(count, window, 0, "x", seed)))
    assert sorted(order.tolist()) == list(range(count))
    read, held, most = 0, set(), 0
    for number in order.tolist():
        while number not in held:
            held.add(read)
            read += 1
        most = max(most, len(held))
        held.remove(number)
    assert most <= window + 1
    if count > 50 and window > 50:
        assert (order != np.arange(count)).mean() > 0.5


@given(h.integers(1, 300), h.integers(1, 90), h.integers(0, 9), h.integers(1, 50))
def test_a_window_is_shuffled_piece_by_piece_from_any_place_on(
    count: int, window: int, seed: int, piece: int
):
    """As an array of all would be, sorted by number and a keyed offset."""
    late = Permutation(count, "x", seed).forward(np.arange(count)) * (window / count)
    expected = np.argsort(np.arange(count) + late, kind="stable").tolist()
    with mock.patch.object(tars, "_PIECE", piece):
        for first in (0, count // 3, count - 1, count):
            assert list(shuffled(count, window, first, "x", seed)) == expected[first:]


@pytest.mark.parametrize("embed", ["images", "views"])
@pytest.mark.parametrize("world", [1, 3])
def test_batches_are_those_of_the_cache(embed: str, world: int, small, exports):
    loader = st.Loader(*small, global_batch=7, workers=0)
    ranks = [
        TarLoader(exports[embed], global_batch=7, seed=3, rank=rank, world=world, window=6)
        for rank in range(world)
    ]
    for epoch in range(2):
        shown = [list(one) for one in ranks]
        assert [len(batches) for batches in shown] == [27 // 7] * world
        for step in range(3):
            assert sum(len(batches[step]) for batches in shown) == 7
        rows = np.concatenate([batch.index for batches in shown for batch in batches])
        assert len(set(rows.tolist())) == len(rows) == 21 and not np.isin(rows, small[0].invalid).any()
        for batch in (batch for batches in shown for batch in batches):
            assert (
                batch.view
                == in_turn(2, epoch, "view", 3)
                == st.order.Order(np.arange(27), 2, 7, 3).view(epoch)
            )
            same(batch, loader)
    assert [one.epoch for one in ranks] == [2] * world


def test_mosaics_and_mixes(mosaics, tmp_path):
    export(mosaics[0], tmp_path / "x", embed="views", source=mosaics[1])
    loader, seen = st.Loader(*mosaics, global_batch=6, workers=0), 0
    for batch in TarLoader(tmp_path / "x", global_batch=6):
        same(batch, loader)
        seen += sum(v.mix is not None and v.mosaic is not None for v in batch.views)
    assert seen


def test_other_sizes_and_targets_are_rendered_from_embedded_images(small, exports):
    loader = st.Loader(*small, global_batch=9, workers=0, size=(6, 10), targets="vector")
    for batch in TarLoader(exports["images"], global_batch=9, size=(6, 10), targets=["vector"], views=1):
        assert batch.images.shape == (9, 3, 6, 10) and list(batch.targets) == ["vector"] and batch.view == 0
        same(batch, loader)


def test_epochs_and_seeds_have_orders_of_their_own(exports):
    def rows(seed: int, epoch: int) -> list[int]:
        loader = TarLoader(exports["views"], global_batch=9, seed=seed)
        loader.epoch = epoch
        return np.concatenate([b.index for b in loader]).tolist()

    assert rows(0, 0) == rows(0, 0)
    assert len({tuple(rows(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


@pytest.mark.parametrize("piece", [1, 600, 1 << 20])
def test_whatever_is_passed_over_the_rows_are_the_same(piece: int, exports, monkeypatch):
    """Short ways are read, long ones sought; ranks begin in the middle of a tar."""
    rows = [
        [b.index.tolist() for b in TarLoader(exports["images"], global_batch=5, rank=r, world=2)]
        for r in (0, 1)
    ]
    monkeypatch.setattr("softcache.tars._PIECE", piece)
    again = [
        [
            b.index.tolist()
            for b in TarLoader(exports["images"], global_batch=5, rank=r, world=2, targets="vector")
        ]
        for r in (0, 1)
    ]
    assert rows == again


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_epoch_goes_on_where_it_was(step: int, exports):
    whole = list(TarLoader(exports["views"], global_batch=5, world=2, window=8))
    again = TarLoader(exports["views"], global_batch=5, world=2, window=8)
    again.step = step
    rest = list(again)
    assert [b.index.tolist() for b in rest] == [b.index.tolist() for b in whole[step:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[step:], strict=True))


class Stream(io.RawIOBase):
    """What a server sends: it cannot seek, and gives what has arrived."""

    def __init__(self, path: Path):
        self._file = path.open("rb")

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 1000) if size >= 0 else -1)

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self._file.close()


def test_tars_are_read_from_wherever_somebody_opens_them(exports, small):
    asked: list[str] = []

    def opener(name: str) -> Stream:
        asked.append(name)
        return Stream(exports["images"] / name)

    def refused(name: str) -> Stream:
        raise PermissionError("403")

    batches = list(TarLoader(opener, global_batch=9))
    here = list(TarLoader(exports["images"], global_batch=9))
    assert [b.index.tolist() for b in batches] == [b.index.tolist() for b in here]
    view = batches[0].view
    opened = [name for name in asked if name.endswith(".tar")]
    assert sorted(opened) == [f"tars/v{view:04d}-b00000{i}.tar" for i in range(4)]  # each once, of one view
    assert {n for n in asked if not n.startswith("tars/")} == {"softcache.json", "tars.json", "tars.bin"}
    with pytest.raises(StoreError, match="403"):
        TarLoader(refused, global_batch=9)
    with pytest.raises(DamageError, match="json is missing"):
        TarLoader(lambda name: Stream(exports["images"] / "none"), global_batch=9)


@pytest.mark.parametrize("what", ["a bit", "cut", "swapped", "missing", "a link"])
def test_damage_is_told_where_it_is_and_no_epoch_is_short(what: str, exports, tmp_path):
    root = Path(shutil.copytree(exports["images"], tmp_path / "x"))
    tar, other = root / "tars/v0000-b000001.tar", root / "tars/v0000-b000002.tar"
    if what == "a bit":
        flip_bit(tar, 8 * (tar.read_bytes().rindex(b"PNG") + 40))
    elif what == "cut":
        tar.write_bytes(tar.read_bytes()[: -3 * 1024])
    elif what == "swapped":
        shutil.copy(other, tar)
    else:
        tar.unlink()
        if what == "a link":
            tar.symlink_to(other)
    loader = TarLoader(root, global_batch=9, views=1)
    with pytest.raises(DamageError, match=r"v0000-b000001\.tar"):
        list(loader)


def test_what_cannot_be_streamed_is_told(small, exports):
    with pytest.raises(SpecError, match="without pixels"):
        TarLoader(exports["nothing"], global_batch=4)
    with pytest.raises(SpecError, match="no export"):
        TarLoader(small[0].path, global_batch=4)
    for options, pattern in (
        ({"global_batch": 28}, "no step"),
        ({"global_batch": 0}, "at least 1"),
        ({"global_batch": 2, "world": 3}, "no row"),
        ({"global_batch": 4, "rank": 2, "world": 2}, "ranks"),
        ({"global_batch": 4, "workers": 0}, "workers"),
        ({"global_batch": 4, "window": 0}, "window"),
        ({"global_batch": 4, "window": 1.5}, "window"),
        ({"global_batch": 4, "views": 3}, "views"),
        ({"global_batch": 4, "size": (16, 16)}, "embed-images"),
    ):
        with pytest.raises(SpecError, match=pattern):
            TarLoader(exports["views"], **options)


def test_a_student_learns_the_same_from_tars(cache, source, tmp_path):
    """Steps in one order from both, losses equal to the last bit."""
    export(cache, tmp_path / "x", embed="images", source=source)
    loader = st.Loader(cache, source, global_batch=24, workers=0)

    def losses(batches) -> list[float]:
        torch.manual_seed(0)
        student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(len(cache.classes)))
        found = []
        for number, batch in enumerate(batches):
            loss = st.kd(student(batch.images), batch["logits"], T=4.0)
            if not number:
                optimizer = torch.optim.SGD(student.parameters(), 0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    tars = TarLoader(tmp_path / "x", global_batch=24, workers=2)
    streamed = [batch for _ in range(3) for batch in tars]
    direct = [of_loader(loader, b.index, b.view) for b in streamed]
    assert len(streamed) == 15 and losses(streamed) == losses(direct)
    assert losses(direct)[-1] < losses(direct)[0]
