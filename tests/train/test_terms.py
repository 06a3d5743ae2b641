"""Objectives in a config: what they read, what they learn themselves, when they count, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file
from softcache_train import config as configs
from softcache_train import load_student, loop, objectives, terms, train
from softcache_train.loader import Loader
from softcache_train.objectives import Known, Peer
from softcache_train.progress import Progress
from softcache_train.taps import Seen, Tapped
from torch import nn

import softcache
from softcache.errors import DamageError, MismatchError, SpecError

OPTIONS = {"student": "toys:plain", "epochs": 2, "global_batch": 25, "lr": 0.01, "workers": 0}


class Regressed(nn.Module):
    """A loss with an adapter, as FitNets' hint: mean squared error behind a 1 × 1 convolution."""

    def __init__(self, student_shape, teacher_shape, *, scale=1.0):
        super().__init__()
        self.adapter, self.scale = nn.Conv2d(student_shape[0], teacher_shape[0], 1), scale

    def forward(self, student_map, teacher_map):
        return self.scale * (self.adapter(student_map) - teacher_map).square().mean()


def nothing(student_map, teacher_map):
    return (student_map.detach().mean() - teacher_map.mean()).square()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    extra = {
        "regressed": Known(Regressed, reads="inside", kinds=("feature_map", "embedding"), mixes=False),
        "nothing": Known(nothing, reads="inside", kinds=("feature_map",)),
    }
    monkeypatch.setattr(objectives, "OBJECTIVES", objectives.OBJECTIVES | extra)
    for module in (configs, terms, loop):
        monkeypatch.setattr(module, "OBJECTIVES", objectives.OBJECTIVES)


@pytest.fixture(scope="module")
def mapped(source, tmp_path_factory):
    """A cache with logits, a map of (6, 7, 7), and two attentions of it."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(294, 4))
    teacher.input_spec = {"size": [toys.SIZE] * 2, "mean": [0.5] * 3, "std": [0.25] * 3}  # pyright: ignore
    path = tmp_path_factory.mktemp("mapped") / "cache"
    targets = {"logits": "full(f16)", "0": "f16", "0.strength": "strength(4)", "0.attention": "attention"}
    return softcache.build(
        path,
        source=source,
        teacher=teacher,
        recipe="flip",
        views=2,
        targets=targets,
        batch=16,
        progress=False,
    )


def test_a_student_that_runs_by_itself_is_not_listened_to():
    """As in validation, batch after batch."""
    student = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    tapped, images = Tapped(student, ["0"]), torch.rand(4, 3)
    for _ in range(2):
        student(images)
    assert torch.equal(tapped(images).inside["0"], student[0](images))
    with pytest.raises(RuntimeError):
        tapped(torch.rand(4, 7))
    student(images)
    assert torch.equal(tapped(images).inside["0"], student[0](images))


def run(cache, source, out, **options):
    return train(configs.check({**OPTIONS, "out": str(out), **options}), cache, source)


def weights(out, kind="model"):
    (path,) = Path(out).glob(f"{kind}-*.safetensors")
    return load_file(path)


HINT = [{"kd": {"weight": 0.5, "T": 2}}, {"regressed": {"weight": 2, "target": "0", "scale": 3}}]


def test_objectives_of_a_config_are_what_alpha_and_t_say(cache, source, tmp_path):
    run(cache, source, tmp_path / "a", alpha=0.7, T=2)
    both = [{"ce": {"weight": 1 - 0.7}}, {"kd": {"weight": 0.7, "T": 2}}]
    run(cache, source, tmp_path / "b", objectives=both)
    a, b = (weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_an_objective_learns_is_optimised_and_kept_beside_the_student(mapped, source, tmp_path):
    run(mapped, source, tmp_path / "run", objectives=HINT)
    own = weights(tmp_path / "run", "terms")
    assert {n: t.shape for n, t in own.items()} == {
        "1.loss.adapter.weight": (6, 8, 1, 1),
        "1.loss.adapter.bias": (6,),
    }
    assert set(weights(tmp_path / "run")) == set(toys.plain(4).state_dict())
    load_student(tmp_path / "run")
    run(mapped, source, tmp_path / "once", objectives=HINT, epochs=1)
    earlier = weights(tmp_path / "once", "terms")
    assert all(not torch.equal(own[name], earlier[name]) for name in own)
    entry = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["history"][-1]
    assert entry["loss"] == pytest.approx(0.5 * entry["kd"] + 2 * entry["regressed(0)"])


def test_a_run_with_adapters_resumes_to_the_very_same_weights(mapped, source, tmp_path, monkeypatch):
    run(mapped, source, tmp_path / "whole", objectives=HINT, clip_norm=1.0)
    step, taken = Progress.step, []

    def stop(self, number):
        step(self, number)
        taken.append(number)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(mapped, source, tmp_path / "stopped", objectives=HINT, clip_norm=1.0)
    run(mapped, source, tmp_path / "stopped", objectives=HINT, clip_norm=1.0)
    for kind in ("model", "terms"):
        a, b = (weights(tmp_path / name, kind) for name in ("whole", "stopped"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_that_lacks_what_an_objective_learned_is_damaged(mapped, source, tmp_path):
    run(mapped, source, tmp_path, objectives=HINT, epochs=1)
    path = tmp_path / "checkpoint.json"
    state = json.loads(path.read_text())
    del state["files"]["terms"]
    path.write_text(json.dumps(state))
    with pytest.raises(DamageError, match="names no terms file"):
        run(mapped, source, tmp_path, objectives=HINT, epochs=1)


def test_an_adapter_is_clipped_with_the_student(mapped, source, tmp_path, monkeypatch):
    seen = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda p, norm: seen.append(len(p := list(p))) or clip(p, norm)
    )
    run(mapped, source, tmp_path, objectives=HINT, clip_norm=0.1, epochs=1)
    assert set(seen) == {len(list(toys.plain(4).parameters())) + 2}


def test_an_objective_leaves_the_draws_of_the_student_alone(mapped, source, tmp_path):
    """Same seed, same student: what is compared is paired."""
    made = []
    for objectives_ in ([{"kd": {}}], HINT):
        torch.manual_seed(0)
        config = configs.check({**OPTIONS, "objectives": objectives_})
        student = toys.plain(4)
        loop._distillation(config, mapped, student, (16, 16), (1, 1, 1), None)
        made.append((student.state_dict(), torch.rand(1)))
    (a, x), (b, y) = made
    assert torch.equal(x, y) and all(torch.equal(a[name], b[name]) for name in a)


def test_stages(mapped, source, tmp_path):
    """FitNets: the hint first, then the teacher's answers."""
    two = [{"regressed": {"target": "0", "stop": 1}}, {"kd": {"start": 1}}]
    run(mapped, source, tmp_path, objectives=two)
    first, second = json.loads((tmp_path / "checkpoint.json").read_text())["history"]
    assert first["kd"] == second["regressed(0)"] == 0
    assert first["regressed(0)"] > 0 and second["kd"] > 0


