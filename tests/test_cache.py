"""However a row is asked for, it is the row the teacher spoke of."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import softcache as sc
from softcache import manifest as m
from softcache import reader
from softcache.cache import Cache
from softcache.errors import DamageError, InvalidRow, MismatchError, NoCache, NotBuilt, SourceError, SpecError
from softcache.recipe import Recipe, View, render
from softcache.source import Source
from softcache.testing import ToyImages, make_image_folder, toy_teacher

ALL = np.arange(20)
SHUFFLED = np.random.default_rng(0).permutation(20)
NAMES = ("logits", "map", "vector")


@pytest.fixture(scope="module")
def spoken(small_folder: Path) -> dict[str, np.ndarray]:
    """What the teacher says of every (view, sample), computed here: render, ask, one row at a time."""
    source, recipe, teacher = Source(small_folder), Recipe("random_resized_crop(8)|flip", 0), toy_teacher()
    rows: dict[str, list] = {name: [] for name in NAMES}
    for k in range(2):
        for i, id in enumerate(source.ids):
            image = source.image(i)
            pixels = render(image, recipe.view(id, k, image.shape[1], image.shape[0]), (8, 8))
            for name, values in teacher(pixels[None]).items():
                rows[name].append(values[0])
    return {name: np.stack(r).reshape(2, 20, *r[0].shape) for name, r in rows.items()}


def values(read: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: batch.values.copy() for name, batch in read.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


# -- what is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [0, 1])
def test_rows_are_what_the_teacher_said_of_that_sample_and_view(small_cache: Cache, spoken, view: int):
    found = values(small_cache.read(view, SHUFFLED))
    for name, target in small_cache.targets.items():
        said = spoken[name][view][SHUFFLED]
        fields = target.codec.encode(said)
        assert (np.abs(found[name] - said) <= target.codec.bound(fields, target.shape)).all()
        assert found[name].dtype == np.float32


def test_a_row_alone_is_the_row_of_a_batch(small_cache: Cache):
    for view in range(2):
        together = values(small_cache.read(view, ALL))
        for i in (0, 7, 19):
            row = small_cache[small_cache.ids[i], view]
            assert set(row) == set(NAMES) and len(row) == 3
            assert same({n: row[n].values for n in row}, {n: together[n][i] for n in together})
            assert (row.sample, row.view_number) == (i, view)


def test_views_are_those_the_recipe_makes(small_cache: Cache, small_folder: Path):
    source, recipe = Source(small_folder), Recipe("random_resized_crop(8)|flip", 0)
    for k in range(2):
        views = small_cache.read_views(k, SHUFFLED)
        for i, view in zip(SHUFFLED.tolist(), views, strict=True):
            height, width = source.image(i).shape[:2]
            assert view == recipe.view(source.ids[i], k, width, height) == small_cache[source.ids[i], k].view
            assert isinstance(view, View)


@pytest.mark.filterwarnings("ignore:Object at")  # receipts and manifest stand beside the arrays
def test_zarr_python_reads_every_array_to_the_same_values(small_path: Path, small_cache: Cache):
    group = zarr.open_group(small_path, mode="r")
    arrays = {a.path: a for _, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}
    assert set(small_cache.manifest.constants) | set(small_cache.arrays) == set(arrays)
    positions = small_cache.grid.positions(ALL)
    for path in small_cache.manifest.constants:
        assert np.array_equal(arrays[path][:], small_cache.constant(path))
    for view in range(2):
        found = values(small_cache.read(view, ALL))
        for name, target in small_cache.targets.items():
            fields = {
                f.name: np.asarray(arrays[f"targets/{name}/{f.name}"][view])[positions] for f in target.fields
            }
            assert np.array_equal(target.decode(fields).values, found[name])
        rows = np.asarray(arrays["view/geometry"][view])[positions]
        assert [View.unpack(r) for r in rows] == small_cache.read_views(view, ALL)


def test_zarr_python_sees_names_of_axes(small_path: Path):
    array = zarr.open_group(small_path, mode="r")["targets/map/value"]
    assert isinstance(array, zarr.Array)
    assert array.metadata.dimension_names == ("view", "sample", "axis_0", "axis_1", "axis_2")


def test_a_big_field_is_sharded_and_small_ones_are_not(small_cache: Cache):
    assert {path for path, array in small_cache.arrays.items() if array.big} == {"targets/map/value"}


# -- however it is asked for -----------------------------------------------------------------------------------


def test_slab_and_file_by_file_agree(small_path: Path, monkeypatch):
    slab = [values(sc.open(small_path).read(v, SHUFFLED)) for v in range(2)]
    views = [sc.open(small_path).read_views(v, SHUFFLED) for v in range(2)]
    monkeypatch.setattr(reader, "SLAB_BYTES", 0)
    cache = sc.open(small_path)
    assert all(same(values(cache.read(v, SHUFFLED)), slab[v]) for v in range(2))
    assert [cache.read_views(v, SHUFFLED) for v in range(2)] == views
    assert not cache.reader._slabs


def test_views_may_be_read_in_turns(small_cache: Cache):
    """The slab of one view is kept: asking for another must not give the first one's rows."""
    first, second = values(small_cache.read(0, ALL)), values(small_cache.read(1, ALL))
    assert not same(first, second)
    assert same(values(small_cache.read(0, ALL)), first) and same(values(small_cache.read(1, ALL)), second)


