"""Batches that are mixed after the teacher spoke: what is mixed and how, what that is not, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from softcache_train import Loader, compare, mixing, train
from softcache_train import config as configs
from softcache_train.mixing import Mixer
from softcache_train.objectives import combine, cross_entropy, dist, dkd, hard, kd, logits_mse, probs_mse
from softcache_train.progress import Progress
from softcache_train.targets import Dense, Hard, Mixed, to_tensors

import softcache as sc
from softcache.cache import Cache
from softcache.codecs import AnchoredLogits
from softcache.errors import MismatchError, SpecError
from softcache.source import Source

OPTIONS = {"student": "toys:plain", "epochs": 2, "global_batch": 25, "lr": 0.01, "workers": 0}


def run(cache: Cache, source: Source, out: Path, **options: Any):
    return train(configs.check({**OPTIONS, "out": str(out), **options}), cache, source)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def batch(cache, source):
    return Loader(cache, source, global_batch=16, workers=0).batch(0, 0)


# -- the batch ---------------------------------------------------------------------------------------------


def test_partners_are_one_ring():
    for rows in (2, 3, 16, 25):
        found = mixing.partners(rows, 1, 2, 3)
        seen, at = [], 0
        for _ in range(rows):
            seen.append(at)
            at = int(found[at])
        assert at == 0 and sorted(seen) == list(range(rows))


def test_mixup_is_the_weighted_mean_of_pixels(batch):
    found = Mixer(mixing.parse("mixup(0.8)"), 0)(batch, 1, 2)
    partner = mixing.partners(16, 0, 1, 2, 0)
    images = batch.images.double().numpy()
    lam = found.lam.double().numpy().reshape(-1, 1, 1, 1)
    assert len(np.unique(lam)) > 8 and 0 < lam.min() < 0.4 < 0.6 < lam.max() <= 1
    expected = lam * images + (1 - lam) * images[partner]
    np.testing.assert_allclose(found.images.numpy(), expected, atol=1e-5)
    assert torch.equal(found.labels, batch.labels)
    assert torch.equal(found.partner_labels, batch.labels[partner])
    target = found["logits"]
    assert isinstance(target, Mixed) and torch.equal(target.partner.values, batch["logits"].values[partner])
    assert isinstance(batch["logits"], Dense) and torch.equal(batch.lam, torch.ones(16))  # as it was


def test_cutmix_pastes_a_box_whose_area_is_the_partners_share(batch):
    batch = replace(batch, images=torch.rand_like(batch.images))  # no two pixels alike
    found = Mixer(mixing.parse("cutmix"), 0)(batch, 0, 1)
    partner, boxes = mixing.partners(16, 0, 0, 1, 0), 0
    for row, lam in enumerate(found.lam.tolist()):
        theirs = (found.images[row] != batch.images[row]).any(0)
        other = batch.images[partner[row]]
        assert torch.equal(found.images[row][:, theirs], other[:, theirs])
        if lam < 1:
            ys, xs = np.nonzero(theirs.numpy())
            area = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
            assert lam == pytest.approx(1 - area / 256, abs=1e-4) and theirs.sum() == area
            boxes += 1
    assert boxes > 8


def test_it_is_a_function_of_seed_epoch_and_step(batch):
    op = mixing.parse("mix(p=0.8)")
    first, again = (Mixer(op, 5)(batch, 3, 4) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.lam, again.lam)
    for other in (Mixer(op, 6)(batch, 3, 4), Mixer(op, 5)(batch, 2, 4), Mixer(op, 5)(batch, 3, 5)):
        assert not torch.equal(first.images, other.images)
    assert (first.lam == 1).any() and (first.lam < 1).any()


def test_a_batch_of_one_row_is_refused(cache, source):
    one = Loader(cache, source, global_batch=1, workers=0).batch(0, 0)
    with pytest.raises(MismatchError, match="one row: raise global_batch"):
        Mixer(mixing.parse("mixup"), 0)(one, 0, 0)


# -- the losses --------------------------------------------------------------------------------------------


def case(seed: int, classes: int = 6) -> tuple[np.ndarray, Mixed, np.ndarray, np.ndarray, np.ndarray]:
    """A student's logits, a mixed target, and its parts in numpy."""
    rng = np.random.default_rng(seed)
    student, own, partner = rng.normal(size=(3, 7, classes)) * rng.uniform(1, 5)
    lam = np.concatenate([rng.uniform(size=5), [0.0, 1.0]])
    target = Mixed(Dense(torch.tensor(own)), Dense(torch.tensor(partner)), torch.tensor(lam))
    return student, target, own, partner, lam[:, None]


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_are_mixed_at_the_losss_temperature(seed):
    student, target, own, partner, lam = case(seed)
    z, T = torch.tensor(student), float(np.random.default_rng(seed).uniform(0.6, 9))  # noqa: N806
    p = lam * softmax(own / T) + (1 - lam) * softmax(partner / T)
    q = softmax(student / T)
    expected: dict[Any, Any] = {
        kd: T**2 * (p * np.log(p / q)).sum(axis=1).mean(),
        probs_mse: T**2 * ((p - q) ** 2).sum(axis=1).mean(),
        dist: T**2
        * (
            np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
            + np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
        ),
    }
    for loss, value in expected.items():
        assert loss(z, target, T=T).item() == pytest.approx(value, rel=1e-9)
        assert torch.autograd.gradcheck(lambda x, f=loss: f(x, target, T=T), z.clone().requires_grad_())
    one = lam * softmax(own) + (1 - lam) * softmax(partner)
    decided = -np.log(softmax(student)[np.arange(7), one.argmax(axis=1)]).mean()
    assert hard(z, target).item() == pytest.approx(decided, rel=1e-9)
    logits = torch.tensor(lam * own + (1 - lam) * partner)  # never these
    assert kd(z, target, T=T).item() != pytest.approx(kd(z, logits, T=T).item(), rel=1e-2)


