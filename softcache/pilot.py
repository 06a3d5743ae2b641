"""``plan``: what a cache would cost, and whether it pays, before it is built.

A pilot of a few hundred samples is built by the very builder in a temporary folder, measured and deleted. Files are
reckoned one by one from what the pilot wrote, time from the rate it went at once it was under way.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from softcache import manifest as m
from softcache.arrays import constant
from softcache.beginning import begun, ids_arrays
from softcache.builder import build, open_source
from softcache.cache import Cache
from softcache.canary import COUNT
from softcache.codecs.anchored import Anchored
from softcache.errors import SpecError, counted
from softcache.identity import Identity
from softcache.inventory import metadata
from softcache.job import check, default_rows
from softcache.measure import size, words
from softcache.meter import clock
from softcache.recipe import Recipe
from softcache.source import Source
from softcache.store import Store
from softcache.targets import requests

VIEWS = 2  # of each of the pilot's samples, or more where there are phases
STUDENTS = (1, 2, 5)  # that are compared with running the teacher online
_OF_SOURCE = inspect.signature(open_source).parameters


@dataclass(frozen=True)
class Plan:
    """What ``plan --json`` prints. Seconds and hours are of the machine that ran the pilot.

    Attributes:
        source: which, in words. samples, views: of the cache.
        pilot: its ``samples``, ``views`` and ``seconds``, loading the teacher among them.
        predicted_bytes: of all files of the finished cache. bytes_per_view: a (sample, view)'s share of them.
        disk_bytes: what they take on the disk, in its blocks, beyond what a build that has begun takes already.
        disk_free: at the output; None where none is named. fits: is it enough?
        teacher_rows: samples × views. teacher_rows_per_second: the teacher alone. rows_per_second: the whole build.
        hours: to read the source once for its fingerprint, and to build; with ``world`` builders, of each.
        bytes_per_row, fidelity, labelled, top1, teacher_top1: as in :class:`softcache.manifest.Report`, of the pilot
            (fidelity: of the first rows of its blocks, a few dozen).
        break_even_epochs: epochs, of all students together, from which the cache takes no longer than the teacher online.
        epochs: of one student. online: for some numbers of students ``students``, ``cache_hours`` (once),
            ``online_hours`` (the teacher in every epoch) and ``pays``; a student's own steps cost the same in both.
    """

    source: str
    samples: int
    views: int
    pilot: dict[str, float]
    predicted_bytes: int
    bytes_per_view: float
    disk_bytes: int
    disk_free: int | None
    fits: bool | None
    teacher_rows: int
    teacher_rows_per_second: float
    rows_per_second: float
    hours: float
    bytes_per_row: dict[str, int]
    fidelity: dict[str, dict[str, float]]
    labelled: int
    top1: float | None
    teacher_top1: float | None
    break_even_epochs: int
    epochs: int
    online: list[dict[str, Any]]


def plan(out: str | Path | None = None, *, pilot: int = 256, epochs: int = 30, **options: Any) -> Plan:
    """Reckon what :func:`softcache.build` would write, and how long it would take, from a pilot.

    Args:
        out: where the cache would go, for the disk check; nothing is written there.
        pilot: samples to try (whole batches of them), two views of each; fewer samples and more views where the phases
            of the recipe have them.
        epochs: that a student will be trained for, for the comparison with the teacher online.
        options: the arguments of :func:`softcache.build`.

    Raises:
        SoftcacheError: as ``build`` does.
        TypeError: ``build`` has no such argument.
    """
    if pilot < 1 or epochs < 1:
        raise SpecError("pilot and epochs are at least 1")
    asked = inspect.signature(build).bind("", **options)
    asked.apply_defaults()
    settings = asked.arguments
    source = open_source(**{name: settings[name] for name in _OF_SOURCE})
    recipe = Recipe(settings["recipe"], settings["seed"])
    check(source, settings["views"], settings["block_rows"], recipe)
    bases = [
        r.codec.codec.views for r in requests(settings["targets"]) if isinstance(r.codec.codec, Anchored)
    ]
    least = max(
        [VIEWS, recipe.starts[-1] + 1, *(2 * n for n in bases)]
    )  # some of every phase, and that no base is made of
    views = min(settings["views"], least)
    some = min(pilot, max(2, pilot * VIEWS // views))
    there = 0 if out is None else _already(Store(out))

    began = time.monotonic()
    part = source.sample(some + -some % max(settings["batch"], 1))
    _ = part.fingerprint
    reading = (time.monotonic() - began) / len(part)
    with TemporaryDirectory(prefix="softcache-plan-") as folder:
        cache = build(Path(folder) / "pilot", **_of_pilot(settings, part, views))
        seconds = time.monotonic() - began
        files, folders = _files(cache, source, settings)

    rows, pace = len(source) * settings["views"], cache.pace
    total = round(sum(count * each for each, count in files))
    block, free = _disk(out)
    needed = sum(count * math.ceil(each / block) * block for each, count in files) + folders * block - there
    build_hours = (reading * len(source) + rows / pace["rows"]) / 3600 / settings["world"]
    epoch_hours = len(source) / pace["teacher_rows"] / 3600
    assert cache.manifest is not None
    report = cache.manifest.report
    return Plan(
        source=source.describe(),
        samples=len(source),
        views=settings["views"],
        pilot={"samples": cache.samples, "views": cache.views, "seconds": seconds},
        predicted_bytes=total,
        bytes_per_view=total / rows,
        disk_bytes=max(needed, 0),
        disk_free=free,
        fits=None if free is None else needed <= free,
        teacher_rows=rows,
        teacher_rows_per_second=pace["teacher_rows"],
        rows_per_second=pace["rows"],
        hours=build_hours,
        bytes_per_row=report.bytes_per_row,
        fidelity=report.fidelity,
        labelled=report.labelled,
        top1=report.top1,
        teacher_top1=report.teacher_top1,
        break_even_epochs=math.ceil(build_hours / epoch_hours),
        epochs=epochs,
        online=[_against(n, epochs, build_hours, epoch_hours) for n in STUDENTS],
    )


def _of_pilot(settings: dict[str, Any], part: Source, views: int) -> dict[str, Any]:
    """What ``build`` is asked for: the same, but of fewer samples and views, and in silence."""
    kept = {k: v for k, v in settings.items() if k not in _OF_SOURCE and k != "out"}
    rows = settings["block_rows"]
    return kept | {
        "source": part,
        "views": views,
        "block_rows": None if rows is None else min(rows, len(part)),
        "progress": False,
    }


def _against(students: int, epochs: int, build_hours: float, epoch_hours: float) -> dict[str, Any]:
    online = students * epochs * epoch_hours
    return {
        "students": students,
        "cache_hours": build_hours,
        "online_hours": online,
        "pays": build_hours <= online,
    }


# -- bytes -------------------------------------------------------------------------------------------------


def _files(cache: Cache, source: Source, settings: dict[str, Any]) -> tuple[list[tuple[float, int]], int]:
    """The files of the whole cache as (bytes of one, how many), and the number of its folders.

    What does not depend on what the teacher says is exact; of the rest (rows under zstd, receipts) the pilot's mean
    is taken.
    """
    assert cache.manifest is not None
    planned = _planned(cache, source, settings)
    whole = Cache(cache.store, planned, None)  # it has a grid and arrays, and nothing on any disk
    blocks, rows = whole.views * whole.grid.blocks_per_view, whole.views * whole.samples
    sizes = cache.table(0)["bytes"].astype(float)  # (the pilot's blocks, arrays + 1)
    found = []
    for array, column in zip(whole.arrays.values(), sizes.T, strict=False):
        varying = column.sum() - len(column) * cache.arrays[array.path].fixed_bytes()
        a_row = varying / (cache.samples * cache.views)
        found.append((array.fixed_bytes() + a_row * rows / blocks, blocks))
    found.append((sizes[:, -1].mean(), blocks))  # the receipts

    constants = _constants(cache, source, rows)
    derived = metadata(list(whole.arrays.values()), constants)
    identity = len(planned.to_bytes())
    around = len(cache.manifest.to_bytes()) - len(cache.manifest.identity.to_bytes())
    once = [c.bytes for c in constants.values()] + [len(data) for data in derived.values()]
    once += [sizes.shape[1] * blocks * m.ENTRY.itemsize, identity, around + identity]
    return found + [(each, 1) for each in once], len(derived) + 1


def _planned(cache: Cache, source: Source, settings: dict[str, Any]) -> Identity:
    """The identity of the whole cache, but for its digests and words of source and build."""
    assert cache.manifest is not None
    views = settings["views"]
    rows = settings["block_rows"] or default_rows(cache.targets, len(source), settings["batch"])
    known = cache.manifest.identity
    grid = known.grid.model_copy(update={"samples": len(source), "views": views, "block_rows": rows})
    return known.model_copy(update={"grid": grid})


def _constants(cache: Cache, source: Source, rows: int) -> dict[str, m.Constant]:
    """Ids are those of the whole source; of the others, the canaries, the whole cache may have more."""
    assert cache.manifest is not None
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, c in cache.manifest.constants.items():
        lead = min(COUNT, rows) if path.startswith("canary/") else c.shape[0]
        lead = len(source) if path.startswith("anchors/") else lead
        shapes[path] = (lead, *c.shape[1:]), c.dtype
    shapes |= {array.path: (array.shape, array.dtype) for array, _ in ids_arrays(source.ids)}
    arrays = [constant(path, shape, dtype) for path, (shape, dtype) in shapes.items()]
    return {
        a.path: m.Constant(sha256="0" * 64, bytes=a.plain_bytes(), dtype=a.dtype, shape=list(a.shape))
        for a in arrays
    }


# -- the disk ----------------------------------------------------------------------------------------------


def _already(store: Store) -> int:
    """Bytes on the disk of a build that has begun there; refuses a folder of something else."""
    begun(store)
    return sum(store.path(name).stat().st_blocks * 512 for name in store.names())


def _disk(out: str | Path | None) -> tuple[int, int | None]:
    """The block size of the disk that ``out`` would lie on, and the free bytes there."""
    if out is None:
        return 4096, None
    there = Path(out).absolute()
    while not there.exists():
        there = there.parent
    disk = os.statvfs(there)
    return disk.f_frsize, disk.f_bavail * disk.f_frsize


# -- in words ----------------------------------------------------------------------------------------------


def tell(plan: Plan, out: str | Path | None) -> str:
    """The plan for a person."""
    pilot = f"{counted(int(plan.pilot['samples']), 'sample')} × {counted(int(plan.pilot['views']), 'view')}"
    lines = [
        plan.source,
        f"  pilot    {pilot} in {clock(plan.pilot['seconds'])}, deleted again",
        f"  cache    {counted(plan.samples, 'sample')} × {counted(plan.views, 'view')} = "
        f"{counted(plan.teacher_rows, 'row')}, {size(plan.predicted_bytes)} "
        f"({plan.bytes_per_view:,.1f} bytes a view, of everything)",
    ]
    if plan.disk_free is not None:
        verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
        lines.append(
            f"  disk     {out} takes {size(plan.disk_bytes)} of {size(plan.disk_free)} that are free: {verdict}"
        )
    lines.append(
        f"  time     {_long(plan.hours)} at {_rate(plan.rows_per_second)} rows/s (the teacher alone: "
        f"{_rate(plan.teacher_rows_per_second)})"
    )
    for name, values in plan.fidelity.items():
        lines.append(f"  target   {name}: {plan.bytes_per_row[name]:,} bytes a row; {words(values)}")
    if plan.top1 is not None:
        lines.append(
            f"  top-1    {plan.top1:.2%} of {plan.labelled:,} labelled rows of the pilot "
            f"({plan.teacher_top1:.2%} before encoding)"
        )
    lines += ["", *_compared(plan)]
    return "\n".join(lines)


def _compared(plan: Plan) -> list[str]:
    lines = [
        f"The cache ({counted(plan.views, 'view')}, with all that is read and written) takes as long as "
        f"{counted(plan.break_even_epochs, 'epoch')} of the teacher online, of all students together.",
        f"{'':23}  {'teacher online':>14}  {'cache, once':>11}",
    ]
    for row in plan.online:
        n, online, cached = row["students"], row["online_hours"], row["cache_hours"]
        who = f"{counted(n, 'student')} × {counted(plan.epochs, 'epoch')}"
        times = max(online, cached) / min(online, cached)
        verdict = "caching pays" if row["pays"] else "caching DOES NOT PAY"
        verdict += f": {times:,.1f} times as {'fast' if row['pays'] else 'long'}"
        lines.append(f"{who:23}  {_long(online):>14}  {_long(cached):>11}  {verdict}")
    return lines


def _long(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 10 else clock(hours * 3600)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
