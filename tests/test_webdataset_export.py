"""A cache as tars: the same bytes every time, read by stock software, by us at random, and back to the very cache."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import softcache as sc
from softcache import cli, licences, spec, tars
from softcache import manifest as m
from softcache.errors import DamageError, MismatchError, NotBuilt, SpecError, StoreError
from softcache.exchange.webdataset import export, restore
from softcache.members import plain_names
from softcache.recipe import gather, render
from softcache.store import Store
from softcache.testing import DAMAGES, FullDisk, ToyImages, flip_bit, make_image_folder, toy_teacher
from softcache.ustar import MOST, header, npy_header
from softcache.zarrfile import Array

EMBEDS = ("nothing", "images", "views")


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def exports(
    small_path: Path, small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The small cache, exported in each way. Copy them before you change them."""
    cache, source, root = sc.open(small_path), sc.Source(small_folder), tmp_path_factory.mktemp("tars")
    for embed in EMBEDS:
        export(cache, root / embed, embed=embed, source=source)
    return {embed: root / embed for embed in EMBEDS}


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache whose views show several images each, and its images."""
    images = make_image_folder(tmp_path_factory.mktemp("tiles"), per_class=3)
    path = tmp_path_factory.mktemp("mosaics") / "cache"
    options: dict[str, Any] = {
        "targets": {"logits": "topk(2)", "vector": "int8"},
        "views": 2,
        "block_rows": 5,
    }
    recipe = "resize(8)|center_crop(8)|mosaic|mixup(0.4)"
    sc.build(path, source=images, teacher=toy_teacher(), recipe=recipe, batch=4, progress=False, **options)
    return path, images


# -- headers -------------------------------------------------------------------------------------------------


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789-_./", min_size=1, max_size=100), st.integers(0, MOST))
def test_a_header_is_what_tarfile_writes(name: str, size: int):
    info = tarfile.TarInfo(name)
    info.size = size
    ours, theirs = (
        tarfile.TarInfo.frombuf(raw, "ascii", "strict").get_info()
        for raw in (header(name, size), info.tobuf(tarfile.USTAR_FORMAT))
    )
    assert {**ours, "chksum": 0} == {
        **theirs,
        "chksum": 0,
    }  # of devices' numbers tarfile writes nothing or zeros
    assert header(name, size)[257:265] == b"ustar\x0000"


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 1), ("x", MOST + 1)])
def test_what_ustar_cannot_hold_is_refused(name: str, size: int):
    with pytest.raises(SpecError, match="does not hold"):
        header(name, size)


@given(
    st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float32"]),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
)
def test_an_npy_header_is_read_by_numpy(dtype: str, shape: tuple[int, ...]):
    values = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    found = np.load(io.BytesIO(npy_header(dtype, shape) + values.tobytes()), allow_pickle=False)
    assert found.dtype == values.dtype and found.shape == shape and np.array_equal(found, values)
    assert len(npy_header(dtype, shape)) % 64 == 0


@given(st.lists(st.text("ab./-_", min_size=1, max_size=120), unique=True, max_size=30))
def test_names_of_arrays_have_no_dots_and_are_each_another(paths: list[str]):
    found = plain_names(paths)
    assert len(set(found.values())) == len(paths)
    assert all("." not in name and "/" not in name and len(name) <= 48 for name in found.values())


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed", EMBEDS)
def test_an_export_is_the_same_bytes_every_time(embed: str, exports, small_path, small_folder, tmp_path):
    export(sc.open(small_path), tmp_path / "again", embed=embed, source=sc.Source(small_folder))
    assert tree(tmp_path / "again") == tree(exports[embed])


def test_tars_hold_plain_files_without_owner_or_time(exports):
    for path in exports["images"].glob("tars/*.tar"):
        with tarfile.open(path, "r:") as tar:
            found = tar.getmembers()
            assert tar.format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT) and not tar.pax_headers
        assert len(found) > 10
        for one in found:
            assert one.isreg() and not one.pax_headers
            assert (one.mode, one.uid, one.gid, one.mtime, one.uname, one.gname) == (0o644, 0, 0, 0, "", "")
            assert one.name.partition(".")[0].startswith(path.stem) and one.name.isascii()


@pytest.mark.parametrize("embed", ["images", "views"])
def test_stock_webdataset_reads_targets_and_pixels(embed: str, exports, small_cache, small_folder):
    wds = pytest.importorskip("webdataset")
    source, cache = sc.Source(small_folder), small_cache
    urls = [str(p) for p in sorted(exports[embed].glob("tars/*.tar"))]
    block, row, seen = {}, 0, 0
    for sample in wds.WebDataset(urls, shardshuffle=False).decode("rgb8"):
        assert "." not in sample["__key__"]
        if "ids.json" in sample:
            block, row = sample, 0
            view = int(sample["__key__"][1:5])
            numbers = np.array([cache.index(id) for id in sample["ids.json"]])
            stored = cache.reader.fields("targets/map", view, cache.grid.positions(numbers))
            assert np.array_equal(sample["targets-map-value.npy"], stored["value"])
            assert sample["targets-map-value.npy"].dtype == np.int8
            continue
        told = sample["json"]
        number = cache.index(told["id"])
        assert told["id"] == block["ids.json"][row] and told["sample"] == number
        assert told["label"] == source.label(told["id"]) == block["label.npy"][row]
        assert cache.classes is not None and told["class"] == cache.classes[told["label"]]
        assert told["geometry"] == list(cache.read_views(told["view"], np.array([number]))[0].pack())
        low, step, value = (block[f"targets-logits-{f}.npy"][row] for f in ("low", "step", "value"))
        logits = cache.read(told["view"], np.array([number]), "logits")["logits"].values[0]
        assert np.array_equal(np.float32(low) + np.float32(step) * value, logits)
        image, view = source.image(number), cache.read_views(told["view"], np.array([number]))[0]
        expected = image if embed == "images" else render(image, view, (8, 8))
        assert np.array_equal(sample["png" if embed == "images" else "pixels.npy"], expected)
        row, seen = row + 1, seen + 1
    assert seen == 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_images_keep_their_bytes_and_get_an_extension_that_fits(kind: str, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png", format=kind)  # whatever they are called
    source = sc.Source(images)
    cache = sc.build(tmp_path / "c", source=source, teacher=toy_teacher(), batch=4, progress=False)
    export(cache, tmp_path / "x", embed="images", source=source)
    with tarfile.open(tmp_path / "x/tars/v0000-b000000.tar") as tar:
        found = [one for one in tar if "-r" in one.name and not one.name.endswith(".json")]
        contents = {tar.extractfile(one).read() for one in found}  # pyright: ignore[reportOptionalMemberAccess]
    assert contents == {path.read_bytes() for path in images.iterdir()}
    (extension,) = {Path(one.name).suffix for one in found}
    assert Image.registered_extensions()[extension] == kind


# -- read again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed", EMBEDS)
def test_an_export_opens_as_the_cache(embed: str, exports, small_cache, small_folder):
    found = sc.open(exports[embed])
    assert found.digest == small_cache.digest and found.ids == small_cache.ids
    for view in range(2):
        order = np.random.default_rng(view).permutation(20)
        ours, theirs = found.read(view, order), small_cache.read(view, order, slab=False)
        for name in theirs:
            assert np.array_equal(ours[name].values, theirs[name].values)
        assert found.read_views(view, order) == small_cache.read_views(view, order)
    assert "pixels equal" in sc.pair(found, sc.Source(small_folder)).message
    assert sc.verify(found) == sc.verify(found, read_data=True) == []


@pytest.mark.parametrize("embed", EMBEDS)
def test_a_cache_comes_back_byte_for_byte(embed: str, exports, small_path, tmp_path):
    assert restore(exports[embed], tmp_path / "back").digest == sc.open(small_path).digest
    assert tree(tmp_path / "back") == tree(small_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "back").rglob("*")}
    restore(exports[embed], tmp_path / "back")  # nothing is left to do
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "back").rglob("*")}


def test_a_cache_of_another_manifest_is_not_replaced(exports, small_copy: Path):
    ours = sc.open(exports["nothing"]).digest
    stated = licences.state(sc.open(small_copy), ["source=CC0-1.0"]).digest
    before = tree(small_copy)
    with pytest.raises(MismatchError, match=f"another cache, {stated}, and this is {ours}"):
        restore(exports["nothing"], small_copy)
    assert tree(small_copy) == before


@pytest.mark.parametrize("embed", ["nothing", "views"])
def test_mosaics_and_mixes_come_back_and_their_pixels_are_what_was_seen(embed: str, mosaics, tmp_path):
    path, images = mosaics
    cache, source = sc.open(path), sc.Source(images)
    export(cache, tmp_path / "x", embed=embed, source=source)
    restore(tmp_path / "x", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path)
    if embed == "nothing":
        return
    with tarfile.open(tmp_path / "x" / "tars" / "v0001-b000000.tar") as tar:
        names = [n.removesuffix(".json") for n in tar.getnames() if "-r" in n and n.endswith(".json")]
        for name in names:
            told = json.load(tar.extractfile(f"{name}.json"))  # pyright: ignore[reportArgumentType]
            view = cache.read_views(1, np.array([told["sample"]]))[0]
            pixels = np.load(io.BytesIO(tar.extractfile(f"{name}.pixels.npy").read()))  # pyright: ignore
            shown = gather(told["sample"], view, source.image)
            assert np.array_equal(pixels, render(shown[told["sample"]], view, (8, 8), shown))
    assert len(names) == 5


def test_invalid_samples_have_no_pixels_and_come_back(small_folder, tmp_path):
    images = Path(shutil.copytree(small_folder, tmp_path / "images"))
    bad = sorted(images.rglob("*.png"))[3]
    bad.write_bytes(b"no image")
    options: dict[str, Any] = {"views": 2, "block_rows": 8, "batch": 4, "progress": False}
    cache = sc.build(tmp_path / "c", source=images, teacher=toy_teacher(), skip_corrupt=True, **options)
    assert len(cache.invalid) == 1
    export(cache, tmp_path / "x", embed="images", source=sc.Source(images))
    seen = 0
    for path in (tmp_path / "x").glob("tars/v0000*.tar"):
        with tarfile.open(path) as tar:
            seen += sum(name.endswith(".png") for name in tar.getnames())
    assert seen == 19
    restore(tmp_path / "x", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "c")


# -- resumed, refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 3_000, 40_000, 90_000])
def test_a_full_disk_is_told_and_the_same_call_goes_on(
    capacity: int, exports, small_cache, small_folder, tmp_path
):
    source, out = sc.Source(small_folder), tmp_path / "x"
    with pytest.raises(StoreError, match="disk is full"):
        export(small_cache, Store(out, FullDisk(capacity)), embed="views", source=source)
    with pytest.raises(sc.SoftcacheError):
        sc.open(out)
    done = {p: p.stat().st_mtime_ns for p in out.glob("tars/*.tar") if p.with_suffix(".index").exists()}
    export(small_cache, out, embed="views", source=source)
    assert tree(out) == tree(exports["views"])
    assert done.items() <= {p: p.stat().st_mtime_ns for p in out.glob("tars/*")}.items()


def test_a_folder_with_something_else_in_it_is_refused(exports, small_path, small_cache, tmp_path):
    for out in (small_path, exports["images"]):  # a cache, another export
        before = tree(out)
        with pytest.raises(SpecError, match=r"choose an empty folder|write beside it"):
            export(small_cache, out)
        assert tree(out) == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"mine\.txt"):
        export(small_cache, tmp_path)
    with pytest.raises(SpecError, match=r"mine\.txt"):
        restore(exports["nothing"], tmp_path)


def test_what_is_no_finished_cache_is_not_exported(exports, small_copy, small_path, tmp_path):
    with pytest.raises(SpecError, match="import it first"):
        export(sc.open(exports["nothing"]), tmp_path / "x")
    with pytest.raises(SpecError, match="export each by itself"):
        export(sc.open([small_path]), tmp_path / "x")
    with pytest.raises(SpecError, match="no export"):
        restore(small_path, tmp_path / "x")
    (small_copy / "softcache.json").unlink()
    with pytest.raises(NotBuilt, match="not finished"):
        export(sc.open(small_copy), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("where", [".", "inside", "targets/inside", ".."])
@pytest.mark.parametrize("kind", ["webdataset", "hdf5"])
def test_nothing_is_exported_into_a_cache_or_around_it(
    kind: str, where: str, small_copy: Path, tmp_path: Path, capsys
):
    before = tree(tmp_path)
    assert cli.main(["export", str(small_copy), "--to", kind, "-o", str(small_copy / where)]) == 1
    assert "its own files only: write beside it" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_an_export_is_imported_before_it_is_exported_again(exports, tmp_path, capsys):
    for kind in ("webdataset", "hdf5"):
        words = ["export", str(exports["views"]), "--to", kind, "-o", str(tmp_path / "out")]
        assert cli.main(words) == 1 and "softcache import it first" in capsys.readouterr().err


def test_a_tar_loader_of_no_export_says_so(tmp_path):
    pytest.importorskip("torch")
    import softcache_train as st

    for where in (tmp_path, tmp_path / "nothere"):
        with pytest.raises(SpecError, match="is no export: softcache export"):
            st.TarLoader(where, global_batch=4)


def test_nothing_is_built_into_an_export_or_stated_in_it(exports, small_folder):
    before = tree(exports["views"])
    with pytest.raises(MismatchError, match="export to tars"):
        sc.build(exports["views"], source=small_folder, teacher=toy_teacher(), progress=False)
    with pytest.raises(SpecError, match="export to tars"):
        licences.state(sc.open(exports["views"]), ["cache=MIT"])
    assert tree(exports["views"]) == before


def test_another_source_is_not_embedded(small_cache, small_folder, mosaics, tmp_path):
    with pytest.raises(SpecError, match="--source"):
        export(small_cache, tmp_path / "x", embed="images")
    other = sc.Source(make_image_folder(tmp_path / "other", per_class=5, seed=1))
    with pytest.raises(MismatchError):
        export(small_cache, tmp_path / "x", embed="images", source=other)
    images = Path(shutil.copytree(small_folder, tmp_path / "images"))
    one = sorted(images.rglob("*.png"))[0]
    one.write_bytes(one.read_bytes() + b"\0")  # the same pixels in other bytes
    with pytest.raises(MismatchError, match="not what it was"):
        export(small_cache, tmp_path / "x", embed="images", source=sc.Source(images))
    with pytest.raises(SpecError, match="--embed-views"):
        export(sc.open(mosaics[0]), tmp_path / "x", embed="images", source=sc.Source(mosaics[1]))
    assert not (tmp_path / "x").exists()


def test_images_without_bytes_are_told_to_be_embedded_as_views(tmp_path):
    cache = sc.build(tmp_path / "c", source=ToyImages(8), teacher=toy_teacher(), batch=4, progress=False)
    with pytest.raises(sc.SoftcacheError, match="--embed-views"):
        export(cache, tmp_path / "x", embed="images", source=sc.Source(ToyImages(8)))
    export(cache, tmp_path / "y", embed="views", source=sc.Source(ToyImages(8)))


def test_a_damaged_cache_is_not_exported(small_copy, tmp_path):
    flip_bit(small_copy / "targets/map/value/c.1.1.0.0.0", 100)
    with pytest.raises(DamageError, match=r"c\.1\.1"):
        export(sc.open(small_copy), tmp_path / "x")


# -- damage --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(exports, tmp_path) -> Path:
    return Path(shutil.copytree(exports["images"], tmp_path / "copy"))


@pytest.mark.parametrize("damage", sorted(DAMAGES))
@pytest.mark.parametrize(
    "name", ["tars/v0001-b000001.tar", "tars/v0001-b000001.index", "tars.bin", "ids/bytes/c.0", "files.bin"]
)
def test_damage_is_named(name: str, damage: str, copy: Path):
    DAMAGES[damage](copy / name)
    if damage == "zero" and (copy / name).read_bytes() == b"":
        return
    found = sc.verify(copy, read_data=True)
    assert [d.file for d in found if d.file == name], found
    assert {d.file for d in found} <= {name, f"{name}.aside"}


def test_every_bit_matters(exports, tmp_path):
    """A bit in every stretch of a tar, and in its index and tables."""
    copy = Path(shutil.copytree(exports["nothing"], tmp_path / "copy"))
    rng = np.random.default_rng(0)
    for name in ("tars/v0000-b000002.tar", "tars/v0000-b000002.index", "tars.bin"):
        size = (copy / name).stat().st_size
        for bit in {*rng.integers(0, 8 * size, 25).tolist(), 0, 8 * size - 1}:
            flip_bit(copy / name, bit)
            assert [d.file for d in sc.verify(copy, read_data=True)] == [name], bit
            flip_bit(copy / name, bit)
    assert sc.verify(copy, read_data=True) == []


def test_a_tar_that_is_cut_or_padded_is_found_by_its_size(copy: Path):
    path = copy / "tars/v0000-b000001.tar"
    whole = path.read_bytes()
    for end in range(0, len(whole), 512):
        path.write_bytes(whole[:end])
        assert [d.file for d in sc.verify(copy)] == ["tars/v0000-b000001.tar"]
    path.write_bytes(whole + bytes(10240))
    assert "bytes" in sc.verify(copy)[0].problem
    with pytest.raises(DamageError, match=r"v0000-b000001\.tar"):
        sc.open(copy).read(0, np.arange(20))


def test_swapped_tars_are_found(copy: Path):
    a, b = copy / "tars/v0000-b000000.tar", copy / "tars/v0000-b000001.tar"
    a.rename(copy / "aside")
    b.rename(a)
    (copy / "aside").rename(b)
    found = [d.file for d in sc.verify(copy, read_data=True)]
    assert found == ["tars/v0000-b000000.tar", "tars/v0000-b000001.tar"]


def test_random_access_finds_a_flipped_bit(copy: Path):
    path = copy / "tars/v0000-b000001.tar"
    at = path.read_bytes().index(b"targets-vector-value.npy") + 700
    flip_bit(path, 8 * at)
    with pytest.raises(DamageError, match=r"v0000-b000001\.tar.*targets-vector-value\.npy"):
        sc.open(copy).read(0, np.arange(20), "vector")


# -- made by somebody who wants us harm: every digest of the tars is right -------------------------------------


def reseal(root: Path, block: str, tar: bytes, places: np.ndarray | None = None) -> None:
    """Put a tar (and index) in place, all digests made anew."""
    cache = sc.open(root)
    assert cache.tars
    index = (root / f"tars/{block}.index").read_bytes()
    head = np.frombuffer(index, tars.HEAD, 1).copy()
    if places is None:
        places = np.frombuffer(index, tars.PLACE, offset=tars.HEAD.itemsize)
    head["tar"]["sha256"], head["tar"]["bytes"] = np.void(bytes.fromhex(spec.digest(tar))), len(tar)
    index = head.tobytes() + places.tobytes()
    table = cache.tars.table.copy()
    number = [b.name for b in cache.grid.blocks()].index(block)
    table[number]["tar"] = head["tar"][0]
    table[number]["index"]["sha256"] = np.void(bytes.fromhex(spec.digest(index)))
    table[number]["index"]["bytes"] = len(index)
    sealed = cache.tars.manifest.model_copy(
        update={"table": m.Entry(sha256=spec.digest(table.tobytes()), bytes=table.nbytes)}
    ).signed()
    (root / f"tars/{block}.tar").write_bytes(tar)
    (root / f"tars/{block}.index").write_bytes(index)
    (root / "tars.bin").write_bytes(table.tobytes())
    (root / "tars.json").write_bytes(sealed.to_bytes())


def refused(root: Path, block: str, pattern: str) -> None:
    """By everything that reads a tar."""
    for read in (
        lambda: sc.open(root).read(int(block[1:5]), np.arange(20)),
        lambda: restore(root, root.with_name("back")),
    ):
        with pytest.raises(DamageError, match=pattern):
            read()
    found = sc.verify(root, read_data=True)
    assert {d.file.split(".")[0] for d in found} == {f"tars/{block}"}
    assert not root.with_name("escaped").exists()


BLOCK = "v0001-b000000"
FIRST_ARRAY = 2  # after the receipt and the ids


def odd(info: tarfile.TarInfo, **changes: Any) -> bytes:
    """The header of a member with something else in it."""
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


HEADERS: dict[str, dict[str, Any]] = {
    "absolute": {"name": "/etc/passwd"},
    "escape": {"name": "../../escaped"},
    "symlink": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "v0001-b000000.ids.json"},
    "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "fifo": {"type": tarfile.FIFOTYPE},
    "folder": {"type": tarfile.DIRTYPE},
    "GNU long name": {"type": tarfile.GNUTYPE_LONGNAME},
    "PAX": {"type": tarfile.XHDTYPE},
    "global PAX": {"type": tarfile.XGLTYPE},
    "sparse": {"type": tarfile.GNUTYPE_SPARSE},
    "size that lies": {"size": 1 << 40},
    "no size": {"size": 0},
    "duplicate": {"name": "v0001-b000000.ids.json"},
    "another owner": {"uid": 1000},
    "a time": {"mtime": 1.0},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(kind: str, copy: Path):
    path = copy / f"tars/{BLOCK}.tar"
    with tarfile.open(path) as tar:
        info = tar.getmembers()[FIRST_ARRAY]
    data = bytearray(path.read_bytes())
    name = info.name
    at = info.offset
    data[at : at + 512] = odd(info, **HEADERS[kind])
    reseal(copy, BLOCK, bytes(data))
    refused(copy, BLOCK, rf"{BLOCK}\.tar.*{name.replace('.', '[.]')}")


def test_members_in_another_order_are_refused(copy: Path):
    path = copy / f"tars/{BLOCK}.tar"
    with tarfile.open(path) as tar:
        a, b = tar.getmembers()[FIRST_ARRAY : FIRST_ARRAY + 2]
        end = tar.getmembers()[FIRST_ARRAY + 2].offset
    data = path.read_bytes()
    assert end - b.offset == b.offset - a.offset
    swapped = data[: a.offset] + data[b.offset : end] + data[a.offset : b.offset] + data[end:]
    reseal(copy, BLOCK, swapped)
    refused(copy, BLOCK, a.name)


NPY = {
    "objects": lambda values: np.array([None] * len(values), object),
    "a huge shape": lambda values: values,
    "another type": lambda values: values.astype(np.float32),
    "big-endian": lambda values: values.astype(values.dtype.newbyteorder(">")),
    "Fortran order": lambda values: np.asfortranarray(np.ones((len(values), 2), values.dtype)),
}


@pytest.mark.parametrize("kind", NPY)
def test_a_hostile_npy_member_is_refused(kind: str, copy: Path):
    """Of the size that belongs there, with digests that are right."""
    path, root = copy / f"tars/{BLOCK}.tar", copy
    with tarfile.open(path) as tar:
        info = tar.getmembers()[FIRST_ARRAY]
    data = bytearray(path.read_bytes())
    here = slice(info.offset_data, info.offset_data + info.size)
    out = io.BytesIO()
    np.save(out, NPY[kind](np.load(io.BytesIO(data[here]))), allow_pickle=True)
    made = out.getvalue()
    if kind == "a huge shape":
        made = made.replace(b"(8,), }" + b" " * 9, b"(9999999999999,)}")[: info.size]
        made = made.replace(b"'shape': (8,", b"'shape': (9,")
    data[here] = made[: info.size].ljust(info.size, b"\0")
    places = np.frombuffer(
        (root / f"tars/{BLOCK}.index").read_bytes(), tars.PLACE, offset=tars.HEAD.itemsize
    ).copy()
    places[FIRST_ARRAY]["sha256"] = np.void(bytes.fromhex(spec.digest(bytes(data[here]))))
    reseal(root, BLOCK, bytes(data), places)
    refused(root, BLOCK, "does not begin as")


@pytest.mark.parametrize("change", ["offset", "bytes", "kind", "fewer", "more", "sha256"])
def test_a_hostile_index_is_refused(change: str, copy: Path):
    path = copy / f"tars/{BLOCK}.index"
    places = np.frombuffer(path.read_bytes(), tars.PLACE, offset=tars.HEAD.itemsize).copy()
    if change == "fewer":
        places = places[:FIRST_ARRAY]
    elif change == "more":
        places = np.concatenate([places, places[-1:]])
    else:
        places[FIRST_ARRAY][change] = (
            np.void(bytes(32)) if change == "sha256" else 1 << (7 if change == "kind" else 60)
        )
    reseal(copy, BLOCK, (copy / f"tars/{BLOCK}.tar").read_bytes(), places)
    with pytest.raises(DamageError, match=BLOCK):
        restore(copy, copy.with_name("back"))
    assert {d.file.split(".")[0] for d in sc.verify(copy, read_data=True)} == {f"tars/{BLOCK}"}


def test_swapped_rows_with_right_digests_are_found(copy: Path):
    """The cache's own manifest knows."""
    path = copy / f"tars/{BLOCK}.tar"
    with tarfile.open(path) as tar:
        number, info = next((i, one) for i, one in enumerate(tar) if "vector" in one.name)
    data = bytearray(path.read_bytes())
    here = slice(info.offset_data, info.offset_data + info.size)
    head = npy_header("float16", (8, 24))
    values = np.frombuffer(bytes(data[here])[len(head) :], np.float16).reshape(8, 24)
    data[here] = head + values[::-1].tobytes()
    places = np.frombuffer(
        (copy / f"tars/{BLOCK}.index").read_bytes(), tars.PLACE, offset=tars.HEAD.itemsize
    ).copy()
    places[number]["sha256"] = np.void(bytes.fromhex(spec.digest(bytes(data[here]))))
    reseal(copy, BLOCK, bytes(data), places)
    assert [d.file for d in sc.verify(copy, read_data=True)] == [f"tars/{BLOCK}.tar"]
    with pytest.raises(DamageError, match="the cache's own manifest"):
        restore(copy, copy.with_name("back"))