def test_a_share_of_one_is_the_plain_loss():
    student, target, own, *_ = case(0)
    whole = Mixed(target.own, target.partner, torch.ones(7))
    z = torch.tensor(student)
    for loss in (kd, probs_mse, dist):
        assert loss(z, whole, T=3.0).item() == pytest.approx(
            loss(z, torch.tensor(own), T=3.0).item(), rel=1e-12
        )
    assert hard(z, whole) == hard(z, torch.tensor(own))


def test_two_teachers_are_combined_before_they_are_mixed():
    student, one, *_ = case(1)
    _, two, *_ = case(2)
    both = [one, Mixed(two.own, two.partner, one.lam)]
    T, lam = 2.5, one.lam.numpy()[:, None]  # noqa: N806
    p = (
        sum(
            lam * softmax(t.own.values.numpy() / T) + (1 - lam) * softmax(t.partner.values.numpy() / T)
            for t in both
        )
        / 2
    )
    found = kd(torch.tensor(student), combine(both, T, "arithmetic"), T=T)
    expected = T**2 * (p * np.log(p / softmax(student / T))).sum(axis=1).mean()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_corrections_of_an_images_logits_are_mixed_too():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 6)).astype(np.float32)
    said = AnchoredLogits(values, rng.random((4, 6)) < 0.5, rng.normal(size=(4, 4)).astype(np.float32))
    partner, lam = torch.tensor([1, 2, 3, 0]), torch.tensor([0.3, 0.9, 0.5, 1.0])
    target = mixing.mixed("logits", to_tensors(said), partner, lam)
    p, share = np.exp(said.log_probs(2.0)), lam.double().numpy()[:, None]
    p = share * p + (1 - share) * p[partner.numpy()]
    student = rng.normal(size=(4, 6))
    expected = 4 * (p * np.log(p / softmax(student / 2))).sum(axis=1).mean()
    assert kd(torch.tensor(student), target, T=2).item() == pytest.approx(expected, rel=1e-6)


