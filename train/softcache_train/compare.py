"""``softcache-train compare``: several configs, each with the same seeds, in one table.

Seeds pair the runs: one seed is the same first weights of the student and the same batches whatever the objectives are, so
that a gain over the first config is a difference within each seed, with Student's interval over them. Run again after a
stop, what is finished is kept, and more seeds are added.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcache import canary
from softcache.cache import Cache
from softcache.errors import SpecError
from softcache.recipe.options import rendered
from softcache.source import Source
from softcache_train import students, validation
from softcache_train.checkpoint import load_student
from softcache_train.commands import say
from softcache_train.config import Config
from softcache_train.cost import Cost, cost, cost_of_exit
from softcache_train.loop import train
from softcache_train.terms import require_targets

# Of Student's t with so many degrees of freedom, from 1 on: 97.5 % lie below.
_T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_TIMED = 50  # forward passes


@dataclass(frozen=True)
class Row:
    """A config, one of its student's exits, or the teacher. ``top1`` in 0…1 by seed; ``gain`` over the first config in
    points, and ``half`` the width of its 95 % interval, None of fewer than two seeds; ``step_ms`` and ``seconds`` of
    training are means over seeds, None where they were not measured; ``milliseconds`` for one image alone, the median;
    ``view_bytes``: of the targets that it reads of a view, as they are encoded, None of the teacher;
    ``approximate``: how views were mixed that the teacher saw unmixed, so that its targets are approximate."""

    name: str
    top1: dict[int, float]
    gain: float | None
    half: float | None
    megabytes: float
    parameters: int
    milliseconds: float
    step_ms: float | None
    seconds: float | None
    approximate: str | None = None
    view_bytes: int | None = None

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, in 0…1."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None


def run(
    configs: Mapping[str, Config],
    cache: Cache,
    source: Source,
    out: Path,
    seeds: int,
    *,
    val_source: Source | None = None,
    teacher: tuple[str, str] | None = None,
) -> list[Row]:
    """Train every config with the seeds from its own on, in ``out/NAME/SEED``.

    Args:
        configs: by name; the first is what the others' gains are over.
        teacher: factory and safetensors file of a network to be measured beside them, as
            ``softcache_train.students:resnet56``.

    Raises:
        SpecError: fewer than one seed, configs that validate on nothing.
    """
    if seeds < 1:
        raise SpecError(f"{seeds} seeds: at least one")
    for config in configs.values():  # before one of them is trained
        require_targets(config.terms, cache)
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in configs}
    for number in range(seeds):  # seed after seed, so that a comparison that is broken off is of pairs
        for name, config in configs.items():
            seed = config.seed + number
            found[name].append((seed, _trained(name, config, seed, cache, source, out, val_source)))
    first = next(iter(configs))
    base = [one["top1"] for _, one in found[first]]
    rows = [
        replace(row, approximate=config.approximate_mixing, view_bytes=_view_bytes(config, cache))
        for name, config in configs.items()
        for row in _rows(name, found[name], base if name != first else None)
    ]
    if teacher is not None:
        config = configs[first]
        rows.append(_teacher(*teacher, config, cache, source, val_source))
    _write(rows, out)
    return rows


def _trained(
    name: str, config: Config, seed: int, cache: Cache, source: Source, out: Path, val: Source | None
) -> dict[str, Any]:
    folder = out / name / str(seed)
    say(f"\n{name}, seed {seed}")
    began = time.monotonic()
    result = train(
        config.model_copy(update={"seed": seed, "out": str(folder)}), cache, source, val_source=val
    )
    if result.top1 is None:
        raise SpecError(
            f"{name}: there are no labelled images to compare students on; say --set val_split=NAME"
        )
    return asdict(result) | {"seconds": _seconds(folder, time.monotonic() - began)}


def _seconds(folder: Path, spent: float) -> float | None:
    """How long a run took: kept beside it, for it may have been finished before. None where it was broken off."""
    note, state = folder / "seconds.json", json.loads((folder / "checkpoint.json").read_text())
    whole = all("step_ms" in entry for entry in state["history"])
    if not note.exists():
        note.write_text(json.dumps(spent if whole else None))
    return json.loads(note.read_text())


def _view_bytes(config: Config, cache: Cache) -> int:
    read = set() if config.teacher else {name for one in config.terms for name in one.read}
    return sum(cache.targets[name].row_bytes for name in read)


def _rows(
    name: str, found: Sequence[tuple[int, Mapping[str, Any]]], base: Sequence[float] | None
) -> list[Row]:
    """A config's; of a student with exits, then one for each of them, and for the mean of their logits."""
    student, seeds = load_student(found[0][1]["out"]), [seed for seed, _ in found]
    images = _images(student.input_spec["size"])  # pyright: ignore[reportArgumentType, reportIndexIssue]
    whole = cost(student, images)
    times = {key: _mean(one[key] for _, one in found) for key in ("step_ms", "seconds")}
    rows = [_row(name, seeds, [one["top1"] for _, one in found], base, whole, **times)]
    if not all(one["exits"] for _, one in found):
        return rows
    for number, tops in enumerate(zip(*(one["exits"] for _, one in found), strict=True), start=1):
        rows.append(_row(f"{name}, exit {number}", seeds, tops, base, cost_of_exit(student, number, images)))
    return [*rows, _row(f"{name}, ensemble", seeds, [one["ensemble"] for _, one in found], base, whole)]


