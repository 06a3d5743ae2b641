"""The terms of a run's loss: objectives with a weight, bound to what they read of the student and of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softcache.cache import Cache
from softcache.codecs.head import layer
from softcache.codecs.strength import Strength
from softcache.errors import MismatchError, SoftcacheError, SpecError, suggest
from softcache.keyed import hash64
from softcache.targets import Target
from softcache_train.config import Objective
from softcache_train.loader import Batch
from softcache_train.objectives import OBJECTIVES, combine, input_gradient
from softcache_train.taps import Seen, Tapped
from softcache_train.targets import BatchTarget, Dense, Parts

Shape = tuple[int, ...]


class Term(nn.Module):
    """One objective: what of the student, against which target, and what it learns itself (adapters, a memory)."""

    std: Tensor

    def __init__(self, asked: Objective, cache: Cache, shapes: Mapping[str, Shape], std: Sequence[float]):
        super().__init__()
        self.asked, self.known = asked, OBJECTIVES[asked.name]
        self.register_buffer(
            "std", torch.tensor(std).view(3, 1, 1), persistent=False
        )  # of the student's pixels
        self.loss: Callable[..., Tensor] = self._made(cache, shapes)

    def _made(self, cache: Cache, shapes: Mapping[str, Shape]) -> Callable[..., Tensor]:
        if not self.known.has_state:
            return partial(self.known.loss, **self.asked.options)
        theirs = [cache.targets[name].shape for name in self.asked.targets]
        ours = [shapes[name] for name in self.asked.inside or [""]]
        of_cache = {"samples": lambda: cache.samples, "head": lambda: _head(cache, self.asked.targets[0])}
        more = {name: of_cache[name]() for name in self.known.made_with}
        return self.known.loss(_one_or_all(ours), _one_or_all(theirs), **more, **self.asked.options)

    def forward(self, seen: Seen, batch: Batch) -> Tensor:
        if self.known.reads == "labels":
            return self.known.loss(seen.logits, batch.labels, batch.partner_labels, batch.lam)
        if self.known.reads == "exits":
            found = self._student(seen, batch)
            exits = len(found) // 2
            return self.loss(found[:exits], found[exits:], **self._given(batch))
        if self.known.reads == "batch":
            return self.loss(seen, batch, *(self.asked.targets or (None,)))
        return self.loss(self._student(seen, batch), self._teacher(batch), **self._given(batch))

    def _student(self, seen: Seen, batch: Batch) -> Any:
        if self.known.reads == "gradient":
            return input_gradient(seen.logits, seen.images, batch.labels) / self.std
        if not self.asked.inside:
            return seen.logits
        found = [seen.inside[name] for name in self.asked.inside]
        return _one_or_all([x.to(torch.promote_types(x.dtype, torch.float32)) for x in found])

    def _teacher(self, batch: Batch) -> Any:
        said = [batch[name] for name in self.asked.targets]
        if self.known.reads == "logits":
            return said[0] if len(said) == 1 else combine(said, self.asked.T, self.asked.combine)
        return _one_or_all([_tensor(one) for one in said])

    def _given(self, batch: Batch) -> dict[str, Tensor]:
        takes, found = self.known.given(), {}
        if "labels" in takes:
            found["labels"] = batch.labels
        if "index" in takes:
            found["index"] = torch.from_numpy(batch.index).to(batch.labels.device)
        if "mask" in takes and self.asked.mask:
            found["mask"] = _tensor(batch[self.asked.mask])
        return found


class Distillation(nn.Module):
    """A student and the terms of its loss, as one module: what a process group averages and an optimizer moves."""

    def __init__(self, student: Tapped, terms: Iterable[Term], amp: torch.dtype | None = None):
        super().__init__()
        self.student = student
        self.terms = nn.ModuleList(terms)
        self._amp = amp

    def forward(self, batch: Batch, epoch: int, first: bool = False) -> Tensor:
        """Each term's loss, unweighted, (terms,); 0 of those whose turn is not in this epoch. With ``first``, a term that
        teaches nothing is a :class:`MismatchError`."""
        kind = batch.images.device.type
        images = batch.images
        if any(OBJECTIVES[term.asked.name].reads == "gradient" for term in self._all()):
            images = images.detach().requires_grad_()
        with torch.autocast(kind, self._amp) if self._amp else nullcontext():
            seen = self.student(images)
        losses = []
        for term in self._all():
            on = term.asked.on(epoch)
            loss = _of(term, seen, batch) if on else seen.logits.sum() * 0
            if on and first:
                self._require_lesson(term, loss)
            losses.append(loss.to(torch.promote_types(loss.dtype, torch.float32)))
        return torch.stack(losses)

    def _all(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]

    def _require_lesson(self, term: Term, loss: Tensor) -> None:
        learns = [p for p in self.student.parameters() if p.requires_grad]
        slopes = (
            torch.autograd.grad(loss, learns, retain_graph=True, allow_unused=True)
            if loss.requires_grad
            else ()
        )
        if not any(bool(slope.any()) for slope in slopes if slope is not None):
            raise MismatchError(
                f"the objective {term.asked.label} is {float(loss):g} for the first batch and moves none of the student's "
                "weights: is its target constant, or what it reads of the student fixed?"
            )


def _of(term: Term, seen: Seen, batch: Batch) -> Tensor:
    """Its loss, or an error that says whose it is."""
    try:
        return term(seen, batch)
    except SoftcacheError as e:
        raise type(e)(f"objective {term.asked.label}: {e}") from e


def make(
    objectives: Iterable[Objective],
    cache: Cache,
    shapes: Mapping[str, Shape],
    seed: int,
    std: Sequence[float],
) -> list[Term]:
    """The terms, their adapters drawn anew: each from a stream of its own, so that none changes the student's."""
    made = []
    for i, asked in enumerate(objectives):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash64("term", seed, i))
            try:
                made.append(Term(asked, cache, shapes, std))
            except SoftcacheError as e:
                raise type(e)(f"objective {asked.label}: {e}") from e
    return made


