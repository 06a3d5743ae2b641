"""A panel: one picture with what is drawn over it, and words below; a sheet is several of them in a grid. Pillow only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside

WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (24, 24, 24)
LINE = 2  # pixels
LEAST = 320  # pixels of a panel's longer side: smaller pictures are enlarged
_GAP = 8
_DASHES = (
    WHITE,
    WHITE,
    BLACK,
    BLACK,
    None,
    None,
)  # steps of a line that is seen on anything, and what lies below it
_DOTS = (WHITE, BLACK, None, None, None)
_STEP = 3  # pixels


@dataclass(frozen=True, eq=False)
class Mark:
    """A box to draw, xyxy in the unit square of the picture; without a colour it is dashed, and with ``dotted`` dotted."""

    box: np.ndarray
    text: str
    color: Color | None = None
    dotted: bool = False


@dataclass(frozen=True, eq=False)
class Panel:
    """Pixels uint8 ``(h, w, 3)``, the marks on them in the order they are drawn, small maps float ``(h', w')`` by name that
    are shown below, and lines of text."""

    pixels: np.ndarray
    marks: Sequence[Mark] = ()
    maps: Sequence[tuple[str, np.ndarray]] = ()
    lines: Sequence[str] = ()


def color_of(number: int) -> Color:
    """A class's colour: bright, and unlike its neighbours'."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def sheet(panels: Sequence[Panel], columns: int, lines: Sequence[str]) -> Image.Image:
    """Panels, all of one size, row by row, with some lines above them all."""
    drawn = [drawing(panel) for panel in panels]
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    width = drawn[0].width * min(columns, len(drawn)) + _GAP * (min(columns, len(drawn)) + 1)
    head = written(lines, width - 2 * _GAP, 14)
    heights = [max(one.height for one in row) for row in rows]
    whole = Image.new("RGB", (width, head.height + sum(heights) + _GAP * (len(rows) + 2)), GREY)
    whole.paste(head, (_GAP, _GAP))
    top = head.height + 2 * _GAP
    for row, height in zip(rows, heights, strict=True):
        for i, one in enumerate(row):
            whole.paste(one, (_GAP + i * (one.width + _GAP), top))
        top += height + _GAP
    return whole


