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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from softcache import canary
from softcache.cache import Cache
from softcache.errors import DamageError, MismatchError, SpecError, counted
from softcache.recipe.options import rendered
from softcache.source import Source
from softcache.store import Store
from softcache_train import checkpoint, students, validation
from softcache_train.commands import say
from softcache_train.config import Config
from softcache_train.cost import Cost, cost, cost_of_exit
from softcache_train.loop import class_count, train

_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
"""Of Student's t with so many degrees of freedom, from 1 on: 97.5 % lie below."""
_Z975 = 1.959964  # of the normal distribution
_ALIKE = ("seed", "val_split", "val_limit")
_NOTE = "seconds.json"
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
        SpecError: fewer than one seed, configs of other seeds or validated on other images or on nothing, a teacher that
            cannot be loaded.
        MismatchError: the teacher's weights are of another network.
    """
    if seeds < 1:
        raise SpecError(f"{seeds} seeds: at least one")
    _require_alike(configs)
    classes = [class_count(config, cache) for config in configs.values()]  # before one of them is trained
    first = next(iter(configs))
    beside = [_teacher(*teacher, classes[0], configs[first], cache, source, val_source)] if teacher else []
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in configs}
    for number in range(seeds):  # seed after seed, so that a comparison that is broken off is of pairs
        for name, config in configs.items():
            seed = config.seed + number
            found[name].append((seed, _trained(name, config, seed, cache, source, out, val_source)))
    base = [one["top1"] for _, one in found[first]]
    rows = [
        replace(row, approximate=config.approximate_mixing, view_bytes=_view_bytes(config, cache))
        for name, config in configs.items()
        for row in _rows(name, found[name], base if name != first else None)
    ]
    rows += beside
    _write(rows, Store(out))
    return rows


def _require_alike(configs: Mapping[str, Config]) -> None:
    (first, base), *others = configs.items()
    for name, config in others:
        for key in _ALIKE:
            mine, theirs = getattr(base, key), getattr(config, key)
            if mine != theirs:
                raise SpecError(
                    f"{first} has {key}={mine!r} and {name} {key}={theirs!r}: what is compared has the same seeds and is "
                    f"validated on the same images; --set {key}=… sets it for all"
                )


def _trained(
    name: str, config: Config, seed: int, cache: Cache, source: Source, out: Path, val: Source | None
) -> dict[str, Any]:
    folder = Store(out / name / str(seed))
    say(f"\n{name}, seed {seed}")
    began, fresh = time.monotonic(), not folder.exists(checkpoint.NAME)
    result = train(
        config.model_copy(update={"seed": seed, "out": str(folder.root)}), cache, source, val_source=val
    )
    _require_measured(name, result.top1)
    if fresh:
        folder.put(_NOTE, json.dumps(time.monotonic() - began).encode())
    return asdict(result) | {"seconds": _seconds(folder)}


def _require_measured(name: str, top1: float | None) -> float:
    if top1 is None:
        raise SpecError(
            f"{name}: there are no labelled images to compare students on; say --set val_split=NAME"
        )
    return top1


def _seconds(folder: Store) -> float | None:
    """How long a run took, as noted beside it by who trained it from start to end; None where nobody did."""
    try:
        said = json.loads(folder.get(_NOTE, limit=100))
    except (DamageError, ValueError):
        return None
    return said if isinstance(said, float) and 0 <= said < math.inf else None


def _view_bytes(config: Config, cache: Cache) -> int:
    read = set() if config.teacher else {name for one in config.terms for name in one.read}
    return sum(cache.targets[name].row_bytes for name in read)


def _rows(
    name: str, found: Sequence[tuple[int, Mapping[str, Any]]], base: Sequence[float] | None
) -> list[Row]:
    """A config's; of a student with exits, then one for each of them, and for the mean of their logits."""
    student, seeds = checkpoint.load_student(found[0][1]["out"]), [seed for seed, _ in found]
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
    return _t975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _t975(freedom: int) -> float:
    """Beyond the table the expansion of Cornish and Fisher (Abramowitz & Stegun 26.7.5), right to 1e-4."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, n = _Z975, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _teacher(
    factory: str, weights: str, classes: int, config: Config, cache: Cache, source: Source, val: Source | None
) -> Row:
    model = _loaded(factory, weights, classes)
    spec = cache.identity["teacher"]["input_spec"] | getattr(model, "input_spec", {})
    size = rendered(spec["size"])
    pairing = canary.pair(cache, source)
    held = validation.load(
        cache, source, validation.split(cache, source, pairing, val, config.val_limit), size
    )
    top1 = validation.accuracy(model, held, spec, torch.device("cpu"))
    return _row("teacher", [0], [_require_measured("teacher", top1)], None, cost(model, _images(size)))


def _loaded(factory: str, weights: str, classes: int) -> nn.Module:
    model = students.make(factory, classes)
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError) as e:
        raise SpecError(f"--beside: {weights} cannot be read as safetensors: {e}") from e
    except RuntimeError as e:
        raise MismatchError(
            f"--beside: {weights} does not fit {factory} of {counted(classes, 'class')}: {' '.join(str(e).split())}"
        ) from e
    return model


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
    note = f"{counted(len(rows[0].top1), 'seed')}, the same for all; gains over {rows[0].name} are paired, in points"
    mixed = [f"{row.name}: approximate targets, {row.approximate}" for row in rows if row.approximate]
    return "\n".join([*(line.rstrip() for line in aligned), note, *mixed])


def _write(rows: Sequence[Row], out: Store) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *(h for h in asdict(rows[0]) if h not in ("name", "top1")), "seed", "top1"])
    for row in rows:
        values = {k: v for k, v in asdict(row).items() if k not in ("name", "top1")}
        for seed, top1 in row.top1.items():
            writer.writerow([row.name, *values.values(), seed, top1])
    out.put("compare.csv", text.getvalue().encode())
    out.put("compare.txt", f"{table(rows)}\n".encode())
    out.put("compare.json", f"{json.dumps([asdict(row) for row in rows], indent=2)}\n".encode())
    try:
        out.put("compare.png", _drawn(rows))
    except ImportError:
        say("no picture: pip install 'softcache-train[demo]' brings matplotlib")


def _drawn(rows: Sequence[Row]) -> bytes:
    """A PNG of the accuracies, a bar a row, with a dot a seed."""
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
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
