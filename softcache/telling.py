"""A plan in words, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcache.erasure import Erasure
from softcache.errors import counted
from softcache.forecast import Plan
from softcache.losses import TEMPERATURES
from softcache.measure import size, words
from softcache.memorised import Answers
from softcache.meter import clock


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
    if plan.drive is not None:
        lines.append(f"           {_of_drive(plan.drive)}")
    stages = ", ".join(f"{stage} {rate(each)}" for stage, each in plan.stages.items())
    lines.append(f"  time     {_long(plan.hours)} at {rate(plan.rows_per_second)} rows/s")
    lines.append(f"           each alone, rows/s: {stages}; the limit is {plan.limit}")
    for name, values in plan.fidelity.items():
        lines.append(f"  target   {name}: {plan.bytes_per_row[name]:,} bytes a row; {words(values)}")
    if plan.top1 is not None:
        lines.append(
            f"  top-1    {plan.top1:.2%} of {plan.labelled:,} labelled rows of the pilot "
            f"({plan.teacher_top1:.2%} before encoding)"
        )
    if plan.memorised:
        lines.append(plan.memorised)
    if plan.elsewhere:
        lines.append(f"  elsewhere  {Answers(**plan.elsewhere).words()}")
    for name, found in plan.erasure.items():
        lines.append(
            f"  others   what {name} tells of classes that are not the answer: {Erasure(**found).words()}"
        )
    lines += ["", *_tables(plan), *_left_out(plan), "", *(plan.choice["why"] if plan.choice else ())]
    lines += [plan.command, "", *_compared(plan)]
    return "\n".join(lines)


def _of_drive(drive: dict[str, Any]) -> str:
    told = f"it takes {size(drive['bytes_per_second'])} a second, measured over {size(drive['written'])}"
    first = drive["first_bytes_per_second"]
    if first > 1.5 * drive["bytes_per_second"]:
        told += f" ({size(first)} at first)"
    return told if drive["settled"] else f"{told}; it may become slower yet"


# -- the table of codecs -----------------------------------------------------------------------------------


def _tables(plan: Plan) -> Iterator[str]:
    """A table a target, the finest first."""
    for name in dict.fromkeys(row["target"] for row in plan.codecs):
        rows = [row for row in plan.codecs if row["target"] == name]
        heads = _columns(rows)
        yield from _aligned(
            [[f"{name} as", "bytes a view", "total", *heads, "decode µs"], *_cells(rows, heads)]
        )
        yield ""


def _columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Heading → the figure below it, of those that a row has."""
    named = {f"T²·KL T={T}": f"t2kl_T{T}" for T in TEMPERATURES}
    named |= {f"gradient T={T}": f"gradient_T{T}" for T in TEMPERATURES[::3]}
    named |= {"kl an item": "kl", "cosine": "cosine", "gradient": "gradient"}
    there = {key for row in rows for key in row["figures"]}
    return {head: key for head, key in named.items() if key in there}


def _cells(rows: list[dict[str, Any]], heads: dict[str, str]) -> Iterator[list[str]]:
    for row in rows:
        figures = (_figure(key, row["figures"].get(key)) for key in heads.values())
        name = ("→ " if row["chosen"] else "  ") + row["codec"]
        yield [
            name,
            f"{row['bytes_per_view']:,.1f}",
            size(row["total_bytes"]),
            *figures,
            f"{row['decode_seconds'] * 1e6:,.1f}",
        ]


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key == "cosine":
        return f"{value:.6f}"
    return f"{value:.2%}" if key.startswith("gradient") and value >= 1e-4 else f"{value:.1e}"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([f"{first:{widths[0]}}", *cells])


def _left_out(plan: Plan) -> Iterator[str]:
    some: dict[tuple[str, str], list[str]] = {}
    for one in plan.left_out:
        why = one["why"].partition(";")[0]
        some.setdefault((one["target"], why), []).append(one["codec"])
    for (name, why), specs in some.items():
        yield f"left out for {name}: {', '.join(specs)} ({why})"


# -- does it pay? ------------------------------------------------------------------------------------------


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
        verdict = "caching pays" if row["pays"] else "caching DOES NOT PAY: run it online"
        verdict += f", {times:,.1f} times as fast"
        lines.append(f"{who:23}  {_long(online):>14}  {_long(cached):>11}  {verdict}")
    return lines


def _long(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 10 else clock(hours * 3600)


def rate(value: float) -> str:
    """``1,234``; with what counts of small ones."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
