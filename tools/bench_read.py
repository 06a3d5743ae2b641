"""Readers compared on the same records: softcache against np.memmap and eight libraries, each in an environment of its own.

    python tools/bench_read.py --work FOLDER [--prepare] [--quick] [--peers lmdb,lance] [--json]

FOLDER keeps environments and records: a second run makes neither again. Records are rows of ``topk(10)`` (two arrays of 50
bytes together) in batches of 256, and float16 maps (256, 20, 20) in batches of 16, as they are and under zstd level 1; small
maps (32, 8, 8) in batches of 64 under zstd. Each reader runs in a process of its own, in turn with np.memmap over the same
records, batch by batch into buffers that are used again; figures are medians, and ratios of rounds, so that they can be
compared across processes. What every reader gives is first compared with what was written.

Cold means that the files were put out of the page cache by ``posix_fadvise`` (and that ``mincore`` says so), and the time of
opening counts; what a virtual disk's host keeps in its memory, nobody here knows. *Control* is how many times as much zlib
two threads do as one, before and after: below 1.7 on two cores something else ran, and the table is not worth much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_spine import table
from read_peers import REQUIREMENTS
from read_peers.records import Sizes, make

TOOLS = Path(__file__).resolve().parent
STAGES = ("warm", "cold", "write")
QUIET = 1.7
MODULES = {"lance": "lance", "mosaic": "streaming", "memmap": "numpy"}


@dataclass(frozen=True)
class Plan:
    """Which records, and how long each side of a comparison is measured: ``rounds`` times so many ``seconds``."""

    name: str
    sizes: Sizes
    rounds: int
    seconds: float
    stages: tuple[str, ...] = STAGES


FULL = Plan("full", Sizes(400_000, 1024, 16_384), 6, 0.25)
QUICK = Plan("quick", Sizes(50_000, 128, 2_048), 5, 0.02, ("warm",))


# -- environments and records ------------------------------------------------------------------------------


def python_of(reader: str, work: Path, here: bool) -> str | None:
    """The interpreter for a reader, installed if need be; None where it is to run here, and is not there."""
    if reader in ("softcache", "memmap"):
        return sys.executable
    if here:
        return sys.executable if find_spec(MODULES.get(reader, reader)) else None
    folder = work / "environments" / reader
    said, wanted = folder / "installed", "\n".join(REQUIREMENTS[reader])
    python = folder / "bin" / "python"
    if not said.exists() or said.read_text() != wanted:
        print(f"installing {reader} into {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _install(folder, python, REQUIREMENTS[reader])
        said.write_text(wanted)
    return str(python)


def _install(folder: Path, python: Path, requirements: tuple[str, ...]) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if uv:
        made = [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]
        install = [uv, "pip", "install", "--quiet", "--python", str(python), *requirements]
    else:
        made = [sys.executable, "-m", "venv", str(folder)]
        install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    subprocess.run(made, check=True)
    subprocess.run(install, check=True)


def records(plan: Plan, work: Path) -> Path:
    """The folder with the records of a plan, made if need be."""
    data, said = work / plan.name, json.dumps(asdict(plan.sizes))
    done = data / "sizes.json"
    if not done.exists() or done.read_text() != said:
        print(f"making records in {data}", file=sys.stderr)
        shutil.rmtree(data, ignore_errors=True)
        make(data, plan.sizes)
        done.write_text(said)
    return data


# -- measuring ---------------------------------------------------------------------------------------------


def measured(plan: Plan, work: Path, readers: list[str], here: bool = False) -> dict[str, Any]:
    """reader → stage → what its process said; of one that failed the last line of its complaint under ``failed``. One whose
    records are not what they should be is not measured."""
    data, found = records(plan, work), {}
    pythons = {reader: python_of(reader, work, here) for reader in readers}
    for stage in ("prepare", *plan.stages):
        for reader, python in pythons.items():
            prepared = (data / reader / "prepared").exists()
            if python is not None and prepared == (stage != "prepare"):
                print(f"{stage}: {reader}", file=sys.stderr)
                found.setdefault(reader, {})[stage] = _run(python, reader, stage, plan, data)
    return found


def _run(python: str, reader: str, stage: str, plan: Plan, data: Path) -> dict[str, Any]:
    out = data / f"{reader}-{stage}.json"
    out.unlink(missing_ok=True)
    asked = {"reader": reader, "stage": stage, "out": str(out), "data": str(data)}
    asked |= {"rounds": plan.rounds, "seconds": plan.seconds}
    path = f"{TOOLS}{os.pathsep}{TOOLS.parent}" if reader == "softcache" else str(TOOLS)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    command = [python, "-m", "read_peers.worker", json.dumps(asked)]
    done = subprocess.run(
        command, env=environment, cwd=data, capture_output=True, text=True, timeout=1200, check=False
    )
    if not out.exists():
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(f"{reader}: {stage} failed: {done.stderr}", file=sys.stderr)
        return {"failed": said[-1]}
    return json.loads(out.read_text())


# -- tables ------------------------------------------------------------------------------------------------


def ratio(way: dict[str, Any], alone: list[float] | None) -> tuple[float, bool]:
    """Of a way to np.memmap, by rounds; to what np.memmap did before the reader was there, and True, where what the reader
    leaves running slows that by more than a fifth."""
    anchor = statistics.median(way["memmap"])
    if alone and anchor < 0.8 * statistics.median(alone):
        return statistics.median(way["rates"]) / statistics.median(alone), True
    return statistics.median(a / b for a, b in zip(way["rates"], way["memmap"], strict=True)), False


def first_ways(measured: dict[str, Any], case: str) -> dict[str, float]:
    """order → how the first of softcache's ways compares with np.memmap."""
    found: dict[str, float] = {}
    for name, way in measured.get("cases", {}).get(case, {}).get("ways", {}).items():
        found.setdefault(name.partition(": ")[0], ratio(way, None)[0])
    return found