def test_what_needs_logits_refuses_them():
    student, target, *_ = case(3)
    z, labels = torch.tensor(student), torch.zeros(7, dtype=torch.int64)
    for call in (lambda: logits_mse(z, target), lambda: dkd(z, target, labels=labels)):
        with pytest.raises(MismatchError, match=r"needs whole logits, and .* two views that are mixed"):
            call()
    for loss in (kd, probs_mse, dist, hard):
        with pytest.raises(MismatchError, match="of one shape"):
            loss(z[:, :1], target)
    with pytest.raises(MismatchError, match="keeps a part of the logits"):
        mixing.mixed("logits", Hard(labels, 6), labels, target.lam)


# -- it is not what a teacher says of a mix ------------------------------------------------------------------


def test_exact_and_approximate_targets_differ_for_a_real_teacher(shared_data, tmp_path):
    """ResNet-56 on 64 test images. Of a mix it says something else than the mean of what it says of both, at T = 4 by a
    total variation of 0.37 where both have their share, and of 0.02 where one has next to all."""
    source = Source(shared_data / "cifar10", split="test", limit=64)
    common: Any = {
        "source": source,
        "teacher": "softcache_train.students:resnet56",
        "weights": shared_data / "weights" / "cifar10_resnet56.safetensors",
        "targets": {"logits": "full(f16)"},
        "views": 2,
        "batch": 32,
        "progress": False,
    }
    exact = sc.build(tmp_path / "exact", recipe="mixup(0.8)", **common)
    plain = sc.build(tmp_path / "plain", recipe="identity", **{**common, "views": 1})
    rows = np.arange(64)
    p = softmax(plain.read(0, rows)["logits"].values.astype(np.float64) / 4)
    apart, lams = [], []
    for k in range(2):
        said = softmax(exact.read(k, rows)["logits"].values.astype(np.float64) / 4)
        for row, view in enumerate(exact.read_views(k, rows)):
            partner, lam = (view.mix.partner, view.mix.blend.share) if view.mix else (row, 1.0)
            apart.append(np.abs(said[row] - lam * p[row] - (1 - lam) * p[partner]).sum() / 2)
            lams.append(lam)
    found, larger = np.array(apart), np.maximum(lams, 1 - np.array(lams))
    assert found[larger < 0.7].mean() > 0.25
    assert found[larger > 0.97].mean() < 0.05


# -- a run ---------------------------------------------------------------------------------------------------


def test_the_first_steps_loss_is_of_the_mixed_batch_and_the_run_says_so(cache, source, tmp_path, capsys):
    options: Any = {
        "epochs": 1,
        "global_batch": 100,
        "lr": 1e-12,
        "alpha": 0.25,
        "T": 2,
        "seed": 3,
        "val_limit": 10,
    }
    run(cache, source, tmp_path, approximate_mixing="mixup(1.5)", **options)
    told = capsys.readouterr().err
    assert told.count("approximate_mixing=mixup(1.5): the targets are approximate") == 1
    state = json.loads((tmp_path / "checkpoint.json").read_text())
    (entry,) = state["history"]
    assert entry["targets"] == "approximate: mixup(1.5)"
    assert state["config"]["approximate_mixing"] == "mixup(1.5)"

    torch.manual_seed(3)
    student = toys.plain(4)
    samples = np.setdiff1d(np.arange(120), _held_out(cache, source))
    loader = Loader(cache, source, global_batch=100, workers=0, seed=3, samples=samples)
    mixed = Mixer(mixing.parse("mixup(1.5)"), 3)(loader.batch(0, 0), 0, 1)
    logits = student(mixed.images)
    labels = mixed.labels, mixed.partner_labels, mixed.lam
    assert entry["ce"] == pytest.approx(cross_entropy(logits, *labels).item(), rel=1e-5)
    assert entry["kd"] == pytest.approx(kd(logits, mixed["logits"], 2).item(), rel=1e-5)