def test_records_of_views_stay_in_memory_while_there_is_room_and_never_take_more(
    small_path: Path, monkeypatch
):
    cache = sc.open(small_path)
    row = sum(a.row_bytes for path, a in cache.arrays.items() if path.startswith("targets/logits/"))
    expected = [values(cache.read(v, ALL, "logits")) for v in range(2)]
    assert {v for _, v in cache.reader._slabs} == {0, 1}
    monkeypatch.setattr(reader, "SLAB_BYTES", row * 20)
    cache = sc.open(small_path)
    for turn in range(400):
        view = 0 if turn < 100 else turn % 2 if turn < 200 else 1
        found = values(cache.read(view, SHUFFLED, "logits"))
        assert same(found, {n: v[SHUFFLED] for n, v in expected[view].items()})
        # read in turns with another, the first stays; once nobody reads it, it goes
        if turn in (0, 199, 399):
            assert [v for _, v in cache.reader._slabs] == [turn == 399]
        assert sum(held.nbytes for held, _ in cache.reader._slabs.values()) <= row * 20


@pytest.mark.parametrize("samples", [[], [3], [5, 5, 5], [19, 0, 19], list(range(19, -1, -1))], ids=str)
def test_any_samples_in_any_order_any_number_of_times(small_cache: Cache, samples: list[int]):
    everything = values(small_cache.read(1, ALL))
    index = np.array(samples, np.int64)
    assert same(values(small_cache.read(1, index)), {n: v[index] for n, v in everything.items()})
    assert len(small_cache.read_views(1, index)) == len(samples)


def test_a_plain_list_of_samples_will_do(small_cache: Cache):
    assert same(values(small_cache.read(0, [2, 1])), values(small_cache.read(0, np.array([2, 1]))))  # type: ignore
    assert small_cache.read(0, []).keys() == set(NAMES)  # type: ignore[arg-type]


def test_only_the_targets_asked_for_are_read(small_copy: Path):
    shutil.rmtree(small_copy / "targets" / "map")
    cache = sc.open(small_copy)
    assert set(cache.read(0, ALL, ["logits"])) == {"logits"}
    assert cache.read(0, ALL, []) == {}
    assert cache[cache.ids[0], 0]["vector"].values.shape == (24,)
    with pytest.raises(DamageError, match="missing"):
        cache.read(0, ALL, ["map"])


def test_a_batch_stays_what_it_is_when_the_next_is_read(small_cache: Cache):
    """The reader's buffer is used again, the values it gave are not."""
    first = small_cache.read(0, np.array([1, 2]))
    before = values(first)
    small_cache.read(1, np.array([3, 4]))
    assert same(values(first), before)


def test_a_batch_may_be_changed_by_who_reads_it(small_cache: Cache):
    first = small_cache.read(0, ALL)
    before = values(first)
    for batch in first.values():
        batch.values[:] = -1
    assert same(values(small_cache.read(0, ALL)), before)


def test_threads_read_what_one_reads(small_path: Path, monkeypatch):
    monkeypatch.setattr(reader, "_OPEN_FILES", 3)
    expected = [values(sc.open(small_path).read(v, ALL)) for v in range(2)]
    cache = sc.open(small_path)

    def use(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            view, samples = int(rng.integers(2)), rng.permutation(20)[:7]
            if not same(
                values(cache.read(view, samples)), {n: v[samples] for n, v in expected[view].items()}
            ):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))


