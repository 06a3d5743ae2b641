"""Integrated gradients: what they add up to, and what they are of functions whose integral is known."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from softcache.errors import SpecError, TeacherError  # noqa: E402
from softcache.teachers.attribution import completeness_gap, integrated_gradients  # noqa: E402
from softcache.teachers.explained import explained  # noqa: E402


def features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(seed=0, channels=3, places=9, classes=5):
    torch.manual_seed(seed)
    layers = [
        torch.nn.Flatten(),
        torch.nn.Linear(channels * places, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, classes),
    ]
    return torch.nn.Sequential(*layers).double()


def test_of_a_linear_function_it_is_weight_times_input_from_one_step_on():
    weight = features(5, 12, seed=1)
    h, labels = features(4, 3, 2, 2), torch.tensor([0, 4, 2, 2])

    def linear(x):
        return x.flatten(1) @ weight.T + 7

    expected = weight[labels].view(4, 3, 2, 2) * h
    for steps in (1, 3):
        torch.testing.assert_close(integrated_gradients(linear, h, labels, steps=steps), expected)
    from_ones = integrated_gradients(linear, h, labels, steps=2, baseline=1.0)
    torch.testing.assert_close(from_ones, weight[labels].view(4, 3, 2, 2) * (h - 1))


def test_of_a_polynomial_by_hand():
    """f = x² y from (0, 0) to (1, 3): ∫ 2·α·3α dα · 1 = 2 and ∫ α² dα · 3 = 1, together 3."""

    def polynomial(x):
        return (x[:, :1] ** 2) * x[:, 1:]

    h, labels = torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.tensor([0])
    found = integrated_gradients(polynomial, h, labels, steps=200)
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0]], dtype=torch.float64), rtol=1e-4, atol=0)


def test_it_is_its_definition_in_numpy():
    """A transcription with the two-layer network's slope written out."""
    model, h, labels = network(), features(3, 3, 3, 3), torch.tensor([1, 0, 4])
    (w1, b1), (w2, _) = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (model[1], model[3])
    )
    base, steps = 0.3, 7
    expected = np.zeros((3, 27))
    for i, row in enumerate(h.numpy().reshape(3, 27)):
        for k in range(steps):
            at = base + (k + 0.5) / steps * (row - base)
            on = (w1 @ at + b1 > 0).astype(float)
            expected[i] += (row - base) * ((w2[labels[i]] * on) @ w1) / steps
    found = integrated_gradients(model, h, labels, steps=steps, baseline=base)
    np.testing.assert_allclose(found.numpy().reshape(3, 27), expected, rtol=1e-10, atol=1e-12)


def test_it_is_complete_and_more_steps_make_it_more_so():
    model, h, labels = network(), features(16, 3, 3, 3), torch.arange(16) % 5
    gaps = []
    for steps in (2, 50, 800):
        found = integrated_gradients(model, h, labels, steps=steps)
        gap = completeness_gap(found, model, h, labels)
        change = model(h) - model(torch.zeros_like(h))
        change = change.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(gap, ((found.flatten(1).sum(1) - change) / change).abs())
        gaps.append(gap.median().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] < 0.05


def test_the_gap_sees_wrong_attributions():
    model, h, labels = network(), features(8, 3, 3, 3), torch.arange(8) % 5
    found = integrated_gradients(model, h, labels)
    plain = (
        torch.autograd.grad(model(h.requires_grad_()).gather(1, labels[:, None]).sum(), h)[0] * h.detach()
    )  # gradient times input is not complete
    assert (
        completeness_gap(plain, model, h, labels).median()
        > 3 * completeness_gap(found, model, h, labels).median()
    )
    assert (completeness_gap(found * 1.5, model, h, labels) > 0.2).all()


def test_what_does_not_matter_gets_nothing_and_a_zero_input_neither():
    model, h = network(), features(4, 3, 3, 3)
    with torch.no_grad():
        model[1].weight[:, :9] = 0  # the first channel
    h[:, 1, 0, 0] = 0
    found = integrated_gradients(model, h, torch.arange(4))
    assert not found[:, 0].any() and not found[:, 1, 0, 0].any() and found[:, 2].any()


