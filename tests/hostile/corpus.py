"""Every attack of :data:`softcache.hostile.HOSTILE` on a cache of its own, watched: prints what came of each as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from hostile import guard
from hostile.fuzz import GROWTH
from hostile.readers import SAMPLES, Step, build, seen

import softcache as sc
from softcache import show
from softcache.errors import SoftcacheError
from softcache.hostile import HOSTILE
from softcache.testing import ToyImages, toy_teacher


def steps(path: Path) -> list[Step]:
    """In the order in which somebody would do it."""
    source, every = sc.Source(ToyImages(SAMPLES)), np.arange(SAMPLES)

    def views() -> None:
        cache = sc.open(path)
        for i in every.tolist():
            seen(cache, source, i, 0)

    return [
        ("open", lambda: sc.open(path)),
        ("ids", lambda: sc.open(path).ids),
        ("read", lambda: [sc.open(path).read(view, every) for view in range(sc.open(path).views)]),
        ("views", views),
        ("pair", lambda: sc.pair(sc.open(path), source)),
        ("show", lambda: show.tell(show.summary(sc.open(path)))),
        ("verify", lambda: _none(sc.verify(path, read_data=True))),
    ]


def _none(damages: list[sc.Damage]) -> None:
    if damages:
        raise NamedError(f"{damages[0]}, and {len(damages) - 1} more")


class NamedError(Exception):
    """Files that verify named."""


def outcome(path: Path) -> dict[str, str]:
    """The first step at which anything came out, and what it was."""
    for step, run in steps(path):
        try:
            with guard.watched(path, seconds=30):
                run()
        except SoftcacheError as e:
            return {"step": step, "error": type(e).__name__, "message": str(e)}
        except NamedError as e:
            return {"step": step, "error": "", "message": str(e)}
        except (Exception, guard.Breach, guard.Hung) as e:
            return {"step": step, "error": repr(e)[:500], "message": ""}
    return {"step": "all", "error": "", "message": ""}


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good"
        build(
            good,
            toy_teacher(),
            "random_resized_crop(8)|flip",
            {"logits": "argmax", "map": "int8", "vector": "f16"},
        )
        for _, run in steps(good):  # imports what reading imports
            run()
        assert outcome(good)["step"] == "all", outcome(good)
        bad = {name: Path(folder) / f"bad{i}" for i, name in enumerate(HOSTILE)}
        for name, path in bad.items():
            HOSTILE[name].make(Path(shutil.copytree(good, path)))
        guard.limit_memory(GROWTH)
        for name, path in bad.items():
            start = time.monotonic()
            found[name] = outcome(path)
            found[name]["seconds"] = f"{time.monotonic() - start:.2f}"
    json.dump({"attacks": found, "memory": guard.memory()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
