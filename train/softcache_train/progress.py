"""What a run says on stderr: a line an epoch and, on a terminal, one live line within it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

EVERY = 0.2  # seconds between live lines


def of_exits(exits: Sequence[float], ensemble: float) -> str:
    """Top-1 of each exit, and of the mean of their logits."""
    each = ", ".join(f"exit {number} {top1:.2%}" for number, top1 in enumerate(exits, 1))
    return f"{each}, ensemble {ensemble:.2%}"


class Progress:
    """Counts the steps of an epoch and times them. Says nothing unless ``shown``."""

    def __init__(self, epochs: int, steps: int, global_batch: int, *, shown: bool):
        self.epochs, self.steps, self.global_batch = epochs, steps, global_batch
        self.shown = shown
        self.live = shown and sys.stderr.isatty()
        self.begin(0)

    def say(self, text: str) -> None:
        if self.shown:
            print(f"\r{text}\033[K" if self.live else text, file=sys.stderr, flush=True)

    def begin(self, epoch: int) -> None:
        self.epoch, self.taken = epoch, 0
        self.started = self.drawn = time.perf_counter()

    def step(self, step: int) -> None:
        """One more step was taken, the epoch's ``step``-th."""
        self.taken += 1
        now = time.perf_counter()
        if self.live and now - self.drawn > EVERY:
            self.drawn = now
            rate = self.taken * self.global_batch / (now - self.started)
            line = f"epoch {self.epoch + 1}/{self.epochs}  step {step}/{self.steps}"
            print(f"\r{line}  {rate:,.0f} img/s\033[K", end="", file=sys.stderr, flush=True)

    def rates(self) -> dict[str, float]:
        """``step_ms`` and ``images_per_second`` since the epoch began; empty if no step was
        taken."""
        if not self.taken:
            return {}
        seconds = (time.perf_counter() - self.started) / self.taken
        return {"step_ms": 1000 * seconds, "images_per_second": self.global_batch / seconds}

    def end(self, entry: dict[str, Any]) -> None:
        """The line of a finished epoch; see ``history`` in :class:`.checkpoint.Checkpoint`."""
        top1 = "" if entry["top1"] is None else f"  val {entry['top1']:7.2%}"
        if "exits" in entry:
            top1 += f" ({of_exits(entry['exits'], entry['ensemble'])})"
        rate = f"  {entry['images_per_second']:,.0f} img/s" if "images_per_second" in entry else ""
        apart = {
            n: v
            for n, v in entry.items()
            if n
            not in ("epoch", "loss", "step_ms", "images_per_second", "top1", "exits", "ensemble", "targets")
        }
        told = "".join(f"  {name} {value:.4f}" for name, value in apart.items())
        self.say(f"epoch {entry['epoch']:>3}/{self.epochs}  loss {entry['loss']:.4f}{told}{top1}{rate}")