def test_rows_are_explained_each_by_itself_and_nothing_is_left_behind():
    model, h, labels = network(), features(4, 3, 3, 3), torch.tensor([3, 1, 0, 2])
    found = integrated_gradients(model, h, labels)
    for i in range(4):
        torch.testing.assert_close(
            found[i : i + 1], integrated_gradients(model, h[i : i + 1], labels[i : i + 1])
        )
    assert not found.requires_grad and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(integrated_gradients(model, h, labels), found)


def test_no_change_of_the_answer_is_no_division_by_zero():
    h, labels = features(2, 3, 3, 3), torch.tensor([0, 1])

    def same(x):
        return (x * 0).flatten(1)[:, :2] + 4

    found = integrated_gradients(same, h, labels)
    assert not found.any() and not completeness_gap(found, same, h, labels).any()


def test_bad_input_is_refused():
    model, h = network(), features(4, 3, 3, 3)
    labels = torch.arange(4)
    for steps in (0, -1, 2.5, True):
        with pytest.raises(SpecError, match="steps must be a whole number of at least 1"):
            integrated_gradients(model, h, labels, steps=steps)
    for wrong in (labels[:3], labels.double()):
        with pytest.raises(SpecError, match="a label a row"):
            integrated_gradients(model, h, wrong)
    with pytest.raises(TeacherError, match=r"one column of \(B, C\)"):
        integrated_gradients(lambda x: x, h, labels)
    with pytest.raises(TeacherError, match="does not depend on these features"):
        integrated_gradients(lambda x: torch.zeros(4, 5), h, labels)


class Crooked(torch.nn.Module):
    """A network with all that makes it hard to run only its end: a module that runs twice, one in place behind what is
    explained, an answer that is no tensor, and a nested one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.act = torch.nn.ReLU()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh())
        self.two = Two()
        self.middle = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1))
        self.cut = torch.nn.ReLU(inplace=True)
        self.head = torch.nn.Linear(4, 5)
        self.double()

    def forward(self, x):
        h, beside = self.two(self.act(self.stem(x)))
        return self.after(self.middle(h), beside)

    def after(self, h, beside):
        return self.head(self.act(self.cut(h) * torch.tanh(h) + beside).mean((2, 3)))


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.conv(x), x


def test_only_what_follows_a_module_is_run_for_every_step():
    net, x, labels = Crooked().eval(), features(4, 3, 6, 6), torch.tensor([0, 4, 2, 2])
    with torch.no_grad():
        h, beside = net.two(net.act(net.stem(x)))
        h = net.middle(h)
    runs = {"stem.0": 0, "two.conv.0": 0, "middle.0": 0, "head": 0}
    for name in runs:
        net.get_submodule(name).register_forward_hook(
            lambda *_, name=name: runs.update({name: runs[name] + 1})
        )
    found, gap = explained(net, net, net.middle, x, labels)
    assert runs["stem.0"] == runs["two.conv.0"] == runs["middle.0"] == 2 and runs["head"] >= 50

    def rest(features):
        return net.after(features.clone(), beside)

    wanted = integrated_gradients(rest, h, labels)
    torch.testing.assert_close(found, wanted.sum(1, keepdim=True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gap, completeness_gap(wanted, rest, h, labels), rtol=1e-9, atol=1e-12)
    assert all("forward" not in vars(module) for module in net.modules())
    torch.testing.assert_close(net(x), rest(h))  # and it answers as before


def test_a_forward_of_its_own_is_put_back():
    net, x = Crooked().eval(), features(2, 3, 6, 6)
    own = net.stem.forward = lambda x: net.stem[1](net.stem[0](x)) * 2
    explained(net, net, net.middle, x, torch.tensor([1, 2]))
    assert net.stem.forward is own


@pytest.mark.parametrize("name", ["act", "two"])
def test_a_module_that_runs_twice_or_gives_two_tensors_is_refused(name):
    net = Crooked().eval()
    with pytest.raises(TeacherError, match="runs once for an image and gives one tensor"):
        explained(net, net, net.get_submodule(name), features(2, 3, 6, 6), torch.tensor([1, 2]))
    with pytest.raises(TeacherError, match="an attribution is of a map"):
        explained(net, net, net.head, features(2, 3, 6, 6), torch.tensor([1, 2]))