def test_another_zstd_is_told_and_is_no_damage(exports, small_path, tmp_path, monkeypatch):
    """What it compresses has other bytes: the export is read and whole, and the cache cannot be made of it."""
    encode = Array.encode

    def otherwise(array: Array, rows: np.ndarray) -> bytes:
        return encode(array, rows) + b"!" * array.big

    monkeypatch.setattr(Array, "encode", otherwise)
    with pytest.raises(DamageError, match="the cache's own manifest"):  # the very version of the cache
        restore(exports["nothing"], tmp_path / "back")
    monkeypatch.setattr("numcodecs.__version__", "9.9")
    with pytest.raises(MismatchError, match=r"numcodecs 9\.9 than by \d"):
        restore(exports["nothing"], tmp_path / "back")
    assert sc.verify(exports["nothing"], read_data=True) == []
    assert len(sc.open(exports["nothing"]).read(0, np.arange(20))["map"].values) == 20


def test_a_stranger_cannot_make_us_read_without_end(copy: Path):
    """A sparse file of a terabyte for an index, with a table that says so."""
    path = copy / f"tars/{BLOCK}.index"
    cache = sc.open(copy)
    assert cache.tars
    table = cache.tars.table.copy()
    table[[b.name for b in cache.grid.blocks()].index(BLOCK)]["index"]["bytes"] = 1 << 40
    sealed = cache.tars.manifest.model_copy(
        update={"table": m.Entry(sha256=spec.digest(table.tobytes()), bytes=table.nbytes)}
    ).signed()
    (copy / "tars.bin").write_bytes(table.tobytes())
    (copy / "tars.json").write_bytes(sealed.to_bytes())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamageError, match="at most"):
        sc.open(copy).read(1, np.arange(20))