def require_targets(objectives: Iterable[Objective], cache: Cache) -> None:
    """Raise :class:`SpecError` for what the cache cannot give: a target that is not there or of another kind, views that an
    objective does not understand."""
    for asked in objectives:
        known = OBJECTIVES[asked.name]
        if not known.mixes and (cache.mixed or cache.tiled):
            raise SpecError(
                f"{asked.label} is of one image with one label, and the views of {cache.path} are mixed: build a cache "
                "without mixup, cutmix or mosaic for it"
            )
        for name in asked.read:
            if name not in cache.targets:
                raise SpecError(
                    f"the cache {cache.path} has no target {name!r}{_instead(name, cache)}, which {asked.label} learns from"
                )
        for name in asked.targets:
            kind = cache.targets[name].kind
            if kind not in known.kinds:
                what = " or ".join(k.replace("_", " ") for k in known.kinds)
                raise SpecError(f"{asked.name} learns from {what}; the target {name!r} is a {kind}")
            if kind == "attention_map":
                _require_strength(asked, cache.targets[name])
            if "head" in known.made_with and not cache.targets[name].layered:
                raise SpecError(
                    f"{asked.name} sends the student's features through the teacher's last layer, and the target {name!r} "
                    f"holds {cache.targets[name].spec} without it: softcache extend {cache.path} --as head --target "
                    "'logits=head(f16)' with the same teacher adds it, as target: head.logits"
                )


def _require_strength(asked: Objective, target: Target) -> None:
    """Attention is of one meaning: another's map has the same shape, and would teach something else in silence."""
    p, codec = asked.options.get("p", 2), target.codec
    if not isinstance(codec, Strength) or codec.p != p:
        raise SpecError(
            f"{asked.name} compares the mean of |F|^{p}, and the target {target.name!r} holds {target.spec}: cache "
            f"strength({p}) of that layer, or its map"
        )


def _head(cache: Cache, name: str) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of the layer that a target is decoded with."""
    found = layer(cache.beside(name, np.zeros(0, np.int64)), cache.targets[name].shape)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _instead(name: str, cache: Cache) -> str:
    same = [one for one in cache.targets if one.partition(".")[2] == name]  # of several caches
    if same:
        return f" (did you mean target=[{', '.join(same)}]?)"
    adds = f"softcache extend {cache.path} --target {name}=CODEC adds it"
    if hint := suggest(name, cache.targets):
        return f"{hint.removesuffix(')')} Or {adds})"
    return f" (it has {', '.join(cache.targets)}; {adds})"


def _tensor(target: BatchTarget) -> Tensor:
    if isinstance(target, Dense):
        return target.values
    if isinstance(target, Parts):
        return target.values["spatial"]
    raise MismatchError(f"this loss takes tensors, not a {type(target).__name__}")


def _one_or_all(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)
