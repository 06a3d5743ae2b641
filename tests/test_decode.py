"""The stated rule for images out of the ordinary, against files written byte by byte and decoded independently."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from layouts import pixels, png
from PIL import Image, ImageOps

import softcache as sc
from softcache.source import Source
from softcache.source.decode import is_rotated, orientation, to_rgb
from softcache.testing import toy_teacher


def saved(image: Image.Image, form: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def grey3(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def by_hand(values: np.ndarray, colour: int, extra: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of uint8 or uint16 ``(H, W)`` or ``(H, W, C)``, of that colour type, written without Pillow."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = 8 * values.itemsize
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in values)
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def tiff(values: np.ndarray, order: str, orientation: int = 1) -> bytes:
    """An uncompressed TIFF of uint16 ``(H, W)`` or ``(H, W, 3)``, written without Pillow."""
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else 3
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, samples, 16 if samples == 1 else 8 + len(body)),
        (259, 3, 1, 1), (262, 3, 1, 1 if samples == 1 else 2), (273, 4, 1, 8), (274, 3, 1, orientation),
        (277, 3, 1, samples), (278, 3, 1, height), (279, 4, 1, len(body)),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + struct.pack(
            f"{order}HH" if kind == 3 and count == 1 else f"{order}I",
            *([value, 0] if kind == 3 and count == 1 else [value]),
        )
        for tag, kind, count, value in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body) + len(bits))
    return head + body + bits + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def deep(shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    values.flat[:4] = 0, 255, 256, 65535
    return values


# --- grey, colour, depth ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM", "JPEG"])
def test_grey_is_repeated(form: str):
    data = saved(Image.fromarray(pixels(1)[:, :, 0]), form)
    theirs = np.asarray(Image.open(io.BytesIO(data)))
    assert theirs.ndim == 2 and np.array_equal(to_rgb(data), grey3(theirs))


def test_sixteen_bits_keep_the_high_byte():
    for shape, colour in (((6, 5), 0), ((6, 5, 3), 2)):
        values = deep(shape)
        high = (values >> 8).astype(np.uint8)
        expected = high if high.ndim == 3 else grey3(high)
        assert np.array_equal(to_rgb(by_hand(values, colour)), expected)
        assert np.array_equal(to_rgb(tiff(values, "<")), expected)
        assert np.array_equal(to_rgb(tiff(values, ">")), expected)


@pytest.mark.parametrize(("channels", "colour"), [(2, 4), (4, 6)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_dropped_and_what_lies_under_it_is_kept(channels: int, colour: int, dtype: type):
    values = deep((6, 5, channels)).astype(dtype)
    values[:3, :, -1] = 0
    high = (values >> (8 * values.itemsize - 8)).astype(np.uint8)[:, :, :-1]
    assert np.array_equal(to_rgb(by_hand(values, colour)), np.broadcast_to(high, (6, 5, 3)))


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_looked_up_whatever_is_transparent(transparent: bool, recwarn: pytest.WarningsRecorder):
    palette = pixels(2, 1, 8)[0]
    index = np.random.default_rng(1).integers(0, 8, (7, 9), np.uint8)
    extra = ((b"PLTE", palette.tobytes()),) + ((b"tRNS", bytes(range(0, 256, 32))),) * transparent
    assert np.array_equal(to_rgb(by_hand(index, 3, extra)), palette[index])
    assert not recwarn.list
    gif = Image.frombytes("P", (9, 7), index.tobytes())
    gif.putpalette(palette.tobytes())
    options = {"transparency": 3} if transparent else {}
    assert np.array_equal(to_rgb(saved(gif, "GIF", **options)), palette[index])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_range_that_is_not_known_is_refused(mode: str):
    data = saved(Image.fromarray(pixels(1)[:, :, 0]).convert(mode), "TIFF")
    with pytest.raises(ValueError, match=f"mode {mode}"):
        to_rgb(data)


@pytest.mark.parametrize("most", [65535, 1023])
def test_of_a_deep_pgm_the_high_byte_of_its_range(most: int):
    values = np.array([[0, 255, 256, most // 2, most - 1, most]], np.uint16)
    file = f"P5 {values.size} 1 {most} ".encode() + values.astype(">u2").tobytes()
    high = np.floor(np.round(values / most * 65535) / 256).astype(np.uint8)
    assert np.array_equal(to_rgb(file), grey3(high))


def test_whole_numbers_of_32_bits_are_refused_since_they_have_no_range():
    with pytest.raises(ValueError, match="mode I"):
        to_rgb(saved(Image.fromarray(np.arange(4, dtype=np.int32)[None]), "TIFF"))


# --- CMYK ---------------------------------------------------------------------------------------


def ink(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), np.uint8)
    return Image.frombytes("CMYK", (5, 4), small.tobytes()).resize((40, 32), Image.Resampling.BILINEAR)


def printed(ink: np.ndarray) -> np.ndarray:
    """RGB of CMYK, 255 being full ink."""
    paper = 255 - ink.astype(float)
    return paper[:, :, :3] * paper[:, :, 3:] / 255


def adobe(jpeg: bytes) -> tuple[int, int]:
    """Where Adobe's marker begins and ends."""
    at = jpeg.index(b"\xff\xee")
    return at, at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def test_cmyk_jpegs_are_read_as_pillow_reads_them():
    data = saved(ink(1), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data and Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(to_rgb(data).astype(float) - printed(np.asarray(ink(1)))).max() <= 6
    assert np.array_equal(to_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_cmyk_jpeg_is_taken_for_inverted_without_the_marker_too():
    data = saved(ink(2), "JPEG", quality=100, subsampling=0)
    at, end = adobe(data)
    bare = data[:at] + data[end:]
    assert "adobe" not in Image.open(io.BytesIO(bare)).info and np.array_equal(to_rgb(bare), to_rgb(data))


def test_a_ycck_jpeg():
    """Adobe's transform 2: the same samples are Y, Cb, Cr and K."""
    data = bytearray(saved(ink(4), "JPEG", quality=100, subsampling=0))
    data[adobe(data)[1] - 1] = 2
    assert np.array_equal(to_rgb(bytes(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    y, cb, cr, black = np.moveaxis(255 - np.asarray(ink(4)).astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    inverted = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    stored = 255 - np.clip(inverted, 0, 255)  # what libjpeg calls CMY: inverted once more by Adobe's habit
    expected = stored * black[:, :, None] / 255
    assert np.abs(to_rgb(bytes(data)).astype(float) - expected).max() <= 8


def test_a_cmyk_tiff():
    data = saved(ink(3), "TIFF")
    assert np.abs(to_rgb(data).astype(float) - printed(np.asarray(ink(3)))).max() <= 1


# --- animations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(form: str):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.array_equal(to_rgb(data), np.asarray(frames[0]))


# --- EXIF ---------------------------------------------------------------------------------------


def turned(orientation: int, form: str = "JPEG", **exif: str) -> bytes:
    tags = Image.Exif()
    tags[0x010F] = "maker " * 20  # a tag before it, too long for its entry
    tags[0x0112] = orientation
    smooth = Image.fromarray(pixels(1, 4, 6)).resize((48, 32))
    return saved(smooth, form, exif=tags)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_not_applied_and_is_noticed(orientation: int):
    data = turned(orientation)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).getexif().get(0x0112, 1) == 1
    assert np.array_equal(to_rgb(data), to_rgb(turned(1)))
    assert is_rotated(data) == (orientation != 1)


def test_torchvisions_loader_does_not_apply_it_either(tmp_path: Path):
    folder = pytest.importorskip("torchvision.datasets.folder")
    (tmp_path / "x.jpg").write_bytes(turned(6))
    theirs = np.asarray(folder.default_loader(str(tmp_path / "x.jpg")))
    assert theirs.shape == (32, 48, 3) and np.abs(to_rgb(turned(6)).astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_with_exif_are_as_stored(form: str):
    assert to_rgb(turned(6, form)).shape == (32, 48, 3)
    assert is_rotated(turned(6, form)) and not is_rotated(turned(1, form))
    for at in range(0, 400):
        assert is_rotated(turned(6, form)[:at]) in (False, True)


def test_of_a_png_the_orientation_may_come_last():
    """As exiftool and others write it: behind the pixels."""
    data = turned(6, "PNG")
    size, at = struct.unpack_from(">I", data, data.index(b"eXIf") - 4)[0], data.index(b"eXIf") - 4
    chunk, end = data[at : at + 12 + size], data.index(b"IEND") - 4
    moved = data[:at] + data[at + 12 + size : end] + chunk + data[end:]
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(moved))).size == (32, 48)
    assert orientation(moved) == 6


def test_the_orientation_of_a_tiff_is_its_own_and_pillow_applies_it():
    values = deep((6, 5))
    assert to_rgb(tiff(values, "<", orientation=6)).shape == (5, 6, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_tag_is_found_in_both_byte_orders(order: str):
    body = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, 8, 0, 0
    )
    segment = b"Exif\0\0" + body
    jfif = b"\xff\xe0" + struct.pack(">H", 16) + bytes(14)
    data = b"\xff\xd8" + jfif + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + b"\xff\xd9"
    assert is_rotated(data) and not is_rotated(data.replace(segment, segment[:-20]))


def test_no_cut_or_flipped_byte_of_a_header_is_more_than_a_no():
    data = turned(6)
    for at in range(0, 400):
        assert is_rotated(data[:at]) in (False, True)
        is_rotated(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    for content in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe1",
        b"\xff\xd8" + b"\xff\xe1\0\0" * 9,
        pixels(1),
        b"\x89PNG",
    ):
        assert not is_rotated(content)


def test_a_build_tells_of_turned_images_once(tmp_path: Path, capsys):
    for name, data in {
        "a.jpg": turned(1),
        "b.jpg": turned(6),
        "c.jpg": turned(3),
        "d.png": png(pixels(1)),
        "e.png": turned(8, "PNG"),
    }.items():
        (tmp_path / "images" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "x" / name).write_bytes(data)
    source = Source(tmp_path / "images")
    assert source.rotation == ""  # before the bytes were read
    sc.build(tmp_path / "cache", source=source, teacher=toy_teacher(), targets=["map=int8"])
    told = capsys.readouterr().err
    assert told.count("3 files with an EXIF orientation, which is not applied") == 1
    sc.build(
        tmp_path / "other",
        source=Source(tmp_path / "images", limit=1),
        teacher=toy_teacher(),
        targets=["map=int8"],
    )
    assert capsys.readouterr().err.count("EXIF") <= 1
