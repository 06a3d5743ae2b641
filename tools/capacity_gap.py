"""Does a small student learn more from a smaller teacher, or from one that was stopped early? CIFAR-10, paired seeds.

    python tools/capacity_gap.py --data ../shared/data --out runs/gap                 # runs what is missing
    python tools/capacity_gap.py --data ../shared/data --out runs/quick --quick       # that it works

ResNet-8 on 16 × 16 pixels from one cache for each teacher, of the same views of the same images: the published ResNet-56; an
assistant, a ResNet-20 that learned from the cache of that (Mirzadeh et al. 2020); and ResNet-20 that learned the labels, for
few epochs and for many (Cho and Hariharan 2019). There is one of each teacher, so that intervals are of students only.
0.1 CE + 0.9 KD at T = 4, and labels alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from paired import CE, HALF, KD, Bench, Scale, differences, main, table
from safetensors.torch import load_file
from softcache_train import students

FULL, QUICK = (
    Scale(images=1500, views=2, epochs=8),
    Scale(images=128, views=1, epochs=2, seeds=2, held_out=200),
)
LOGITS = {"logits": "full(u8)"}
SOFT, HARD = {"objectives": [CE, KD]}, {"objectives": ["ce"]}
PUBLISHED, ASSISTANT = "ResNet-56", "assistant, ResNet-20"


def work(bench: Bench) -> tuple[str, dict[str, Any]]:
    cache, epochs = bench.cache("resnet56", LOGITS), bench.scale.epochs
    few, many = (f"ResNet-20 from labels, {n} epochs" for n in (epochs // 4 or 1, epochs))
    asked = {
        ASSISTANT: SOFT,
        few: {**HARD, "epochs": epochs // 4 or 1, "warmup_epochs": 0},
        many: HARD,
    }
    teachers = {
        name: bench.run(f"teacher {name}", cache, 0, {**options, "student": "resnet20"})
        for name, options in asked.items()
    }
    arms = {"labels": (cache, HARD | HALF), PUBLISHED: (cache, SOFT | HALF)}
    for name, one in teachers.items():
        own = bench.cache(name, LOGITS, "resnet20", Path(one["model"]))
        arms[name] = own, SOFT | HALF
    found = bench.runs(arms)
    right = {name: one["top1"]["test"] for name, one in teachers.items()}
    published = students.make("resnet56", 10)
    published.load_state_dict(load_file(bench.data / "weights" / "cifar10_resnet56.safetensors"))
    right[PUBLISHED] = bench.measured(published)["test"]
    beside = {name: [f"{100 * right[name]:.2f}" if name in right else "–"] for name in found}
    text = table(found, beside, ["its teacher's top-1 on other test images, %"])
    pairs = {
        "the assistant − its teacher": ([ASSISTANT], [PUBLISHED]),
        "few epochs − many": ([few], [many]),
        "distilled − labels, of teachers": ([ASSISTANT], [many]),
    }
    return f"{text}\n\n{differences(found, pairs)}", {"top1": found, "teachers": right}


if __name__ == "__main__":
    sys.exit(main(__doc__, FULL, QUICK, work))
