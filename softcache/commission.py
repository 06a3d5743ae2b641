"""What a build is asked for, with its source and teacher opened: what :func:`softcache.build` makes, and ``plan`` tries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.errors import SpecError
from softcache.job import Job, check, prepare
from softcache.licences import read as read_licences
from softcache.recipe import Recipe
from softcache.source import Source
from softcache.store import Store
from softcache.targets import Request, is_attribution, is_logits, requests, taps
from softcache.teachers import Options, Teacher, layouts_of
from softcache.teachers.classes import aligned
from softcache.teachers.classes import read as read_classes
from softcache.teachers.ensemble import assemble

Say = Callable[[str], None]


@dataclass(frozen=True)
class Commission:
    """The arguments of :func:`softcache.build` by their names; ``asked`` are the targets, ``licences`` those stated."""

    source: Source
    teacher: Teacher
    recipe: Recipe
    asked: tuple[Request, ...]
    views: int
    batch: int
    block_rows: int | None
    skip_corrupt: bool
    ignore_labels: bool
    licences: Mapping[str, str]
    workers: int

    def job(self, store: Store) -> Job:
        """Begin, or go on; see :func:`softcache.job.prepare`."""
        return prepare(
            store,
            self.source,
            self.teacher,
            self.recipe,
            self.asked,
            self.views,
            self.block_rows,
            self.skip_corrupt,
            self.ignore_labels,
        )


def commission(settings: Mapping[str, Any], say: Say) -> Commission:
    """Open what the arguments of :func:`softcache.build` name. Raises as that does."""
    numbers = ("rank", "world", "batch", "workers", "label_smoothing")
    check_numbers(**{name: settings[name] for name in numbers})
    asked, made = requests(settings["targets"]), Recipe(settings["recipe"], settings["seed"])
    stated = {what: one for what, one in read_licences(settings["licences"]).items() if one}
    samples = open_source(**{name: settings[name] for name in SOURCE})
    check(samples, settings["views"], settings["block_rows"], made)
    say(samples.describe())
    size = settings["input_size"]
    same = (
        "allow_pickle",
        "precision",
        "device",
        "batch",
        "mean",
        "std",
        "color",
        "flip_tta",
        "label_smoothing",
        "head",
    )
    options = Options(
        taps=taps(asked),
        input_size=(size, size) if isinstance(size, int) else size,
        **{name: settings[name] for name in same},
    )
    who = assemble(settings["teacher"], settings["weights"], options)
    wanted = None if settings["ignore_labels"] else samples.classes
    who = in_order(who, asked, settings["classes"], wanted, say)
    kept = ("views", "batch", "block_rows", "skip_corrupt", "ignore_labels", "workers")
    return Commission(samples, who, made, asked, licences=stated, **{name: settings[name] for name in kept})


def in_order(
    teacher: Teacher,
    asked: Iterable[Request],
    said: str | Path | Sequence[str] | None,
    wanted: tuple[str, ...] | None,
    say: Say,
) -> Teacher:
    """The teacher with its classes in the order ``wanted``, where something is asked for that has classes; see
    :func:`softcache.teachers.classes.aligned`. ``said``: its class names, or their file."""
    heads = {name for name, one in layouts_of(teacher).items() if one.classes}
    named = any(is_logits(r.name) or r.name in heads or is_attribution(r.tap) for r in asked)
    return aligned(teacher, read_classes(said), wanted if named else None, say)


def check_numbers(
    rank: int, world: int, batch: int | None, workers: int, label_smoothing: float | None
) -> None:
    """Refuse numbers that cannot be."""
    if world < 1 or not 0 <= rank < world:
        raise SpecError(f"rank {rank} of world {world}: ranks go from 0 to world - 1")
    if (batch is not None and batch < 1) or workers < 1:
        raise SpecError("batch and workers are at least 1")
    if label_smoothing is not None and not 0 <= label_smoothing < 1:
        raise SpecError(f"label_smoothing {label_smoothing}: it is from 0 up to 1, such as 0.1")


def teller(progress: bool) -> Say:
    """Prints lines on stderr, or does nothing."""
    return (lambda text: print(text, file=sys.stderr, flush=True)) if progress else (lambda text: None)


SOURCE = ("source", "split", "limit", "layout", "image_column", "label_column")  # of open_source


def open_source(
    source: Any,
    split: str | None,
    limit: int | None,
    layout: str | None,
    image_column: str | None,
    label_column: str | None,
) -> Source:
    """The source that :func:`softcache.build` is asked to read, by the arguments of their names."""
    if isinstance(source, Source):
        if any(v is not None for v in (split, limit, layout, image_column, label_column)):
            raise SpecError(
                "split, limit, layout and columns belong to the Source you made; leave them out here"
            )
        return source
    return Source(
        source, split=split, limit=limit, layout=layout, image_column=image_column, label_column=label_column
    )
