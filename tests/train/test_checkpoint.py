"""Checkpoints: whole after a crash at any moment, exact, and no pickle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from softcache_train import checkpoint, load_student, students

from softcache.errors import DamageError, MismatchError, StoreError
from softcache.store import Disk, Store

STATE = checkpoint.Checkpoint(
    config={"student": "resnet8", "lr": 0.1},
    cache="c" * 64,
    num_classes=10,
    input_spec=students.resnet8().input_spec,
    epoch=1,
    step=3,
    totals=[0.1, 0.2, 1 / 3],
    history=[{"epoch": 0, "val": None}],
)


def trained(optimizer_class=torch.optim.SGD, seed=0, **options):
    torch.manual_seed(seed)
    model = students.resnet8()
    optimizer = optimizer_class(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {}), (torch.optim.AdamW, {})],
)
def test_round_trip_is_exact(tmp_path, optimizer_class, options):
    model, optimizer = trained(optimizer_class, **options)
    store = Store(tmp_path / "run")
    checkpoint.save(store, STATE, model, optimizer)
    state = checkpoint.read(store)
    assert replace(state, files={}) == STATE

    other, other_optimizer = trained(optimizer_class, seed=1, **options)
    checkpoint.restore(store, state, other, other_optimizer)
    assert same(model.state_dict(), other.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(images).square().mean().backward()
        o.step()
    assert same(model.state_dict(), other.state_dict())


def test_load_student(tmp_path):
    model, optimizer = trained()
    checkpoint.save(Store(tmp_path), STATE, model, optimizer)
    student = load_student(tmp_path)
    assert not student.training and student.input_spec == STATE.input_spec
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(student(images), model.eval()(images))


def test_the_one_before_is_removed(tmp_path):
    model, optimizer = trained()
    store = Store(tmp_path)
    for step in range(3):
        checkpoint.save(store, replace(STATE, step=step), model, optimizer)
    assert store.names() == [
        "checkpoint.json",
        "model-0001-000002.safetensors",
        "optimizer-0001-000002.safetensors",
    ]


class FailingDisk(Disk):
    """Fails at the n-th write or rename."""

    def __init__(self, n):
        self.left = n

    def _tick(self):
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")

    def write_file(self, path: Path, data):
        self._tick()
        super().write_file(path, data)

    def rename(self, source: Path, target: Path):
        self._tick()
        super().rename(source, target)


@pytest.mark.parametrize("n", range(1, 7))
def test_a_failed_save_leaves_the_one_before(tmp_path, n):
    before, optimizer = trained()
    checkpoint.save(Store(tmp_path), STATE, before, optimizer)
    after, optimizer = trained(seed=1)
    with pytest.raises(StoreError, match="disk is full"):
        store = Store(tmp_path, FailingDisk(n))
        checkpoint.save(store, replace(STATE, step=4), after, optimizer)
    state = checkpoint.read(Store(tmp_path))
    assert state.step == 3
    assert same(load_student(tmp_path).state_dict(), before.state_dict())


@pytest.mark.parametrize("name", ["model", "optimizer"])
@pytest.mark.parametrize("damage", [b"", None, b"flip"])
def test_damage_is_found(tmp_path, name, damage):
    model, optimizer = trained(momentum=0.9)
    store = Store(tmp_path)
    checkpoint.save(store, STATE, model, optimizer)
    state = checkpoint.read(store)
    path = tmp_path / state.files[name]["file"]
    if damage is None:
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data) if damage else b"")
    with pytest.raises(DamageError, match=path.name):
        checkpoint.restore(store, state, model, optimizer)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}'])
def test_a_json_that_is_no_checkpoint(tmp_path, text):
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(DamageError, match="not a checkpoint"):
        checkpoint.read(Store(tmp_path))


def test_a_newer_version_is_refused(tmp_path):
    model, optimizer = trained()
    checkpoint.save(Store(tmp_path), STATE, model, optimizer)
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(MismatchError, match="version 2"):
        checkpoint.read(Store(tmp_path))


def test_no_checkpoint(tmp_path):
    assert checkpoint.read(Store(tmp_path)) is None
    with pytest.raises(DamageError, match="no checkpoint in"):
        load_student(tmp_path)


def test_tensors_that_do_not_fit_the_student(tmp_path):
    model, optimizer = trained()
    store = Store(tmp_path)
    checkpoint.save(store, STATE, model, optimizer)
    with pytest.raises(MismatchError, match="does not fit the student"):
        checkpoint.restore(store, checkpoint.read(store), students.resnet20())


def test_another_run_is_named_by_its_field(tmp_path):
    checkpoint.require_same(STATE, STATE.config, STATE.cache, tmp_path)
    with pytest.raises(MismatchError, match=r"lr=0\.1, this one lr=0\.2"):
        checkpoint.require_same(STATE, {**STATE.config, "lr": 0.2}, STATE.cache, tmp_path)
    with pytest.raises(MismatchError, match="cache="):
        checkpoint.require_same(STATE, STATE.config, "d" * 64, tmp_path)


def test_a_run_does_not_move_into_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match="something else"):
        checkpoint.read(Store(tmp_path))
    with pytest.raises(MismatchError, match="is a file"):
        checkpoint.read(Store(tmp_path / "notes.txt"))