def rows_of(found: dict[str, Any], stage: str, case: str) -> Iterator[tuple[str, ...]]:
    unit = "MB/s" if stage == "write" else "rows/s"
    anchor = "np.save" if stage == "write" else "np.memmap"
    yield (
        "reader",
        "order",
        "way",
        unit,
        "quartiles",
        f"{anchor}, {unit}",
        f"/ {anchor}",
        "softcache /",
        "control",
    )
    ours = {} if stage == "write" else first_ways(found.get("softcache", {}).get(stage, {}), case)
    for reader, stages in found.items():
        one = stages.get(stage, {})
        if "failed" in one:
            yield reader, "", one["failed"][:60], "", "", "", "", "", ""
            continue
        measured = one.get("cases", {}).get(case, {})
        for name, way in measured.get("ways", {}).items():
            order, colon, how = name.partition(": ")
            low, middle, high = statistics.quantiles(way["rates"], n=4, method="inclusive")
            times, before = ratio(way, measured.get("alone") if order == "shuffled" else None)
            better = f"{ours[order] / times:.3g}" if order in ours and reader != "softcache" else ""
            yield (
                reader,
                order if colon else "",
                how if colon else name,
                f"{middle:,.0f}",
                f"{low:,.0f} – {high:,.0f}",
                f"{statistics.median(way['memmap']):,.0f}",
                f"{times:.3g}" + (" *" if before else ""),
                better,
                " ".join(f"{x:.2f}" for x in one["control"]),
            )


TITLES = {
    "rows": "rows of topk(10), 50 bytes",
    "maps": "maps of 205 kB, as they are",
    "zstd": "maps of 205 kB, zstd level 1",
    "small": "maps of 4 kB, zstd level 1",
}
WHEN = {"warm": "warm page cache", "cold": "cold page cache, from opening on", "write": "written"}


def tables(found: dict[str, Any], stages: tuple[str, ...]) -> None:
    for reader, one in found.items():
        if "failed" in one.get("prepare", {}):
            print(f"{reader} is not measured: {one['prepare']['failed']}")
    for stage in stages:
        for case, title in TITLES.items():
            rows = list(rows_of(found, stage, case))
            if rows[1:]:
                table(f"{title}: {WHEN[stage]}", rows)
    print("\n* to np.memmap as it was before the reader was there, whose threads slow it")
    every = [one for stages in found.values() for one in stages.values()]
    controls = [one["control"][0] for one in every if "control" in one]  # before the reader's own threads
    if controls and min(controls) < QUIET:
        print(f"The machine was not quiet: two threads of zlib did {min(controls):.2f} times what one does.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="keeps environments and records; up to 10 GB"
    )
    parser.add_argument("--quick", action="store_true", help="few records, warm only; under two minutes")
    parser.add_argument("--peers", help=f"some of {','.join(REQUIREMENTS)}; all by default")
    parser.add_argument(
        "--prepare", action="store_true", help="install, make records and compare, and no more"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    readers = args.peers.split(",") if args.peers else list(REQUIREMENTS)
    if unknown := [name for name in readers if name not in REQUIREMENTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(REQUIREMENTS)}")
    plan = QUICK if args.quick else FULL
    if args.prepare:
        plan = replace(plan, stages=())
    found = measured(plan, args.work.resolve(), readers)
    print(json.dumps(found, indent=1)) if args.json else tables(found, plan.stages)


if __name__ == "__main__":
    main()
