"""What ``curve_kl.py`` prints: distortions beside paired differences, and the picture."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from proof_tables import interval, results

Run = dict[str, Any]
SPOILED = ("noise", "scaled")
MARKERS = {"codecs": "o", "noise": "x", "scaled": "s", "draws": "^", "class only": "v"}


def differences(runs: dict[int, Run], reference: dict[int, Run]) -> list[float]:
    """Top-1 in points, runs − reference, of the seeds that both have."""
    both = sorted(runs.keys() & reference.keys())
    return [100 * (runs[seed]["top1_train"] - reference[seed]["top1_train"]) for seed in both]


def tables(out: Path, reference: str) -> None:
    """Print what there is: rising in T²·KL, then those without."""
    found = results(out)
    print(
        "\ntop-1 on the larger set; paired differences from full(f16), 95 % intervals over the seeds both have\n"
    )
    columns = [
        "targets",
        "bytes",
        "KL, T = 1",
        "KL, T = 4",
        "T²·KL",
        "‖p̂−p‖/‖p‖",
        "top-1, %",
        "difference, points",
    ]
    print(f"| {' | '.join(columns)} | seeds |\n{'|---' * (len(columns) + 1)}|")
    for arm in sorted(_distortions(out), key=lambda arm: (arm.get("kl_T4", math.inf), arm["gradient"])):
        runs = found.get(arm["arm"], {})
        kl = [arm.get(key, math.inf) for key in ("kl_T1", "kl_T4")]
        cells = [title(arm), "–" if arm["family"] in SPOILED else str(arm["bytes"])]
        cells += map(_number, (*kl, 16 * kl[1], arm["gradient"]))
        top1 = [100 * run["top1_train"] for run in runs.values()]
        cells.append(f"{statistics.mean(top1):.2f}" if top1 else "–")
        points = differences(runs, found.get(reference, {})) if arm["arm"] != reference else []
        cells.append("{:+.2f} ± {:.2f}".format(*interval(points)) if points else "–")
        print(f"| {' | '.join(cells)} | {len(runs)} |")


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


def plot(out: Path, file: Path, reference: str) -> None:
    """Difference in top-1 against T²·KL, and against the error of the probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = results(out)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for panel, key, scale in zip(panels, ("kl_T4", "gradient"), (16, 1), strict=True):
        for family, marker in MARKERS.items():
            drawn = []
            for arm in _distortions(out):
                points = differences(found.get(arm["arm"], {}), found[reference])
                if arm["family"] == family and key in arm and arm["arm"] != reference and points:
                    drawn.append((scale * arm[key], *interval(points)))
            if drawn:
                x, mean, half = zip(*drawn, strict=True)
                panel.errorbar(x, mean, half, label=family, marker=marker, linestyle="none", capsize=3)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
    panels[0].set_xlabel("T²·KL at T = 4, nats")
    panels[1].set_xlabel("‖p̂ − p‖ / ‖p‖ at T = 4")
    panels[0].set_ylabel("top-1, points from full(f16)")
    panels[1].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