def test_a_link_in_the_place_of_a_tar_is_not_followed(copy: Path, tmp_path):
    path = copy / f"tars/{BLOCK}.tar"
    path.rename(tmp_path / "elsewhere.tar")
    path.symlink_to(tmp_path / "elsewhere.tar")
    for read in (lambda: sc.open(copy).read(1, np.arange(20)), lambda: restore(copy, tmp_path / "back")):
        with pytest.raises(DamageError, match=BLOCK):
            read()


def test_the_export_of_another_cache_is_refused(copy: Path, exports):
    raw = json.loads((copy / "tars.json").read_bytes())
    raw["cache"] = "0" * 64
    del raw["digest"]
    raw["digest"] = spec.digest(spec.canonical_json(raw))
    (copy / "tars.json").write_bytes(spec.canonical_json(raw))
    with pytest.raises(DamageError, match="is of the cache 000"):
        sc.open(copy)
    raw["version"] = [2, 0]
    del raw["digest"]
    raw["digest"] = spec.digest(spec.canonical_json(raw))
    (copy / "tars.json").write_bytes(spec.canonical_json(raw))
    with pytest.raises(MismatchError, match="upgrade"):
        sc.open(copy)


@settings(max_examples=20)
@given(data=st.binary(max_size=400))
def test_any_bytes_for_a_sidecar_are_damage(data: bytes, exports, tmp_path_factory):
    for name in ("tars.json", "tars.bin", f"tars/{BLOCK}.index"):
        copy = tmp_path_factory.mktemp("fuzz") / "x"
        shutil.copytree(exports["nothing"], copy)
        (copy / name).write_bytes(data)
        with pytest.raises((DamageError, MismatchError)):
            sc.open(copy).read(1, np.arange(20))


