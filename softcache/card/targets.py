"""What is kept, in a card: a table."""

from __future__ import annotations

from collections.abc import Iterator

from softcache import measure
from softcache.cache import Cache
from softcache.card.markup import bullets, code, table


def told(cache: Cache) -> Iterator[str]:
    """A line of the table for each target, and what to know of it."""
    report = cache.report
    head = ["target", "kind", "shape", "codec", "bytes a view", "what was lost"]
    moving = any(report.equivariance.get(name) for name in cache.targets)
    rows = []
    for name, target in cache.targets.items():
        shape = "×".join(map(str, target.shape))
        lost = measure.words(_plain(report.fidelity.get(name, {})))
        row = [
            code(name),
            target.kind,
            shape,
            code(target.spec),
            f"{report.bytes_per_row.get(name, 0):,}",
            lost or "—",
        ]
        rows.append(row + [measure.motion_words(report.equivariance.get(name, {})) or "—"] * moving)
    yield table(head + ["moves with the view, cosine"] * moving, rows)
    yield (
        "What was lost is what was kept against what the teacher said, a mean over rows: `kl_T1` in nats at temperature 1, "
        "`relative_l2` and so on. Bytes are before compression; all shards together are "
        f"{measure.size(report.bytes)}."
    )
    choice = cache.manifest and cache.manifest.choice
    if choice:
        yield "The codecs were chosen when it was built:"
        yield bullets(code(why) for why in choice.why)
    layouts = [f"{code(n)}: {code(str(t.layout))}" for n, t in cache.targets.items() if t.layout]
    if layouts:
        yield bullets(layouts)
    if report.top1 is not None:
        before = "" if report.teacher_top1 is None else f" ({report.teacher_top1:.2%} before encoding)"
        yield f"Top-1 of what was kept: {report.top1:.2%}{before} of {report.labelled:,} labelled rows."


def _plain(figures: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if key.isascii() and key.replace("_", "").isalnum()}
