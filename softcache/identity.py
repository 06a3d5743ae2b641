"""What a build is of: everything that changes a cache's values, and nothing else.

Paths, hosts, users, times and throughput are no part of it. Two builds of one identity may go on with each other.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from softcache import spec
from softcache.block import Grid
from softcache.errors import DamageError
from softcache.recipe.view import MAX_PARAMETERS
from softcache.targets import NAME, Target

VERSION = (1, 3)
IMPORTED = "import:"  # what the name of a teacher begins with of which there are arrays only
MAX_VIEWS, MAX_BLOCK_ROWS = 1 << 20, 1 << 24
MAX_TARGETS = 1000

T = TypeVar("T")
Many = Annotated[
    list[T], Field(fail_fast=True)
]  # or an error would be kept for each of millions of wrong values
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Pixels = Annotated[int, Field(ge=1, le=1 << 15)]
TeacherName = Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_-]{0,31})?$")]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    ADDED: ClassVar[frozenset[str]] = frozenset()  # since 1.0: not written where they have their default

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        default = type(self).model_fields
        found = handler(self)
        return {k: v for k, v in found.items() if k not in self.ADDED or v != default[k].get_default()}

    def to_bytes(self) -> bytes:
        return spec.canonical_json(self.model_dump(mode="json"))


class SourceId(Model):
    """Which samples, in which order, with which content, class names, labels and boxes (None where there are none)."""

    ADDED = frozenset({"boxes"})

    layout: str
    split: str | None
    ids: Sha
    content: Sha
    classes: Many[str] | None
    labels: Sha | None
    decoder: dict[str, str]
    boxes: Sha | None = None


class RecipeId(Model):
    """How views were drawn and rendered; ``parameters`` numbers of its pixel ops are kept of each, with ``mixed``
    what it is mixed with, and with ``tiled`` what it is a mosaic of. Where it is not ``replayable`` nobody knows what
    the teacher saw, and views are whole images."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"parameters", "mixed", "tiled", "replayable"})
    spec: str
    seed: int
    ops: dict[str, int]
    render: dict[str, int | str]
    parameters: Annotated[int, Field(ge=0, le=MAX_PARAMETERS)] = 0
    mixed: bool = False
    tiled: bool = False
    replayable: bool = True


class InputSpec(Model):
    """What a network wants to see: ``(RGB / 255 - mean) / std`` at ``size`` (height, width), channels in ``color`` order."""

    size: tuple[Pixels, Pixels]
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    color: Literal["RGB", "BGR"] = "RGB"


class MemberId(Model):
    """One of several teachers that ran as one."""

    name: str
    weights: Sha | None
    weights_format: str | None
    input_spec: InputSpec


class TeacherId(Model):
    """Who spoke. ``weights`` is a digest of names, types, shapes and values; None where there are none to hash.

    ``answer``: mean and standard deviation of each target's answer to one picture of noise, so that changed code does
    not pass for the same teacher; None for a callable that names its weights.
    ``members``: those of an ensemble; its ``weights`` is a digest of theirs, its ``input_spec`` the first one's.
    ``parent``: the cache that its weights were learned from, a sha256, where the file of a student says so.
    ``flip_tta``: logits are the mean over an image and its mirror image. ``columns``: where the cache's classes were among
    its own, when their order differs. ``label_smoothing``: ε of its training, where that is known. ``head``: of an ONNX
    graph, what its ``detections`` were read from.
    """

    ADDED = frozenset({"members", "flip_tta", "columns", "label_smoothing", "head", "parent"})

    name: str
    weights: Sha | None
    weights_format: str | None
    input_spec: InputSpec
    precision: str
    processor: str
    batch: Annotated[int, Field(ge=1)]
    answer: Many[float] | None = None
    members: Many[MemberId] | None = None
    flip_tta: bool = False
    columns: Many[Count] | None = None
    label_smoothing: FiniteFloat | None = None
    head: str | None = None
    parent: Sha | None = None

    def unlike(self, other: TeacherId) -> list[tuple[str, Any, Any]]:
        """Where another is another teacher, or the same one run otherwise: :func:`differences`. Neither the processor counts
        nor the file's format and origin, nor ``answer``, which is of the targets that were asked for."""
        beside = {"processor", "weights_format", "answer", "parent"}
        mine, theirs = (one.model_dump(mode="json", exclude=beside) for one in (self, other))
        for one in (mine, theirs):
            for member in one.get("members") or ():
                member.pop("weights_format")
        return differences(mine, theirs)


class LayoutId(Model):
    """See :class:`softcache.targets.Layout`, which checks more."""

    ADDED = frozenset({"anchors"})

    columns: Many[tuple[str, int]]
    score: str
    background: int | None
    levels: Many[tuple[int, int]]
    layers: int
    head: str
    anchors: int = 1


class TargetId(Model):
    """See :meth:`softcache.targets.Target.identity`."""

    ADDED = frozenset({"layout"})

    kind: str
    law: str
    shape: Many[Annotated[int, Field(ge=1, le=1 << 24)]]
    codec: str
    codec_version: int
    layout: LayoutId | None = None


class ProbesId(Model):
    """How the boxes of ``probes`` were drawn: see :func:`softcache.probes.points`."""

    count: Annotated[int, Field(ge=1, le=1 << 16)]
    version: int


class GridId(Model):
    """See :class:`softcache.block.Grid`. ``first``: the view from which on a part of a cache holds rows."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"first"})

    samples: Annotated[int, Field(ge=1, le=1 << 40)]
    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)]
    block_rows: Annotated[int, Field(ge=1, le=MAX_BLOCK_ROWS)]
    permutation: Literal["feistel-6"]
    key: int
    first: Annotated[int, Field(ge=0, le=MAX_VIEWS)] = 0


class Identity(Model):
    """Everything that changes a cache's values, and nothing else.

    ``named``: of a part by another teacher than the cache's first, what it is called; ``big`` says ``big.logits``.
    """

    ADDED = frozenset({"probes", "named"})

    version: tuple[int, int]
    source: SourceId
    recipe: RecipeId
    teacher: TeacherId
    targets: Annotated[dict[str, TargetId], Field(max_length=MAX_TARGETS)]
    grid: GridId
    libraries: dict[str, str]
    probes: ProbesId | None = None
    named: TeacherName = ""

    @cached_property
    def digest(self) -> str:
        return spec.digest(self.to_bytes())

    def make_grid(self) -> Grid:
        g = self.grid
        return Grid(g.samples, g.views, g.block_rows, g.key, g.first)

    def make_targets(self) -> dict[str, Target]:
        for name in self.targets:
            if not NAME.fullmatch(name):
                raise DamageError(f"the manifest names a target {name!r}, which is no target name")
        return {n: Target.from_identity(n, t.model_dump()) for n, t in sorted(self.targets.items())}


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON-like values differ: (dotted path, in a, in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(a.keys() | b.keys()):
            found += differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if a == b else [(path, a, b)]


def told(found: list[tuple[str, Any, Any]]) -> str:
    """Some :func:`differences` in words."""
    some = "; ".join(f"{path} is {_short(a)} there and {_short(b)} here" for path, a, b in found[:4])
    return some + (f" (and {len(found) - 4} more)" if len(found) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
