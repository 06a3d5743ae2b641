"""What ``curve_kl.py`` prints: distortions beside paired differences, and the picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proof_tables import interval, results

Runs = dict[str, dict[int, dict[str, Any]]]  # by arm and seed
FINE = 0.01  # T²·KL, in nats
SPOILED = ("noise", "scaled")
MARKERS = {"codecs": "o", "noise": "x", "scaled": "s", "draws": "^", "class only": "v"}


def differences(found: Runs, arm: str, against: Sequence[str]) -> list[float]:
    """Top-1 in points from the mean of ``against``, of each seed that they all have; of one of them from the others'."""
    others = [found.get(name, {}) for name in against if name != arm]
    runs = found.get(arm, {})
    both = sorted(set(runs).intersection(*others)) if others else []
    return [
        100 * (runs[s]["top1_train"] - statistics.mean(other[s]["top1_train"] for other in others))
        for s in both
    ]


def fine(distortions: Sequence[dict[str, Any]], found: Runs) -> list[str]:
    """Those that were run of the arms that are as good as the teacher's own numbers: T²·KL below :data:`FINE`."""
    return [d["arm"] for d in distortions if 16 * d.get("kl_T4", math.inf) < FINE and d["arm"] in found]


def tables(out: Path, reference: str) -> None:
    """Print what there is: rising in T²·KL, then those without."""
    found, distortions = results(out), _distortions(out)
    finest = fine(distortions, found)
    columns = ["targets", "bytes", "KL, T = 1", "KL, T = 4", "T²·KL", "‖p̂−p‖/‖p‖", "top-1, %"]
    columns += ["from full(f16), points", f"from those below {FINE:g}", "seeds"]
    print("\ntop-1 on the larger set; paired differences with 95 % intervals over the seeds\n")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for arm in sorted(distortions, key=lambda arm: (arm.get("kl_T4", math.inf), arm["gradient"])):
        kl = [arm.get(key, math.inf) for key in ("kl_T1", "kl_T4")]
        cells = [title(arm), "–" if arm["family"] in SPOILED else str(arm["bytes"])]
        cells += map(_number, (*kl, 16 * kl[1], arm["gradient"]))
        top1 = [100 * run["top1_train"] for run in found.get(arm["arm"], {}).values()]
        cells.append(f"{statistics.mean(top1):.2f}" if top1 else "–")
        for against in ([reference], finest):
            points = differences(found, arm["arm"], against)
            cells.append("{:+.2f} ± {:.2f}".format(*interval(points)) if points else "–")
        print(f"| {' | '.join(cells)} | {len(top1)} |")


def title(arm: dict[str, Any]) -> str:
    """As the table calls an arm."""
    much = arm["arm"].partition("-")[2]
    return {"noise": f"noise of {much}", "scaled": f"logits × {much}"}.get(arm["family"], f"`{arm['codec']}`")


def _distortions(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "distortion.json").read_text())


def _number(x: float) -> str:
    if math.isinf(x) or not x:
        return "∞" if x else "0"
    return f"{x:.2g}" if x >= 1e-3 else f"{x:.1e}"


def plot(out: Path, file: Path) -> None:
    """Points lost against T²·KL, and against the error of the probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, distortions = results(out), _distortions(out)
    finest = fine(distortions, found)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for panel, key, scale in zip(panels, ("kl_T4", "gradient"), (16, 1), strict=True):
        for family, marker in MARKERS.items():
            drawn = []
            for arm in distortions:
                points = differences(found, arm["arm"], finest)
                if arm["family"] == family and arm.get(key) and points:
                    drawn.append((scale * arm[key], *interval(points)))
            if drawn:
                x, mean, half = zip(*drawn, strict=True)
                panel.errorbar(x, mean, half, label=family, marker=marker, linestyle="none", capsize=3)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
    panels[0].set_xlabel("T²·KL at T = 4, nats")
    panels[1].set_xlabel("‖p̂ − p‖ / ‖p‖ at T = 4")
    panels[0].set_ylabel(f"top-1, points from those below {FINE:g}")
    panels[1].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