def test_an_objective_that_teaches_nothing_is_an_error(mapped, source, tmp_path):
    with pytest.raises(MismatchError, match=r"nothing\(0\) is .* moves none of the student's weights"):
        run(mapped, source, tmp_path, objectives=[{"ce": {}}, {"nothing": {"target": "0"}}])


def test_layers_that_do_not_fit_are_named(mapped, source, tmp_path):
    with pytest.raises(MismatchError, match=r"^objective attention\(3\): attention takes maps"):
        run(mapped, source, tmp_path, objectives=["ce", {"attention": {"target": "0", "student": "3"}}])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            [{"kd": {"target": "layer9"}}],
            r"no target 'layer9' .it has .*softcache extend .* --target layer9=CODEC",
        ),
        (
            [{"kd": {"target": "0.strengt"}}],
            r"no target '0.strengt' .did you mean '0.strength'. Or softcache extend .* --target 0.strengt=CODEC adds it",
        ),
        ([{"kd": {"target": "0"}}], "kd learns from logits; the target '0' is a feature_map"),
        (
            [{"regressed": {"target": "logits"}}],
            "learns from feature map or embedding; the target 'logits' is a logits",
        ),
        ([{"regressed": {"target": "0", "student": "9"}}], "student has no module '9'"),
        (
            ["ce", {"rkd": {"target": "logits"}}],
            "no module 'logits': say student: linear, or whichever module gives",
        ),
        (["own_exits"], "no module 'exit1': .* resnet8_exits and resnet20_exits"),
    ],
)
def test_what_the_cache_or_student_cannot_give_is_refused(mapped, source, tmp_path, asked, says):
    with pytest.raises(SpecError, match=says):
        run(mapped, source, tmp_path, objectives=asked)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objectives": [{"kdd": {}}]}, "unknown objective 'kdd' .did you mean 'kd'"),
        ({"objectives": [{"kd": {"temperature": 2}}]}, "kd has no option 'temperature'"),
        ({"objectives": [{"kd": {"T": 0}}]}, "a temperature is finite and above 0"),
        ({"objectives": [{"kd": {"T": "hot"}}]}, "a temperature is finite and above 0"),
        ({"objectives": [{"kd": {"weight": -1}}]}, "weight: "),
        ({"objectives": [{"kd": {"weight": 0}}]}, "none of them has a weight above 0"),
        ({"objectives": []}, "none of them has a weight above 0"),
        ({"objectives": [{"kd": {}}, "kd"]}, "kd is there twice"),
        ({"objectives": [{"kd": {}, "ce": {}}]}, "an objective is written name: "),
        ({"objectives": [{"kd": 3}]}, "kd is written kd: "),
        ({"objectives": ["kd"], "alpha": 0.5}, "alpha and objectives"),
        ({"objectives": [{"regressed": {}}]}, "say target: layer3"),
        ({"objectives": [{"ce": {"target": "logits"}}]}, "ce learns from labels, and has no target"),
        ({"objectives": [{"kd": {"mask": "a"}}]}, "kd takes no mask"),
        ({"objectives": ["mutual"]}, "mutual needs peer: say mutual: .peer: "),
        ({"objectives": [{"levels": {"target": "0"}}]}, "levels needs level"),
        ({"objectives": [{"kd": {"start": 2, "stop": 1}}]}, "stop=1 is not after start=2"),
        ({"objectives": [{"kd": {"start": 2}}]}, "kd would start after the last of 2 epochs"),
        ({"objectives": [{"kd": {"start": 1}}]}, "none is on in epoch 0, of 0 … 1"),
        (
            {"objectives": [{"kd": {"stop": 1}}, {"ce": {"start": 2}}], "epochs": 4},
            "none is on in epoch 1, of 0 … 3",
        ),
        (
            {"objectives": [{"kd": {"stop": 1}}, {"ce": {"weight": 0}}]},
            "none is on in epoch 1",
        ),
        ({"objectives": [{"name": "kdd"}]}, "unknown objective 'kdd' .did you mean 'kd'"),
        ({"objectives": [{"name": "kd", "options": {"bogus": 1}}]}, "kd has no option 'bogus'"),
        ({"objectives": [{"kd": {"wieght": 1}}]}, "kd has no option 'wieght' .did you mean 'weight'"),
        ({"objectives": [{"kd": {"student": ["a", "b"]}}]}, "kd compares 1 module of the student, not a, b"),
        (
            {"objectives": [{"attention": {"target": ["0", "1"]}}]},
            "attention learns from 1 target, not from 0, 1",
        ),
        ({"objectives": [{"gradient_attention": {"target": ["0", "1"]}}]}, "learns from 1 target"),
        ({"objectives": [{"fsp": {"target": "0"}}]}, "fsp compares 2 modules of the student, not 0"),
        ({"objectives": [{"fsp": {"target": ["0", "1", "2"]}}]}, "fsp learns from 2 targets"),
        ({"objectives": [{"kd": {"target": []}}]}, "kd: target names none"),
        ({"objectives": [{"hard": {"student": []}}]}, "hard: student names none"),
        (
            {"objectives": [{"gradient_attention": {"normalised": "no"}}]},
            "normalised is of type bool, not 'no'",
        ),
        (
            {"objectives": [{"hint": {"target": "0", "batch_norm": "no"}}]},
            "batch_norm is of type bool, not 'no'",
        ),
        (
            {"objectives": [{"rkd": {"target": "0", "distance": "abc"}}]},
            "distance is of type float, not 'abc'",
        ),
        ({"objectives": [{"attention": {"target": "0", "p": "two"}}]}, "p is of type float, not 'two'"),
        ({"objectives": [{"mutual": {"peer": 8}}]}, "peer is of type str, not 8"),
        ({"objectives": [{"own_exits": {"target": "logits"}}]}, "own_exits learns from .* and has no target"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, says):
    with pytest.raises(SpecError, match=says):
        configs.check({**OPTIONS, **options})


