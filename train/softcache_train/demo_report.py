"""How ``softcache-train demo`` tells what it measured: a table, a picture, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from softcache.errors import SpecError
from softcache.recipe import render
from softcache.source import Source
from softcache_train.commands import script
from softcache_train.cost import Cost
from softcache_train.demo_score import THREE, Found, Score

GREY, BLUE, ORANGE, INK = "#9aa3ad", "#3a6ea5", "#d9822b", "#333333"


# -- words -------------------------------------------------------------------------------------------------


def table(found: Found) -> str:
    """What was measured, for a person; aligned plain text."""
    student, teacher = _costs(found.student_cost), _costs(found.teacher_cost)
    rows = [
        ["", "all %", "3s %", "δ", "all %", "3s %", "teacher", "MB", "ms/image"],
        ["student, hard labels", *_cells(found.hard), *student],
        [f"student, cache (T={found.T:g})", *_cells(found.soft), *student],
        ["teacher", *_teacher_cells(found.teacher), *teacher],
    ]
    head, *lines = _aligned(rows)
    trained, shifted, kl = head.index("all %"), head.index("δ"), head.index("teacher")
    above = (
        f"{'':{trained}}{'as trained':{shifted - trained}}{'output for 3 shifted by δ':{kl - shifted}}KL from"
    )
    return "\n".join([above, head, "─" * len(head), *lines, "", *_notes(found)])


def _cells(scores: list[Score]) -> list[str]:
    """Mean ± spread over the seeds, column by column."""

    def cell(of: Callable[[Score], float], digits: int) -> str:
        values = [of(score) for score in scores]
        spread = stdev(values) if len(values) > 1 else 0.0
        return f"{mean(values):.{digits}f} ± {spread:.{digits}f}"

    return [
        cell(lambda s: 100 * s.overall, 1),
        cell(lambda s: 100 * s.threes, 1),
        cell(lambda s: s.shift, 1),
        cell(lambda s: 100 * s.shifted_overall, 1),
        cell(lambda s: 100 * s.shifted_threes, 1),
        cell(lambda s: s.kl, 2),
    ]


def _teacher_cells(score: Score) -> list[str]:
    return [f"{100 * score.overall:.1f}", f"{100 * score.threes:.1f}", "", "", "", ""]


def _costs(cost: Cost) -> list[str]:
    return [f"{cost.megabytes:.2f}", f"{cost.milliseconds:.3f}"]


def _aligned(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    return [
        "   ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], rest, strict=True))])
        for row in rows
    ]


def _notes(found: Found) -> list[str]:
    logits, disk = found.bytes_a_view
    cache, kl = found.cache, found.report.fidelity["logits"]["kl_T1"]
    return [
        f"On {found.test.sum()} test digits, {found.test[THREE]} of them 3s: mean ± standard deviation of "
        f"{len(found.soft)} students (seeds); one teacher, one cache.",
        "δ, added to a student's output for 3, is the best over all digits of the validation split.",
        "KL(teacher ‖ student) in nats on the test digits, as trained.",
        f"Students were shown {found.shown.sum():,} images, {found.shown[THREE]} of them a 3: the cache covers "
        "3s too, and its loader left them out.",
        f"The cache: {cache.samples} digits × {cache.views} views, {logits} bytes of logits a view ({disk:.0f} "
        f"on disk with its geometry and checksums), KL {kl:.0e} from what the teacher said.",
    ]


def closing(found: Found) -> str:
    """Where things lie and what to run next."""
    out = shlex.quote(str(found.out))
    show, train, build = script("softcache"), script("softcache-train"), script("build-cache")
    source = f"--source {out}/digits"
    return "\n".join(
        [
            f"cache    {found.cache.path} (sha256 {found.cache.digest})",
            f"picture  {found.picture}",
            f"all of it took {found.seconds:.0f} s",
            "",
            "To run next:",
            f"  {show} show {out}/cache",
            f"  {show} verify {out}/cache --live 64 {source} --split train --teacher {found.teacher_spec} "
            f"--weights {out}/teacher.safetensors",
            f"  {train} {out}/student.yaml --cache {out}/cache {source}    # from all ten digits",
            f"  {build} --help    # with your images and your teacher",
        ]
    )


# -- picture -----------------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Raise :class:`SpecError` where it is missing, before a minute of work is lost."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise SpecError(f"the demo draws with matplotlib: pip install 'softcache-train[demo]' ({e})") from e


def draw(found: Found, source: Source, samples: np.ndarray) -> None:
    """Left, the accuracy on the 3s; right, what the teacher said of some ``samples`` that are no 3."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 6), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    _draw_bars(left, found)
    _draw_views(right, found, source, samples)
    figure.savefig(found.picture)


