"""Codecs: float32 rows ↔ fixed-width fields, with a stated bound. One file each, listed in :data:`CODECS`.

A codec is a frozen dataclass whose spec string is its constructor call. It has

- ``version``: raised whenever the meaning of its bytes changes;
- ``kinds``: the target kinds it serves;
- ``limit``: the largest ``|x|`` it can hold (the builder refuses more, naming the row);
- ``fields(shape)``: the fields of one row of that shape; :class:`CodecError` when it cannot serve the shape;
- ``encode(values)``: float32 ``(n, *shape)`` → ``{field: (n, *field shape)}``;
- ``decode(fields, shape)``: the inverse, float32 ``(n, *shape)``; from those that keep less than every value, or keep
  it in parts, an object of their own: :class:`SparseLogits`, :class:`HardLabels`, :class:`Items`;
- ``bound(fields, shape)``: the largest absolute error of each value that is kept, broadcastable to ``(n, *shape)`` (of
  items: by part);
- ``exact(values)``, where what is decoded has another form than the teacher's rows: those rows in that form, unrounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from softcache import spec
from softcache.codecs.argmax import Argmax, HardLabels
from softcache.codecs.f16 import F16
from softcache.codecs.fields import Field, Fields
from softcache.codecs.full import Full
from softcache.codecs.int8 import Int8
from softcache.codecs.items import All, Items, Top
from softcache.codecs.topk import SparseLogits, TopK
from softcache.errors import SpecError

__all__ = [
    "CODECS",
    "Codec",
    "Decoded",
    "Field",
    "Fields",
    "HardLabels",
    "Items",
    "Named",
    "SparseLogits",
    "parse",
]

Decoded = np.ndarray | SparseLogits | HardLabels | Items


class Codec(Protocol):
    """What every member of :data:`CODECS` offers; see the module's text."""

    version: ClassVar[int]
    kinds: ClassVar[tuple[str, ...]]
    limit: ClassVar[float]

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]: ...
    def encode(self, values: np.ndarray) -> Fields: ...
    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Decoded: ...
    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray | Mapping[str, np.ndarray]: ...


CODECS: dict[str, type[Codec]] = {
    "all": All,
    "argmax": Argmax,
    "f16": F16,
    "full": Full,
    "int8": Int8,
    "top": Top,
    "topk": TopK,
}


@dataclass(frozen=True)
class Named:
    """A codec and the canonical spec string that makes it."""

    spec: str
    codec: Codec


def parse(text: str) -> Named:
    """``"full(u8)"`` → the codec. Raises :class:`SpecError` naming the nearest known word."""
    calls = spec.parse(text)
    if len(calls) != 1:
        raise SpecError(f"codec {text!r} has {len(calls)} steps; codecs are not composed yet, name one")
    return Named(spec.unparse(calls), spec.construct(calls[0], CODECS, "codec"))