def _held_out(cache, source):
    from softcache_train import validation

    divided = validation.split(cache, source, sc.pair(cache, source), None, 10)
    return np.setdiff1d(np.arange(cache.samples), np.asarray(divided.train))


def test_a_run_resumed_in_mid_epoch_ends_with_the_same_weights(cache, source, tmp_path, monkeypatch):
    some: Any = {"approximate_mixing": "mix", "epochs": 3}
    run(cache, source, tmp_path / "whole", **some)
    step, taken = Progress.step, []

    def stop(self, number):
        step(self, number)
        taken.append(number)
        if len(taken) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(cache, source, tmp_path / "stopped", checkpoint_every=2, **some)
    run(cache, source, tmp_path / "stopped", checkpoint_every=2, **some)
    ours, theirs = (next((tmp_path / name).glob("model-*")).read_bytes() for name in ("whole", "stopped"))
    assert ours == theirs


def test_without_it_a_run_is_what_it_was(cache, source, tmp_path):
    run(cache, source, tmp_path, epochs=1)
    state = json.loads((tmp_path / "checkpoint.json").read_text())
    assert "approximate_mixing" not in state["config"] and "targets" not in state["history"][0]


def test_a_peer_learns_from_the_mix_too(cache, source, tmp_path):
    peer = {"mutual": {"peer": "toys:plain", "target": "logits"}}
    run(cache, source, tmp_path, epochs=1, objectives=["ce", peer], approximate_mixing="cutmix")


def test_the_comparison_says_which_targets_are_approximate(cache, source, images, tmp_path):
    plain = configs.check({**OPTIONS, "epochs": 1})
    both = {"plain": plain, "mixed": plain.model_copy(update={"approximate_mixing": "mixup(0.8)"})}
    compare.run(both, cache, source, tmp_path, 1, val_source=Source(images, split="test"))
    assert "\nmixed: approximate targets, mixup(0.8)\n" in (tmp_path / "compare.txt").read_text()
    assert ",approximate," in (tmp_path / "compare.csv").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"approximate_mixing": "mixupp"}, "unknown mix 'mixupp' .did you mean 'mixup'"),
        ({"approximate_mixing": "mixup(0)"}, "mixup: alpha must be a number above 0"),
        ({"approximate_mixing": "mixup|cutmix"}, "a batch is mixed once"),
        ({"approximate_mixing": "flip"}, "unknown mix 'flip'"),
        (
            {"approximate_mixing": "mixup", "objectives": ["ce", "logits_mse"]},
            "logits_mse does not learn from labels or probabilities alone",
        ),
        ({"approximate_mixing": "mixup", "objectives": ["dkd"]}, "dkd does not learn from labels or prob"),
        (
            {"approximate_mixing": "mixup", "objectives": [{"rkd": {"target": "logits", "student": "2"}}]},
            r"rkd.2. does not learn from labels or prob.* build a cache whose recipe mixes",
        ),
    ],
)
def test_what_cannot_be_is_refused(cache, source, tmp_path, options, says):
    with pytest.raises(SpecError, match=says):
        run(cache, source, tmp_path, **options)


def test_caches_of_mixed_views_or_of_a_part_of_the_logits_are_refused(source, tmp_path):
    mixed = toys.build(tmp_path / "mixed", source, views=2, recipe="mixup(0.5)")
    with pytest.raises(SpecError, match="are mixed already, and their targets are exact: leave it out"):
        run(mixed, source, tmp_path / "a", approximate_mixing="mixup")
    kept = toys.build(tmp_path / "kept", source, views=1, targets={"logits": "topk(2)"})
    with pytest.raises(SpecError, match="approximate_mixing mixes probabilities from whole logits"):
        run(kept, source, tmp_path / "b", approximate_mixing="mixup")
