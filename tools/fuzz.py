"""Files of caches changed at random, and read, for as long as you like: ``python tools/fuzz.py --minutes 10 [--seed 0]``.

Every reader of tests/hostile/readers.py runs in a process of its own, under a limit of memory and an audit hook. Prints,
for each, how many inputs were tried, what was raised, the slowest input, and the most memory; a fault with its input,
made small, and the seed that finds it again. Exit status 1 where there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO / "tests"))

from hostile.readers import READERS  # noqa: E402  # pyright: ignore[reportMissingImports]


def run(reader: str, seconds: float, seed: int) -> dict[str, Any] | None:
    """What ``hostile.fuzz`` tells of a reader; None where it crashed, or never came back."""
    paths = [str(REPO / "tests"), str(REPO), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "hostile.fuzz",
        "--reader",
        reader,
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
    ]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=2 * seconds + 300
        )
    except subprocess.TimeoutExpired:
        print(f"{reader}: it hung, seed {seed}")
        return None
    if done.returncode:
        print(done.stderr[-8000:])
    if not done.stdout:
        print(f"{reader}: it crashed with status {done.returncode}, seed {seed}")
        return None
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="which; all by default")
    arguments = parser.parse_args()
    names, faults, total = arguments.reader or list(READERS), 0, 0
    print(
        f"{'reader':10} {'inputs':>8} {'refused':>8} {'slowest s':>10} {'MB in use':>10} {'MB addresses':>13}  raised"
    )
    for name in names:
        found = run(name, 60 * arguments.minutes / len(names), arguments.seed)
        if found is None:
            faults += 1
            continue
        one, memory = found["readers"][name], found["memory"]
        kinds: dict[str, int] = {}
        for key, count in one["raised"].items():
            kind = key.rpartition(" ")[2]
            kinds[kind] = kinds.get(kind, 0) + count
        refused = sum(count for key, count in one["refused"].items() if not key.endswith(" none"))
        told = ", ".join(f"{kind} {count:,}" for kind, count in sorted(kinds.items()))
        in_use, addresses = (memory[key] / 1e6 for key in ("in_use", "addresses"))
        numbers = f"{one['tried']:8,} {refused:8,} {one['slowest_s']:10.2f} {in_use:10.0f} {addresses:13.0f}"
        print(f"{name:10} {numbers}  {told}", flush=True)
        total += one["tried"]
        if "fault" in found:
            faults += 1
            print(f"FAULT, seed {arguments.seed}: {found['fault']}")
    print(f"{total:,} inputs, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
