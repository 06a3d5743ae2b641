"""Targets: what a teacher's output means. One file a kind, listed in :data:`KINDS`.

A kind has a ``name``, a geometry ``law`` (how it changes when the view changes), ``accepts(shape)`` for the shape
of one row, and ``wrap(values)``, which gives decoded rows their meaning: ``[i]`` is one row of them, ``arrays()`` what a
DataLoader stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from softcache import codecs
from softcache.codecs import Codec, Field, Fields, HardLabels, Objects, SparseLogits, is_boxed, is_plain
from softcache.codecs.anchored import Anchored
from softcache.codecs.head import Head
from softcache.codecs.items import All
from softcache.errors import CodecError, MismatchError, SoftcacheError, SpecError, TeacherError, nearest
from softcache.targets.attention_map import AttentionMapKind
from softcache.targets.attribution import GAP, AttributionKind, gap_of, is_attribution
from softcache.targets.embedding import EmbeddingKind
from softcache.targets.feature_map import FeatureMapKind
from softcache.targets.items import ITEMS, Items, ItemsKind
from softcache.targets.layout import Layout
from softcache.targets.logits import Logits, LogitsKind

__all__ = [
    "GAP",
    "KINDS",
    "HardLabels",
    "Items",
    "Kind",
    "Layout",
    "Logits",
    "Request",
    "SparseLogits",
    "Target",
    "gap_of",
    "is_attribution",
    "is_logits",
    "made_of",
    "request",
    "requests",
    "taps",
]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Kind(Protocol):
    """What every member of :data:`KINDS` offers; see the module's text."""

    @property
    def name(self) -> str: ...
    @property
    def law(self) -> str: ...
    def accepts(self, shape: tuple[int, ...]) -> bool: ...
    def wrap(self, values: Any) -> Any: ...


KINDS: dict[str, Kind] = {
    k.name: k
    for k in (LogitsKind(), FeatureMapKind(), EmbeddingKind(), AttentionMapKind(), AttributionKind(), *ITEMS)
}


@dataclass(frozen=True)
class Request:
    """What a user asks for: ``layer3=int8``, or ``layer3:feature_map=int8`` to state the kind."""

    name: str
    kind: str | None
    codec: codecs.Named

    @property
    def tap(self) -> str:
        """What the teacher is asked for."""
        return _tap(self.name, self.codec.codec)

    def resolve(self, shape: tuple[int, ...], layout: Layout | None = None) -> Target:
        """The target for rows of ``shape``. Unless it was stated, the kind follows from the shape; with a ``layout``, by
        which its teacher says that they are many items, from the last part of the name (``one2one.detections``)."""
        if 0 in shape:
            raise TeacherError(f"target {self.name!r} gives rows of shape {shape}: there is nothing in them")
        kind = self.kind or self._kind_of(shape, layout)
        if not KINDS[kind].accepts(shape):
            raise TeacherError(f"target {self.name!r} gives rows of shape {shape}, which are no {kind}")
        if kind not in self.codec.codec.kinds:
            fitting = [n for n, c in codecs.CODECS.items() if kind in c.kinds]
            raise CodecError(
                f"target {self.name!r} is a {kind}, which {self.codec.spec!r} does not hold; "
                f"codecs for it: {', '.join(fitting)}"
            )
        codec = self.codec.codec
        if isinstance(known := KINDS[kind], ItemsKind):
            codec = self._laid_out(known, shape, layout)
        return Target(self.name, kind, shape, self.codec.spec, codec)

    def _laid_out(self, kind: ItemsKind, shape: tuple[int, ...], layout: Layout | None) -> Codec:
        """The codec, told what the columns are. Raises :class:`TeacherError` for what is not of the kind."""
        if layout is None:
            raise TeacherError(
                f"the teacher does not say what the columns of {self.name!r} {shape} mean, as {kind.name} need: give "
                f"it layouts, such as {{{self.name!r}: softcache.Layout(…)}}"
            )
        if why := kind.refuses(layout, shape):
            raise TeacherError(
                f"target {self.name!r} gives rows of shape {shape}, which are no {kind.name}: {why}"
            )
        assert isinstance(self.codec.codec, All)  # no other codec serves these kinds
        return self.codec.codec.laid_out(layout)

    def _kind_of(self, shape: tuple[int, ...], layout: Layout | None) -> str:
        last, of_items = self.name.rpartition(".")[2], [k.name for k in ITEMS]
        if layout is not None or isinstance(self.codec.codec, All):
            if last in of_items:
                return last
            if layout is None and KINDS["feature_map"].accepts(shape):
                fitting = [n for n, c in codecs.CODECS.items() if "feature_map" in c.kinds]
                raise CodecError(
                    f"target {self.name!r} is a map {shape}, and {self.codec.spec!r} holds items: codecs for maps are "
                    f"{', '.join(fitting)}"
                )
            raise TeacherError(
                f"the target {self.name!r} is of many items: say of which kind, such as {self.name}:{of_items[0]}="
                f"{self.codec.spec} (known: {', '.join(of_items)})"
            )
        if "attention_map" in self.codec.codec.kinds:
            return "attention_map"
        if is_logits(self.name):
            return "logits"
        if is_attribution(self.name) and KINDS["attribution"].accepts(shape):
            return "attribution"
        for kind in ("feature_map", "embedding"):
            if KINDS[kind].accepts(shape):
                return kind
        raise TeacherError(f"target {self.name!r} gives rows of shape {shape}; no kind of target holds them")


