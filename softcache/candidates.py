"""A table of codecs: what each that makes sense for a target would take, and what the student's gradient would lose.

They are tried on what the teacher said in a pilot, and their rows are encoded and compressed as a build would write them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from softcache import codecs, layers
from softcache.codecs import Fields
from softcache.codecs.argmax import Argmax
from softcache.codecs.pool import Pooled
from softcache.codecs.sample import Sample
from softcache.codecs.sign import Sign
from softcache.errors import CodecError, SoftcacheError
from softcache.losses import of_any, of_items, of_logits, of_values
from softcache.measure import fidelity
from softcache.pilot import ANCHORED, Heard, Pilot
from softcache.reckoning import Kept, Size, varying
from softcache.targets import Items, Request, Target, request
from softcache.teachers import layouts_of

_OTHER_FORMS = (Argmax, Sample, Sign)  # what they keep is for another loss than values or probabilities
_QUICK = 0.05  # seconds for which decoding is timed

_LOGITS = (
    "full(f16)", "full(u8)", "packed(256)", "packed(128)", "packed(64)", "packed(44)", "packed(28)", "packed(16)",
    "anchored", "head(f16)", "head(int8)", "topk(50)", "topk(20)", "topk(10)", "topk(4)", "argmax",
)  # fmt: skip
_MAPS = ("f16", "int8", "int4", "pool(2)|int8", "pool(2)|int4", "attention(0.5)", "strength(2)", "sign")
_NUMBERS = ("f16", "int8", "int4")
_VECTORS = (*_NUMBERS, "sign")
_ITEMS = (
    "all(logits=f16)", "all", "all(logits=score)", "top(1000, background=200)", "top(300, background=100)",
    "top(300, background=100, logits=score)", "top(100, background=50)",
)  # fmt: skip
BY_KIND: dict[str, tuple[str, ...]] = {
    "logits": _LOGITS,
    "feature_map": _MAPS,
    "embedding": _VECTORS,
    "attention_map": (),
    "attribution": _NUMBERS,
    **dict.fromkeys(("detections", "queries", "probes", "proposals"), _ITEMS),
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A codec of a target, tried.

    Attributes:
        target: its name. codec: the spec. kept: for :class:`softcache.reckoning.Reckoning`.
        asked: is it what was asked for? same: does it keep the form that was asked for, so that it may be chosen?
        figures: see :mod:`softcache.losses`. error: what the student's gradient loses, relative to it, at the worst of its
            temperatures; kl: T²·KL in nats there, of logits. None where there is no such thing.
        encode_seconds, decode_seconds: of a row, by one thread.
    """

    target: str
    codec: str
    kept: Kept
    asked: bool
    same: bool
    figures: Mapping[str, float]
    error: float | None
    kl: float | None
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Tried:
    """The candidates of each target, the finest first; what was ``left_out``, and why: (target, codec, reason)."""

    pilot: Pilot
    candidates: Mapping[str, list[Candidate]]
    left_out: list[tuple[str, str, str]]

    @property
    def asked(self) -> dict[str, Candidate]:
        """What was asked for, of each target."""
        return {name: next(c for c in some if c.asked) for name, some in self.candidates.items()}

    def whole(self, chosen: Mapping[str, Candidate], beside: int = 0) -> Size:
        """The cache with these; see :meth:`softcache.reckoning.Reckoning.whole`."""
        return self.pilot.reckoning.whole({name: one.kept for name, one in chosen.items()}, beside)

    def bytes_per_view(self, one: Candidate) -> float:
        """Of the files of its target alone."""
        rows = len(self.pilot.of.source) * self.pilot.of.views
        return self.pilot.reckoning.shards(one.kept) / rows


def try_all(pilot: Pilot) -> Tried:
    """Every candidate of every target that was asked for."""
    found: dict[str, list[Candidate]] = {}
    left: list[tuple[str, str, str]] = []
    for asked in pilot.of.asked:
        own = pilot.reckoning.as_asked[asked.name]
        found[asked.name] = [_candidate(pilot, asked, own.target, own)]
        for spec in _specs(pilot, own.target):
            if spec == asked.codec.spec:
                continue
            try:
                target = _target(pilot, asked, spec, own.target)
                found[asked.name].append(_candidate(pilot, asked, target, None))
            except SoftcacheError as e:
                left.append((asked.name, spec, str(e)))
        found[asked.name].sort(key=lambda one: one.error if one.error is not None else np.inf)
    return Tried(pilot, found, left)


def _specs(pilot: Pilot, asked: Target) -> Iterator[str]:
    """What is tried instead of what was asked for."""
    yield from BY_KIND[asked.kind]
    if isinstance(asked.codec, Pooled):
        step = asked.spec.rpartition("|")[0]
        yield from (f"{step}|{spec}" for spec in _VECTORS if f"{step}|{spec}" not in BY_KIND[asked.kind])
    if not pilot.of.source.has_boxes:
        return
    if asked.kind == "feature_map":
        cells = asked.shape[1] * asked.shape[2]
        yield from (f"foreground({-(-cells // share)}, pool=2)" for share in (4, 10))
    elif asked.layout is not None and asked.layout.scored and not pilot.of.ignore_labels:
        yield "top(300, background=100, inside=100)"


