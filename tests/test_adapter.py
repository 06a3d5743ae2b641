"""A dataset with targets: the teacher's very pixels and words, whoever reads them, in whichever process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, Subset, default_collate

import softcache as sc
from softcache import adapter
from softcache.adapter import Item
from softcache.errors import InvalidRow, MismatchError, NotBuilt, SourceError, SpecError
from softcache.keyed import Permutation, in_turn
from softcache.testing import ToyImages, make_image_folder, toy_teacher

VIEWS = 3
SPEC = {"size": [8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "color": "BGR"}


class Teacher(type(toy_teacher())):
    input_spec = SPEC


def build(path: Path, source: Any, **options: Any) -> sc.Cache:
    given = {"recipe": "random_resized_crop(8)|flip", "views": VIEWS, "block_rows": 8, "batch": 4} | options
    return sc.build(path, **{"source": source, "teacher": Teacher(), "progress": False} | given)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> sc.Cache:
    """Three views of 40 images, with logits, a small map and a vector."""
    targets = {"logits": "full(u8)", "map": "int8", "vector": "f16"}
    return build(tmp_path_factory.mktemp("adapter") / "cache", ToyImages(40), targets=targets)


@pytest.fixture
def dataset(cache: sc.Cache):
    return sc.with_targets(ToyImages(40), cache)


def by_index(loader: DataLoader) -> dict[int, dict[str, Any]]:
    """Every row of an epoch by its index."""
    rows = {}
    for batch in loader:
        for i, index in enumerate(batch["index"].tolist()):
            assert index not in rows
            rows[index] = {name: values[i].clone() for name, values in batch.items()}
    return rows


def assert_same(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> None:
    assert a.keys() == b.keys()
    for index in a:
        assert all(torch.equal(a[index][name], b[index][name]) for name in [*a[index], *b[index]])


# -- what an item is -------------------------------------------------------------------------------------------


def test_items_are_the_rendered_views_and_their_targets(cache: sc.Cache, dataset: Any):
    images = ToyImages(40)
    assert len(dataset) == 40 and dataset.samples.tolist() == dataset.positions.tolist() == [*range(40)]
    for epoch in range(VIEWS):
        dataset.set_epoch(epoch)
        for i in range(40):
            item, row = dataset[i], cache[str(i), dataset.view(epoch)]
            assert set(item) == {"image", "label", "logits", "map", "vector", "index", "view"}
            assert (item["index"], item["view"], item["label"]) == (i, dataset.view(epoch), images[i][1])
            pixels = sc.render(images[i][0], row.view, (8, 8))[:, :, ::-1].transpose(2, 0, 1)
            mean, std = (np.array(SPEC[k])[:, None, None] for k in ("mean", "std"))
            np.testing.assert_allclose(item["image"], (pixels / 255.0 - mean) / std, rtol=1e-5, atol=1e-6)
            assert item["image"].dtype == np.float32 and item["image"].shape == (3, 8, 8)
            for name in ("logits", "map", "vector"):
                assert item[name].dtype == np.float32
                np.testing.assert_array_equal(item[name], row[name].values)


def test_items_are_what_the_trainers_loader_gives(cache: sc.Cache, dataset: Any):
    import softcache_train as st

    loader = st.Loader(cache, sc.Source(ToyImages(40)), global_batch=40, seed=5, workers=0)
    dataset = sc.with_targets(ToyImages(40), cache, seed=5)
    for epoch in range(2 * VIEWS):
        dataset.set_epoch(epoch)
        batch = loader.batch(epoch, 0)
        ours = default_collate(dataset.__getitems__(batch.index.tolist()))
        assert torch.equal(ours["image"], batch.images) and torch.equal(ours["label"], batch.labels)
        assert torch.equal(ours["logits"], batch["logits"].values) and (ours["view"] == batch.view).all()


def test_a_batch_goes_to_kd_as_it_is(dataset: Any):
    import softcache_train as st

    batch = next(iter(DataLoader(dataset, batch_size=16)))
    assert batch["logits"].shape == (16, 4) and batch["logits"].dtype == torch.float32
    assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    assert st.kd(batch["logits"], batch["logits"], T=4.0) == 0


@pytest.mark.parametrize("codec", ["topk(2)", "topk(2, tail='spread')", "argmax"])
def test_sparse_and_hard_targets_go_to_kd_as_they_are(tmp_path: Path, codec: str):
    import softcache_train as st

    cache = build(
        tmp_path / "c", ToyImages(20), targets={"logits": codec}, recipe="crop(8, pad=1)|grayscale(0.5)"
    )
    dataset = sc.with_targets(ToyImages(20), cache, seed=2)
    loader = st.Loader(cache, sc.Source(ToyImages(20)), global_batch=20, seed=2, workers=0)
    output = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    for workers in (0, 2):
        dataset.set_epoch(1)
        order = loader.batch(1, 0)
        batch = next(iter(DataLoader(Subset(dataset, order.index), batch_size=20, num_workers=workers)))
        assert torch.equal(batch["image"], order.images)
        assert st.kd(output, batch["logits"], T=2.0) == st.kd(output, order["logits"], T=2.0)


def test_one_item_at_a_time_or_many_is_the_same(cache: sc.Cache):
    """Also where the samples of a batch are at different views."""
    one, many = (sc.with_targets(ToyImages(40), cache) for _ in range(2))
    one[3], many[3], one[12], many[12], one[12], many[12]
    wanted = [7, 3, -1, 12]
    items = many.__getitems__(wanted)
    assert [item["index"] for item in items] == [7, 3, 39, 12]
    assert [item["view"] for item in items] == [one.view(epoch) for epoch in (0, 1, 0, 2)]
    for i, item in zip(wanted, items, strict=True):
        again = one[i]
        assert all(np.array_equal(item[name], again[name]) for name in item)
    with pytest.raises(IndexError):
        one[40]


@pytest.mark.parametrize("recipe", ["resize(8)|mosaic", "resize(8)|mixup(alpha=8)"])
def test_partners_are_decoded_once_while_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
):
    images = Listed([ToyImages(12)[i][0] for i in range(12)], None)
    cache = build(tmp_path / "c", images, recipe=recipe)
    calls: list[int] = []
    decode = sc.Source.image
    monkeypatch.setattr(sc.Source, "image", lambda self, i: calls.append(i) or decode(self, i))

    def two_epochs(dataset: Any) -> list[np.ndarray]:
        calls.clear()
        found = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            found += [dataset[i]["image"] for i in range(12)]
        return found

    dataset = sc.with_targets(images, cache)
    once = two_epochs(dataset)
    assert sorted(calls) == [*range(12)]
    copied = pickle.loads(pickle.dumps(dataset))  # as a worker has it, with a memory of its own
    again = two_epochs(copied)
    assert sorted(calls) == [*range(12)]
    monkeypatch.setattr(adapter, "ROOM", 3 * 20 * 20 * 3)
    tight = two_epochs(sc.with_targets(images, cache))
    assert len(calls) > 24
    for a, b, c in zip(once, again, tight, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_views_of_one_image_keep_nothing_in_memory(dataset: Any):
    for i in range(40):
        dataset[i]
    assert not dataset._decoded.kept


def test_size_is_the_students(cache: sc.Cache):
    dataset = sc.with_targets(ToyImages(40), cache, size=(12, 6))
    dataset.set_epoch(0)
    view = cache.read_views(dataset.view(0), np.array([5]))[0]
    again = sc.with_targets(ToyImages(40), cache, size=(12, 6), transform=np.asarray)
    again.set_epoch(0)
    assert dataset[5]["image"].shape == (3, 12, 6)
    np.testing.assert_array_equal(again[5]["image"], sc.render(ToyImages(40)[5][0], view, (12, 6)))
    assert sc.with_targets(ToyImages(40), cache, size=9)[0]["image"].shape == (3, 9, 9)
    assert sc.with_targets(ToyImages(40), cache, size=np.array([9, 8]))[0]["image"].shape == (3, 9, 8)


@pytest.mark.parametrize("size", [0, -1, (8, 0), (3,), (1, 2, 3), "a", "ab", 1.5, (8.5, 8), True])
def test_what_is_no_size_is_refused(cache: sc.Cache, size: Any):
    with pytest.raises(SpecError, match=re.escape(f"size={size!r}: it is (h, w) in whole pixels")):
        sc.with_targets(ToyImages(40), cache, size=size)


@pytest.mark.parametrize("i", [1.5, True, "1", None])
def test_an_item_has_a_whole_number(dataset: Any, i: Any):
    with pytest.raises(SpecError, match="whole numbers, not"):
        dataset[i]
    assert dataset[np.int64(1)]["index"] == dataset[-39]["index"] == 1


@pytest.mark.parametrize("epoch", [-1, 2**70, 2**63, 1.5, True, "1"])
def test_what_is_no_epoch_is_refused(dataset: Any, epoch: Any):
    dataset.set_epoch(np.int64(2))
    with pytest.raises(SpecError, match="epochs are whole numbers"):
        dataset.set_epoch(epoch)
    assert dataset[0]["view"] == dataset.view(2)


def test_some_targets(cache: sc.Cache):
    item = sc.with_targets(ToyImages(40), cache, targets=["vector"])[0]
    assert set(item) == {"image", "label", "vector", "index", "view"}
    assert "logits" in sc.with_targets(ToyImages(40), cache, targets="logits")[0]
    for wrong in (["logit"], "logit"):
        with pytest.raises(MismatchError, match=r"no target 'logit'.*did you mean 'logits'"):
            sc.with_targets(ToyImages(40), cache, targets=wrong)
    with pytest.raises(SpecError, match="asked for by name, such as 'logits', not as 3"):
        sc.with_targets(ToyImages(40), cache, targets=3)  # type: ignore[arg-type]


def test_a_target_may_not_take_an_items_place(tmp_path: Path):
    def teacher(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"label": toy_teacher()(pixels)["vector"]}

    teacher.input_spec = {"size": (8, 8)}  # pyright: ignore[reportFunctionMemberAccess]
    cache = build(tmp_path / "c", ToyImages(8), teacher=teacher, targets={"label": "f16"})
    with pytest.raises(SpecError, match="a target called 'label'"):
        sc.with_targets(ToyImages(8), cache)


def test_an_item_survives_who_throws_unknown_keys_out_of_dicts(dataset: Any):
    """As Hugging Face's Trainer does, by default: it spares what is not a dict."""
    item = dataset[0]
    assert not isinstance(item, dict)
    assert {**item} == item.data and item.pop("view") == dataset.view(0) and "view" not in item
    batch = default_collate(dataset.__getitems__([0, 1]))
    assert isinstance(batch, Item) and batch.keys() == {**item, "view": 0}.keys()


