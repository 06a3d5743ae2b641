"""Tars, sample for sample as the ``webdataset`` library reads them."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import pixels, png, write_tar
from PIL import Image

from softcache.errors import SourceError
from softcache.source import Source


def shard(path: Path, keys: list[str], **options) -> Path:
    """Samples of an image and its class, 0 to 9."""
    members = [(f"{key}.{end}", data) for n, key in enumerate(keys) for end, data in sample(n).items()]
    return write_tar(path, members, **options)


def sample(n: int) -> dict[str, bytes]:
    return {"png": png(pixels(n)), "cls": str(n % 10).encode()}


def theirs(*tars: Path) -> list[dict]:
    """The undecoded samples of the real library."""
    wds = pytest.importorskip("webdataset")
    return list(wds.WebDataset([str(tar) for tar in tars], shardshuffle=False))


def agrees(source: Source, *tars: Path, image: str = "png") -> None:
    samples = theirs(*tars)
    assert list(source.ids) == [one["__key__"] for one in samples]
    for i, one in enumerate(samples):
        assert source._samples.read(i) == one[image]
        assert source.label(one["__key__"]) == (int(one["cls"]) if "cls" in one else None)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_sample_is_that_of_the_library(tmp_path: Path, form: int):
    first = shard(tmp_path / "train-000000.tar", ["a", "b", "deep/er/c"], form=form)
    second = shard(tmp_path / "train-000001.tar", ["d", "./e", "f.g"], form=form)
    if form != tarfile.USTAR_FORMAT:
        second = shard(second, ["x" * 300, "dir" * 60 + "/ä" * 60, "d"], form=form)
    else:
        second = shard(second, ["d", "./e"], form=form)
    source = Source(tmp_path)
    assert (source.layout, source.split) == ("webdataset", "train")
    agrees(source, first, second)


def test_tars_that_the_library_writes(tmp_path: Path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "val-%06d.tar"), maxcount=4, verbose=0) as sink:
        for i in range(10):
            sink.write({"__key__": f"{i:04}", "png": Image.fromarray(pixels(i)), "cls": i % 3})
    source = Source(tmp_path)
    assert source.split == "val" and len(source) == 10
    agrees(source, *sorted(tmp_path.glob("*.tar")))
    assert np.array_equal(source.image(9), pixels(9)) and source.labels.tolist() == [i % 3 for i in range(10)]


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"\A(\./)?([a-z_]{1,120}/){0,2}[a-z0-9_ é-]{1,8}\Z"),
            st.sets(st.sampled_from(["cls", "TXT", "seg.png", "__meta__", "mask.a.b"])),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda one: one[0],
    )
)
def test_any_names_are_grouped_as_the_library_groups_them(tmp_path_factory, samples):
    root = tmp_path_factory.mktemp("tar")
    members = []
    for n, (key, more) in enumerate(samples):
        files = dict.fromkeys(more, b"7") | {"JPG": bytes([n])}
        members += [(f"{key}.{end}", data) for end, data in sorted(files.items())]
    agrees(Source(write_tar(root / "x.tar", members)), root / "x.tar", image="jpg")


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train-000000.tar", "train-000001.tar"], "train"),
        (["train_0.tar", "train_1.tar"], "train"),
        (["imagenet-train-000000.tar"], "imagenet-train"),
        (["cats.TAR"], "cats"),
        (["train-00000-of-00002.tar", "train-00001-of-00002.tar"], "train"),
        (["set.train.tar"], "set.train"),
        (["cifar10.tar"], "cifar10"),
        (["val/000000.tar", "val/000001.tar"], "val"),
        (["000000.tar", "000001.tar"], None),
    ],
)
def test_tars_and_their_splits(tmp_path: Path, names: list[str], split: str | None):
    for n, name in enumerate(names):
        shard(tmp_path / name, [f"{n}-{i}" for i in range(3)])
    source = Source(tmp_path)
    assert (source.split, len(source)) == (split, 3 * len(names))
    assert np.array_equal(source.image(1), pixels(1))
    assert len(Source(tmp_path / names[0])) == 3


def test_the_split_of_a_number_is_not_guessed(tmp_path: Path):
    shard(tmp_path / "000000.tar", ["a"])
    with pytest.raises(SourceError, match="its name is a number"):
        Source(tmp_path, split="train")
    shard(tmp_path / "val-000000.tar", ["a"])
    with pytest.raises(SourceError, match="its name is a number"):
        Source(tmp_path)


def test_a_gap_in_the_numbers_is_told(tmp_path: Path):
    for n in (0, 1, 4):
        shard(tmp_path / f"train-{n:06}.tar", [str(n)])
    assert "2 tars are missing between the first and the last number" in Source(tmp_path).describe()


def test_labels_from_json_and_none(tmp_path: Path):
    image = png(pixels(1))
    members = [("a.png", image), ("a.json", b'{"label": 3, "caption": "x"}'), ("b.png", image)]
    members += [
        ("c.png", image),
        ("c.json", b'{"caption": "x"}'),
        ("d.png", image),
        ("d.json", b'{"label": null}'),
    ]
    members += [("e.png", image), ("e.cls", b" 5\n"), ("e.json", b'{"label": 3}')]
    assert Source(write_tar(tmp_path / "x.tar", members)).labels.tolist() == [3, -1, -1, -1, 5]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.cls", b"cat", r"label of the sample 'a' in .*x\.tar cannot be read"),
        ("a.json", b"{", r"label of the sample 'a' in .*x\.tar cannot be read"),
        ("a.json", b'{"label": "cat"}', "has the label 'cat', not a whole number"),
        ("a.json", b'{"label": true}', "has the label True"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.cls", b"1" + b"0" * 30, "not a whole number"),
        ("a.jpg", b"another", "several images.*image_column="),
        ("a.png", b"again", r"a\.png twice"),
    ],
)
def test_what_a_sample_should_not_hold(tmp_path: Path, name: str, content: bytes, told: str):
    tar = write_tar(tmp_path / "x.tar", [("a.png", png(pixels(1))), (name, content)])
    with pytest.raises(SourceError, match=told):
        Source(tar)


def test_nothing_is_unpickled(tmp_path: Path):
    """A member that webdataset's own decoder would run."""
    marker = tmp_path / "ran"
    evil = b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(marker)
    tar = write_tar(
        tmp_path / "x.tar", [("a.png", png(pixels(1))), ("a.pyd", evil), ("a.pkl", evil), ("a.pth", evil)]
    )
    source = Source(tar)
    assert source.image(0).shape == (20, 24, 3) and source.labels.tolist() == [-1]
    assert not marker.exists()