@dataclass(frozen=True)
class Target:
    """A target of a cache: its name, kind, row shape and codec."""

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: str
    codec: Codec

    @property
    def fields(self) -> tuple[Field, ...]:
        found = self.codec.fields(self.shape)
        return tuple(replace(f, plain=True) for f in found) if is_plain(self.spec) else found

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, before zstd; what its image shares with others is not counted."""
        return sum(field.bytes for field in self.fields)

    @property
    def anchored(self) -> Anchored | None:
        """Its codec, where views of an image share something."""
        return self.codec if isinstance(self.codec, Anchored) else None

    @property
    def layered(self) -> bool:
        """Does its codec need the teacher's last layer?"""
        return isinstance(self.codec, Head)

    @property
    def said(self) -> str:
        """The teacher's answer that what is kept is compared with."""
        return self.name if self.layered else self.tap

    @property
    def shared(self) -> tuple[Field, ...]:
        """The fields of an image, where its views share some."""
        return self.anchored.shared(self.shape) if self.anchored else ()

    @property
    def law(self) -> str:
        return KINDS[self.kind].law

    @property
    def tap(self) -> str:
        """The teacher's answer that it is made of."""
        return _tap(self.name, self.codec)

    @property
    def layout(self) -> Layout | None:
        """What the columns mean, of a target of many items."""
        return getattr(self.codec, "layout", None)

    @property
    def boxed(self) -> bool:
        """Does its codec ask what a view shows?"""
        return is_boxed(self.codec)

    def encode(self, values: np.ndarray, objects: Sequence[Objects], beside: Fields) -> Fields:
        """The teacher's rows, float32 ``(n, *shape)`` → fields. ``objects`` of each row count where it is ``boxed``,
        ``beside`` as for :meth:`decode`."""
        if self.anchored:
            return self.anchored.encode(values, beside)
        codec: Any = self.codec
        return codec.encode(values, objects) if self.boxed else codec.encode(values)

    def decode(self, fields: Fields) -> Any:
        """Encoded rows, with what is needed beside them (:meth:`softcache.Cache.beside`) → what they mean:
        :class:`Logits`, a feature map, an embedding, :class:`Items`."""
        return KINDS[self.kind].wrap(self.codec.decode(fields, self.shape))

    def wrap(self, values: np.ndarray) -> Any:
        """What the teacher's rows mean, float32 ``(n, *shape)``: as :meth:`decode`, but with nothing rounded."""
        exact = getattr(self.codec, "exact", None)
        return KINDS[self.kind].wrap(values if exact is None else exact(values))

    def identity(self) -> dict[str, Any]:
        return {
            "codec": self.spec,
            "codec_version": self.codec.version,
            "kind": self.kind,
            "law": self.law,
            "shape": list(self.shape),
            "layout": None if self.layout is None else self.layout.identity(),
        }

    @classmethod
    def from_identity(cls, name: str, stored: Mapping[str, Any]) -> Target:
        """The target that :meth:`identity` described; :class:`MismatchError` when this version cannot read it."""
        layout = stored.get("layout")
        try:
            found = None if layout is None else Layout.from_identity(layout)
            asked = request(f"{name}:{stored['kind']}={stored['codec']}")
            target = asked.resolve(tuple(stored["shape"]), found)
            target.codec.fields(target.shape)
        except SoftcacheError as e:
            raise MismatchError(f"this softcache does not read the target {name!r}: {e}") from e
        if target.codec.version != stored["codec_version"]:
            raise MismatchError(
                f"target {name!r} was written by version {stored['codec_version']} of {target.spec!r}; "
                f"this softcache reads version {target.codec.version}"
            )
        return target


