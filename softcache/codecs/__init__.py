"""Codecs: float32 rows ↔ fixed-width fields, with a stated bound. One file each, listed in :data:`CODECS`.

A codec is a frozen dataclass whose spec string is its constructor call. It has

- ``version``: raised whenever the meaning of its bytes changes;
- ``kinds``: the target kinds it serves;
- ``limit``: the largest ``|x|`` it can hold (the builder refuses more, naming the row);
- ``fields(shape)``: the fields of one row of that shape; :class:`CodecError` when it cannot serve the shape;
- ``encode(values)``: float32 ``(n, *shape)`` → ``{field: (n, *field shape)}``;
- ``decode(fields, shape)``: the inverse, float32 ``(n, *shape)``; from those that keep less than every value, or keep
  it in parts, an object of their own: :class:`SparseLogits`, :class:`SampledLogits`, :class:`HardLabels`,
  :class:`AnchoredLogits`, :class:`Items`, :class:`AttentionMap`, :class:`StrengthMap`;
- ``bound(fields, shape)``: the largest absolute error of each value that is kept, broadcastable to ``(n, *shape)`` (where
  what is decoded has parts: by part);
- ``suffix``, where it makes another target of the teacher's: ``layer3.strength`` is of ``layer3``;
- where views of an image share something: ``views``, of how many first views it is made; ``shared(shape)``, its fields, of
  an image; ``anchor(values)``, float32 ``(views, n, *shape)`` → these fields. ``encode(values, shared)`` is then given them,
  by rows, and ``decode`` finds them among a row's own;
- ``taken``, where it is made of another answer of the teacher's, called so behind the target's name, and decoded with the
  teacher's last layer, constants of the cache that ``decode`` finds among a row's fields: :class:`Head`;
- ``exact(values)``, where what is decoded has another form than the teacher's rows: those rows in that form, unrounded;
- ``boxed = True``, where it asks what a view shows: ``encode(values, objects)`` is then given an :class:`Objects` of each
  row (of rows without an image an empty one), and a source without boxes is refused; ``labelled = True``, where it
  compares their classes with the teacher's, so that their order must be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import numpy as np

from softcache import spec
from softcache.codecs.anchored import Anchored, AnchoredLogits
from softcache.codecs.argmax import Argmax, HardLabels
from softcache.codecs.attention import Attention, AttentionMap
from softcache.codecs.f16 import F16
from softcache.codecs.fields import Field, Fields
from softcache.codecs.foreground import Foreground
from softcache.codecs.full import Full
from softcache.codecs.head import Head
from softcache.codecs.int4 import Int4
from softcache.codecs.int8 import Int8
from softcache.codecs.items import All, Items, Top
from softcache.codecs.objects import NOTHING, Objects, is_boxed, is_labelled
from softcache.codecs.packed import Packed
from softcache.codecs.pool import Pool, Pooled
from softcache.codecs.sample import Sample, SampledLogits
from softcache.codecs.sign import Sign
from softcache.codecs.strength import Strength, StrengthMap
from softcache.codecs.topk import SparseLogits, TopK
from softcache.errors import SpecError

__all__ = [
    "CODECS",
    "NOTHING",
    "AnchoredLogits",
    "AttentionMap",
    "Codec",
    "Decoded",
    "Field",
    "Fields",
    "HardLabels",
    "Items",
    "Named",
    "Objects",
    "SampledLogits",
    "SparseLogits",
    "StrengthMap",
    "is_boxed",
    "is_labelled",
    "is_plain",
    "parse",
]

Decoded = (
    np.ndarray
    | SparseLogits
    | SampledLogits
    | AnchoredLogits
    | HardLabels
    | Items
    | AttentionMap
    | StrengthMap
)


class Codec(Protocol):
    """What every member of :data:`CODECS` offers; see the module's text."""

    version: ClassVar[int]
    kinds: ClassVar[tuple[str, ...]]
    limit: ClassVar[float]

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]: ...
    @property
    def encode(self) -> Callable[..., Fields]: ...  # of the rows, and what it asks for
    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Decoded: ...
    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray | Mapping[str, np.ndarray]: ...


CODECS: dict[str, type[Codec]] = {
    "all": All,
    "anchored": Anchored,
    "argmax": Argmax,
    "attention": Attention,
    "f16": F16,
    "foreground": Foreground,
    "full": Full,
    "head": Head,
    "int4": Int4,
    "int8": Int8,
    "packed": Packed,
    "sample": Sample,
    "sign": Sign,
    "strength": Strength,
    "top": Top,
    "topk": TopK,
}


# What may stand in front of a codec of maps, as in ``pool(2)|int8``.
STEPS: dict[str, type[Pool]] = {"pool": Pool}

# What may stand behind any codec: its fields are stored as they are, however large, and never compressed.
PLAIN = spec.Call("plain")


@dataclass(frozen=True)
class Named:
    """A codec and the canonical spec string that makes it."""

    spec: str
    codec: Codec


def is_plain(text: str) -> bool:
    """Does a canonical spec string end with ``|plain``?"""
    return text.endswith(f"|{PLAIN}")


def parse(text: str) -> Named:
    """``"full(u8)"``, ``"pool(2)|int8"``, ``"f16|plain"`` → the codec. Raises :class:`SpecError` naming the nearest known
    word."""
    calls = spec.parse(text)
    *steps, last = calls[:-1] if calls[1:] and calls[-1] == PLAIN else calls
    if last.name in STEPS:
        raise SpecError(f"codec {text!r} says what is kept and not how: say {last}|int8 or {last}|f16")
    codec = spec.construct(last, CODECS, "codec")
    for call in reversed(steps):
        if call.name in CODECS:
            raise SpecError(
                f"codec {text!r}: only {', '.join(STEPS)} stands in front of another, and not {call}"
            )
        if isinstance(codec, Foreground):
            raise SpecError(
                f"codec {text!r}: {last.name} pools by itself what is far from boxes, and keeps the rest as fine as it is: "
                f"say foreground({codec.cells}, pool={[*call.args, *dict(call.kwargs).values()][0]})"
            )
        codec = cast(Codec, Pooled(spec.construct(call, STEPS, "step"), codec))
        if not codec.kinds:
            raise SpecError(
                f"codec {text!r}: {call} is for maps, which {last} does not hold; say {call}|int8"
            )
    return Named(spec.unparse(calls), codec)
