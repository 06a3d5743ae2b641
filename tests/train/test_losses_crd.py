"""Contrastive representation distillation against a transcription in loops, by hand, and over several ranks."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from formulas import draw
from softcache_train.objectives import CRD

from softcache.errors import MismatchError, SpecError


def made(samples=9, widths=(5, 7), seed=0, **options):
    torch.manual_seed(seed)
    return CRD((widths[0],), (widths[1],), samples=samples, **options).double()


def others(index, samples, negatives, seed):
    """The samples that a module draws after ``torch.manual_seed(seed)``: all but the own one, numbered from 0 on."""
    torch.manual_seed(seed)
    drawn = torch.randint(samples - 1, (len(index), negatives)).tolist()
    return [[k + (k >= i) for k in row] for i, row in zip(index.tolist(), drawn, strict=True)]


class Transcription:
    """Tian et al., in loops, of the weights and memories of a module."""

    def __init__(self, module, tau, momentum):
        self.tau, self.momentum, self.z = tau, momentum, [None, None]
        self.layers = [
            (x.weight.detach().numpy(), x.bias.detach().numpy()) for x in (module.student, module.teacher)
        ]
        self.memories = [x.vectors.numpy().copy() for x in (module.of_student, module.of_teacher)]

    def step(self, student, teacher, index, drawn):
        vectors = [
            [self.unit(w @ row + b) for row in rows]
            for (w, b), rows in zip(self.layers, (student, teacher), strict=True)
        ]
        loss = sum(self.side(vectors[me], 1 - me, index, drawn) for me in (0, 1))
        for me in (0, 1):
            for i, vector in zip(index, vectors[me], strict=True):
                kept = self.momentum * self.memories[me][i] + (1 - self.momentum) * vector
                self.memories[me][i] = self.unit(kept)
        return loss

    def side(self, anchors, other, index, drawn):
        memory, samples = self.memories[other], len(self.memories[other])
        raw = [
            [math.exp(a @ memory[k] / self.tau) for k in (i, *row)]
            for a, i, row in zip(anchors, index, drawn, strict=True)
        ]
        if self.z[other] is None:
            self.z[other] = samples * np.mean(raw)
        chance, loss = len(drawn[0]) / samples, 0.0
        for row in raw:
            positive, *negative = (e / self.z[other] / (e / self.z[other] + chance) for e in row)
            loss -= math.log(positive) + sum(math.log(1 - d) for d in negative)
        return loss / len(anchors)

    @staticmethod
    def unit(x):
        return x / np.linalg.norm(x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("samples", [6, 200])
def test_crd_is_its_formula_step_after_step(seed, samples):
    """Of caches that are smaller and larger than what is drawn from them."""
    random = np.random.default_rng(seed)
    dim, negatives, many = (int(x) for x in random.integers(1, 6, 3))
    options = {"tau": random.uniform(0.05, 1), "momentum": random.uniform(0, 0.9)}
    loss = made(samples, seed=seed, dim=dim, negatives=negatives, **options)
    single = made(samples, seed=seed, dim=dim, negatives=negatives, **options).float()
    expected = Transcription(loss, **options)
    for step in range(3):
        student, teacher = draw(many, 5, seed=seed + step), draw(many, 7, seed=seed + step + 50)
        index = torch.from_numpy(random.permutation(samples)[:many])
        drawn = others(index, samples, negatives, seed=step)
        wanted = expected.step(student.numpy(), teacher.numpy(), index.tolist(), drawn)
        torch.manual_seed(step)
        assert loss(student, teacher, index=index).item() == pytest.approx(wanted, rel=1e-9)
        torch.manual_seed(step)
        found = single(student.float(), teacher.float(), index=index)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted, rel=1e-5)
    for memory, wanted in zip((loss.of_student, loss.of_teacher), expected.memories, strict=True):
        np.testing.assert_allclose(memory.vectors.numpy(), wanted, rtol=1e-9)


def test_crd_by_hand():
    """Vectors of length 1 in one dimension are 1 and -1. Student 1 against a memory of 1 and -1: Z = e + 1/e, and h is
    0.8808 and 0.1192. Teacher -1 against 1 and 1: h is 1/2 and 1/2. K/N = 1/2."""
    loss = made(2, (1, 1), dim=1, negatives=1, tau=1.0).float()
    for layer in (loss.student, loss.teacher):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    loss.of_teacher.vectors[:] = torch.tensor([[1.0], [-1.0]])
    loss.of_student.vectors[:] = torch.tensor([[1.0], [1.0]])
    found = loss(torch.tensor([[2.0]]), torch.tensor([[-3.0]]), index=torch.tensor([0]))
    expected = -math.log(0.880797 / 1.380797) - math.log(0.5 / 0.619203) + 2 * math.log(2)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # half of 1 and half of 1; half of 1 and half of -1 is 0, which stays 0
    assert loss.of_student.vectors.tolist() == [[1], [1]] and loss.of_teacher.vectors.tolist() == [[0], [-1]]


def test_crd_learns_to_tell_samples_apart():
    """Both sides come from the same 64 samples, seen through different random maps."""
    loss = made(64, (20, 30), dim=16, negatives=63).float()
    hidden = draw(64, 10).float()
    student = torch.nn.Linear(10, 20)
    teacher = hidden @ draw(10, 30, seed=1).float()
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.01)
    losses = []
    for step in range(60):
        index = torch.arange(32) + 32 * (step % 2)
        found = loss(student(hidden[index]), teacher[index], index=index)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    vectors = torch.nn.functional.normalize(loss.student(student(hidden)), dim=1)
    assert ((vectors @ loss.of_teacher.vectors.T).argmax(1) == torch.arange(64)).float().mean() > 0.9


def test_crd_draws_all_other_samples_alike(monkeypatch):
    loss, seen = made(5, dim=2, negatives=4000), []
    forward = loss.of_teacher.forward
    monkeypatch.setattr(loss.of_teacher, "forward", lambda a, drawn: seen.append(drawn) or forward(a, drawn))
    loss(draw(5, 5), draw(5, 7), index=torch.tensor([3, 0, 4, 1, 2]))
    (drawn,) = seen
    assert drawn[:, 0].tolist() == [3, 0, 4, 1, 2]
    for own, row in zip((3, 0, 4, 1, 2), drawn[:, 1:], strict=True):
        counts = torch.bincount(row, minlength=5)
        assert counts[own] == 0 and counts.sum() == 4000
        assert all(850 < n < 1150 for i, n in enumerate(counts.tolist()) if i != own)


def test_crd_goes_on_from_its_state():
    def step(loss, seed):
        torch.manual_seed(seed)
        return loss(draw(4, 5, seed=seed), draw(4, 7, seed=seed + 9), index=torch.arange(4)).item()

    loss, other = made(dim=3, negatives=6), made(dim=3, negatives=6, seed=1)
    fixed = [loss.of_student.log_z, loss.of_teacher.log_z]
    assert all(z.isnan() for z in fixed)
    step(loss, 0)
    kept = [z.item() for z in fixed]
    other.load_state_dict(loss.state_dict())
    assert step(loss, 1) == step(other, 1) and step(loss, 2) == step(other, 2)
    assert [z.item() for z in fixed] == kept
    assert {*loss.state_dict()} == {
        *(f"{side}.{what}" for side in ("student", "teacher") for what in ("weight", "bias")),
        *(f"of_{side}.{what}" for side in ("student", "teacher") for what in ("vectors", "log_z")),
    }


def test_gradients_are_those_of_the_loss_also_of_the_projections():
    """Once Z is fixed: the first batch has a gradient as if it were."""
    teacher, index = draw(3, 7, seed=1), torch.tensor([5, 0, 2])

    def fresh(student, weight):
        loss = made(dim=3, negatives=4, tau=0.5)
        loss(draw(3, 5, seed=3), teacher, index=index)
        torch.manual_seed(0)
        parameters = {"teacher.weight": weight}
        return torch.func.functional_call(loss, parameters, (student, teacher), {"index": index})

    assert torch.autograd.gradcheck(fresh, (draw(3, 5).requires_grad_(), draw(3, 7, seed=2).requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast_change_no_number(dtype):
    def found(student, autocast=False):
        loss = made(dim=8, negatives=16).float()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(student, draw(4, 7, seed=1).float(), index=torch.arange(4))
        value.backward()
        return value

    given = draw(4, 5).to(dtype)
    expected = found(given.float().clone().requires_grad_())
    for autocast in (False, True):
        value = found(given.clone().requires_grad_(), autocast)
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_no_gradient_flows_into_the_teacher_but_into_its_projection():
    loss = made(dim=3, negatives=4)
    student, teacher = draw(2, 5).requires_grad_(), draw(2, 7, seed=1).requires_grad_()
    loss(student, teacher, index=torch.tensor([1, 3])).backward()
    assert student.grad.any() and teacher.grad is None
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


def test_what_does_not_fit_is_refused():
    loss, student, teacher = made(dim=3, negatives=4), draw(2, 5), draw(2, 7)
    with pytest.raises(MismatchError, match=r"crd was made for rows of \(5,\) .* \(7,\) .* not \(7,\)"):
        loss(teacher, teacher, index=torch.arange(2))
    for index in (torch.arange(3), torch.arange(2).float(), torch.arange(2)[:, None]):
        with pytest.raises(MismatchError, match=r"crd takes index int64 \(2,\)"):
            loss(student, teacher, index=index)
    for index in ([0, 9], [-1, 0]):
        with pytest.raises(MismatchError, match="crd was made for 9 samples"):
            loss(student, teacher, index=torch.tensor(index))
    for options in (
        {"dim": 0},
        {"negatives": 0},
        {"negatives": 1.5},
        {"dim": 3.0},
        {"tau": 0},
        {"tau": "1"},
        {"momentum": 1},
    ):
        with pytest.raises(SpecError, match=f"crd: {next(iter(options))} "):
            made(**options)
    with pytest.raises(SpecError, match=r"crd: .* 1 sample"):
        made(samples=1)


RANKS = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from softcache_train.objectives import CRD

def work(rank, port):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    loss = CRD((5,), (5,), samples=9, dim=3, negatives=4)
    start = loss.of_student.vectors.clone()
    index = torch.tensor([7, 1, 4]) if rank else torch.tensor([2, 8])  # one row more
    loss(torch.randn(len(index), 5), torch.randn(len(index), 5), index=index)
    moved = (loss.of_student.vectors != start).any(1).nonzero()[:, 0].tolist()
    both = [None, None]
    dist.all_gather_object(both, (moved, loss.of_student.vectors.tolist(), loss.of_teacher.vectors.tolist()))
    assert both[0] == both[1] and moved == [1, 2, 4, 7, 8], both
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
"""


@pytest.mark.slow
def test_ranks_remember_what_all_of_them_saw(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
