"""The live line of a build: rates, and which stage is the limit."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from softcache.errors import counted

_WINDOW = 20.0  # seconds the rates look back
STAGES = ("decode", "teacher", "write")


@dataclass
class Meter:
    """Counts rows and bytes, and how long the main loop waited for each stage.

    The main loop waits for pixels (decode), runs the teacher, and waits for the writer when that falls behind: the
    stage it spends most of its time in is the limit.
    """

    total: int
    show: bool = True
    rows: int = 0
    bytes: int = 0
    queue: int = 0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _first: tuple[float, int, float] | None = None  # when the first batch was answered
    _begun: float = field(default_factory=time.monotonic)
    _printed: float = 0.0
    _past: deque[tuple[float, int, int, dict[str, float]]] = field(default_factory=deque)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time spent here is time the main loop spends in, or waiting for, this stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] += time.monotonic() - start

    def add(self, rows: int) -> None:
        """Rows the teacher answered; prints the line when it is due."""
        self.rows += rows
        now = time.monotonic()
        self._first = self._first or (now, self.rows, self.spent["teacher"])
        self._past.append((now, self.rows, self.bytes, dict(self.spent)))
        while len(self._past) > 2 and now - self._past[0][0] > _WINDOW:
            self._past.popleft()
        terminal = sys.stderr.isatty()
        if self.show and now - self._printed > (0.5 if terminal else 15.0) and now - self._begun > 0.5:
            self._printed = now
            print(self.line(), end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    def pace(self) -> dict[str, float]:
        """Rows a second until now: of the whole loop (``rows``), and of the teacher while it answers (``teacher_rows``).

        The first batch, which pays for the start, does not count where there are others; empty where there is none.
        """
        if self._first is None:
            return {}
        at, rows, answering = self._first if self.rows > self._first[1] else (self._begun, 0, 0.0)
        span, answered = time.monotonic() - at, self.spent["teacher"] - answering
        return {"rows": (self.rows - rows) / span, "teacher_rows": (self.rows - rows) / max(answered, 1e-9)}

    def limit(self, since: dict[str, float] | None = None) -> tuple[str, float]:
        """The stage that takes the largest share of the main loop's time since then (or ever), and that share."""
        shares = {s: self.spent[s] - (since or {}).get(s, 0.0) for s in STAGES}
        name = max(shares, key=lambda s: shares[s])
        return name, shares[name] / (sum(shares.values()) or 1.0)

    def line(self) -> str:
        """One line: progress, rates over the last seconds, time left, the limit."""
        start, rows, size, then = self._past[0] if len(self._past) > 1 else (self._begun, 0, 0, {})
        span = max(time.monotonic() - start, 1e-6)
        rate = (self.rows - rows) / span or self.rows / max(time.monotonic() - self._begun, 1e-6)
        left = (self.total - self.rows) / rate if rate else 0.0
        limit, share = self.limit(then)
        return (
            f"{self.rows:,}/{self.total:,} rows · {rate:,.0f} rows/s · {(self.bytes - size) / span / 1e6:,.1f} MB/s "
            f"written · {self.queue} batches waiting to be written · {clock(left)} left · "
            f"the limit is {limit} ({share:.0%})   "
        )

    def summary(self) -> str:
        """One line for the end."""
        if not self.rows:
            return "0 rows through the teacher"
        span = max(time.monotonic() - self._begun, 1e-6)
        limit, share = self.limit()
        return (
            f"{counted(self.rows, 'row')} through the teacher in {clock(span)} ({self.rows / span:,.0f} rows/s), "
            f"{self.bytes / 1e6:,.1f} MB written; the limit was {limit} ({share:.0%} of the time)"
        )


def clock(seconds: float) -> str:
    """``3725`` → ``"1:02:05"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
