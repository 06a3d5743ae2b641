"""What is measured while building: how right the teacher is, and how faithful the codecs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.beside import classes_of
from softcache.codecs import AttentionMap, SampledLogits
from softcache.codecs.fixed import HIGH, LOW
from softcache.errors import counted
from softcache.manifest import Receipt, Report
from softcache.memorised import Answers, entropies, warning
from softcache.targets import GAP, Items, Logits, Target

if TYPE_CHECKING:
    from softcache.cache import Cache

TEMPERATURES = (1, 4)
MOST_GAP = 0.05  # of attributions that add up to what they explain
_LOST = 0.99  # relative L2 error, from which on zeros would do as well
ROWS = 16  # rows of a block whose fidelity is measured


@dataclass
class Tally:
    """Counts and sums over the rows of a block; what they mean: :class:`softcache.manifest.Receipt`."""

    labelled: int = 0
    correct: int = 0
    teacher_correct: int = 0
    entropy: float = 0.0
    measured: int = 0
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)

    def count(self, said: np.ndarray, kept: np.ndarray, labels: np.ndarray) -> None:
        """Is the most probable class the label's, and how certain is the teacher? ``said`` float32 ``(n, C)``, its logits;
        ``kept`` int64 ``(n,)``, the class that is kept of them; ``labels`` likewise, -1 where there is none to compare."""
        known = labels >= 0
        self.labelled += int(known.sum())
        self.correct += int((kept == labels)[known].sum())
        self.teacher_correct += int((said.argmax(axis=1) == labels)[known].sum())
        self.entropy += float(entropies(said[known]).sum())

    def add(self, target: Target, said: np.ndarray, kept: Any, gap: np.ndarray | None = None) -> None:
        """Compare float32 rows with what the codec kept of them, decoded; ``gap`` (n,): what of each the teacher itself
        missed (:func:`softcache.targets.gap_of`)."""
        sums = self.fidelity.setdefault(target.name, {})
        found = fidelity(target.wrap(said), kept) | ({} if gap is None else {GAP: gap})
        for key, values in found.items():
            sums[key] = sums.get(key, 0.0) + float(values.sum())
        self.measured = max(self.measured, len(said))


def fidelity(said: Any, kept: Any) -> dict[str, np.ndarray]:
    """Per row, of two decoded targets: KL(said ‖ kept) in nats at each temperature that both hold for logits, and
    whether they agree on the class where one has none; of sampled ones ‖p̂ − p‖ / ‖p‖, since their KL is infinite; of items
    see :func:`_of_items`; relative L2 error and cosine for the rest, of attention maps for either part."""
    if isinstance(said, AttentionMap):
        pairs = {"spatial": (said.spatial, kept.spatial), "channel": (said.channel, kept.channel)}
        return {f"{name}_{key}": v for name, pair in pairs.items() for key, v in _closeness(*pair).items()}
    if isinstance(said, Items):
        rows = [_of_items(*_common(said[i], kept[i])) for i in range(len(said.index))]
        return {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    if not hasattr(said, "top1"):
        return _closeness(said.values, kept.values)
    drawn = next((one for one in (kept, said) if isinstance(one, SampledLogits)), None)
    if drawn is not None and said.holds(drawn.T) and kept.holds(drawn.T):
        p, q = (np.exp(one.log_probs(drawn.T)) for one in (said, kept))
        return {f"gradient_T{drawn.T:g}": np.linalg.norm(q - p, axis=-1) / np.linalg.norm(p, axis=-1)}
    held = [T for T in TEMPERATURES if drawn is None and said.holds(T) and kept.holds(T)]
    found = {f"kl_T{T}": _kl(said.log_probs(T), kept.log_probs(T)) for T in held}
    return found or {"agreement": (said.top1() == kept.top1()).astype(np.float64)}


def _common(said: Items, kept: Items) -> tuple[Items, Items]:
    """The items of a row that both hold."""
    _, ours, theirs = np.intersect1d(said.index, kept.index, return_indices=True)
    return said.take(ours), kept.take(theirs)


def _of_items(said: Items, kept: Items) -> dict[str, float]:
    """Of a row's items that both hold: ``boxes``, the mean absolute error of a side in the unit square of the view, and
    ``boxes_max``, the largest, of sides within −0.5 … 1.5; ``boxes_clipped``, the share of items with a side that is not,
    and is cut there; ``kl``, the mean of KL(said ‖ kept) in nats (of sigmoids summed over the classes);
    ``embedding_l2`` and so on, the relative L2 error of other parts."""
    found: dict[str, float] = {}
    for name in said.layout.columns:
        a, b = (items.parts[name].astype(np.float64) for items in (said, kept))
        if name in ("boxes", "reference"):
            inside = (a >= LOW) & (a <= HIGH) & (b >= LOW) & (b <= HIGH)
            off = np.abs(a - b)[inside]
            found[name], found[f"{name}_max"] = _mean(off), float(off.max(initial=0.0))
            found[f"{name}_clipped"] = _mean(np.asarray(~inside.all(axis=-1)))
        elif name == "logits":
            softmax = said.layout.score == "softmax"
            found["kl"] = _mean(kl(a, b, 1) if softmax else _bernoulli_kl(a, b))
        else:
            norm = np.linalg.norm(a)
            found[f"{name}_l2"] = float(np.linalg.norm(a - b) / norm) if norm else 0.0
    return found


def _mean(errors: np.ndarray) -> float:
    return float(errors.mean()) if errors.size else 0.0


def _bernoulli_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the sigmoids of two rows of logits, summed over a row."""
    p = np.exp(-np.logaddexp(0, -a))
    yes, no = np.logaddexp(0, -b) - np.logaddexp(0, -a), np.logaddexp(0, b) - np.logaddexp(0, a)
    return (p * yes + (1 - p) * no).sum(axis=-1)