def _target(pilot: Pilot, asked: Request, spec: str, own: Target) -> Target:
    """The same target by another codec. Raises :class:`SoftcacheError` where that does not serve it, or makes no sense."""
    kind = f":{asked.kind}" * (asked.kind in codecs.parse(spec).codec.kinds)
    other = request(f"{asked.name}{kind}={spec}")
    if other.tap not in pilot.heard:
        raise CodecError(
            f"the teacher is not asked for {other.tap!r}: ask for {asked.name}={spec}, and it is tried"
        )
    heard = pilot.heard[other.tap].values
    target = other.resolve(heard.shape[1:], layouts_of(pilot.of.teacher).get(asked.name))
    if heard.size and float(np.abs(heard).max()) > target.codec.limit:
        raise CodecError(f"it holds values up to {target.codec.limit:g}, and the teacher says larger ones")
    finest = BY_KIND[own.kind][0]
    if spec != finest:
        most = request(f"{asked.name}{kind}={finest}")
        most = most.resolve(pilot.heard[most.tap].values.shape[1:], target.layout)
        if target.row_bytes >= most.row_bytes:
            raise CodecError(f"it takes no fewer bytes than {finest}, which keeps more")
    return target


def _candidate(pilot: Pilot, asked: Request, target: Target, own: Kept | None) -> Candidate:
    """``own``: how the pilot kept it, of what was asked for."""
    heard, beside = _heard(pilot, target)
    start = time.perf_counter()
    fields = target.encode(heard.values, heard.objects, beside)
    beyond = varying(target, fields)
    encoding = time.perf_counter() - start
    kept, decoding = _decoded(target, fields | beside)
    form = _form(target)
    said = pilot.heard[target.said].values if target.layered else heard.values
    found = _figures(target, said, kept, form)
    rows = max(len(heard.samples), 1)
    return Candidate(
        target=asked.name,
        codec=target.spec,
        kept=own or Kept(target, beyond, tuple(fidelity(target.wrap(said[:1]), kept[:1]))),
        asked=own is not None,
        same=form == _form(pilot.reckoning.as_asked[asked.name].target),
        figures=found,
        error=max((v for k, v in found.items() if k.startswith("gradient")), default=None),
        kl=max((v for k, v in found.items() if k.startswith("t2kl")), default=None),
        encode_seconds=encoding / rows,
        decode_seconds=decoding / rows,
    )


def _heard(pilot: Pilot, target: Target) -> tuple[Heard, Fields]:
    """What is tried, and what it is encoded or decoded with: of codecs that have bases, rows of which none is made.

    Raises :class:`CodecError` where no image was seen in as many views as a base is made of.
    """
    heard, codec = pilot.heard[target.tap], target.anchored
    if target.layered:
        return heard, layers.of(pilot.of.teacher, {target.name: target}, "")[target.name]
    if codec is None:
        return heard, {}
    row = {key: i for i, key in enumerate(zip(heard.samples.tolist(), heard.views.tolist(), strict=True))}
    first = range(codec.views)
    whole = [s for s in dict.fromkeys(heard.samples.tolist()) if all((s, view) in row for view in first)]
    if not whole or (pilot.views <= codec.views < pilot.of.views):
        raise CodecError(
            f"it makes a base of {codec.views} views and pays from about {ANCHORED}, where there are many classes"
        )
    bases = codec.anchor(np.stack([heard.values[[row[s, view] for s in whole]] for view in first]))
    tried = [
        (s, view) for s, view in row if s in whole and (view >= codec.views or pilot.views == codec.views)
    ]
    place = {sample: i for i, sample in enumerate(whole)}
    some = [row[key] for key in tried]
    objects = [heard.objects[i] for i in some]
    beside = {field: values[[place[s] for s, _ in tried]] for field, values in bases.items()}
    return Heard(heard.values[some], heard.samples[some], heard.views[some], objects), beside


def _figures(target: Target, said: np.ndarray, kept: Any, form: Form) -> dict[str, float]:
    """See :mod:`softcache.losses`."""
    if form.other is not None or target.kind == "attention_map":
        return of_any(target.wrap(said), kept)
    if target.kind == "logits":
        return of_logits(said, kept)
    if isinstance(kept, Items):
        return of_items(target.wrap(said), kept)
    return of_values(said, kept.values, form.pool)


class Form(NamedTuple):
    """What a student's loss has to know of a target, besides its values."""

    kind: str
    pool: int
    other: type | None


def _form(target: Target) -> Form:
    codec, pool = target.codec, 1
    if isinstance(codec, Pooled):
        codec, pool = codec.then, codec.pool.n
    return Form(target.kind, pool, next((form for form in _OTHER_FORMS if isinstance(codec, form)), None))


def _decoded(target: Target, fields: Fields) -> tuple[Any, float]:
    """The rows, and the seconds they take: the least of several times, since the first pays for imports and tables."""
    began = start = time.perf_counter()
    kept = target.decode(fields)
    took = time.perf_counter() - start
    while time.perf_counter() - began < _QUICK:
        start = time.perf_counter()
        target.decode(fields)
        took = min(took, time.perf_counter() - start)
    return kept, took
