"""Which part of masked attention teaches? Alignment × attention × masking, CIFAR-10, ResNet-56 → ResNet-8, paired seeds.

    python tools/ablation.py --data ../shared/data --out runs/ablation                # runs what is missing
    python tools/ablation.py --data ../shared/data --out runs/quick --quick           # that it works

Every student learns from labels and soft targets (0.1 CE + 0.9 KD); beside them from embeddings (``infonce``), from the
attention of layer2 (``attention``), from the half of its places that speaks most for the label by integrated gradients
(``masked_attention``), or, since that mask costs the teacher fifty passes and another none, from the half where the
attention itself is strongest. A place weighs the same in all of them. Attention is of layer2 because in these networks
everything behind layer3 is linear, where integrated gradients are no integral; students see 16 × 16 pixels, and their map of
8 × 8 places is compared as one of 16 × 16. Of the attributions it prints how much of the logit's change they miss: the
completeness gap, which a build keeps beside its fidelity.
"""

from __future__ import annotations

import sys
from typing import Any

from paired import CE, HALF, KD, Bench, Scale, differences, main, table

TARGETS = {
    "logits": "full(u8)",
    "embedding": "f16",
    "layer2.strength": "strength",
    "layer2.attribution": "f16",
    "layer3.attribution": "f16",
}
FULL, QUICK = (
    Scale(images=2000, views=2, epochs=10),
    Scale(images=128, views=1, epochs=2, seeds=2, held_out=200),
)
CELLS = 16 * 16

ALIGNMENT = {"infonce": {"weight": 0.1, "target": "embedding"}}
ATTENTION = {
    "attention": {"weight": 1000, "target": "layer2.strength"}
}  # a mean over the places, and this a sum:
MASKED = {"weight": 1000 / CELLS, "target": "layer2.strength", "quantile": 0.5}
BY_GRADIENTS = {"masked_attention": {**MASKED, "mask": "layer2.attribution"}}
BY_STRENGTH = {"masked_attention": {**MASKED, "mask": "layer2.strength"}}

ARMS: dict[str, list[dict[str, Any]]] = {
    "kd": [],
    "kd + alignment": [ALIGNMENT],
    "kd + attention": [ATTENTION],
    "kd + masked attention": [BY_GRADIENTS],
    "kd + attention masked by strength": [BY_STRENGTH],
    "kd + alignment + attention": [ALIGNMENT, ATTENTION],
    "kd + alignment + masked attention": [ALIGNMENT, BY_GRADIENTS],
}
EFFECTS = {
    "alignment": (
        ["kd + alignment", "kd + alignment + attention", "kd + alignment + masked attention"],
        ["kd", "kd + attention", "kd + masked attention"],
    ),
    "attention": (["kd + attention", "kd + alignment + attention"], ["kd", "kd + alignment"]),
    "masking, of attention": (
        ["kd + masked attention", "kd + alignment + masked attention"],
        ["kd + attention", "kd + alignment + attention"],
    ),
    "masks: integrated gradients − strength": (
        ["kd + masked attention"],
        ["kd + attention masked by strength"],
    ),
}


def work(bench: Bench) -> tuple[str, dict[str, Any]]:
    cache = bench.cache("explained", TARGETS)
    gaps = {
        name: figures["completeness_gap"]
        for name, figures in cache.report.fidelity.items()
        if name.endswith(".attribution")
    }
    found = bench.runs(
        {name: (cache, {**HALF, "objectives": [CE, KD, *more]}) for name, more in ARMS.items()}
    )
    text = [table(found), differences(found, EFFECTS)]
    text.append("\n".join(f"{name}: {gap:.2%} of the logit's change is missed" for name, gap in gaps.items()))
    return "\n\n".join(text), {"top1": found, "completeness_gap": gaps}


if __name__ == "__main__":
    sys.exit(main(__doc__, FULL, QUICK, work))
