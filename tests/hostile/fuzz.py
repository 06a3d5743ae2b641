"""Files that are changed at random, and read: ``python -m hostile.fuzz --seconds 10 --seed 0 [--reader NAME]``.

Only errors of softcache's own may come out, whose message is one short line. What else comes out is shrunk by hypothesis
and told, with the seed. Meant for a process of its own: its memory is limited, and an audit hook forbids what
:mod:`hostile.guard` lists.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hostile import guard
from hostile.mutate import Tree, choose
from hostile.readers import READERS
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from softcache.errors import SoftcacheError

GROWTH = 1 << 30  # bytes of addresses that reading may take
LONGEST = 1200  # characters of a message
_BATCH = 20  # examples of one seed
LEAST = 20  # inputs of a reader, however slow the machine
_SKIPPED = 0.7  # of what can be done with what was opened: other files are worth more


class FaultError(Exception):
    """Something came out that must not."""


class Fuzz:
    """Tries inputs of one reader, and counts: ``tried``, how each mutation's ended, and what was raised where."""

    def __init__(self, name: str, folder: Path):
        self.name, self.reader = name, READERS[name]
        self.root, self.scratch = folder / name / "files", folder / name / "scratch"
        self.root.parent.mkdir(parents=True)
        self.scratch.mkdir()
        self.reader.make(self.root)
        self.tree = Tree(self.root)
        self.tried = 0
        self.refused: Counter[str] = Counter()
        self.raised: Counter[str] = Counter()
        self.slowest = 0.0

    def read(self, random: Random) -> str:
        """Open, and do some of what can be done then. Returns the first error's kind, or ``none``."""
        first, done = "none", 0
        steps = self.reader.steps(self.root, self.scratch)
        while True:
            try:
                step, run = next(steps)
            except StopIteration:
                return first
            except SoftcacheError as e:
                raise FaultError(f"{self.name}: between its steps: {e!r}") from e
            done += 1
            if done > 1 and random.random() < _SKIPPED:
                continue
            try:
                with guard.watched(self.root, writable=(self.scratch,)):
                    run()
            except SoftcacheError as e:
                self._check_message(step, e)
                self.raised[f"{step}: {type(e).__name__}"] += 1
                first = type(e).__name__ if first == "none" else first
            except (Exception, guard.Breach, guard.Hung) as e:
                raise FaultError(f"{self.name}, {step}: {e!r:.500}") from e

    def _check_message(self, step: str, e: SoftcacheError) -> None:
        told = str(e)
        if len(told) > LONGEST + 2 * len(str(self.root)) or "\n" in told or "\x1b" in told:
            raise FaultError(
                f"{self.name}, {step}: a message of {len(told)} characters: {told[:300]!r}"
            ) from e

    def attempt(self, random: Random) -> None:
        self.tree.restore()
        mutation = choose(random, self.reader.mutations)
        self.reader.mutations[mutation][1](random, self.tree)
        hypothesis.note(mutation)
        self.tried += 1
        start = time.monotonic()
        found = self.read(random)
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.refused[f"{mutation}: {found}"] += 1

    def run(self, seconds: float, seed: int) -> None:
        """Until the time is over, and :data:`LEAST` were tried. Raises what :meth:`attempt` does, of a small input."""
        end = time.monotonic() + seconds

        @hypothesis.given(st.randoms(use_true_random=False))
        @hypothesis.settings(
            max_examples=_BATCH,
            database=None,
            deadline=None,
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
                HealthCheck.filter_too_much,
            ],
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        )
        def one(random: Random) -> None:
            self.attempt(random)

        while time.monotonic() < end or self.tried < LEAST:
            hypothesis.seed(seed)(one)()
            seed += 1

    def told(self) -> dict[str, Any]:
        counts = {"refused": self.refused, "raised": self.raised}
        sorted_ = {name: dict(sorted(c.items())) for name, c in counts.items()}
        return {"tried": self.tried, "slowest_s": round(self.slowest, 2)} | sorted_


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, action="append")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of numbers that overflow
    found: dict[str, Any] = {"seed": arguments.seed, "readers": {}}
    names = arguments.reader or list(READERS)
    with tempfile.TemporaryDirectory() as folder:
        all_of_them = [Fuzz(name, Path(folder)) for name in names]
        for one in all_of_them:
            _warm_up(one)
        found["limit"] = guard.limit_memory(GROWTH)
        for one in all_of_them:
            try:
                one.run(arguments.seconds / len(names), arguments.seed)
            except BaseException as e:
                traceback.print_exc()  # with what hypothesis notes
                found["fault"] = f"{e!r:.2000}"
            found["readers"][one.name] = one.told()
    print(json.dumps(found | {"memory": guard.memory()}, indent=1))
    return 1 if "fault" in found else 0


def _warm_up(one: Fuzz) -> None:
    """Import what reading good files imports, and hypothesis' own."""
    for _, run in one.reader.steps(one.root, one.scratch):
        with contextlib.suppress(SoftcacheError):  # NotPulled
            run()
    hypothesis.settings(max_examples=3, database=None)(hypothesis.given(st.randoms())(lambda random: None))()


if __name__ == "__main__":
    sys.exit(main())
