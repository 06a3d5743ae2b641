"""An array of somebody's, read once: what no teacher says is refused, and the rows are laid aside on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from softcache.errors import MismatchError, SourceError
from softcache.exchange.arrayfile import Stored
from softcache.exchange.files import aside
from softcache.store import Store
from softcache.targets import Request, is_logits

FORMS = ("logits", "log_probabilities", "probabilities")
_OFF = 0.01  # by which a row of probabilities in half precision may miss 1
_LEAST = 1e-12  # below which a probability tells nothing more


@dataclass(frozen=True)
class Kept:
    """An array that was looked at, laid aside: ``rows`` ``(rows, views, *row)``."""

    rows: np.ndarray
    row: tuple[int, ...]
    digest: str
    floor: float | None  # of probabilities: what stands for 0

    @classmethod
    def of(
        cls,
        stored: Stored,
        tap: str,
        asked: Iterable[Request],
        form: str,
        views: int,
        ids: Sequence[str],
        store: Store,
        say: Callable[[str], None],
    ) -> Kept:
        """Read it once, refusing what no teacher says."""
        many = (views,) if views > 1 else ()
        logits = any(
            (r.kind or ("logits" if is_logits(r.name) else "")) == "logits" for r in asked if r.tap == tap
        )
        lead = (len(ids), *many)
        if stored.shape[: len(lead)] != lead or len(stored.shape) <= len(lead) or not all(stored.shape):
            raise MismatchError(
                f"{stored.name!r} is {stored.shape}; rows of {tap!r} are ({len(ids)}, {'views, ' if many else ''}…): "
                "samples first" + (f", then {views} views" if many else "")
            )
        row = stored.shape[len(lead) :]
        if logits and len(row) != 1:
            raise MismatchError(
                f"{stored.name!r} is {stored.shape}: logits are (samples, classes), or with --views V (samples, V, classes)"
            )
        folder = next(p for p in (store.root.absolute(), *store.root.absolute().parents) if p.is_dir())
        dtype = stored.dtype.newbyteorder("<")
        kept, hashed, start = aside(folder, dtype, (len(ids), views, *row)), sha256(), 0
        numbers = _Numbers(stored.name, ids, form if logits else "", dtype)
        for piece in stored.pieces():
            piece = np.ascontiguousarray(piece, dtype)
            numbers.see(start, piece.reshape(len(piece), views, *row))
            hashed.update(piece.data)
            kept[start : start + len(piece)] = piece.reshape(len(piece), views, *row)
            start += len(piece)
        numbers.judge(say)
        floor = numbers.floor if logits and form == "probabilities" else None
        return cls(kept, row, hashed.hexdigest(), floor)

    def take(self, rows: np.ndarray, view: int) -> np.ndarray:
        """float32 ``(n, *row)``, logits where they were probabilities."""
        values = self.rows[rows, view]
        if self.floor is not None:
            values = np.log(np.maximum(values.astype(np.float64), self.floor))
        return values.astype(np.float32)


class _Numbers:
    """What is wrong with numbers, and whether logits are none."""

    def __init__(self, name: str, ids: Sequence[str], form: str, dtype: np.dtype):
        self._name, self._ids, self._form, self._dtype = name, ids, form, dtype
        self._odd = self._zeros = self._count = 0  # rows that are no probabilities; zeros; numbers
        tiny = float(np.finfo(dtype).smallest_subnormal) if dtype.kind == "f" else _LEAST
        self.floor = max(tiny, _LEAST)

    def see(self, start: int, values: np.ndarray) -> None:
        """Rows ``(n, views, *row)``, the first being number ``start``. Raises :class:`SourceError` naming the first bad."""
        with np.errstate(over="ignore"):
            flat = values.reshape(len(values), values.shape[1], -1).astype(np.float32)
        self._refuse(start, ~np.isfinite(flat).all(axis=2), "holds NaN, infinity, or more than a float32")
        if not self._form:
            return
        sums = flat.sum(axis=2, dtype=np.float64)
        likely = (flat.min(axis=2) >= 0) & (flat.max(axis=2) <= 1) & (abs(sums - 1) <= _OFF)
        if self._form == "probabilities":
            self._refuse(start, ~likely, "is no row of probabilities: they are 0 to 1, and 1 in all")
        elif self._form == "log_probabilities":
            self._refuse(start, (flat > _OFF).any(axis=2), "holds more than 0, which no log-probability is")
        self._odd += int((~likely).sum())
        self._zeros += int((flat == 0).sum())
        self._count += flat.size

    def _refuse(self, start: int, bad: Any, what: str) -> None:
        if bad.any():
            row, view = np.argwhere(bad)[0].tolist()
            more = f" view {view}" if bad.shape[1] > 1 else ""
            raise SourceError(f"{self._name!r}, row {start + row}{more} ({self._ids[start + row]!r}) {what}")

    def judge(self, say: Callable[[str], None]) -> None:
        """When all rows were seen. Raises :class:`SourceError`."""
        if self._form == "logits" and not self._odd:
            raise SourceError(
                f"{self._name!r} holds probabilities, every row is 1 in all: logits are what stands before the softmax. Say "
                "--from probabilities to take their logarithms"
            )
        if self._form == "probabilities" and self._zeros:
            say(
                f"NOTE: {self._zeros:,} of {self._count:,} probabilities ({self._zeros / self._count:.2%}) are 0, as "
                f"{self._dtype} leaves what is too small for it: they are taken for {self.floor:.2g}. At temperatures above "
                "1, where small probabilities teach, these are wrong"
            )