def _draw_bars(figure: Any, found: Found) -> None:
    bars: list[tuple[str, Sequence[float], str]] = [
        ("hard labels,\nas trained", [s.threes for s in found.hard], GREY),
        ("hard labels,\n3 shifted by δ", [s.shifted_threes for s in found.hard], GREY),
        ("cache,\nas trained", [s.threes for s in found.soft], BLUE),
        ("cache,\n3 shifted by δ", [s.shifted_threes for s in found.soft], BLUE),
        ("teacher", [found.teacher.threes], ORANGE),
    ]
    axes = figure.subplots()
    for x, (_, values, colour) in enumerate(bars):
        heights = 100 * np.array(values)
        axes.bar(x, heights.mean(), color=colour, width=0.62, alpha=0.55, zorder=2)
        if len(heights) > 1:
            spread = np.linspace(-0.16, 0.16, len(heights))
            axes.scatter(
                x + spread, heights, s=30, color=colour, edgecolor=INK, linewidth=0.6, zorder=3, clip_on=False
            )
        axes.text(x, heights.max() + 2.5, f"{heights.mean():.1f} %", ha="center", color=INK, fontsize=12)
    axes.set_xticks(range(len(bars)), [label for label, _, _ in bars])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"accuracy on the {found.test[THREE]} test 3s, %")
    axes.set_title(
        "Students that never saw a 3: how many 3s they recognise\n"
        f"bars: mean of {len(found.soft)} students; dots: each of them",
        fontsize=12,
    )
    axes.grid(axis="y", color="#e3e6e9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_views(figure: Any, found: Found, source: Source, samples: np.ndarray) -> None:
    chosen = _most_like_a_3(found, source, samples)
    top = 100 * max(p.max() for _, _, p in chosen) + 8
    grid = figure.subplots(len(chosen), 2, width_ratios=[1, 3.2])
    for (image, said), (sample, view, p) in zip(grid, chosen, strict=True):
        pixels = render(source.image(sample), found.cache.read_views(view, np.array([sample]))[0], (8, 8))
        image.imshow(pixels, interpolation="nearest")
        image.set_xticks([])
        image.set_yticks([])
        image.set_ylabel(f"a {source.labels[sample]}", rotation=0, ha="right", va="center", fontsize=12)
        said.bar(range(10), 100 * p, color=[ORANGE if digit == THREE else GREY for digit in range(10)])
        said.text(
            THREE, 100 * p[THREE] + 1, f"{100 * p[THREE]:.0f} %", ha="center", color=ORANGE, fontsize=10
        )
        said.set_xticks(range(10), range(10) if image is grid[-1, 0] else [""] * 10)
        said.axhline(10, color=INK, linewidth=0.8, linestyle=":")
        said.set_ylim(0, top)
        said.set_yticks([0, 10, 20])
        said.set_ylabel("probability, %")
        said.spines[["top", "right"]].set_visible(False)
    grid[-1, 1].set_xlabel("digit")
    figure.suptitle(
        f"What the cache says of other digits (T = {found.T:g}; dotted: no opinion)\n"
        "for four digits, the view in which the teacher sees most of a 3",
        fontsize=12,
    )


def _most_like_a_3(
    found: Found, source: Source, samples: np.ndarray, count: int = 4
) -> list[tuple[int, int, np.ndarray]]:
    """(sample, view, probabilities at T): for each digit its row with the most 3, the ``count`` first."""
    best: dict[int, tuple[int, int, np.ndarray]] = {}
    for view in range(found.cache.views):
        said = np.exp(found.cache.read(view, samples)["logits"].dense(found.T))
        for sample, p in zip(samples.tolist(), said, strict=True):
            digit = int(source.labels[sample])
            if digit not in best or p[THREE] > best[digit][2][THREE]:
                best[digit] = sample, view, p
    return sorted(best.values(), key=lambda row: -row[2][THREE])[:count]
