"""Checks that the ops share, and who renders."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from softcache.errors import SpecError
from softcache.recipe.canvas import Size


def whole(op: str, name: str, value: object, least: int) -> int:
    """``value`` if it is an integer of at least ``least``, else :class:`SpecError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{op}: {name} must be a whole number of at least {least}, not {value!r}")
    return value


def number(op: str, name: str, value: object, most: float) -> None:
    """:class:`SpecError` unless ``value`` is a number from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise SpecError(f"{op}: {name} must be a number from 0 to {most:g}, not {value!r}")


def probability(op: str, value: object, name: str = "p") -> None:
    """:class:`SpecError` unless ``value`` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SpecError(f"{op}: {name} must be a probability from 0 to 1, not {value!r}")


def height_width(op: str, size: object) -> Size:
    """``size`` as (height, width); an int is a square. :class:`SpecError` for anything else."""
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2:
        raise SpecError(f"{op}: size must be a number or (height, width), not {size!r}")
    return whole(op, "size", pair[0], 1), whole(op, "size", pair[1], 1)


def rendered(size: object) -> Size:
    """``size`` of a rendered view as (height, width), numpy's numbers too; one number is a square. :class:`SpecError`."""
    sides = tuple(size) if isinstance(size, Iterable) else (size, size)
    good = [int(s) for s in sides if isinstance(s, Integral) and not isinstance(s, bool) and int(s) >= 1]
    if len(sides) != 2 or len(good) != 2:
        raise SpecError(f"size={size!r}: it is (h, w) in whole pixels, at least 1, or both in one number")
    return good[0], good[1]


def level(op: str, name: str, value: object) -> None:
    """:class:`SpecError` unless ``value`` is a grey, 0 to 255."""
    if whole(op, name, value, 0) > 255:
        raise SpecError(f"{op}: {name} is a grey from 0 to 255, not {value!r}")


def yes_or_no(op: str, name: str, value: object) -> None:
    """:class:`SpecError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise SpecError(f"{op}: {name} is True or False, not {value!r}")


def interval(op: str, name: str, value: object) -> tuple[float, float]:
    """``value`` if it is a pair of numbers with 0 < low <= high < inf, else :class:`SpecError`."""
    if isinstance(value, tuple) and len(value) == 2 and all(type(v) in (int, float) for v in value):
        low, high = value
        if 0 < low <= high < float("inf"):
            return low, high
    raise SpecError(f"{op}: {name} must be (low, high) with 0 < low <= high, not {value!r}")
