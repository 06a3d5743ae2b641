"""What objectives learn, remember and leave out, with two processes as with one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file
from softcache_train import config as configs
from softcache_train import train
from torch import nn

import softcache

ROOT = Path(__file__).parents[2]
OPTIONS = {"student": "toys:plain", "epochs": 2, "global_batch": 25, "lr": 0.01, "workers": 0}
EXITS = ["exit1", "exit2", "exit1.embedding", "exit2.embedding"]
CASES = {
    "own_exits": {"student": "toys:exits", "objectives": [{"own_exits": {"student": EXITS, "beta": 0.01}}]},
    "exits that nobody hears": {"student": "toys:exits"},
    "hint": {"objectives": [{"hint": {"target": "0", "stop": 1}}, {"kd": {"start": 1}}]},
    "crd": {"objectives": ["ce", {"crd": {"target": "logits", "student": "3", "negatives": 40, "dim": 8}}]},
    "mutual": {"objectives": ["ce", {"mutual": {"peer": "toys:plain", "target": "logits"}}]},
}

TRAIN = """
import os, sys
import torch; torch.set_num_threads(1)
import softcache, test_ranks
from softcache_train import config, train
torch.randint = test_ranks.evenly
cache, images, out, *ports = sys.argv[1:]
for name, os.environ["MASTER_PORT"] in zip(test_ranks.CASES, ports, strict=True):
    test_ranks.learn(name, softcache.open(cache), softcache.Source(images, split="train"), out)
"""


def evenly(high, size, device):
    """crd's others, which each process draws for itself: here the same, whoever draws."""
    return (torch.arange(size[1], device=device) * 7 % high).expand(size)


def learn(name, cache, source, out):
    train(configs.check({**OPTIONS, **CASES[name], "out": f"{out}/{name}"}), cache, source)


@pytest.fixture(scope="module")
def mapped(source, tmp_path_factory):
    """A cache with logits and a map of (6, 7, 7)."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(294, 4))
    teacher.input_spec = {"size": [toys.SIZE] * 2, "mean": [0.5] * 3, "std": [0.25] * 3}  # pyright: ignore
    path = tmp_path_factory.mktemp("ranks") / "cache"
    options = {"targets": {"logits": "full(f16)", "0": "f16"}, "recipe": "flip", "views": 2}
    return softcache.build(path, source=source, teacher=teacher, batch=16, progress=False, **options)


@pytest.fixture(scope="module")
def runs(mapped, source, images, tmp_path_factory):
    """Every case, of one process and of two, in folders ``1/CASE`` and ``2/CASE``."""
    out = tmp_path_factory.mktemp("runs")
    (out / "train.py").write_text(TRAIN)
    paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / "train")]
    more = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = [
        sys.executable,
        str(out / "train.py"),
        str(mapped.path),
        str(images),
        str(out / "2"),
        *free_ports(),
    ]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **more, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", evenly)
        for name in CASES:
            learn(name, mapped, source, out / "1")
    try:
        for rank in ranks:
            told = rank.communicate(timeout=400)[1]
            assert rank.returncode == 0, told[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return out


def free_ports() -> list[str]:
    """One for each case: a group that ended leaves its words behind at its port."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in CASES]
        return [str(one.getsockname()[1]) for one in found]


def tensors(run: Path, kind: str) -> dict[str, torch.Tensor]:
    (path,) = run.glob(f"{kind}-*.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(runs, case):
    """25 rows a step are 12 and 13; none of the networks has batch norm, which would see a rank's share."""
    one, two = runs / "1" / case, runs / "2" / case
    learned = case in ("hint", "crd", "mutual")
    assert [kind for kind in ("model", "terms") if any(one.glob(f"{kind}-*"))] == ["model", "terms"][
        : 1 + learned
    ]
    for kind in ["model", "terms"][: 1 + learned]:
        a, b = tensors(one, kind), tensors(two, kind)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                b[name], a[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    histories = [json.loads((run / "checkpoint.json").read_text())["history"] for run in (one, two)]
    for a, b in zip(*histories, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step_ms", "images_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
