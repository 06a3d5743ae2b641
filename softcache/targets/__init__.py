"""Targets: what a teacher's output means. One file a kind, listed in :data:`KINDS`.

A kind has a ``name``, a geometry ``law`` (how it changes when the view changes), ``accepts(shape)`` for the shape
of one row, and ``wrap(values)``, which gives decoded rows their meaning: ``[i]`` is one row of them, ``arrays()`` what a
DataLoader stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from softcache import codecs
from softcache.codecs import Codec, Decoded, Field, Fields, HardLabels, SparseLogits
from softcache.errors import CodecError, MismatchError, SoftcacheError, SpecError, TeacherError, nearest
from softcache.targets.embedding import EmbeddingKind
from softcache.targets.feature_map import FeatureMapKind
from softcache.targets.logits import Logits, LogitsKind

__all__ = [
    "KINDS",
    "HardLabels",
    "Kind",
    "Logits",
    "Request",
    "SparseLogits",
    "Target",
    "is_logits",
    "request",
    "requests",
]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Kind(Protocol):
    """What every member of :data:`KINDS` offers; see the module's text."""

    name: str
    law: str

    def accepts(self, shape: tuple[int, ...]) -> bool: ...
    def wrap(self, values: Any) -> Any: ...


KINDS: dict[str, Kind] = {k.name: k for k in (LogitsKind(), FeatureMapKind(), EmbeddingKind())}


@dataclass(frozen=True)
class Request:
    """What a user asks for: ``layer3=int8``, or ``layer3:feature_map=int8`` to state the kind."""

    name: str
    kind: str | None
    codec: codecs.Named

    def resolve(self, shape: tuple[int, ...]) -> Target:
        """The target for rows of ``shape``. The kind follows from the shape unless it was stated."""
        kind = self.kind or self._kind_of(shape)
        if not KINDS[kind].accepts(shape):
            raise TeacherError(f"target {self.name!r} gives rows of shape {shape}, which are no {kind}")
        if kind not in self.codec.codec.kinds:
            fitting = [n for n, c in codecs.CODECS.items() if kind in c.kinds]
            raise CodecError(
                f"target {self.name!r} is a {kind}, which {self.codec.spec!r} does not hold; "
                f"codecs for it: {', '.join(fitting)}"
            )
        return Target(self.name, kind, shape, self.codec.spec, self.codec.codec)

    def _kind_of(self, shape: tuple[int, ...]) -> str:
        if is_logits(self.name):
            return "logits"
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
        return self.codec.fields(self.shape)

    @property
    def law(self) -> str:
        return KINDS[self.kind].law

    def decode(self, fields: Fields) -> Any:
        """Encoded rows → what they mean: :class:`Logits`, a feature map, an embedding."""
        return self.wrap(self.codec.decode(fields, self.shape))

    def wrap(self, values: Decoded) -> Any:
        """What float32 rows mean, or what ``topk`` and ``argmax`` keep of them."""
        return KINDS[self.kind].wrap(values)

    def identity(self) -> dict[str, Any]:
        return {
            "codec": self.spec,
            "codec_version": self.codec.version,
            "kind": self.kind,
            "law": self.law,
            "shape": list(self.shape),
        }

    @classmethod
    def from_identity(cls, name: str, stored: Mapping[str, Any]) -> Target:
        """The target that :meth:`identity` described; :class:`MismatchError` when this version cannot read it."""
        try:
            target = request(f"{name}:{stored['kind']}={stored['codec']}").resolve(tuple(stored["shape"]))
            target.codec.fields(target.shape)
        except SoftcacheError as e:
            raise MismatchError(f"this softcache does not read the target {name!r}: {e}") from e
        if target.codec.version != stored["codec_version"]:
            raise MismatchError(
                f"target {name!r} was written by version {stored['codec_version']} of {target.spec!r}; "
                f"this softcache reads version {target.codec.version}"
            )
        return target


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