# -- the command line ----------------------------------------------------------------------------------------


def test_the_commands(small_path, small_folder, exports, tmp_path, capsys):
    out, source = tmp_path / "x", ["--source", str(small_folder)]
    assert (
        cli.main(["export", str(small_path), "--to", "webdataset", "-o", str(out), "--embed-views", *source])
        == 0
    )
    assert tree(out) == tree(exports["views"])
    assert cli.main(["verify", str(out), "--read-data"]) == 0
    assert cli.main(["show", str(out)]) == cli.main(["diff", str(out), str(small_path)]) == 0
    assert cli.main(["import", str(out), "-o", str(tmp_path / "back")]) == 0
    assert tree(tmp_path / "back") == tree(small_path)
    capsys.readouterr()
    assert cli.main(["import", str(small_folder), "-o", str(tmp_path / "no")]) == 1
    assert (
        cli.main(
            ["export", str(small_path), "--to", "webdataset", "-o", str(tmp_path / "z"), "--embed-images"]
        )
        == 1
    )
    assert (
        cli.main(["export", str(small_path), "--to", "webdataset", "-o", str(tmp_path / "z"), *source]) == 1
    )
    assert capsys.readouterr().err.count("error: ") == 3
    flip_bit(out / "tars/v0000-b000000.tar", 80_000)
    assert cli.main(["verify", str(out), "--read-data"]) == 2
    assert "tars/v0000-b000000.tar" in capsys.readouterr().out


def test_a_build_exports_what_it_built(small_folder, tmp_path, capsys):
    flags = ["--source", str(small_folder), "--teacher", "softcache.testing:toy_teacher", "--views", "2"]
    flags += [
        "--recipe",
        "random_resized_crop(8)|flip",
        "--target",
        "logits=full(u8)",
        "--target",
        "map=int8",
    ]
    flags += ["--target", "vector=f16", "--block-rows", "8", "--batch", "4", "--no-progress"]
    built = tmp_path / "c"
    assert cli.build_cache([*flags, "-o", str(built), "--format", "webdataset", "--embed-images"]) == 0
    export(sc.open(built), tmp_path / "again", embed="images", source=sc.Source(small_folder))
    assert tree(tmp_path / "c-webdataset") == tree(tmp_path / "again")
    assert cli.build_cache([*flags, "-o", str(built), "--embed-images"]) == 1
    assert "--format" in capsys.readouterr().err