def _tap(name: str, codec: Codec) -> str:
    """``p3.attention`` is of the map ``p3``, which may be asked for too; logits as ``head`` are of ``logits.head``."""
    return name.removesuffix(getattr(codec, "suffix", "")) + getattr(codec, "taken", "")


def made_of(name: str, known: Iterable[str]) -> str:
    """``": layer3.strength=strength is kept …"`` where ``name`` is what a codec makes of a ``known`` one; else nothing."""
    for codec, cls in codecs.CODECS.items():
        base = name.removesuffix(getattr(cls, "suffix", ""))
        if base != name and base in known:
            return f": {name}={codec} is kept of the map {base!r}"
    return ""


def taps(targets: Iterable[Request | Target]) -> tuple[str, ...]:
    """What a teacher is asked for besides its logits."""
    both = [name for t in targets for name in ((t.tap, t.name) if t.tap == f"{t.name}.head" else (t.tap,))]
    return tuple(dict.fromkeys(name for name in both if name != "logits"))


def is_logits(name: str) -> bool:
    """``logits``, or ``0.logits``: those of one of several teachers."""
    return re.fullmatch(r"(\d+\.)?logits", name) is not None


def request(text: str) -> Request:
    """``"name[:kind]=codec"`` → a request. Raises :class:`SpecError`."""
    left, equals, codec = text.partition("=")
    name, _, kind = left.strip().partition(":")
    if not equals or not codec.strip():
        raise SpecError(f"target {text!r} is written name=codec, like logits=full(u8) or layer3=int8")
    if not NAME.fullmatch(name):
        raise SpecError(f"target name {name!r}: letters, digits, '_', '.' and '-' only")
    if kind and kind not in KINDS:
        raise SpecError(f"target {text!r}: unknown kind {kind!r}{nearest(kind, KINDS)}")
    return Request(name, kind or None, codecs.parse(codec))


def requests(targets: Mapping[str, str] | Iterable[str]) -> tuple[Request, ...]:
    """Requests from ``{"logits": "full(u8)"}`` or ``["logits=full(u8)"]``, sorted by name."""
    if isinstance(targets, str):
        texts = [targets]
    else:
        texts = [f"{k}={v}" for k, v in targets.items()] if isinstance(targets, Mapping) else list(targets)
    asked = sorted((request(t) for t in texts), key=lambda r: r.name)
    if not asked:
        raise SpecError("no target: say what to keep, for example --target 'logits=full(u8)'")
    for a, b in pairwise(asked):
        if a.name == b.name:
            raise SpecError(f"target {a.name!r} is asked for twice")
    return tuple(asked)