def test_the_images_may_have_an_extension_of_their_own(tmp_path: Path):
    members = [("a.left.png", png(pixels(1))), ("a.right.png", png(pixels(2)))]
    tar = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        SourceError, match=r"'a' in .* has no image .*\.left\.png, \.right\.png.*image_column="
    ):
        Source(tar)
    assert np.array_equal(Source(tar, image_column="right.png").image(0), pixels(2))
    with pytest.raises(SourceError, match="label_column"):
        Source(tar, label_column="cls")


def test_a_key_in_two_tars_is_refused_naming_both(tmp_path: Path):
    shard(tmp_path / "train-000000.tar", ["a", "b"])
    shard(tmp_path / "train-000001.tar", ["c", "b"])
    with pytest.raises(SourceError, match=r"'b' is in .*train-000000\.tar and again in .*train-000001\.tar"):
        Source(tmp_path)


def test_class_names_beside_the_tars(tmp_path: Path):
    shard(tmp_path / "train" / "0.tar", ["a", "b"])
    assert Source(tmp_path).classes is None
    (tmp_path / "classes.json").write_text('["x", "y"]')
    assert Source(tmp_path).classes == ("x", "y")
    (tmp_path / "train" / "classes.txt").write_bytes("\ufeffcat\r\ndog\r\n\r\n".encode())
    assert Source(tmp_path).classes == ("cat", "dog")
    (tmp_path / "train" / "classes.txt").write_text("cat\n")
    with pytest.raises(SourceError, match="1 classes"):
        _ = Source(tmp_path).labels
    for name, text in (("classes.txt", "cat\n\ndog"), ("classes.json", '{"cat": 0}'), ("classes.json", "[")):
        (tmp_path / "train" / "classes.txt").unlink(missing_ok=True)
        (tmp_path / "train" / name).write_text(text)
        with pytest.raises(SourceError, match=name):
            Source(tmp_path)


