"""What in a layer speaks for a label: the integrated gradients of a network's logit, of what one of its modules gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import TeacherError
from softcache.teachers.attribution import completeness_gap, integrated_gradients

Network = Callable[[Tensor], Tensor]


def explained(
    network: Network, model: nn.Module, module: nn.Module, x: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Attributions (B, 1, h, w) of the places of ``module``'s map to the logit of ``labels`` int64 (B,), summed over its
    channels, from the map 0; and the share (B,) of the logit's change that they miss
    (:func:`~softcache.teachers.attribution.completeness_gap`).

    ``network`` is images (B, 3, H, W) → logits (B, C), by ``model``, and runs ``module`` once. What comes before the module
    in it runs twice, what follows once and then for every step. Raises :class:`TeacherError` for what is no map.
    """
    with torch.no_grad():
        given = _given(network, model, module, x)
    features = given[module]
    if features.ndim != 4:
        raise TeacherError(
            f"an attribution is of a map (B, C, h, w), and the module gives {tuple(features.shape)}"
        )

    def rest(h: Tensor) -> Tensor:
        with _giving({**given, module: h}):
            return network(x)

    made = integrated_gradients(rest, features, labels)
    return made.sum(dim=1, keepdim=True), completeness_gap(made, rest, features, labels)


def _given(network: Network, model: nn.Module, module: nn.Module, x: Tensor) -> dict[nn.Module, Tensor]:
    """What ``module`` gives, and the modules that are done before it, of nested ones the outermost. Not those that run
    several times, or give something else than a tensor: they are run again."""
    ended: list[nn.Module] = []  # in this order: what is inside of another ends before it
    tensors: set[nn.Module] = set()

    def note(one: nn.Module, output: Any) -> None:
        ended.append(one)
        if isinstance(output, Tensor):
            tensors.add(one)

    _listening(network, model.modules(), x, note)
    once = {one for one, times in Counter(ended).items() if times == 1} & tensors
    if module not in once:
        raise TeacherError("an attribution is of a module that runs once for an image and gives one tensor")
    before = once.intersection(ended[: ended.index(module) + 1])
    inner = {child for one in before for child in one.modules() if child is not one}
    found: dict[nn.Module, Tensor] = {}
    # Copies: an operation in place that follows must not change them.
    _listening(network, before - inner, x, lambda one, output: found.update({one: output.clone()}))
    return found


def _listening(
    network: Network, modules: Iterable[nn.Module], x: Tensor, hear: Callable[[nn.Module, Any], object]
) -> None:
    """Run the network, and hand what these modules give to ``hear``, which keeps it or not."""

    def hook(one: nn.Module, _inputs: Any, output: Any) -> None:
        hear(one, output)

    hooks = [one.register_forward_hook(hook) for one in modules]
    try:
        network(x)
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def _giving(answers: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """The modules give these, without running."""
    own = {one: one.__dict__.get("forward") for one in answers}
    for one, answer in answers.items():
        one.forward = lambda *_, answer=answer, **__: answer.clone()
    try:
        yield
    finally:
        for one, forward in own.items():
            if forward is None:
                del one.forward
            else:
                one.forward = forward