def test_many_big_rows_are_decoded_by_threads(tmp_path: Path):
    """More than a megabyte goes through the pool; the values are the same as row by row."""
    cache = sc.build(
        tmp_path / "c", source=ToyImages(300), teacher=toy_teacher(), targets={"map": "f16"}, progress=False
    )
    samples = np.random.default_rng(1).permutation(300)
    together = cache.read(0, samples)["map"].values
    assert cache.arrays["targets/map/value"].row_bytes * 300 > 1 << 20
    for place in range(0, 300, 23):
        assert np.array_equal(together[place], cache.read(0, samples[place : place + 1])["map"].values[0])


def test_a_cache_survives_a_fork(tmp_path: Path):
    """DataLoader workers are forks; the parent has read, with its threads running, before."""
    code = f"""
    import os, numpy as np, softcache as sc, warnings
    from softcache.testing import ToyImages, toy_teacher
    cache = sc.build({str(tmp_path / "c")!r}, source=ToyImages(300), teacher=toy_teacher(), progress=False,
                     targets={{"map": "f16", "logits": "full(u8)"}})
    samples = np.arange(300)
    before = [cache.read(0, samples)[n].values.copy() for n in ("map", "logits")]
    warnings.simplefilter("ignore")
    pid = os.fork()
    after = [cache.read(0, samples[::-1])[n].values for n in ("map", "logits")]
    assert all(np.array_equal(a[::-1], b) for a, b in zip(after, before))
    if pid == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


# -- names and numbers -----------------------------------------------------------------------------------------


def test_ids_are_in_source_order(small_cache: Cache, small_folder: Path):
    assert tuple(small_cache.ids) == Source(small_folder).ids
    assert [small_cache.index(id) for id in small_cache.ids] == list(range(20))


def test_what_a_cache_says_of_itself(small_cache: Cache):
    assert (len(small_cache), small_cache.samples, small_cache.views) == (20, 20, 2)
    assert small_cache.complete and small_cache.classes == ToyImages.classes
    assert small_cache.digest[:12] in repr(small_cache)
    assert {n: t.spec for n, t in small_cache.targets.items()} == {
        "logits": "full(u8)",
        "map": "int8",
        "vector": "f16",
    }


def test_an_unknown_id_names_a_near_one(small_cache: Cache):
    with pytest.raises(SourceError, match=r"did you mean 'cow/0014\.png'"):
        small_cache["cow/00014.png", 0]
    with pytest.raises(SourceError, match=r"no id 14.*; ids are strings"):
        small_cache.index(14)


def test_an_unknown_target_names_a_near_one(small_cache: Cache):
    with pytest.raises(MismatchError, match="did you mean 'logits'"):
        small_cache.read(0, ALL, ["logit"])


@pytest.mark.parametrize(("view", "samples"), [(2, [0]), (-1, [0]), (0, [20]), (0, [-1]), (0, [0, 99])])
def test_what_is_out_of_range_is_an_error_and_not_another_row(
    small_cache: Cache, view: int, samples: list[int]
):
    for read in (small_cache.read, small_cache.read_views):
        with pytest.raises(IndexError):
            read(view, np.array(samples))


@pytest.mark.parametrize(
    "samples", [np.ones(20, bool), np.array([0.5]), np.array(["ant"])], ids=lambda s: s.dtype
)
def test_samples_are_whole_numbers(small_cache: Cache, samples: np.ndarray):
    with pytest.raises(SpecError, match="whole numbers"):
        small_cache.read(0, samples)


@pytest.mark.parametrize("view", [1.5, 1.0, "0", True, np.True_, None, np.float32(0)], ids=repr)
def test_views_are_whole_numbers(small_cache: Cache, view: Any):
    for read in (lambda: small_cache[small_cache.ids[0], view], lambda: small_cache.read(view, ALL)):
        with pytest.raises(SpecError, match="views are whole numbers, here from 0 to 1"):
            read()


@pytest.mark.parametrize("view", [np.int64(1), np.uint8(1)], ids=repr)
def test_numpys_integers_are_views(small_cache: Cache, view: Any):
    row, same_row = small_cache[small_cache.ids[0], view], small_cache[small_cache.ids[0], 1]
    assert np.array_equal(row["logits"].values, same_row["logits"].values) and row.view == same_row.view


def test_a_string_is_one_name(small_cache: Cache):
    assert list(small_cache.read(0, ALL, "logits")) == ["logits"]
    for names in (3, ["logits", 3]):
        with pytest.raises(SpecError, match="asked for by name, such as 'logits', not as 3"):
            small_cache.read(0, ALL, names)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", ["nothing", "an empty folder", "another folder"])
def test_what_is_no_cache_is_named(tmp_path: Path, make: str):
    path = tmp_path / "x"
    if make != "nothing":
        path.mkdir()
    if make == "another folder":
        (path / "notes.txt").write_text("mine")
    with pytest.raises(NoCache, match=r"is no cache: it (does not exist|is empty|holds no softcache.json)"):
        sc.open(path)


def test_damaged_ids_are_found_by_opening_them(small_copy: Path):
    """Valid bytes with a valid checksum, of other ids."""
    cache = sc.open(small_copy)
    array = cache.manifest.constants["ids/bytes"].array("ids/bytes")
    text = bytearray(cache.constant("ids/bytes").tobytes())
    text[0] = ord("x")
    (small_copy / array.file()).write_bytes(array.encode(np.frombuffer(bytes(text), np.uint8)))
    with pytest.raises(DamageError, match="not the ids of the manifest"):
        _ = sc.open(small_copy).ids


def test_a_missing_shard_is_damage_for_its_rows_only(small_copy: Path):
    cache = sc.open(small_copy)
    gone, here = (cache.grid.samples_of(cache.grid.block(0, i)) for i in (1, 0))
    (small_copy / cache.arrays["targets/map/value"].file(0, 1)).unlink()
    with pytest.raises(DamageError, match="is missing"):
        cache.read(0, gone)
    cache.read(0, here, ["map"])
    cache.read(1, gone, ["map"])


@pytest.mark.parametrize("slab", [True, False])
def test_a_shard_that_vanishes_between_two_reads_is_told_with_what_to_do(small_copy: Path, slab: bool):
    cache = sc.open(small_copy)
    cache.read(0, ALL, slab=slab)
    for array in cache.arrays.values():
        (small_copy / array.file(1, 2)).unlink()
    cache.read(0, ALL, slab=slab)
    for name in NAMES:
        with pytest.raises(DamageError, match=rf"targets/{name}/.*c\.1\.2.* is missing: .*softcache repair"):
            cache.read(1, ALL, [name], slab=slab)


def test_a_shard_that_is_cut_between_two_reads_is_told(small_copy: Path):
    cache = sc.open(small_copy)
    cache.read(0, ALL, slab=False)
    for array in cache.arrays.values():
        if array.path.startswith("targets/"):
            (small_copy / array.file(0, 0)).write_bytes(b"")
    for name in NAMES:
        with pytest.raises(DamageError, match=rf"targets/{name}/.* became shorter .*softcache repair"):
            cache.read(0, ALL, [name], slab=False)


def test_a_view_that_is_in_memory_holds_no_file_open(small_cache: Cache):
    small_cache.read(0, ALL, ["logits", "vector"])
    assert not small_cache.reader._files


def test_files_are_let_go_where_their_indices_take_much_memory(small_path: Path, monkeypatch):
    expected = values(sc.open(small_path).read(0, ALL))
    monkeypatch.setattr(reader, "SLAB_BYTES", 1)
    monkeypatch.setattr(reader, "_KEPT_FILES", 2)
    cache = sc.open(small_path)
    for _ in range(2):
        assert same(values(cache.read(0, SHUFFLED)), {n: v[SHUFFLED] for n, v in expected.items()})
        assert len(cache.reader._files) <= 2


def test_a_link_in_place_of_a_folder_is_damage(small_copy: Path, tmp_path: Path):
    (small_copy / "targets").rename(tmp_path / "elsewhere")
    (small_copy / "targets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamageError, match="is a link"):
        sc.open(small_copy).read(0, ALL)


# -- while it is being built -----------------------------------------------------------------------------------


@pytest.fixture
def unfinished(small_copy: Path) -> Cache:
    """A build that has done block 0 of view 0 only; the other files are there, not committed."""
    (small_copy / m.MANIFEST).unlink()
    for receipt in (small_copy / "receipts").glob("v*.json"):
        if receipt.name != "v0000-b000000.json":
            receipt.unlink()
    return sc.open(small_copy)


def test_whole_blocks_can_be_read_during_a_build(unfinished: Cache, small_cache: Cache):
    samples = unfinished.grid.samples_of(unfinished.grid.block(0, 0))
    assert same(values(unfinished.read(0, samples)), values(small_cache.read(0, samples)))
    assert unfinished.read_views(0, samples) == small_cache.read_views(0, samples)
    assert tuple(unfinished.ids) == tuple(small_cache.ids)
    id = unfinished.ids[samples[0]]
    assert np.array_equal(unfinished[id, 0]["logits"].values, small_cache[id, 0]["logits"].values)


@pytest.mark.parametrize(("view", "index"), [(0, 1), (0, 2), (1, 0)])
def test_blocks_without_a_receipt_are_not_built_though_their_files_are_there(unfinished: Cache, view, index):
    samples = unfinished.grid.samples_of(unfinished.grid.block(view, index))
    for read in (unfinished.read, unfinished.read_views):
        with pytest.raises(NotBuilt, match="not built yet"):
            read(view, samples)
    with pytest.raises(NotBuilt):
        unfinished[unfinished.ids[samples[0]], view]


def test_a_batch_with_one_row_that_is_not_built_is_refused(unfinished: Cache):
    samples = unfinished.grid.samples_of(unfinished.grid.block(0, 0))
    missing = unfinished.grid.samples_of(unfinished.grid.block(0, 1))[:1]
    with pytest.raises(NotBuilt):
        unfinished.read(0, np.concatenate([samples, missing]))


def test_a_block_can_be_read_as_soon_as_it_is_committed(unfinished: Cache, small_path: Path):
    samples = unfinished.grid.samples_of(unfinished.grid.block(1, 2))
    with pytest.raises(NotBuilt):
        unfinished.read(1, samples)
    shutil.copy(small_path / "receipts" / "v0001-b000002.json", unfinished.path / "receipts")
    assert len(unfinished.read(1, samples)["logits"].values) == len(samples)


def test_what_only_a_whole_cache_knows_is_not_built(unfinished: Cache):
    assert not unfinished.complete and "unfinished" in repr(unfinished)
    for what in ("digest", "invalid", "report"):
        with pytest.raises(NotBuilt):
            getattr(unfinished, what)
    with pytest.raises(NotBuilt):
        unfinished.table(0)


# -- rows without an image -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of a folder in which two images were damaged."""
    folder = tmp_path_factory.mktemp("holed")
    images = make_image_folder(folder / "images", per_class=5)
    for id in ("bee/0001.png", "dog/0019.png"):
        (images / id).write_bytes(b"no image")
    return sc.build(
        folder / "cache",
        source=images,
        teacher=toy_teacher(),
        views=2,
        block_rows=8,
        skip_corrupt=True,
        progress=False,
    )


def test_invalid_rows_are_refused_by_name(holed: Cache):
    bad = [holed.ids[i] for i in holed.invalid]
    assert bad == ["bee/0001.png", "dog/0019.png"]
    for view in range(2):
        for read in (holed.read, holed.read_views):
            with pytest.raises(InvalidRow, match=bad[0]):
                read(view, np.arange(20))
        with pytest.raises(InvalidRow, match=bad[1]):
            holed[bad[1], view]


def test_rows_beside_invalid_ones_are_read(holed: Cache):
    good = np.setdiff1d(np.arange(20), holed.invalid)
    assert holed.read(1, good)["logits"].values.shape == (18, 4)


def test_invalid_rows_are_refused_during_the_build_too(holed: Cache, tmp_path: Path):
    path = Path(shutil.copytree(holed.path, tmp_path / "c"))
    (path / m.MANIFEST).unlink()
    cache = sc.open(path)
    good = np.setdiff1d(np.arange(20), holed.invalid)
    assert np.array_equal(cache.read(0, good)["logits"].values, holed.read(0, good)["logits"].values)
    with pytest.raises(InvalidRow):
        cache.read(0, holed.invalid[:1])