def test_links_devices_folders_and_hidden_files(tmp_path: Path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as opened:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            opened.addfile(member)
        member = tarfile.TarInfo("n.png")
        member.type = tarfile.CHRTYPE
        opened.addfile(member)
        for name in ("d/a.png", "d/._a.png", "README"):
            member = tarfile.TarInfo(name)
            member.size = len(png(pixels(1)))
            opened.addfile(member, io.BytesIO(png(pixels(1))))
    source = Source(tar)
    assert source.ids == ("d/a",) and "3 members of the tars that are no plain files" in source.describe()


def test_no_cut_of_a_tar_passes(tmp_path: Path):
    tar = shard(tmp_path / "x.tar", ["a", "b", "x" * 200])
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        opened.getmembers()
        end = opened.offset  # the first block of zeros
    assert len(Source(tar)) == 3
    for length in [*range(0, end, 256), end, end + 511]:
        tar.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"x\.tar.*copy it again"):
            Source(tar)
    tar.write_bytes(whole[: end + 512])
    assert len(Source(tar)) == 3


def test_a_header_that_is_damaged_does_not_end_a_tar(tmp_path: Path):
    tar = shard(tmp_path / "x.tar", ["a", "b", "c"])
    with tarfile.open(tar) as opened:
        third = opened.getmembers()[2].offset
    data = bytearray(tar.read_bytes())
    data[third + 5] ^= 1
    tar.write_bytes(data)
    with pytest.raises(SourceError, match=rf"damaged at byte {third:,}"):
        Source(tar)


def test_a_tar_cut_after_it_was_opened_is_no_damaged_image(tmp_path: Path):
    tar = shard(tmp_path / "x.tar", ["a", "b"])
    source = Source(tar)
    os.truncate(tar, 600)
    with pytest.raises(SourceError, match="cut since it was opened"):
        source.image(1)
    tar.unlink()
    with pytest.raises(SourceError, match="No such file"):
        source.image(1)


def test_compressed_tars_say_what_to_do(tmp_path: Path):
    tar = shard(tmp_path / "x.tar", ["a"])
    packed = gzip.compress(tar.read_bytes())
    tar.write_bytes(packed)
    with pytest.raises(SourceError, match=r"x\.tar.*unpack it to a plain \.tar"):
        Source(tmp_path)
    packed_tar = tar.rename(tmp_path / "x-000.tar.gz")
    for path, layout in ((packed_tar, None), (tmp_path, "webdataset")):
        with pytest.raises(SourceError, match=r"x-000\.tar\.gz is compressed.*gunzip"):
            Source(path, layout=layout)
    with pytest.raises(SourceError, match=r"\*\.tar \(not compressed.*there is x-000\.tar\.gz"):
        Source(tmp_path)


def test_what_a_folder_was_unpacked_from_does_not_make_it_a_webdataset(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(pixels(1)))
    (tmp_path / "all.tar.gz").write_bytes(b"")
    assert Source(tmp_path).layout == "imagefolder"


def test_a_member_of_more_than_eight_gigabytes(tmp_path: Path):
    """A size beyond eleven octal digits, as GNU tar writes it."""
    tar = tmp_path / "x.tar"
    header = tarfile.TarInfo("big.png")
    header.size = 9 << 30
    with tar.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(file.tell() + header.size)
        small = tarfile.TarInfo("z.png")
        small.size = len(png(pixels(2)))
        file.write(small.tobuf() + png(pixels(2)).ljust(-(-small.size // 512) * 512, b"\0") + bytes(1024))
    source = Source(tar)
    assert source.ids == ("big", "z") and np.array_equal(source.image(1), pixels(2))
    assert source._samples.places[0, 2] == 9 << 30
