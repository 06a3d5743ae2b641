"""Rate-distortion pictures of what ``bench_codecs.py`` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINES = {"anchored": "tab:red", "packed": "tab:blue", "fp16 top": "tab:gray"}  # all else are points
MARKS = "sDv^<>pPXd"
SHOWN = ("f16", "int8", "int4", "pool(2)|f16", "pool(2)|int8", "pool(2)|int4", "pool(4)|int8")
Rows = dict[str, dict[str, float]]


def draw(found: dict[str, Any], folder: Path) -> None:
    """``codecs-logits.png``, ``codecs-maps.png`` and ``codecs-detections.png``."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("logits", logits(found["logits"])),
        ("maps", maps(found["maps"])),
        ("detections", class_logits(found["detections"])),
    ):
        figure.savefig(folder / f"codecs-{name}.png", dpi=80, metadata={"Software": None})


def logits(found: Rows) -> Any:
    """KL and the error of the gradient over bytes, at each temperature."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 6.5), sharex=True)
    for column, T in enumerate((1, 2, 4, 8)):  # noqa: N806
        axes[0, column].set_title(f"T = {T}")
        axes[1, column].set_xlabel("bytes a view")
        for row, key in enumerate(("kl", "p")):
            curves(axes[row, column], found, f"{key}_T{T}")
    axes[0, 0].set_ylabel("KL, nats")
    axes[1, 0].set_ylabel("‖p̂ − p‖ / ‖p‖")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    return figure


def curves(axis: Any, found: Rows, key: str) -> None:
    for family, colour in LINES.items():
        points = sorted((f["bytes"], f[key]) for name, f in found.items() if name.startswith(family))
        if points:
            axis.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=family)
    others = {name: f for name, f in found.items() if f[key] > 0 and not name.startswith(tuple(LINES))}
    for i, (name, f) in enumerate(others.items()):
        axis.plot(f["bytes"], f[key], MARKS[i % len(MARKS)], ms=5, color=f"C{i}", label=name)
    logarithmic(axis)


def maps(found: dict[str, Rows]) -> Any:
    """The error of the hint loss's gradient over bytes."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for i, (name, rows) in enumerate(found.items()):
        halves = rows["f16"]["raw"]
        points = {text: (rows[text]["zstd"] / halves, rows[text]["hint"]) for text in SHOWN if text in rows}
        axis.plot(*zip(*points.values(), strict=True), MARKS[i], ms=5, label=name)
        if i == 0:
            named(axis, points)
    axis.set(xlabel="bytes as written, of those of halves", ylabel="error of the gradient of hint")
    return finished(figure, axis)


def class_logits(found: dict[str, Rows]) -> Any:
    """The error of the gradient of sigmoid losses over kB."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5))
    for name, words in found.items():
        points = {word: (f["bytes"] / 1000, f["gradient"]) for word, f in words.items()}
        axis.plot(*zip(*points.values(), strict=True), "o-", ms=4, label=name)
        named(axis, points)
    axis.set(xlabel="kB an image, class logits", ylabel="‖σ(ẑ) − σ(z)‖ / ‖σ(z)‖")
    return finished(figure, axis)


def named(axis: Any, points: dict[str, tuple[float, float]]) -> None:
    for text, place in points.items():
        axis.annotate(text, place, fontsize=7, xytext=(4, 4), textcoords="offset points")


def logarithmic(axis: Any) -> None:
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.3)


def finished(figure: Any, axis: Any) -> Any:
    logarithmic(axis)
    axis.legend(fontsize=7)
    figure.tight_layout()
    return figure