# -- transforms ------------------------------------------------------------------------------------------------


def shown(image: Image.Image) -> np.ndarray:
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image)


def test_a_transform_is_given_the_rendered_view_as_a_pil_image(cache: sc.Cache):
    dataset = sc.with_targets(ToyImages(40), cache, transform=shown)
    view = cache.read_views(dataset.view(0), np.array([3]))[0]
    np.testing.assert_array_equal(dataset[3]["image"], sc.render(ToyImages(40)[3][0], view, (8, 8)))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_torchvisions_transforms(cache: sc.Cache, version: str):
    transforms = pytest.importorskip("torchvision.transforms" + ".v2" * (version == "v2"))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    if version == "v2":
        to_float = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)]
    else:
        to_float = [transforms.ToTensor()]
    transform = transforms.Compose([*to_float, transforms.Normalize(mean, std)])
    ours = sc.with_targets(ToyImages(40), cache)[4]["image"]  # whose network wants BGR
    theirs = sc.with_targets(ToyImages(40), cache, transform=transform)[4]["image"]
    mine = ours * np.float32(std)[:, None, None] + np.float32(mean)[:, None, None]
    his = theirs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    np.testing.assert_allclose(mine[::-1], his, atol=1e-6)


def test_a_hugging_face_processor(cache: sc.Cache):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    processor = transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image = sc.with_targets(ToyImages(40), cache, transform=processor)[4]["image"]
    pixels = sc.with_targets(ToyImages(40), cache, transform=shown)[4]["image"]
    np.testing.assert_allclose(np.asarray(image), pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-5)