def drawing(panel: Panel) -> Image.Image:
    """The picture, enlarged where it is small, with its marks, and below it the maps and the lines."""
    height, width = panel.pixels.shape[:2]
    times = max(1, -(-LEAST // max(height, width)))
    pixels = panel.pixels.repeat(times, axis=0).repeat(times, axis=1)
    places = [place(mark.box, pixels.shape[1], pixels.shape[0]) for mark in panel.marks]
    for mark, at in zip(panel.marks, places, strict=True):
        _outline(pixels, at, mark)
    picture = Image.fromarray(pixels)
    _write_texts(picture, panel.marks, places)
    wide = max(picture.width, LEAST)
    below = [_thumbnails(panel.maps, wide, height / width)] if panel.maps else []
    below.append(written(panel.lines, wide, 13))
    whole = Image.new("RGB", (wide, picture.height + sum(one.height + 4 for one in below)), GREY)
    whole.paste(picture, (0, 0))
    top = picture.height
    for one in below:
        whole.paste(one, (0, top + 4))
        top += 4 + one.height
    return whole


def place(box: np.ndarray, width: int, height: int) -> Rectangle:
    """The pixels of a line around ``box``: half of it outside the box, all of it inside the picture."""
    left, top, right, bottom = (round(float(v)) for v in box.clip(-1, 2) * [width, height, width, height])
    left, top = min(max(left - 1, 0), width - LINE), min(max(top - 1, 0), height - LINE)
    return left, top, max(min(right + 1, width), left + LINE), max(min(bottom + 1, height), top + LINE)


def _outline(pixels: np.ndarray, at: Rectangle, mark: Mark) -> None:
    left, top, right, bottom = at
    steps = (mark.color,) if mark.color else _DOTS if mark.dotted else _DASHES
    across, down = slice(left, right), slice(top, bottom)
    for side in (
        pixels[top : top + LINE, across],
        pixels[bottom - LINE : bottom, across],
        pixels[down, left : left + LINE].transpose(1, 0, 2),
        pixels[down, right - LINE : right].transpose(1, 0, 2),
    ):
        step = np.arange(side.shape[1]) // _STEP % len(steps)
        for number, color in enumerate(steps):
            if color:
                side[:, step == number] = color


def _write_texts(picture: Image.Image, marks: Sequence[Mark], places: Sequence[Rectangle]) -> None:
    """Beside every box what it is, where there is room that no other text has taken; the last drawn comes first."""
    draw, font = ImageDraw.Draw(picture), _font(12)
    taken: list[Rectangle] = []
    for mark, (left, top, right, bottom) in reversed(list(zip(marks, places, strict=True))):
        text = printable(mark.text)[:40]
        if not text:
            continue
        width, height = round(font.getlength(text)) + 4, _line_height(12)
        above, below = [(left, top - height), (left, top)], [(left, bottom), (left, bottom - height)]
        ends = [(right - width, bottom - height), (right - width, top)]
        for x, y in [*above, *below, *ends] if mark.color else [*reversed(below), *above, *ends]:
            at = (x, y, x + width, y + height)
            inside = x >= 0 and y >= 0 and at[2] <= picture.width and at[3] <= picture.height
            if inside and not any(_overlap(at, other) for other in taken):
                taken.append(at)
                ground = mark.color or BLACK
                draw.rectangle((x, y, at[2] - 1, at[3] - 1), fill=ground)
                bright = np.dot(ground, (0.299, 0.587, 0.114)) > 140
                draw.text((x + 2, y), text, fill=BLACK if bright else WHITE, font=font)
                break


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _thumbnails(maps: Sequence[tuple[str, np.ndarray]], width: int, proportion: float) -> Image.Image:
    """Four in a row, from black over red and yellow to white, each with its name below."""
    wide = (width - 3 * _GAP) // 4
    high = max(1, round(wide * min(proportion, 4)))
    every = high + _line_height(11)
    whole = Image.new("RGB", (width, every * -(-len(maps) // 4)), GREY)
    draw = ImageDraw.Draw(whole)
    for i, (name, values) in enumerate(maps):
        x, y = i % 4 * (wide + _GAP), i // 4 * every
        low, high_value = float(values.min()), float(values.max())
        heat = 3 * (values - low) / max(high_value - low, 1e-12)
        colors = np.stack([(heat - third).clip(0, 1) for third in range(3)], axis=-1)
        small = Image.fromarray((255 * colors).astype(np.uint8))
        whole.paste(small.resize((wide, high), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + high), _cut(name, wide, 11), fill=WHITE, font=_font(11))
    return whole


def written(lines: Sequence[str], width: int, size: int) -> Image.Image:
    """The lines in white, broken where they are longer than ``width`` pixels."""
    broken = [part for line in lines for part in _broken(printable(line), width, size)]
    each = _line_height(size)
    whole = Image.new("RGB", (width, each * len(broken)), GREY)
    draw = ImageDraw.Draw(whole)
    for i, line in enumerate(broken):
        draw.text((0, i * each), line, fill=WHITE, font=_font(size))
    return whole


def _broken(line: str, width: int, size: int) -> list[str]:
    found, length = [""], _font(size).getlength
    for word in line.split(" "):
        longer = f"{found[-1]} {word}" if found[-1] else word
        if length(longer) <= width:
            found[-1] = longer
            continue
        found.append(word)
        while length(found[-1]) > width:  # a word longer than a line, such as an id
            fits = len(_cut(found[-1], width, size))
            found[-1:] = [found[-1][:fits], found[-1][fits:]]
    return [part for part in found if part]


def _cut(text: str, width: int, size: int) -> str:
    """As much of the text as fits, one character at least."""
    while len(text) > 1 and _font(size).getlength(text) > width:
        text = text[:-1]
    return text


def printable(text: str) -> str:
    """Names are whatever a source says."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _line_height(size: int) -> int:
    return sum(_font(size).getmetrics()) + 1
