"""Other people's loops, with the targets in them: docs/loops.md as it stands, Lightning, Hugging Face, torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from softcache_train import kd
from torch.utils.data import DataLoader, DistributedSampler, default_collate

import softcache as sc

ROOT = Path(__file__).parents[2]
NEEDED = {"lightning": "lightning", "transformers": "transformers", "torchvision": "torchvision"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / "train")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=environment(), timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def dataset(cache: sc.Cache, source: sc.Source):
    return sc.with_targets(source, cache)


def loss_of(output: torch.Tensor, label: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return 0.1 * F.cross_entropy(output, label) + 0.9 * kd(output, logits, T=4.0)


# -- the page --------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
TITLES = ["own", "plain", "lightning", "transformers", "torchrun"]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/train`` and ``caches/train``, as the page has them."""
    folder = tmp_path_factory.mktemp("loops")
    data = toys.write_imagefolder(folder / "data", "train", 12, seed=0)
    toys.build(folder / "caches" / "train", sc.Source(data, split="train"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("title", "block"), [*zip(TITLES, BLOCKS[1:], strict=True)], ids=TITLES)
def test_the_pages_code_runs(place: Path, title: str, block: str):
    for name in NEEDED:
        if f"import {name}" in block or f"from {name}" in block:
            pytest.importorskip(name, reason=f"{name} is not installed")
    script = place / f"loop_{title}.py"  # not to be taken for the library
    script.write_text(BLOCKS[0] + block)
    run([*(TORCHRUN if title == "torchrun" else [sys.executable]), str(script)], place)


# -- a plain loop ----------------------------------------------------------------------------------------------


def test_a_plain_loop_learns_what_the_teacher_says(dataset: Any):
    torch.manual_seed(0)
    student = toys.plain(4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        for batch in DataLoader(dataset, batch_size=20, shuffle=True):
            loss = kd(student(batch["image"]), batch["logits"], T=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])


# -- Lightning -------------------------------------------------------------------------------------------------


def test_lightning_shows_each_epoch_its_view_also_when_resumed(
    cache: sc.Cache, source: sc.Source, tmp_path: Path
):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Student(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = toys.plain(4), {}
            self.dataset = sc.with_targets(source, cache)

        def train_dataloader(self) -> DataLoader:
            self.dataset.set_epoch(self.current_epoch)
            return DataLoader(self.dataset, batch_size=20, shuffle=True, num_workers=2)

        def on_train_epoch_start(self) -> None:
            self.dataset.set_epoch(self.current_epoch)

        def training_step(self, batch: Any) -> torch.Tensor:
            self.seen.setdefault(self.current_epoch, set()).update(batch["view"].tolist())
            return loss_of(self.net(batch["image"]), batch["label"], batch["logits"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(epochs: int, **options: Any) -> tuple[Student, Any]:
        student = Student()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(student, **options)
        return student, trainer

    student, trainer = fit(2)
    assert student.seen == {epoch: {student.dataset.view(epoch)} for epoch in (0, 1)}
    assert len({student.dataset.view(epoch) for epoch in range(3)}) == 3
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    student, _ = fit(4, ckpt_path=tmp_path / "two.ckpt")
    assert student.seen == {epoch: {student.dataset.view(epoch)} for epoch in (2, 3)}


# -- Hugging Face ----------------------------------------------------------------------------------------------


def vit(transformers: Any) -> Any:
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize(("remove", "collator"), [(True, "theirs"), (True, "torch's"), (False, "theirs")])
def test_the_hugging_face_trainer_keeps_the_targets_and_tells_the_epoch(
    dataset: Any, cache: sc.Cache, tmp_path: Path, remove: bool, collator: str
):
    """With ``remove_unused_columns``, on by default, it takes what ``forward`` does not name out of dicts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    seen: list[tuple[int, set[int]]] = []
    label = "labels" if collator == "theirs" else "label"

    class Distilling(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            seen.append((int(self.state.epoch), set(inputs["view"].tolist())))
            for i, index in enumerate(inputs["index"].tolist()):
                row = cache[str(cache.ids[index]), int(inputs["view"][i])]
                assert inputs["logits"][i].tolist() == row["logits"].values.tolist()
            outputs = model(pixel_values=inputs["image"])
            loss = loss_of(outputs.logits, inputs[label], inputs["logits"])
            return (loss, outputs) if return_outputs else loss

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=24,
        learning_rate=1e-3,
        remove_unused_columns=remove,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    options = {} if collator == "theirs" else {"data_collator": default_collate}
    result = Distilling(vit(transformers), arguments, train_dataset=dataset, **options).train()
    assert result.global_step == len(seen) == 10
    assert seen == [(epoch, {dataset.view(epoch)}) for epoch in (0, 1) for _ in range(5)]


# -- torchrun --------------------------------------------------------------------------------------------------


def test_a_distributed_samplers_padding_shows_some_images_twice(dataset: Any):
    dataset.set_epoch(1)
    shown = []
    for rank in range(7):  # 120 images
        sampler = DistributedSampler(dataset, num_replicas=7, rank=rank, shuffle=False)
        shown.append([dict(dataset[i]) for i in sampler])
    assert {len(part) for part in shown} == {18}
    rows = [item for part in shown for item in part]
    counts = torch.bincount(torch.tensor([item["index"] for item in rows]))
    assert counts.tolist() == [2] * 6 + [1] * 114
    first, again = (item for item in rows if item["index"] == 3)
    assert all((first[name] == again[name]).all() for name in ("image", "logits"))


SCRIPT = """
import gc, json, os, sys
import torch, toys, softcache as sc
import torch.distributed as dist
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from test_loops import loss_of

torch.set_num_threads(1)
cache, images, out, epochs = *map(Path, sys.argv[1:4]), int(sys.argv[4])
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def train():
    dataset = sc.with_targets(sc.Source(images, split="train"), sc.open(cache))
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, seed=3)
    loader = DataLoader(dataset, batch_size=24 // world, sampler=sampler, num_workers=1)
    torch.manual_seed(0)
    student = toys.plain(4)
    model = DistributedDataParallel(student) if world > 1 else student
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = torch.load(out / "state.pt") if (out / "state.pt").exists() else None
    if state:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    losses = state["losses"] if state else []
    for epoch in range(state["epoch"] if state else 0, epochs):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        for batch in loader:
            assert set(batch["view"].tolist()) == {dataset.view(epoch)}
            loss = loss_of(model(batch["image"]), batch["label"], batch["logits"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach() / world
            if world > 1:
                dist.all_reduce(mean)
            losses.append(mean.item())
    (out / f"steps-{rank}").write_text(str(len(losses)))
    if world > 1:
        dist.barrier()  # nobody reads the state any more
    if rank == 0:
        saved = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**saved, "losses": losses, "epoch": epochs}, out / "state.pt")
        (out / "losses.json").write_text(json.dumps(losses))


if world > 1:
    dist.init_process_group("gloo")
train()
if world > 1:
    gc.collect()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_see_what_one_sees(cache: sc.Cache, images: Path, tmp_path: Path):
    """Equal steps and one loss curve, also when the two stop after an epoch and go on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    given = [str(script), str(cache.path), str(images)]
    run([sys.executable, *given, str(one), "3"], tmp_path)
    for epochs in (1, 3):
        run([*TORCHRUN, *given, str(two), str(epochs)], tmp_path)
        assert [(two / f"steps-{rank}").read_text() for rank in range(2)] == [str(5 * epochs)] * 2
    expected, found = (json.loads((out / "losses.json").read_text()) for out in (one, two))
    assert len(expected) == 15 and expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=1e-4)
    weights = [torch.load(out / "state.pt")["student"] for out in (one, two)]
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-3, atol=1e-5)