def test_options_of_every_kind_are_taken():
    asked = [
        {"fsp": {"target": "0", "student": ["1", "2"]}},  # the matrices of two maps
        {"attention": {"target": "0", "p": 4}},
        {"hint": {"target": "0", "quantile": None, "batch_norm": True}},
        {"kd": {"target": ["0.logits", "1.logits"], "start": 1}},
        {"name": "cc", "target": "0", "options": {"order": 3}},
    ]
    made = configs.check({**OPTIONS, "objectives": asked})
    assert [o.options for o in made.terms] == [
        {},
        {"p": 4},
        {"quantile": None, "batch_norm": True},
        {},
        {"order": 3},
    ]


def test_mixed_views_are_refused_by_what_cannot_take_them(source, tmp_path):
    mixed = toys.build(
        tmp_path / "mixed", source, views=2, recipe="mixup(0.5)", targets={"logits:embedding": "f16"}
    )
    asked = configs.check({**OPTIONS, "objectives": [{"regressed": {"target": "logits", "student": "2"}}]})
    with pytest.raises(SpecError, match=r"one image with one label, and the views of .* are mixed"):
        terms.require_targets(asked.terms, mixed)
    # of which the cache lacks the target, too, and no extension could bring it
    lacking = configs.check({**OPTIONS, "objectives": ["gradient_attention"]})
    with pytest.raises(SpecError, match=r"the views of .* are mixed"):
        terms.require_targets(lacking.terms, mixed)


