"""The receipts of a cache's blocks, and the manifest that commits them.

Written in this order: ``receipts/identity.json`` and the ids, then per block its shards and its receipt, then the
canaries, ``files.bin`` and at last ``softcache.json``: the only commit point. Read in the opposite order.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from softcache import spec
from softcache.arrays import constant
from softcache.chosen import Choice
from softcache.errors import DamageError, MismatchError
from softcache.identity import VERSION, Count, Identity, Many, Model, Sha
from softcache.parts import MAX_PARTS
from softcache.zarrfile import Array

MANIFEST = "softcache.json"
MAX_JSON, MAX_DEPTH, MAX_MEMBERS = 8 << 20, 32, 1 << 18
MAX_TABLE = 1 << 30
_MOST_TOLD = 100  # of what is wrong with a file: pydantic takes a kilobyte for each
MAX_AXES = 64  # as numpy has
ENTRY = np.dtype([("sha256", "V32"), ("bytes", "<u8")])

# SPDX's identifiers and expressions, and words such as "proprietary": nothing that could be an address or markup
Licence = Annotated[str, Field(pattern=r"^[A-Za-z0-9(][A-Za-z0-9 ().+-]{0,199}$")]
ConstantName = Annotated[str, Field(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)+$", max_length=200)]
M = TypeVar("M", bound=Model)


class Entry(Model):
    """A file's digest and size."""

    sha256: Sha
    bytes: Count

    @classmethod
    def of(cls, data: bytes) -> Entry:
        """Of a file that holds these bytes."""
        return Entry(sha256=spec.digest(data), bytes=len(data))


class Constant(Entry):
    """A constant array's file, and what is needed to read it."""

    dtype: str
    shape: Many[Count]

    def array(self, path: str) -> Array:
        return constant(path, tuple(self.shape), self.dtype)


class _Signed(Model):
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
    highest at the label, ``teacher_correct`` those where the teacher's were before encoding; ``entropy`` sums
    that of the teacher's softmax over them, in nats. ``fidelity`` holds sums over ``measured`` rows. ``anchors``: of targets
    whose views share something, sha256 of the bases of its samples (:func:`softcache.bases.digests`), against which its
    rows were encoded.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"anchors", "entropy"})

    block: tuple[int, int]
    identity: Sha
    rows: Count
    files: Many[Entry]
    invalid: Many[int]
    labelled: Count
    correct: Count
    teacher_correct: Count
    measured: Count
    fidelity: dict[str, dict[str, float]]
    anchors: dict[str, Sha] = Field(default={})
    entropy: FiniteFloat | None = None


class Report(Model):
    """What was measured. ``bytes`` of all shards, and of bases; ``bytes_per_row`` of each target, before zstd;
    ``fidelity`` of each, means of :func:`softcache.measure.fidelity`; top-1 over ``labelled`` rows, None without labels, and
    over these the mean ``entropy`` of what the teacher said, in nats; ``equivariance`` of each spatial target, see
    :mod:`softcache.probe`.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"equivariance", "entropy"})

    bytes: Count
    bytes_per_row: dict[str, Count]
    fidelity: dict[str, dict[str, float]]
    labelled: Count
    teacher_top1: float | None
    top1: float | None
    entropy: FiniteFloat | None = None
    equivariance: dict[str, dict[str, FiniteFloat]] = Field(default={})

    @model_validator(mode="after")
    def _top1_of_labelled_rows(self) -> Self:
        if {self.top1 is None, self.teacher_top1 is None} != {self.labelled == 0}:
            raise ValueError("top-1 is of labelled rows")
        return self


def together(parts: list[tuple[int, str, Report]]) -> Report:
    """The report of a whole cache, of those of its parts, each with the number of its views and what its teacher is called:
    means of what several tell; top-1 is the first teacher's."""
    reports = [report for _, _, report in parts]
    if len(reports) == 1:
        return reports[0]
    fidelity: dict[str, dict[str, float]] = {}
    for name in {name: None for r in reports for name in r.fidelity}:
        told = [(views, r.fidelity[name]) for views, _, r in parts if r.fidelity.get(name)]
        total = sum(views for views, _ in told)
        keys = [k for k in (told[0][1] if told else ()) if all(k in f for _, f in told)]
        fidelity[name] = {k: sum(v * f[k] for v, f in told) / total for k in keys}
    firsts = [r for _, named, r in parts if not named]
    return Report(
        bytes=sum(r.bytes for r in reports),
        bytes_per_row={n: b for r in reports for n, b in r.bytes_per_row.items()},
        fidelity=fidelity,
        labelled=sum(r.labelled for r in firsts),
        teacher_top1=_mean([(r.teacher_top1, r.labelled) for r in firsts]),
        top1=_mean([(r.top1, r.labelled) for r in firsts]),
        entropy=_mean([(r.entropy, r.labelled) for r in firsts]),
        equivariance={n: f for r in reversed(reports) for n, f in r.equivariance.items()},
    )


def _mean(shares: list[tuple[float | None, int]]) -> float | None:
    known = [(share, rows) for share, rows in shares if share is not None and rows]
    return sum(share * rows for share, rows in known) / sum(rows for _, rows in known) if known else None


