"""What a student's gradient loses by what a codec rounds or leaves out; not how close the numbers look.

Of logits, at T = 1, 2, 4, 8, means over rows: ``kl_T``, KL(teacher ‖ kept) in nats; ``t2kl_T``, T² times that, as the loss
of distillation weighs it; ``gradient_T``, ‖p̂ − p‖ / ‖p‖ of the probabilities: by how much the gradient T·(p_student − p) is
off, relative to what the targets are of it.

Of maps and embeddings: ``cosine``, of rows; ``gradient``: the gradient of the squared distance ‖s − t‖² is 2(s − t), and
off by ‖t̂ − t‖; relative to it at the student that knows nothing but each channel's mean, over all rows together. A pooled
map is compared at every place.

Of items: as :func:`softcache.measure.fidelity` has it for those that are kept, and ``gradient``, ‖p̂ − p‖ / ‖p‖ of the class
probabilities of all items, those that are left out being taken for 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softcache import measure
from softcache.codecs import Items
from softcache.targets import Logits

TEMPERATURES = (1, 2, 4, 8)


def of_logits(said: np.ndarray, kept: Any) -> dict[str, float]:
    """``said`` float32 ``(n, C)``, ``kept`` the rows decoded; at the temperatures that these hold."""
    found: dict[str, float] = {}
    truth = Logits(said)
    for T in TEMPERATURES:  # noqa: N806
        if not kept.holds(T):
            continue
        p, q = truth.log_probs(T), kept.log_probs(T)
        kl = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
        off = np.linalg.norm(np.exp(q) - np.exp(p), axis=-1) / np.linalg.norm(np.exp(p), axis=-1)
        found |= {f"kl_T{T}": kl, f"t2kl_T{T}": T * T * kl, f"gradient_T{T}": float(off.mean())}
    return found


def of_values(said: np.ndarray, kept: np.ndarray, pool: int = 1) -> dict[str, float]:
    """``said`` float32 ``(n, C, H, W)``, ``(n, Q, D)`` or ``(n, D)``; ``kept`` likewise, or of cells ``pool`` × ``pool``."""
    axes = (0, 2, 3) if said.ndim == 4 else tuple(range(said.ndim - 1))
    mean = said.mean(axis=axes, keepdims=True, dtype=np.float64)[0]
    cosines, wrong, spread, norm = [], 0.0, 0.0, 0.0
    for row, one in zip(said, kept, strict=True):  # one by one: they may be large
        here = _spread(one, pool, row.shape).astype(np.float64)
        wrong += float(np.square(here - row).sum())
        spread += float(np.square(row - mean).sum())
        norm += float(np.square(row.astype(np.float64)).sum())
        cosines.append(float(measure.cosine(row[None], here[None])[0]))
    # a map that does not vary has no such student: relative to itself
    whole = spread if spread > 1e-12 * norm else norm
    gradient = (wrong / whole) ** 0.5 if whole else float(wrong > 0)
    return {"cosine": float(np.mean(cosines)) if cosines else 1.0, "gradient": gradient}


def _spread(values: np.ndarray, pool: int, shape: tuple[int, ...]) -> np.ndarray:
    if pool == 1:
        return values
    wide = np.repeat(np.repeat(values, pool, axis=1), pool, axis=2)
    return wide[:, : shape[1], : shape[2]]


def of_items(said: Items, kept: Items) -> dict[str, float]:
    """Of rows of items: all that the teacher said, and what was kept."""
    found = of_any(said, kept)
    if said.layout.scored:
        wrong = total = 0.0
        for row in range(len(said.index)):
            p = said[row].scores().astype(np.float64)
            left = np.zeros_like(p)
            left[kept[row].index] = kept[row].scores()
            wrong, total = wrong + float(np.square(left - p).sum()), total + float(np.square(p).sum())
        found["gradient"] = (wrong / total) ** 0.5 if total else 0.0
    return found


def of_any(said: Any, kept: Any) -> dict[str, float]:
    """Means of :func:`softcache.measure.fidelity`, of two decoded targets of the same form."""
    return {key: float(values.mean()) for key, values in measure.fidelity(said, kept).items() if values.size}
