"""What the runs of proof_views.py say: tables, paired differences with their intervals, and a picture."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats


def results(out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's interval."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * spread


def tables(out: Path, fresh: int, longer: int) -> None:
    """Print what there is. ``fresh``: epochs, and views where each has its own; ``longer``: epochs of equal wall-clock."""
    found = results(out)
    rows = {"labels only": ("none", "labels"), "cache, full(u8)": ("resnet56", "full")}
    rows |= {"cache, topk(3)": ("resnet56", "topk"), "teacher online": ("resnet56", "online")}
    rows |= {"fresh pixels, frozen targets": ("resnet56", "frozen")}
    rows |= {"targets of another image": ("resnet56", "other"), "shuffled targets": ("resnet56", "shuffled")}
    rows |= {"ensemble: cache, full(u8)": ("ensemble", "full"), "ensemble: online": ("ensemble", "online")}
    for on, count in (("test", "2,000 test images"), ("train", "20,000 training images no student saw")):
        print(f"\ntop-1 on {count}, mean ± standard deviation over seeds (number of seeds)\n")
        print("| | 1 view | 4 views | 10 views | fresh views |\n|---|---|---|---|---|")
        for title, (teacher, targets) in rows.items():
            cells = [_cell(found.get(f"{teacher}-{targets}-{v}", {}), on) for v in (1, 4, 10, fresh)]
            print(f"| {title} | {' | '.join(cells)} |")
    labels = f"none-labels-{fresh}-{longer}"
    print("\npaired differences in points, 95 % interval (90 % in brackets), over seeds both have\n")
    print("| | test | train | seeds |\n|---|---|---|---|")
    pairs = [
        ("cache, 10 views − online, fresh views", "resnet56-full-10", f"resnet56-online-{fresh}"),
        ("cache, 10 views − online, the same 10 views", "resnet56-full-10", "resnet56-online-10"),
        ("topk(3), 10 views − full(u8), 10 views", "resnet56-topk-10", "resnet56-full-10"),
        ("cache, 10 views − cache, 1 view", "resnet56-full-10", "resnet56-full-1"),
        ("cache, 10 views − frozen targets", "resnet56-full-10", f"resnet56-frozen-{fresh}"),
        ("cache, 10 views − labels, fresh views", "resnet56-full-10", f"none-labels-{fresh}"),
        (
            f"cache, {fresh} epochs − labels, {longer} epochs: wall-clock with the build",
            "resnet56-full-10",
            labels,
        ),
        (
            f"cache − labels, both {longer} epochs: wall-clock of a second student",
            f"resnet56-full-10-{longer}",
            labels,
        ),
        ("ensemble's cache, 10 views − ResNet-56's", "ensemble-full-10", "resnet56-full-10"),
        ("ensemble: cache, 10 views − online, the same views", "ensemble-full-10", "ensemble-online-10"),
        ("another image's targets − labels, 10 views", "resnet56-other-10", "none-labels-10"),
        ("shuffled targets − labels, 10 views", "resnet56-shuffled-10", "none-labels-10"),
    ]
    for title, a, b in pairs:
        seeds = sorted(found.get(a, {}).keys() & found.get(b, {}).keys())
        if not seeds:
            continue
        cells = []
        for on in ("test", "train"):
            gaps = [100 * (found[a][s][f"top1_{on}"] - found[b][s][f"top1_{on}"]) for s in seeds]
            (mean, wide), (_, narrow) = interval(gaps), interval(gaps, 0.9)
            cells.append(f"{mean:+.2f} ± {wide:.2f} [± {narrow:.2f}]")
        print(f"| {title} | {' | '.join(cells)} | {len(seeds)} |")
    gaps = np.array([g for name in found for run in found[name].values() for g in run["gaps"]])
    if gaps.size:
        print(
            f"\nthe cache's loss in place of the live teacher's, at {gaps.size:,} steps: relative difference"
        )
        print(
            f"mean {np.abs(gaps).mean():.1e}, 99 % below {np.quantile(np.abs(gaps), 0.99):.1e}, "
            f"most {np.abs(gaps).max():.1e}"
        )
    for views in (1, 4, 10):
        a, b = found.get(f"resnet56-full-{views}", {}), found.get(f"resnet56-online-{views}", {})
        apart = [
            np.array(a[seed]["ce_kd"])[:, 1] / np.array(b[seed]["ce_kd"])[:, 1] - 1
            for seed in a.keys() & b.keys()
        ]
        if len(apart) > 1:
            mean, half = interval([float(run.mean()) for run in apart])
            print(
                f"{views} views: an epoch's loss from the cache over that online − 1: {mean:+.1e} ± {half:.1e} over "
                f"{len(apart)} seeds, at most {max(np.abs(run).max() for run in apart):.1e}"
            )

    if (out / "clock.json").exists():
        seconds = json.loads((out / "clock.json").read_text())
        print(
            f"\nseconds, {torch.get_num_threads()} threads: { {k: round(v) for k, v in seconds.items()} }\n"
        )
        print("| | 1 student | 2 students | 5 students |\n|---|---|---|---|")
        paid = [seconds["build"] + n * seconds["cache"] for n in (1, 2, 5)]
        every = [n * seconds["online"] for n in (1, 2, 5)]
        for title, totals in {"teacher paid once": paid, "teacher in every step": every}.items():
            print(f"| {title} | {' | '.join(f'{t:,.0f} s' for t in totals)} |")


def _cell(runs: dict[int, dict[str, Any]], on: str) -> str:
    values = [100 * run[f"top1_{on}"] for run in runs.values()]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})"


def plot(out: Path, file: Path, fresh: int) -> None:
    """Top-1 against the number of views."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, x = results(out), {1: 0, 4: 1, 10: 2, fresh: 3}
    figure, axes = plt.subplots(figsize=(6, 4))
    lines = {
        "labels only": "none-labels",
        "cache, full(u8)": "resnet56-full",
        "cache, topk(3)": "resnet56-topk",
    }
    lines |= {"teacher online": "resnet56-online", "fresh pixels, frozen targets": "resnet56-frozen"}
    for shift, (title, arm) in enumerate(lines.items()):
        points = [(v, [100 * r["top1_train"] for r in found.get(f"{arm}-{v}", {}).values()]) for v in x]
        points = [(x[v] + 0.04 * (shift - 2), *interval(values)) for v, values in points if values]
        if points:
            at, mean, half = zip(*points, strict=True)
            axes.errorbar(at, mean, half, label=title, marker="o", capsize=3)
    axes.set_xticks(list(x.values()), ["1 view", "4 views", "10 views", "fresh views"])
    axes.set_ylabel("top-1 on 20,000 unseen images, %")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
