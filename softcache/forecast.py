"""``plan``: what a cache would cost, which codec would keep what, and whether it pays, before it is built."""

from __future__ import annotations

import inspect
import math
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from softcache import erasure, flags, memorised
from softcache.beginning import begun
from softcache.builder import build
from softcache.candidates import Candidate, Tried, try_all
from softcache.choice import choose, limits, record
from softcache.commission import SOURCE, Commission, commission, open_source
from softcache.drive import Drive, sustained
from softcache.errors import SourceError, SpecError
from softcache.memorised import Answers
from softcache.pilot import SAMPLES, Pilot, try_out
from softcache.reckoning import Size
from softcache.source import Source
from softcache.store import Store
from softcache.targets import Logits, is_logits

STUDENTS = (1, 2, 5)  # that are compared with running the teacher online
_HOT = 4.0  # a temperature that students are taught at


@dataclass(frozen=True)
class Plan:
    """What ``plan --json`` prints. Seconds and hours are of the machine that ran the pilot.

    Attributes:
        source: which, in words. samples, views: of the cache.
        pilot: its ``samples``, ``views`` and ``seconds``, loading the teacher among them.
        predicted_bytes: of all files of the finished cache. bytes_per_view: a (sample, view)'s share of them.
        disk_bytes: what they take on the disk, in its blocks, beyond what a build that has begun takes already.
        disk_free: at the output; None where none is named. fits: is it enough?
        drive: how fast that disk takes bytes, see :class:`softcache.drive.Drive`; None where none is named.
        teacher_rows: samples × views. teacher_rows_per_second: the teacher alone. rows_per_second: the whole build.
        stages: rows a second of each alone: ``decode`` (and render), ``teacher``, ``encode``, ``write``; limit: the slowest.
        hours: to read the source once for its fingerprint, and to build; with ``world`` builders, of each.
        bytes_per_row, fidelity, labelled, top1, teacher_top1: as in :class:`softcache.manifest.Report`, of the pilot
            (fidelity: of the first rows of its blocks, a few dozen).
        codecs: the table, a row a candidate: ``target``, ``codec``, whether it was ``asked`` for, and ``chosen``,
            ``bytes_per_view`` of its target, ``total_bytes`` of the cache with it, its ``figures`` (see
            :mod:`softcache.losses`), and ``encode_seconds`` and ``decode_seconds`` of a row.
        left_out: codecs that do not serve a target: ``target``, ``codec``, ``why``.
        choice: what was chosen for ``budget`` and ``max_kl``, and why, see :class:`softcache.chosen.Choice`; None where
            neither was asked for. Bytes, hours and fidelity are then those of what was chosen.
        command: that builds it.
        memorised: a warning, where the teacher seems to know these images by heart. elsewhere: what it said of images that
            were named for comparison.
        erasure: of the targets of logits that were asked for, how much the teacher tells of the classes that are not its
            answer, see :class:`softcache.erasure.Erasure`.
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
    drive: dict[str, Any] | None
    teacher_rows: int
    teacher_rows_per_second: float
    rows_per_second: float
    stages: dict[str, float]
    limit: str
    hours: float
    bytes_per_row: dict[str, int]
    fidelity: dict[str, dict[str, float]]
    labelled: int
    top1: float | None
    teacher_top1: float | None
    codecs: list[dict[str, Any]]
    left_out: list[dict[str, str]]
    choice: dict[str, Any] | None
    command: str
    memorised: str | None
    elsewhere: dict[str, Any] | None
    erasure: dict[str, dict[str, Any]]
    break_even_epochs: int
    epochs: int
    online: list[dict[str, Any]]


def plan(
    out: str | Path | None = None,
    *,
    pilot: int = SAMPLES,
    epochs: int = 30,
    elsewhere: str | None = None,
    **options: Any,
) -> Plan:
    """Reckon what :func:`softcache.build` would write, and how long it would take, from a pilot.

    Args:
        out: where the cache would go, for the disk check, and for its speed; nothing is left there.
        pilot: samples to try (whole batches of them), two views of each; fewer samples and more views where the phases
            of the recipe have them.
        epochs: that a student will be trained for, for the comparison with the teacher online.
        elsewhere: another split of the source, which the teacher was not trained on, to see whether it knows these images by
            heart.
        options: the arguments of :func:`softcache.build`.

    Raises:
        SoftcacheError: as ``build`` does.
        TypeError: ``build`` has no such argument.
    """
    if pilot < 1 or epochs < 1:
        raise SpecError("pilot and epochs are at least 1")
    asked = inspect.signature(build).bind("", **options)
    asked.apply_defaults()
    settings = {name: value for name, value in asked.arguments.items() if name != "out"}
    there = 0 if out is None else _already(Store(out))
    began = time.monotonic()
    wanted = limits(settings["budget"], settings["max_kl"])
    whole = commission(settings, lambda text: None)
    tried = try_all(try_out(whole, pilot))
    other = None if elsewhere is None else _elsewhere(whole, settings, elsewhere, pilot)
    seconds = time.monotonic() - began
    chosen = choose(tried, wanted) if wanted else tried.asked
    choice = record(tried, chosen, wanted) if wanted else None
    size = tried.whole(chosen)
    block, free = _disk(out)
    needed = size.on_disk(block) - there
    speed = None if out is None else sustained(_nearest(out), max(size.bytes, 0))
    run = _Run(tried, chosen, size, speed, settings["world"])
    epoch_hours = len(whole.source) / run.stages["teacher"] / 3600
    report = tried.pilot.reckoning.manifest.report
    return Plan(
        source=whole.source.describe(),
        samples=len(whole.source),
        views=whole.views,
        pilot={"samples": tried.pilot.samples, "views": tried.pilot.views, "seconds": seconds},
        predicted_bytes=size.bytes,
        bytes_per_view=size.bytes / run.rows,
        disk_bytes=max(needed, 0),
        disk_free=free,
        fits=None if free is None else needed <= free,
        drive=None if speed is None else asdict(speed),
        teacher_rows=run.rows,
        teacher_rows_per_second=run.stages["teacher"],
        rows_per_second=run.pace,
        stages=run.stages,
        limit=min(run.stages, key=lambda stage: run.stages[stage]),
        hours=run.hours,
        bytes_per_row={name: one.kept.target.row_bytes for name, one in chosen.items()},
        fidelity={n: report.fidelity[n] if one.asked else {**one.figures} for n, one in chosen.items()},
        labelled=report.labelled,
        top1=report.top1,
        teacher_top1=report.teacher_top1,
        codecs=[_row(tried, one, chosen) for some in tried.candidates.values() for one in some],
        left_out=[{"target": name, "codec": spec, "why": why} for name, spec, why in tried.left_out],
        choice=None if choice is None else choice.model_dump(),
        command=_command(options, chosen, whole, out),
        memorised=tried.pilot.said and memorised.warning(tried.pilot.said, other),
        elsewhere=None if other is None else asdict(other),
        erasure=_erasure(tried.pilot),
        break_even_epochs=math.ceil(run.hours / epoch_hours),
        epochs=epochs,
        online=[_against(n, epochs, run.hours, epoch_hours) for n in STUDENTS],
    )


@dataclass(frozen=True)
class _Run:
    """How long the build takes with what is chosen, on a drive that takes bytes at its ``speed``."""

    tried: Tried
    chosen: Mapping[str, Candidate]
    size: Size
    speed: Drive | None
    world: int

    @property
    def rows(self) -> int:
        return len(self.tried.pilot.of.source) * self.tried.pilot.of.views

    @cached_property
    def stages(self) -> dict[str, float]:
        """Rows a second of each stage, alone; of one builder, but for the disk, which all share."""
        found = self.tried.pilot
        encoding = sum(one.encode_seconds for one in self.chosen.values())
        stages = {
            "decode": found.decoding,
            "teacher": found.pace["teacher_rows"],
            "encode": 1 / max(encoding, 1e-9),
        }
        if self.speed is not None:
            writing = self.speed.writing(self.size.bytes, self.size.count)
            stages["write"] = self.rows / max(writing, 1e-9)
        return stages

    @property
    def pace(self) -> float:
        """Rows a second of the whole: what the pilot did, or the encoder or the disk, where they are slower."""
        together = min(self.tried.pilot.pace["rows"], self.stages["encode"]) * self.world
        return min(together, self.stages.get("write", together)) / self.world

    @property
    def hours(self) -> float:
        reading = self.tried.pilot.reading * len(self.tried.pilot.of.source)
        return (reading + self.rows / self.pace) / 3600 / self.world


def _row(tried: Tried, one: Candidate, chosen: Mapping[str, Candidate]) -> dict[str, Any]:
    return {
        "target": one.target,
        "codec": one.codec,
        "asked": one.asked,
        "chosen": chosen[one.target] is one,
        "bytes_per_view": tried.bytes_per_view(one),
        "total_bytes": tried.whole({**chosen, one.target: one}).bytes,
        "figures": dict(one.figures),
        "encode_seconds": one.encode_seconds,
        "decode_seconds": one.decode_seconds,
    }


def _command(
    options: Mapping[str, Any], chosen: Mapping[str, Candidate], whole: Commission, out: str | Path | None
) -> str:
    """The ``build-cache`` that makes it, with its codecs named."""
    kinds = {one.name: f":{one.kind}" * bool(one.kind) for one in whole.asked}
    targets = [f"{name}{kinds[name]}={one.codec}" for name, one in chosen.items()]
    said = {k: v for k, v in options.items() if k not in ("budget", "max_kl", "targets", "progress")}
    words = flags.words({**said, "targets": targets})
    return shlex.join(["build-cache", *words, "-o", "CACHE" if out is None else str(out)])


def _elsewhere(whole: Commission, settings: Mapping[str, Any], split: str, samples: int) -> Answers:
    """What the teacher says of another split of the source."""
    if isinstance(settings["source"], Source):
        raise SpecError("elsewhere names a split of a source that is a path, and this one is an object")
    source = open_source(**{name: settings[name] for name in SOURCE} | {"split": split, "limit": None})
    if source.classes != whole.source.classes:
        raise SourceError(f"{source.describe()} has other classes: it is no place to compare with")
    said = try_out(
        replace(whole, source=source, views=min(whole.views, 1 + whole.recipe.starts[-1])), samples
    ).said
    if said is None:
        raise SourceError(
            f"{source.describe()} has no labels, or no logits are kept: nothing can be compared with it"
        )
    return said


def _erasure(pilot: Pilot) -> dict[str, dict[str, Any]]:
    heard = {name: Logits(one.values) for name, one in pilot.heard.items() if is_logits(name)}
    found = {name: erasure.shares(logits.log_probs(_HOT), _HOT) for name, logits in heard.items()}
    return {name: asdict(one) for name, one in found.items() if one}


def _against(students: int, epochs: int, build_hours: float, epoch_hours: float) -> dict[str, Any]:
    online = students * epochs * epoch_hours
    return {
        "students": students,
        "cache_hours": build_hours,
        "online_hours": online,
        "pays": build_hours <= online,
    }


# -- the disk ----------------------------------------------------------------------------------------------


def _already(store: Store) -> int:
    """Bytes on the disk of a build that has begun there; refuses a folder of something else."""
    begun(store)
    return sum(store.path(name).stat().st_blocks * 512 for name in store.names())


def _nearest(out: str | Path) -> Path:
    """The folder there is, on whose disk ``out`` will lie."""
    there = Path(out).absolute()
    while not there.is_dir():
        there = there.parent
    return there


def _disk(out: str | Path | None) -> tuple[int, int | None]:
    """The block size of the disk that ``out`` would lie on, and the free bytes there."""
    if out is None:
        return 4096, None
    disk = os.statvfs(_nearest(out))
    return disk.f_frsize, disk.f_bavail * disk.f_frsize
