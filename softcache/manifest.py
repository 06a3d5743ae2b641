"""The identity of a cache, its receipts, and the manifest that commits them.

Written in this order: ``receipts/identity.json`` and the ids, then per block its shards and its receipt, then the
canaries, ``files.bin`` and at last ``softcache.json``: the only commit point. Read in the opposite order.
"""

from __future__ import annotations

import json
from functools import cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from softcache import spec
from softcache.block import Block, Grid
from softcache.errors import DamageError, MismatchError
from softcache.recipe.mix import Blend, Mix
from softcache.recipe.mosaic import Frame, Mosaic
from softcache.recipe.view import MAX_PARAMETERS, View
from softcache.targets import NAME, Target
from softcache.zarrfile import Array

MANIFEST, TABLE, IDENTITY = "softcache.json", "files.bin", "receipts/identity.json"
VERSION = (1, 2)
MAX_JSON = 8 << 20
MAX_VIEWS, MAX_BLOCK_ROWS = 1 << 20, 1 << 24
_MOST_VALUES = 1 << 28  # of a row: what a manifest can make a reader allocate
ENTRY = np.dtype([("sha256", "V32"), ("bytes", "<u8")])

Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Pixels = Annotated[int, Field(ge=1, le=1 << 15)]
ConstantName = Annotated[str, Field(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)+$", max_length=200)]
Model = TypeVar("Model", bound="_Model")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    ADDED: ClassVar[frozenset[str]] = frozenset()  # since 1.0: not written where they have their default

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        default = type(self).model_fields
        found = handler(self)
        return {k: v for k, v in found.items() if k not in self.ADDED or v != default[k].get_default()}

    def to_bytes(self) -> bytes:
        return spec.canonical_json(self.model_dump(mode="json"))


class SourceId(_Model):
    """Which samples, in which order, with which content, class names, labels and boxes (None where there are none)."""

    ADDED = frozenset({"boxes"})

    layout: str
    split: str | None
    ids: Sha
    content: Sha
    classes: list[str] | None
    labels: Sha | None
    decoder: dict[str, str]
    boxes: Sha | None = None


class RecipeId(_Model):
    """How views were drawn and rendered; ``parameters`` numbers of its pixel ops are kept of each, with ``mixed``
    what it is mixed with, and with ``tiled`` what it is a mosaic of."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"parameters", "mixed", "tiled"})
    spec: str
    seed: int
    ops: dict[str, int]
    render: dict[str, int | str]
    parameters: Annotated[int, Field(ge=0, le=MAX_PARAMETERS)] = 0
    mixed: bool = False
    tiled: bool = False


class InputSpec(_Model):
    """What a network wants to see: ``(RGB / 255 - mean) / std`` at ``size`` (height, width), channels in ``color`` order."""

    size: tuple[Pixels, Pixels]
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    color: Literal["RGB", "BGR"] = "RGB"


class MemberId(_Model):
    """One of several teachers that ran as one."""

    name: str
    weights: Sha | None
    weights_format: str | None
    input_spec: InputSpec


class TeacherId(_Model):
    """Who spoke. ``weights`` is a digest of names, types, shapes and values; None where there are none to hash.

    ``answer``: mean and standard deviation of each target's answer to one picture of noise, so that changed code does
    not pass for the same teacher; None for a callable that names its weights.
    ``members``: those of an ensemble; its ``weights`` is a digest of theirs, its ``input_spec`` the first one's.
    ``flip_tta``: logits are the mean over an image and its mirror image. ``columns``: where the cache's classes were among
    its own, when their order differs. ``label_smoothing``: ε of its training, where that is known. ``head``: of an ONNX
    graph, what its ``detections`` were read from.
    """

    ADDED = frozenset({"members", "flip_tta", "columns", "label_smoothing", "head"})

    name: str
    weights: Sha | None
    weights_format: str | None
    input_spec: InputSpec
    precision: str
    processor: str
    batch: Annotated[int, Field(ge=1)]
    answer: list[float] | None = None
    members: list[MemberId] | None = None
    flip_tta: bool = False
    columns: list[Count] | None = None
    label_smoothing: FiniteFloat | None = None
    head: str | None = None


class LayoutId(_Model):
    """See :class:`softcache.targets.Layout`, which checks more."""

    ADDED = frozenset({"anchors"})

    columns: list[tuple[str, int]]
    score: str
    background: int | None
    levels: list[tuple[int, int]]
    layers: int
    head: str
    anchors: int = 1


class TargetId(_Model):
    """See :meth:`softcache.targets.Target.identity`."""

    ADDED = frozenset({"layout"})

    kind: str
    law: str
    shape: list[Annotated[int, Field(ge=1, le=1 << 24)]]
    codec: str
    codec_version: int
    layout: LayoutId | None = None


class ProbesId(_Model):
    """How the boxes of ``probes`` were drawn: see :func:`softcache.probes.points`."""

    count: Annotated[int, Field(ge=1, le=1 << 16)]
    version: int


class GridId(_Model):
    """See :class:`softcache.block.Grid`."""

    samples: Annotated[int, Field(ge=1, le=1 << 40)]
    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)]
    block_rows: Annotated[int, Field(ge=1, le=MAX_BLOCK_ROWS)]
    permutation: Literal["feistel-6"]
    key: int


class Identity(_Model):
    """Everything that changes a cache's values, and nothing else."""

    ADDED = frozenset({"probes"})

    version: tuple[int, int]
    source: SourceId
    recipe: RecipeId
    teacher: TeacherId
    targets: dict[str, TargetId]
    grid: GridId
    libraries: dict[str, str]
    probes: ProbesId | None = None

    @cached_property
    def digest(self) -> str:
        return spec.digest(self.to_bytes())

    def make_grid(self) -> Grid:
        g = self.grid
        return Grid(g.samples, g.views, g.block_rows, g.key)

    def make_targets(self) -> dict[str, Target]:
        for name in self.targets:
            if not NAME.fullmatch(name):
                raise DamageError(f"the manifest names a target {name!r}, which is no target name")
        return {n: Target.from_identity(n, t.model_dump()) for n, t in sorted(self.targets.items())}


def view_rows(rows: int, parameters: int, mixed: bool, tiled: bool) -> dict[str, np.ndarray]:
    """Room for what is stored of so many views, by the names of :meth:`~softcache.recipe.View.fields`, zeros."""
    room = {
        "geometry": np.zeros((rows, View.FIELDS), np.int16),
        "ops": np.zeros((rows, parameters), np.int16),
        "partner": np.zeros((rows, Mix.FIELDS * mixed), np.int64),
        "mix": np.zeros((rows, Blend.FIELDS * mixed), np.int16),
        "tiles": np.zeros((rows, Mosaic.FIELDS * tiled), np.int64),
        "mosaic": np.zeros((rows, Frame.FIELDS * tiled), np.int16),
    }
    return {name: numbers for name, numbers in room.items() if numbers.shape[1]}


def keep_view(views: dict[str, np.ndarray], row: int, view: View) -> None:
    """Put a view into a row of :func:`view_rows`."""
    fields = view.fields()
    for name, numbers in views.items():
        numbers[row] = fields[name]


def arrays(
    grid: Grid, targets: dict[str, Target], parameters: int = 0, mixed: bool = False, tiled: bool = False
) -> list[Array]:
    """The arrays cut into blocks, in canonical (path) order: one a field, and the views with ops, mixes and mosaics."""
    found = [
        _block_array(f"view/{name}", rows.dtype.name, rows.shape[1:], ("parameter",), grid)
        for name, rows in view_rows(0, parameters, mixed, tiled).items()
    ]
    for target in targets.values():
        for field in target.fields:
            axes = tuple(f"axis_{i}" for i in range(len(field.shape)))
            path = f"targets/{target.name}/{field.name}"
            found.append(_block_array(path, field.dtype, field.shape, axes, grid))
    return sorted(found, key=lambda a: a.path)


def _block_array(path: str, dtype: str, row: tuple[int, ...], axes: tuple[str, ...], grid: Grid) -> Array:
    shape = (grid.views, grid.samples, *row)
    if prod(row) > _MOST_VALUES:
        raise DamageError(f"{path} has rows of {prod(row):,} values; a row holds up to {_MOST_VALUES:,}")
    return Array(path, dtype, shape, (1, grid.block_rows, *row), ("view", "sample", *axes))


def constant(path: str, shape: tuple[int, ...], dtype: str) -> Array:
    """The array of a constant: one plain file."""
    return Array(path, dtype, shape, shape, tuple(f"axis_{i}" for i in range(len(shape))), lead=1)


class Entry(_Model):
    """A file's digest and size."""

    sha256: Sha
    bytes: Count


class Constant(Entry):
    """A constant array's file, and what is needed to read it."""

    dtype: str
    shape: list[Count]

    def array(self, path: str) -> Array:
        return constant(path, tuple(self.shape), self.dtype)


class _Signed(_Model):
    """``digest`` is the sha256 of the canonical JSON of the rest."""

    digest: str = ""

    def body_digest(self) -> str:
        return spec.digest(spec.canonical_json(self.model_dump(mode="json", exclude={"digest"})))

    def stands_for(self, raw: bytes) -> bool:
        """Are these the very bytes that were written? JSON has several spellings of one value (``1e-5``, ``1E-5``)."""
        try:
            return self.to_bytes() == raw and self.digest == self.body_digest()
        except ValueError:  # NaN, or half a surrogate pair
            return False

    def signed(self) -> Self:
        return self.model_copy(update={"digest": self.body_digest()})


class Receipt(_Signed):
    """A block is whole: its files, what was invalid, and what was measured on it.

    ``files`` follow the canonical order of :func:`arrays`. ``correct`` counts the labelled rows whose cached logits are
    highest at the label, ``teacher_correct`` those where the teacher's were before encoding. ``fidelity``
    holds sums over ``measured`` rows.
    """

    block: tuple[int, int]
    identity: Sha
    rows: Count
    files: list[Entry]
    invalid: list[int]
    labelled: Count
    correct: Count
    teacher_correct: Count
    measured: Count
    fidelity: dict[str, dict[str, float]]

    @staticmethod
    def path(block: Block) -> str:
        return f"receipts/{block.name}.json"


class Report(_Model):
    """What was measured. ``bytes`` of all shards; ``bytes_per_row`` of each target, before zstd; ``fidelity`` of each,
    means of :func:`softcache.measure.fidelity`; top-1 over ``labelled`` rows, None without labels; ``equivariance`` of
    each spatial target, see :mod:`softcache.probe`.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"equivariance"})

    bytes: Count
    bytes_per_row: dict[str, Count]
    fidelity: dict[str, dict[str, float]]
    labelled: Count
    teacher_top1: float | None
    top1: float | None
    equivariance: dict[str, dict[str, FiniteFloat]] = {}


class Manifest(_Signed):
    """``softcache.json``. Its ``digest`` is the cache's name."""

    format: Literal["softcache"]
    identity: Identity
    constants: dict[ConstantName, Constant]
    identity_file: Entry
    files: Entry
    invalid: list[Count]
    report: Report

    def stands_for(self, raw: bytes) -> bool:
        return all(i < self.identity.grid.samples for i in self.invalid) and super().stands_for(raw)


def read(model: type[Model], data: bytes, where: str, hint: str) -> Model:
    """Parse and validate. :class:`DamageError` naming ``where``, or :class:`MismatchError` for a newer format."""
    try:
        version = _version(data)
        if version[0] > VERSION[0]:
            raise MismatchError(
                f"{where} has format version {version[0]}; this softcache reads up to version {VERSION[0]}: "
                "upgrade softcache"
            )
        return _validate(model, data, where, version)
    except (ValidationError, ValueError, RecursionError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(e)
        why = repr(why)[1:-1]  # it may quote what is in the file
        raise DamageError(f"{where} is half-written or was edited ({why}); {hint}") from None


def _validate(model: type[Model], data: bytes, where: str, version: tuple[int, int]) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError:
        if version > VERSION:
            told = ".".join(map(str, version))
            raise MismatchError(f"{where} has format version {told}: upgrade softcache to read it") from None
        raise


def _version(data: bytes) -> tuple[int, int]:
    """The format's version in a manifest or an identity; (0, 0) where there is none."""
    value = json.loads(data)
    identity = value.get("identity", value) if isinstance(value, dict) else None
    version = identity.get("version") if isinstance(identity, dict) else None
    match version:
        case [int(major), int(minor)]:
            return major, minor
        case _:
            return 0, 0


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON-like values differ: (dotted path, in a, in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(a.keys() | b.keys()):
            found += differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if a == b else [(path, a, b)]


def pack_table(receipts: list[tuple[Receipt, bytes]]) -> bytes:
    """``files.bin``: for each block in canonical order its files' entries, then its receipt's own."""
    rows = []
    for receipt, raw in receipts:
        rows += [(bytes.fromhex(e.sha256), e.bytes) for e in receipt.files]
        rows.append((bytes.fromhex(spec.digest(raw)), len(raw)))
    return np.array(rows, ENTRY).tobytes()


def unpack_table(data: bytes, blocks: int, files: int) -> np.ndarray:
    """``(blocks, files + 1)`` of :data:`ENTRY`; the last column is the receipts'."""
    if len(data) != blocks * (files + 1) * ENTRY.itemsize:
        raise DamageError(
            f"{TABLE} has {len(data):,} bytes and should have {blocks * (files + 1) * ENTRY.itemsize:,}"
        )
    return np.frombuffer(data, ENTRY).reshape(blocks, files + 1)