class Sealed(Model):
    """A part of a cache that is whole: what it is, and the digests of its files. See :class:`softcache.parts.Part`."""

    identity: Identity
    constants: dict[ConstantName, Constant]
    identity_file: Entry
    files: Entry
    report: Report

    def holds_together(self) -> bool:
        """Is the identity the one whose file is named?"""
        return self.identity_file == Entry.of(self.identity.to_bytes())


class Manifest(_Signed, Sealed):
    """``softcache.json``: part 0 of a cache, and the ``parts`` it was extended by. Its ``digest`` is the cache's name.

    ``licences`` of the source, the teacher and the cache, where they were stated: see :mod:`softcache.licences`. ``choice``:
    how the codecs of part 0 were chosen, where the build did so.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"parts", "licences", "choice"})

    format: Literal["softcache"]
    invalid: Many[Count]
    parts: Many[Sealed] = Field(default=[], max_length=MAX_PARTS)
    licences: dict[Literal["source", "teacher", "cache"], Licence] = Field(default={})
    choice: Choice | None = None

    def stands_for(self, raw: bytes) -> bool:
        rising = all(a < b for a, b in pairwise(self.invalid))
        inside = not self.invalid or self.invalid[-1] < self.identity.grid.samples
        return rising and inside and super().stands_for(raw)

    @model_validator(mode="after")
    def _constants_in_their_places(self) -> Self:
        """None in another part's folder, in another array, or with too many axes."""
        seen: set[str] = set()
        for number, part in enumerate((self, *self.parts)):
            lead = f"parts/{number}/" if number else ""
            roots = ("anchors", "constants") if number else ("anchors", "canary", "constants", "ids")
            for path, one in sorted(part.constants.items()):
                inside = path.startswith(lead) and path.removeprefix(lead).split("/")[0] in roots
                above = {path[:i] for i, c in enumerate(path) if c == "/"}
                if not inside or path in seen or above & seen or len(one.shape) > MAX_AXES:
                    raise ValueError(f"the constant {path!r} is where no cache has one")
                seen.add(path)
        return self


def read(model: type[M], data: bytes, where: str, hint: str) -> M:
    """Parse and validate. :class:`DamageError` naming ``where``, or :class:`MismatchError` for a newer format."""
    try:
        _bounded(data)
        version = _version(data)
        if version[0] > VERSION[0]:
            raise MismatchError(
                f"{where} has format version {version[0]}; this softcache reads up to version {VERSION[0]}: "
                "upgrade softcache"
            )
        return _validate(model, data, where, version)
    except (ValidationError, ValueError, RecursionError) as e:
        why = _first(e) if isinstance(e, ValidationError) else str(e)
        raise DamageError(f"{where} is half-written or was edited ({why:.200}); {hint}") from None


def _bounded(data: bytes) -> None:
    """Raises :class:`ValueError` for JSON that would take far more memory, or stack, than it has bytes."""
    depth, members = spec.extent(data)
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if members > MAX_MEMBERS:
        raise ValueError(f"{members:,} keys; up to {MAX_MEMBERS:,} are read")


def _first(e: ValidationError) -> str:
    if e.error_count() > _MOST_TOLD:
        return f"{e.error_count():,} of its values are wrong"
    one = e.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, one['loc']))}: {one['msg']}"


def _validate(model: type[M], data: bytes, where: str, version: tuple[int, int]) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError:
        if version > VERSION:
            told = ".".join(map(str, version))
            raise MismatchError(f"{where} has format version {told}: upgrade softcache to read it") from None
        raise


def _version(data: bytes) -> tuple[int, int]:
    """The format's version in a manifest or an identity; (0, 0) where there is none."""
    value = json.loads(data.decode())
    identity = value.get("identity", value) if isinstance(value, dict) else None
    version = identity.get("version") if isinstance(identity, dict) else None
    match version:
        case [int(major), int(minor)]:
            return major, minor
        case _:
            return 0, 0


def pack_table(receipts: list[tuple[Receipt, bytes]]) -> bytes:
    """``files.bin``: for each block in canonical order its files' entries, then its receipt's own."""
    return pack_entries([e for receipt, raw in receipts for e in (*receipt.files, Entry.of(raw))])


def pack_entries(entries: list[Entry]) -> bytes:
    """As :data:`ENTRY`."""
    return np.array([(bytes.fromhex(e.sha256), e.bytes) for e in entries], ENTRY).tobytes()


def unpack_table(name: str, data: bytes, blocks: int, files: int) -> np.ndarray:
    """``(blocks, files + 1)`` of :data:`ENTRY`; the last column is the receipts'."""
    if len(data) != blocks * (files + 1) * ENTRY.itemsize:
        raise DamageError(
            f"{name} has {len(data):,} bytes and should have {blocks * (files + 1) * ENTRY.itemsize:,}"
        )
    found = np.frombuffer(data, ENTRY).reshape(blocks, files + 1)
    if found.size and (largest := int(found["bytes"].max())) > 1 << 48:
        raise DamageError(f"{name} names a file of {largest:,} bytes, which is none of a cache")
    return found