# -- peers, gradients, exits ---------------------------------------------------------------------------------


def one_batch(cache, source):
    return Loader(cache, source, global_batch=10, workers=0).batch(0, 0)


def test_a_peer_learns_from_the_student_and_the_student_from_the_peer(cache, source):
    torch.manual_seed(0)
    student, term = toys.plain(4), Peer((4,), None, peer="toys:plain")
    batch = one_batch(cache, source)
    logits = student(batch.images)
    term(Seen(batch.images, logits), batch, None).backward()
    whole = [*student.parameters(), *term.parameters()]
    moved = [p.grad.clone() for p in whole if p.grad is not None]

    s, p = (net(batch.images).log_softmax(1) for net in (student, term.peer))
    (p.detach().exp() * (p.detach() - s)).sum().div(
        len(batch)
    ).backward()  # KL(peer ‖ student): moves the student
    own = -p.gather(1, batch.labels[:, None]).mean()
    (own + (s.detach().exp() * (s.detach() - p)).sum() / len(batch)).backward()
    again = [p.grad - g for p, g in zip(whole, moved, strict=True) if p.grad is not None]
    assert len(again) == len(whole)
    assert all(torch.allclose(a, g, atol=1e-6) for a, g in zip(again, moved, strict=True))


def test_mutual_learning_is_a_line_of_a_config(cache, source, tmp_path):
    run(cache, source, tmp_path, objectives=["ce", {"mutual": {"peer": "toys:plain", "target": "logits"}}])
    peer = weights(tmp_path, "terms")
    assert set(peer) == {f"1.loss.peer.{name}" for name in toys.plain(4).state_dict()}
    own = weights(tmp_path)
    assert not any(torch.equal(own[n], peer[f"1.loss.peer.{n}"]) for n in own if own[n].ndim > 1)


def test_a_students_gradient_is_by_pixels_in_0_to_1(mapped, source):
    """Whatever it is fed with: the loss is that of two gradients by the same pixels."""
    batch = one_batch(mapped, source)
    asked = configs.check({**OPTIONS, "objectives": [{"gradient_attention": {"target": "0"}}]}).terms
    (term,) = terms.make(asked, mapped, {"": (4,)}, 0, (0.25, 0.25, 0.5))
    student = toys.plain(4)
    images = batch.images.requires_grad_()
    found = term._student(Seen(images, student(images)), batch)
    pixels = (batch.images.detach() * torch.tensor([0.25, 0.25, 0.5]).view(3, 1, 1)).requires_grad_()
    fed = pixels / torch.tensor([0.25, 0.25, 0.5]).view(3, 1, 1)
    loss = torch.nn.functional.cross_entropy(student(fed), batch.labels, reduction="sum")
    assert torch.allclose(found, torch.autograd.grad(loss, pixels)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("0.strength", r"\|F\|\^2.*'0.strength' holds strength\(4\)"),
        ("0.attention", "'0.attention' holds attention"),
    ],
)
def test_attention_of_another_meaning_is_refused(mapped, source, tmp_path, target, told):
    asked = {"attention": {"target": target, "student": "0"}}
    with pytest.raises(SpecError, match=told + r".*: cache strength\(2\) of that layer, or its map"):
        run(mapped, source, tmp_path, objectives=["ce", asked])
    of_four = {"attention": {"target": "0.strength", "student": "0", "p": 4}}
    run(mapped, source, tmp_path, objectives=["ce", of_four], epochs=1)


def test_own_exits_are_listened_to(cache, source, tmp_path):
    run(cache, source, tmp_path, student="resnet8_exits", objectives=["own_exits"], epochs=1)
    (entry,) = json.loads((tmp_path / "checkpoint.json").read_text())["history"]
    (told,) = (value for name, value in entry.items() if name.startswith("own_exits"))
    assert told > 1