def kl(said: np.ndarray, kept: np.ndarray, T: float) -> np.ndarray:  # noqa: N803
    """KL(softmax(said/T) ‖ softmax(kept/T)) of each row of logits, in nats, float64 ``(n,)``."""
    return _kl(Logits(said).log_probs(T), Logits(kept).log_probs(T))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (np.exp(p) * (p - q)).sum(axis=-1)


def cosine(said: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Of each row, flattened; 1 where both are zero, 0 where one is."""
    return _closeness(said, kept)["cosine"]


def _closeness(said: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
    flat = len(said), prod(said.shape[1:])  # not -1: there may be no rows
    a, b = said.reshape(flat).astype(np.float64), kept.reshape(flat).astype(np.float64)
    norm = np.linalg.norm(a, axis=1)
    safe = np.where(norm > 0, norm, 1.0)
    dot, other = (a * b).sum(axis=1), np.linalg.norm(b, axis=1)
    both = (norm > 0) & (other > 0)
    cosine = np.where(both, dot / (safe * np.where(other > 0, other, 1.0)), norm == other)
    return {"relative_l2": np.linalg.norm(a - b, axis=1) / safe, "cosine": cosine}


def report(
    receipts: list[Receipt],
    targets: Mapping[str, Target],
    equivariance: dict[str, dict[str, float]],
    bases: int,
) -> Report:
    """The manifest's report: top-1 of what was kept, fidelity and bytes a row, and what the probe found; ``bases`` take so
    many bytes."""
    labelled = sum(r.labelled for r in receipts)
    return Report(
        bytes=sum(e.bytes for r in receipts for e in r.files) + bases,
        bytes_per_row={n: t.row_bytes for n, t in targets.items()},
        fidelity={n: _mean_fidelity(receipts, n) for n in targets},
        labelled=labelled,
        teacher_top1=sum(r.teacher_correct for r in receipts) / labelled if labelled else None,
        top1=sum(r.correct for r in receipts) / labelled if labelled else None,
        entropy=_mean_entropy(receipts, labelled),
        equivariance=equivariance,
    )


def _mean_entropy(receipts: list[Receipt], labelled: int) -> float | None:
    """None where nobody measured it: without labels, or in receipts of before 1.3."""
    if not labelled or any(r.labelled and r.entropy is None for r in receipts):
        return None
    return sum(r.entropy or 0.0 for r in receipts) / labelled


def answers(cache: Cache, number: int) -> Answers | None:
    """What is known of the teacher of a part; None where it has no logits, or there are no labels."""
    part, report = cache.parts[number], cache.sealed[number].report
    if part.logits not in part.targets or report.teacher_top1 is None or report.entropy is None:
        return None
    return Answers(report.labelled, report.teacher_top1, report.entropy, classes_of(cache, part.logits))


def _mean_fidelity(receipts: list[Receipt], name: str) -> dict[str, float]:
    measured = sum(r.measured for r in receipts)
    sums = [r.fidelity[name] for r in receipts if r.measured]
    keys = [k for k in (sums[0] if sums else ()) if all(k in s for s in sums)]
    return {k: sum(s[k] for s in sums) / measured for k in keys}


def size(count: float) -> str:
    """``1234567`` → ``"1.2 MB"``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def words(fidelity: Mapping[str, float]) -> str:
    """``kl_T1 5.4e-08, kl_T4 3.8e-08``; a cosine with the digits that matter."""
    return ", ".join(f"{k} {v:.6f}" if k == "cosine" else f"{k} {v:.3g}" for k, v in fidelity.items())


def motion_words(figures: Mapping[str, float]) -> str:
    """``flip 0.7429 (0.6277 ignoring it), zoom …``: the probe's figures of a target."""
    moves = [k for k in ("flip", "shift", "zoom") if {k, f"{k}_ignored"} <= figures.keys()]
    return ", ".join(f"{k} {figures[k]:.4f} ({figures[f'{k}_ignored']:.4f} ignoring it)" for k in moves)


def tell(cache: Cache) -> str:
    """What a build says at its end."""
    r = cache.report
    rows = cache.samples * cache.views
    lines = [
        f"{cache.path}: {counted(cache.samples, 'sample')} × {counted(cache.views, 'view')}, {size(r.bytes)} in shards"
    ]
    lines[0] += f" ({r.bytes / rows:,.1f} bytes a view), digest {cache.digest[:16]}"
    for name, values in r.fidelity.items():
        told = words(values)
        if values.get("relative_l2", 0) >= _LOST:
            told += (
                ". NOTE: nothing of it is left: it is too small, or too uneven, for this codec; say another"
            )
        if values.get(GAP, 0) > MOST_GAP:
            told += (
                f". NOTE: these attributions do not add up to the change of the logit they explain ({values[GAP]:.0%} of it "
                "is off): take those of a later layer"
            )
        shared = sum(field.bytes for field in cache.targets[name].shared)
        size_of = f"{r.bytes_per_row[name]:,} bytes a row" + f", and {shared:,} an image" * bool(shared)
        lines.append(f"  {name} as {cache.targets[name].spec}: {size_of}; {told}")
    for name, figures in r.equivariance.items():
        lines.append(f"  {name} moves with the view, cosine: {motion_words(figures)}")
    if r.top1 is not None:
        lines.append(
            f"  top-1 of what was cached against the labels: {r.top1:.2%} of {r.labelled:,} rows "
            f"({r.teacher_top1:.2%} before encoding)"
        )
    for part, sealed in zip(cache.parts, cache.sealed, strict=True):
        if part.named and sealed.report.top1 is not None:
            lines.append(
                f"  top-1 of {part.logits}: {sealed.report.top1:.2%} of {sealed.report.labelled:,} rows "
                f"({sealed.report.teacher_top1:.2%} before encoding)"
            )
    for part in cache.parts:
        said = answers(cache, part.number)
        if said and (told := warning(said)):
            lines.append(told)
    if len(cache.invalid):
        lines.append(f"  {len(cache.invalid):,} samples are invalid: their images could not be read")
    return "\n".join(lines)
