"""One reader in a process of its own: ``python -m read_peers.worker '{"reader": …}'`` prints what it measured as JSON.

Stages, each a process: ``prepare`` writes the records if they are not there, and compares what is read with the truth;
``warm``, ``cold`` and ``write`` measure, every side in turn with np.memmap, here, in this process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from read_peers import CASES, REQUIREMENTS, Case, Rows, Ways, by_memmap, timing

_ORDERS = {
    "rows": ("shuffled",),
    "maps": ("shuffled",),
    "zstd": ("sequential", "blocks", "shuffled"),
    "small": ("shuffled",),
}
_CHECKED = 20_000  # rows of a stream that are compared
_ALONE = "memmap, before"


class Bench:
    def __init__(self, reader: str, data: str, rounds: int, seconds: float):
        self.reader, self.folder, self.rounds, self.seconds = reader, Path(data), rounds, seconds
        self.truth = {
            path.stem: np.load(path, mmap_mode="r") for path in (self.folder / "truth").glob("*.npy")
        }

    def arrays(self, case: Case) -> dict[str, np.ndarray]:
        return {name: self.truth[name] for name in case.arrays}

    def cases(self, module: ModuleType) -> list[Case]:
        return [case for case in CASES.values() if module.ZSTD or not case.zstd]

    def _large(self, module: ModuleType) -> list[Case]:
        """Small maps tell nothing more of disks."""
        return [case for case in self.cases(module) if case.name != "small"]

    def where(self, case: Case) -> Path:
        return self.folder / "truth" if self.reader == "memmap" else self.folder / self.reader / case.name

    # -- prepare -------------------------------------------------------------------------------------------

    def prepare(self) -> dict[str, Any]:
        module = importlib.import_module(f"read_peers.by_{self.reader}")
        for case in self.cases(module):
            done = self.folder / self.reader / f"{case.name}.done"
            if done.exists():
                continue
            if self.reader not in ("softcache", "memmap"):
                self._write(module, case)
            with module.opened(self.where(case), case) as ways:
                self._check(case, ways)
            done.parent.mkdir(exist_ok=True)
            done.touch()
        (self.folder / self.reader / "prepared").touch()
        return {}

    def _write(self, module: ModuleType, case: Case) -> None:
        folder = self.where(case)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with _silent():
            module.write(self.arrays(case), folder, case.zstd)

    def _check(self, case: Case, ways: Ways) -> None:
        """Every way gives the records, to the last bit."""
        truth = [self.truth[name] for name in case.arrays]
        rng = np.random.default_rng(1)
        for name, take in ways.takes.items():
            for _ in range(0 if name in ways.inexact else 3):
                rows = rng.permutation(len(truth[0]))[: case.batch]
                found = ways.whole(take(rows))
                self._same(name, found, [values[rows] for values in truth])
        for name, epoch in ways.streams.items():
            self._check_stream(name, epoch(), truth)

    def _check_stream(self, name: str, epoch: Iterator[Rows], truth: list[np.ndarray]) -> None:
        numbers = {_key([values[i] for values in truth]): i for i in range(len(truth[0]))}
        seen: set[int] = set()
        for batch in epoch:
            rows = [numbers[_key([values[i] for values in batch])] for i in range(len(batch[0]))]
            self._same(name, batch, [values[rows] for values in truth])
            if len(seen | set(rows)) != len(seen) + len(rows):
                raise SystemExit(f"{self.reader}, {name}: a row came twice in an epoch")
            seen |= set(rows)
            if len(seen) >= _CHECKED:
                return
        if len(seen) != len(truth[0]):
            raise SystemExit(f"{self.reader}, {name}: {len(truth[0]) - len(seen)} rows did not come")

    def _same(self, name: str, found: Rows, wanted: Rows) -> None:
        for a, b in zip(found, wanted, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                raise SystemExit(f"{self.reader}, {name}: what was read is not what was written")

    # -- warm ----------------------------------------------------------------------------------------------

    def warm(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            anchors = {
                case.name: stack.enter_context(by_memmap.opened(self.folder / "truth", case)).takes["take"]
                for case in CASES.values()
            }
            alone = {  # before the reader is there: some leave threads behind
                name: timing.interleaved(
                    {_ALONE: self._anchor(anchors[name], case, "shuffled")}, self.rounds, self.seconds
                )
                for name, case in CASES.items()
            }
            module = importlib.import_module(f"read_peers.by_{self.reader}")
            found: dict[str, Any] = {}
            for case in self.cases(module):
                with module.opened(self.where(case), case) as ways:
                    found[case.name] = self._measured(case, ways, anchors[case.name]) | {
                        "alone": alone[case.name][_ALONE]
                    }
        return found

    def _anchor(self, take: Callable[[np.ndarray], Rows], case: Case, order: str) -> timing.Side:
        rows = len(self.truth[case.arrays[0]])
        return timing.taking(take, timing.batches(order, rows, case))

    def _measured(self, case: Case, ways: Ways, anchor: Callable[[np.ndarray], Rows]) -> dict[str, Any]:
        rows, found = len(self.truth[case.arrays[0]]), {}
        for order in _ORDERS[case.name]:
            mapped = {"memmap": self._anchor(anchor, case, order)}
            sides: dict[str, timing.Side] = {}
            for name, take in ways.takes.items():
                sides[name] = timing.taking(take, timing.batches(order, rows, case, ways.disk))
            if order != "sequential":
                sides |= {name: timing.streaming(epoch) for name, epoch in ways.streams.items()}
            sides |= ways.references
            for name, side in sides.items():  # by twos: what one leaves in the caches is not another's
                found[f"{order}: {name}"] = timing.interleaved(
                    mapped | {name: side}, self.rounds, self.seconds
                )
        return {
            "ways": {
                name: {"rates": both[name.partition(": ")[2]], "memmap": both["memmap"]}
                for name, both in found.items()
            }
        }

    # -- cold ----------------------------------------------------------------------------------------------

    def cold(self) -> dict[str, Any]:
        """From opening on, until an epoch is over or the seconds are: the files are not in the page cache."""
        rows = {name: len(values) for name, values in self.truth.items()}
        self.truth.clear()  # what is mapped stays in memory
        module, found = importlib.import_module(f"read_peers.by_{self.reader}"), {}
        for case in self._large(module):
            count, ways = rows[case.arrays[0]], {}
            names = _apart(lambda case=case: self._names(module, case))
            order = "sequential" if case.zstd else "shuffled"
            sides = {name: self._cold(module, self.where(case), case, name, order, count) for name in names}
            sides["memmap"] = self._cold(by_memmap, self.folder / "truth", case, "take", order, count)
            for name in names:
                both = timing.interleaved(
                    {"memmap": sides["memmap"], name: sides[name]}, min(self.rounds, 5), 2 * self.seconds
                )
                ways[f"{order}: {name}"] = {"rates": both[name], "memmap": both["memmap"]}
            found[case.name] = {"ways": ways}
        return found

    def _cold(
        self, module: ModuleType, folder: Path, case: Case, name: str, order: str, count: int
    ) -> timing.Side:
        # its caches lie beside each other
        held = folder.parent if module.__name__ == "read_peers.by_softcache" else folder

        def read(seconds: float) -> float:
            rows, start = 0, time.perf_counter()
            with module.opened(folder, case) as ways:
                for got in self._epoch(ways, name, timing.batches(order, count, case, ways.disk, int(start))):
                    rows += got
                    if time.perf_counter() - start > seconds:
                        break
                return rows / (time.perf_counter() - start)

        def side(seconds: float) -> float:
            share = timing.put_out(timing.files(held))
            if share > 0.02:
                raise SystemExit(
                    f"{module.__name__}, {case.name}: {share:.0%} of its files stay in memory; not cold"
                )
            return _apart(lambda: read(seconds))

        return side

    def _names(self, module: ModuleType, case: Case) -> list[str]:
        with module.opened(self.where(case), case) as ways:
            return [*ways.takes, *ways.streams]

    def _epoch(self, ways: Ways, name: str, batches: list[np.ndarray]) -> Iterator[int]:
        """Reads an epoch; says how many rows were read."""
        if name in ways.streams:
            yield from (len(batch[0]) for batch in ways.streams[name]())
            return
        for batch in batches:
            ways.takes[name](batch)
            yield len(batch)

    # -- write ---------------------------------------------------------------------------------------------

    def write(self) -> dict[str, Any]:
        """MB a second of what is written, of records that are in memory, into a new folder."""
        module, found = importlib.import_module(f"read_peers.by_{self.reader}"), {}
        most = getattr(module, "SLOW", None)
        for case in self._large(module):
            few = most if case.name == "rows" else 256
            arrays = {name: np.array(values[:few]) for name, values in self.arrays(case).items()}
            sides = {"memmap": self._written(by_memmap.write, arrays, False)}
            for name, write in getattr(module, "WRITES", {"write": module.write}).items():
                sides[name] = self._written(write, arrays, case.zstd)
            if case.zstd and hasattr(module, "encoder"):
                alone, each = module.encoder(arrays[case.arrays[0]]), arrays[case.arrays[0]][0].nbytes
                sides["zstd alone, 2 threads"] = lambda seconds, alone=alone, each=each: (
                    alone(seconds) * each / 1e6
                )
            rates = timing.interleaved(sides, min(self.rounds, 5), self.seconds)
            anchor = rates.pop("memmap")
            found[case.name] = {
                "ways": {name: {"rates": one, "memmap": anchor} for name, one in rates.items()}
            }
        return found

    def _written(self, write: Callable[..., None], arrays: dict[str, np.ndarray], zstd: bool) -> timing.Side:
        folder, size = self.folder / "written" / self.reader, sum(values.nbytes for values in arrays.values())

        def side(seconds: float) -> float:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with _silent():
                start = time.perf_counter()
                write(arrays, folder, zstd)
                passed = time.perf_counter() - start
            shutil.rmtree(folder)
            return size / passed / 1e6

        return side


def _apart(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, done in a child: what it maps, and threads that it leaves behind, end with it."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(theirs, json.dumps(work()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    if not said:
        raise SystemExit("a child failed")
    return json.loads(said)


def _key(rows: Rows) -> bytes:
    return b"".join(row.reshape(-1)[:64].tobytes() for row in rows)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Progress bars are not wanted on stdout."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _versions(reader: str) -> dict[str, str]:
    names = {text.partition("==")[0] for text in REQUIREMENTS[reader]} | {"numpy"}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def main() -> None:
    asked = json.loads(sys.argv[1])
    stage, out = asked.pop("stage"), Path(asked.pop("out"))
    before = timing.control(asked["seconds"])
    bench = Bench(**asked)
    found = getattr(bench, stage)()
    after = timing.control(asked["seconds"])
    out.write_text(
        json.dumps({"cases": found, "control": [before, after], "versions": _versions(asked["reader"])})
    )


if __name__ == "__main__":
    main()