def test_a_transform_that_draws_is_warned_of(cache: sc.Cache):
    transforms = pytest.importorskip("torchvision.transforms")
    inner = transforms.Compose([transforms.RandomCrop(8), transforms.ToTensor()])
    drawing = transforms.Compose([inner, transforms.ColorJitter(0.1)])
    with pytest.warns(UserWarning, match="has RandomCrop, ColorJitter, which draws anew"):
        sc.with_targets(ToyImages(40), cache, transform=drawing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sc.with_targets(ToyImages(40), cache, transform=transforms.ToTensor())


# -- which view ------------------------------------------------------------------------------------------------


def test_taking_turns():
    for n in (1, 2, 7):
        rounds = [[in_turn(n, r * n + i, "k", 3) for i in range(n)] for r in range(20)]
        assert all(sorted(r) == [*range(n)] for r in rounds)
        assert len({tuple(r) for r in rounds}) > 1 or n == 1
        expected = Permutation(n, "k", 3, 0).inverse(np.arange(n)).tolist()
        assert rounds[0] == expected


def test_without_an_epoch_every_reading_shows_the_next_view(dataset: Any):
    seen = [[dataset[i]["view"] for _ in range(2 * VIEWS)] for i in (0, 11)]
    assert seen[0] == seen[1] == [dataset.view(epoch) for epoch in range(2 * VIEWS)]
    assert sorted(seen[0][:VIEWS]) == sorted(seen[0][VIEWS:]) == [*range(VIEWS)]


def test_an_epoch_is_obeyed_until_the_next(dataset: Any):
    for epoch in (4, 0, 2, 2):
        dataset.set_epoch(epoch)
        assert {dataset[i]["view"] for i in (0, 0, 7)} == {dataset.view(epoch)}
    with pytest.raises(SpecError, match="epoch -1"):
        dataset.set_epoch(-1)


def test_seeds_give_other_orders(cache: sc.Cache):
    orders = [
        [sc.with_targets(ToyImages(40), cache, seed=seed).view(e) for e in range(30)] for seed in range(2)
    ]
    assert orders[0] != orders[1]


# -- processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_one_process_gives(cache: sc.Cache, start: str):
    """After a read in the parent; and in persistent workers, which are told of an epoch when they have long begun."""
    alone, shared = (sc.with_targets(ToyImages(40), sc.open(cache.path)) for _ in range(2))
    shared.cache.read(0, np.arange(40))
    workers: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": start, "persistent_workers": True}
    one = DataLoader(alone, batch_size=6, shuffle=True)
    many = DataLoader(shared, batch_size=6, shuffle=True, **workers)
    for told, epoch in ((False, 0), (False, 1), (True, 5), (True, 0)):
        if told:
            alone.set_epoch(epoch)
            shared.set_epoch(epoch)
        rows = by_index(many)
        assert_same(by_index(one), rows)
        assert {int(row["view"]) for row in rows.values()} == {alone.view(epoch)} and len(rows) == 40


def test_workers_that_do_not_persist_count_on(dataset: Any):
    loader = DataLoader(dataset, batch_size=6, num_workers=2)
    for epoch in range(VIEWS + 1):
        assert {int(row["view"]) for row in by_index(loader).values()} == {dataset.view(epoch)}


def test_subsets(dataset: Any):
    part = Subset(dataset, [30, 2, 8])
    rows = by_index(DataLoader(part, batch_size=2, num_workers=2))
    assert rows.keys() == {30, 2, 8} and {int(r["view"]) for r in rows.values()} == {dataset.view(0)}
    assert dataset[30]["view"] == dataset.view(1) and dataset[31]["view"] == dataset.view(0)


def test_several_caches_opened_as_one(cache: sc.Cache, tmp_path: Path):
    """And opened again where they were not inherited."""
    build(tmp_path / "b", ToyImages(40), batch=5)
    both = sc.open([cache.path, tmp_path / "b"])
    dataset = sc.with_targets(ToyImages(40), both, targets=["0.logits", "1.logits"])
    for one in (dataset, pickle.loads(pickle.dumps(dataset))):
        one.set_epoch(1)
        said = both.read(one.view(1), np.array([9]))
        assert all(np.array_equal(one[9][name], said[name].values[0]) for name in ("0.logits", "1.logits"))


def test_copies_are_their_own(dataset: Any):
    dataset.set_epoch(1)
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        other.set_epoch(2)
        assert other[3]["view"] == other.view(2) and dataset[3]["view"] == dataset.view(1)
        dataset.set_epoch(1), other.set_epoch(1)
        assert all(np.array_equal(other[i][name], dataset[i][name]) for i in (0, 39) for name in dataset[i])


def test_a_copy_goes_on_counting(dataset: Any):
    dataset[3], dataset[3]
    other = pickle.loads(pickle.dumps(dataset))
    assert other[3]["view"] == dataset[3]["view"] == dataset.view(2)


def test_another_cache_in_the_folder_is_told(cache: sc.Cache, tmp_path: Path):
    folder = Path(shutil.copytree(cache.path, tmp_path / "c"))
    data = pickle.dumps(sc.with_targets(ToyImages(40), sc.open(folder)))
    shutil.rmtree(folder)
    build(folder, ToyImages(40), seed=1)
    with pytest.raises(MismatchError, match="holds another cache"):
        pickle.loads(data)[0]


def children() -> set[int]:
    """The processes that this one has begun and not yet seen end."""
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def test_a_killed_worker_is_told_and_leaves_no_harm(cache: sc.Cache, dataset: Any):
    before = children()
    loader = DataLoader(dataset, batch_size=2, num_workers=2, prefetch_factor=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker.*(killed by signal|exited unexpectedly)"):
        for _ in loader:
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
    assert sc.verify(cache, read_data=True) == []
    dataset.set_epoch(1)
    rows = by_index(loader)
    assert len(rows) == 40 and {int(row["view"]) for row in rows.values()} == {dataset.view(1)}


class Many:
    """So many tiny images, with labels in an array."""

    classes = ("ant", "bee", "cow", "dog")

    def __init__(self, n: int):
        self.targets = np.arange(n) % 4
        self.pool = np.random.default_rng(0).integers(0, 256, (97, 8, 8, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.pool[i % 97], int(self.targets[i])


def private_mb(pid: int) -> float:
    """What a process has written to and shares with nobody, in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(n) for n in re.findall(r"Private_Dirty: +(\d+) kB", text)) / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.slow
def test_memory_is_flat_over_three_epochs(tmp_path: Path):
    """100,000 rows: their ids alone, once their pages are copied (as counting references does), are 6 MB a worker."""
    rows = 100_000
    teacher = Teacher()
    cache = build(
        tmp_path / "c", Many(rows), teacher=teacher, recipe="identity", batch=2048, block_rows=20_000
    )
    dataset = sc.with_targets(Many(rows), cache)
    sampler = RandomSampler(dataset, num_samples=5_000)
    before = children()
    loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=2, persistent_workers=True)
    start: dict[int, float] = {}
    for epoch in range(3):
        if epoch:
            dataset.set_epoch(epoch)
        for step, _ in enumerate(loader):
            if epoch == 0 and step == 20:
                start = {pid: private_mb(pid) for pid in {os.getpid(), *children() - before}}
    assert len(start) == 3
    grown = {pid: private_mb(pid) - mb for pid, mb in start.items()}
    assert max(grown.values()) < 3, grown


# -- what does not belong together -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("adapter") / "images", per_class=5)


@pytest.fixture(scope="module")
def of_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> sc.Cache:
    return build(tmp_path_factory.mktemp("adapter") / "files", folder)


def test_a_python_dataset_of_files_needs_their_ids(folder: Path, of_files: sc.Cache):
    torchvision = pytest.importorskip("torchvision")
    images = torchvision.datasets.ImageFolder(str(folder))
    with pytest.raises(MismatchError, match=r"called '0', '1', ….*'ant/0000\.png'.*Source\(dataset, ids="):
        sc.with_targets(images, of_files)
    ids = [Path(path).relative_to(folder).as_posix() for path, _ in images.samples]
    dataset = sc.with_targets(sc.Source(images, ids=ids), of_files)
    files = sc.with_targets(sc.Source(folder), of_files)
    dataset.set_epoch(0), files.set_epoch(0)
    for i in range(20):
        mine, theirs = dataset[i], files[i]
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_ids_are_one_for_each(folder: Path):
    with pytest.raises(SourceError, match="3 ids for a dataset of 4 items"):
        sc.Source(ToyImages(4), ids=["a", "b", "c"])
    with pytest.raises(SourceError, match="two samples called 'a'"):
        sc.Source(ToyImages(2), ids=["a", "a"])
    with pytest.raises(SourceError, match="has ids of its own"):
        sc.Source(folder, ids=["a"])


def test_items_in_another_order_are_found_by_id(cache: sc.Cache):
    order = np.random.default_rng(0).permutation(40)
    images = ToyImages(40)
    shuffled = Listed([images[i] for i in order])
    dataset = sc.with_targets(sc.Source(shuffled, ids=[str(i) for i in order]), cache)
    straight = sc.with_targets(images, cache)
    assert dataset.samples.tolist() == order.tolist() and dataset.positions.tolist() == [*range(40)]
    dataset.set_epoch(0), straight.set_epoch(0)
    for i in range(40):
        mine, theirs = dataset[i], straight[int(order[i])]
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


class Listed:
    def __init__(self, items: list[Any], classes: tuple[str, ...] | None = ToyImages.classes):
        self.items = items
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def test_a_part_of_the_dataset_is_taken_afterwards(cache: sc.Cache):
    with pytest.raises(MismatchError, match=r"10 images and the cache .* 40: .*\.Subset"):
        sc.with_targets(Subset(ToyImages(40), range(10)), cache)


def test_normalised_tensors_are_no_images(cache: sc.Cache):
    items = [(torch.from_numpy(x.transpose(2, 0, 1).copy()) / 255, y) for x, y in ToyImages(40)]  # pyright: ignore
    with pytest.raises(SourceError, match=r"float32 images.* leave out ToTensor"):
        sc.with_targets(Listed(items), cache)


def test_other_images_are_refused(cache: sc.Cache):
    images = ToyImages(40)
    swapped = [(255 - image, label) for image, label in (images[i] for i in range(40))]
    with pytest.raises(MismatchError, match=r"pixels of .* are not those"):
        sc.with_targets(Listed(swapped), cache)


def test_classes_are_matched_by_name(cache: sc.Cache):
    images = ToyImages(40)
    names = tuple(reversed(ToyImages.classes))
    turned = Listed([(image, 3 - label) for image, label in (images[i] for i in range(40))], names)
    dataset = sc.with_targets(turned, cache)
    assert [dataset[i]["label"] for i in range(40)] == images.targets
    with pytest.raises(MismatchError, match="class 'eel' is not one of the cache's"):
        sc.with_targets(Listed(turned.items, ("ant", "bee", "cow", "eel")), cache)


def test_other_labels_are_warned_of(cache: sc.Cache):
    images = ToyImages(40)
    wrong = Listed([(image, 3 - label) for image, label in (images[i] for i in range(40))], None)
    with pytest.warns(UserWarning, match="labels are not those the cache was built with"):
        sc.with_targets(wrong, cache)


def test_dicts_and_images_without_labels(cache: sc.Cache):
    images = [ToyImages(40)[i] for i in range(40)]
    named = sc.with_targets(Listed([{"img": Image.fromarray(x), "label": y} for x, y in images]), cache)
    bare = sc.with_targets(Listed([Image.fromarray(x) for x, _ in images]), cache)
    assert named[6]["label"] == images[6][1] and bare[6]["label"] == -1
    np.testing.assert_array_equal(bare[6]["logits"], cache["6", bare.view(1)]["logits"].values)


def test_an_unfinished_cache(tmp_path: Path):
    cache = build(tmp_path / "c", ToyImages(8))
    (cache.path / "softcache.json").unlink()
    with pytest.raises(NotBuilt, match="not finished"):
        sc.with_targets(ToyImages(8), sc.open(cache.path))


def test_images_without_targets_are_left_out(tmp_path: Path):
    """Unreadable ones, and those that the cache never had."""
    images = make_image_folder(tmp_path / "images", per_class=5)
    (images / "cow" / "0006.png").write_bytes(b"")
    cache = build(tmp_path / "c", sc.Source(images, limit=15), skip_corrupt=True)
    invalid = [cache.ids[i] for i in cache.invalid]
    source = sc.Source(images)
    dataset = sc.with_targets(source, cache)
    wanted = [i for i, id in enumerate(source.ids) if id in cache.ids and id not in invalid]
    assert dataset.positions.tolist() == wanted and len(dataset) == len(wanted) == 15 - len(invalid)
    assert [cache.ids[s] for s in dataset.samples] == [source.ids[i] for i in wanted]
    assert f"{20 - len(wanted)} of the dataset left out" in repr(dataset)
    rows = by_index(DataLoader(dataset, batch_size=4, num_workers=2))
    assert rows.keys() == set(dataset.samples.tolist())
    for bad in cache.invalid:
        with pytest.raises(InvalidRow):
            cache.read(0, np.array([bad]))


def test_an_image_lost_in_mid_epoch_is_named(tmp_path: Path):
    images = make_image_folder(tmp_path / "images", per_class=5)
    dataset = sc.with_targets(images, build(tmp_path / "c", images))
    (images / "ant" / "0004.png").unlink()
    with pytest.raises(SourceError, match=r"ant/0004\.png"):
        by_index(DataLoader(dataset, batch_size=4, num_workers=2))