def _row(
    name: str,
    seeds: Sequence[int],
    top1: Sequence[float],
    base: Sequence[float] | None,
    costs: Cost,
    step_ms: float | None = None,
    seconds: float | None = None,
) -> Row:
    gains = None if base is None else [100 * (own - other) for own, other in zip(top1, base, strict=True)]
    return Row(
        name=name,
        top1=dict(zip(seeds, top1, strict=True)),
        gain=None if gains is None else statistics.mean(gains),
        half=None if gains is None else interval(gains),
        **asdict(costs),
        step_ms=step_ms,
        seconds=seconds,
    )


def interval(values: Sequence[float]) -> float | None:
    """Half of Student's 95 % interval of the mean; None of one value."""
    if len(values) < 2:
        return None
    t = _T975[len(values) - 2] if len(values) - 2 < len(_T975) else 1.96
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _teacher(
    factory: str, weights: str, config: Config, cache: Cache, source: Source, val: Source | None
) -> Row:
    from safetensors.torch import load_file

    classes = len(cache.classes or ())
    model = students.make(factory, classes)
    model.load_state_dict(load_file(weights))
    spec = cache.identity["teacher"]["input_spec"] | getattr(model, "input_spec", {})
    size = rendered(spec["size"])
    pairing = canary.pair(cache, source)
    held = validation.load(
        cache, source, validation.split(cache, source, pairing, val, config.val_limit), size
    )
    top1 = validation.accuracy(model, held, spec, torch.device("cpu"))
    assert top1 is not None
    return _row("teacher", [0], [top1], None, cost(model, _images(size)))


def _images(size: Sequence[int]) -> Tensor:
    """What networks are timed on."""
    return torch.zeros(1, 3, *size).expand(_TIMED, -1, -1, -1)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


# -- told ------------------------------------------------------------------------------------------------------


HEADS = (
    "",
    "top-1 %",
    "± sd",
    "gain",
    "± 95 %",
    "B/view",
    "MB",
    "parameters",
    "ms/image",
    "ms/step",
    "training",
)


def cells(row: Row) -> list[str]:
    """As :data:`HEADS` names them; "-" where there is nothing to say."""

    def told(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    return [
        row.name,
        f"{100 * row.mean:.2f}",
        told(None if row.spread is None else 100 * row.spread, "{:.2f}"),
        told(row.gain, "{:+.2f}"),
        told(row.half, "{:.2f}"),
        told(row.view_bytes, "{:,}"),
        f"{row.megabytes:.2f}",
        f"{row.parameters:,}",
        f"{row.milliseconds:.2f}",
        told(row.step_ms, "{:.1f}"),
        told(row.seconds, "{:,.0f} s"),
    ]


def table(rows: Sequence[Row]) -> str:
    """For a person."""
    lines = [list(HEADS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(one, widths, strict=True))
        )
        for one in lines
    ]
    seeds = len(rows[0].top1)
    note = f"{seeds} seeds, the same for all; gains over {rows[0].name} are paired, in points"
    mixed = [f"{row.name}: approximate targets, {row.approximate}" for row in rows if row.approximate]
    return "\n".join([*(line.rstrip() for line in aligned), note, *mixed])


def _write(rows: Sequence[Row], out: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *(h for h in asdict(rows[0]) if h not in ("name", "top1")), "seed", "top1"])
    for row in rows:
        values = {k: v for k, v in asdict(row).items() if k not in ("name", "top1")}
        for seed, top1 in row.top1.items():
            writer.writerow([row.name, *values.values(), seed, top1])
    (out / "compare.csv").write_text(text.getvalue())
    (out / "compare.txt").write_text(table(rows) + "\n")
    (out / "compare.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    try:
        _draw(rows, out / "compare.png")
    except ImportError:
        say("no picture: pip install 'softcache-train[demo]' brings matplotlib")


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracies, a bar a row, with a dot a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 1 + 0.35 * len(rows)), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, row in enumerate(reversed(rows)):
        colour = "#d9822b" if row.name == "teacher" else "#9aa3ad" if row is rows[0] else "#3a6ea5"
        axes.barh(y, 100 * row.mean, color=colour, alpha=0.55, height=0.62, zorder=2)
        axes.scatter([100 * v for v in row.top1.values()], [y] * len(row.top1), s=14, color=colour, zorder=3)
    lowest = min(min(row.top1.values()) for row in rows)
    axes.set_xlim(max(0, 100 * lowest - 5), None)
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_xlabel("top-1, %; dots: seeds")
    axes.grid(axis="x", color="#e3e6e9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
