"""Where a batch's targets come from: the cache, or a live teacher, behind one protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from softcache.codecs import AnchoredLogits, AttentionMap, HardLabels, Items, SampledLogits, SparseLogits
from softcache.codecs.topk import Tail

if TYPE_CHECKING:
    from softcache.cache import Cache


@dataclass(frozen=True)
class Dense:
    """A target of a batch with nothing left out: ``values`` float32 (B, …)."""

    values: Tensor

    def constant(self) -> bool:
        """Is it the same for every row, as no teacher's that saw its input is?"""
        return bool((self.values[1:] == self.values[:1]).all())

    def to(self, device: torch.device | str) -> Dense:
        return Dense(self.values.to(device, non_blocking=True))


@dataclass(frozen=True)
class Sparse:
    """What ``topk`` kept of a batch of logits: see :class:`softcache.codecs.topk.SparseLogits`.

    ``index`` int64 (B, k); ``values`` float32 (B, k), below the row's largest; ``soft_mean`` float32 (B, len(tail.at)).
    """

    index: Tensor
    values: Tensor
    soft_mean: Tensor
    tail: Tail

    def constant(self) -> bool:
        return all(bool((t[1:] == t[:1]).all()) for t in (self.index, self.values, self.soft_mean))

    def to(self, device: torch.device | str) -> Sparse:
        index, values, soft_mean = (
            t.to(device, non_blocking=True) for t in (self.index, self.values, self.soft_mean)
        )
        return Sparse(index, values, soft_mean, self.tail)


@dataclass(frozen=True)
class Anchored:
    """What ``anchored`` kept of a batch of logits: see :class:`softcache.codecs.anchored.AnchoredLogits`.

    ``values`` float32 (B, C), ``rest`` bool (B, C), ``shift`` float32 (B, 4).
    """

    values: Tensor
    rest: Tensor
    shift: Tensor

    def constant(self) -> bool:
        return bool((self.values[1:] == self.values[:1]).all())

    def to(self, device: torch.device | str) -> Anchored:
        values, rest, shift = (t.to(device, non_blocking=True) for t in (self.values, self.rest, self.shift))
        return Anchored(values, rest, shift)


@dataclass(frozen=True)
class Mixed:
    """Logits of two views, of which a row shows a mix. Taken for what the teacher says of it are probabilities at the loss's
    T: those of ``own`` to the share ``lam``, float32 (B,), and for the rest those of ``partner``."""

    own: Dense | Anchored
    partner: Dense | Anchored
    lam: Tensor

    def constant(self) -> bool:
        return self.own.constant()

    def to(self, device: torch.device | str) -> Mixed:
        return Mixed(self.own.to(device), self.partner.to(device), self.lam.to(device, non_blocking=True))


@dataclass(frozen=True)
class Hard:
    """The teacher's class of each row: ``values`` int64 (B,), of ``classes``."""

    values: Tensor
    classes: int

    def constant(self) -> bool:
        return False  # a batch of one class is rare, and no fault

    def to(self, device: torch.device | str) -> Hard:
        return Hard(self.values.to(device, non_blocking=True), self.classes)


@dataclass(frozen=True)
class Sampled:
    """Classes drawn from the teacher's softmax at ``T``: ``values`` int64 (B, n), of ``classes``; ``entropy`` float32
    (B,)."""

    values: Tensor
    entropy: Tensor
    T: float
    classes: int

    def constant(self) -> bool:
        return all(bool((t[1:] == t[:1]).all()) for t in (self.values, self.entropy))

    def to(self, device: torch.device | str) -> Sampled:
        values, entropy = (t.to(device, non_blocking=True) for t in (self.values, self.entropy))
        return Sampled(values, entropy, self.T, self.classes)


@dataclass(frozen=True)
class Parts:
    """A target of a batch in several parts, such as items of a detector, by name: tensors (B, …)."""

    values: dict[str, Tensor]

    def constant(self) -> bool:
        return all(bool((t[1:] == t[:1]).all()) for t in self.values.values())

    def to(self, device: torch.device | str) -> Parts:
        return Parts({name: t.to(device, non_blocking=True) for name, t in self.values.items()})


OfLogits = Dense | Sparse | Anchored | Mixed | Sampled | Hard
BatchTarget = OfLogits | Parts


def to_tensors(decoded: Any) -> BatchTarget:
    """What :meth:`softcache.cache.Cache.read` gives of a target, as tensors that share its memory."""
    if isinstance(decoded, SparseLogits):
        index, values, soft_mean = map(torch.from_numpy, (decoded.index, decoded.value, decoded.soft_mean))
        return Sparse(index, values, soft_mean, decoded.tail)
    if isinstance(decoded, SampledLogits):
        index, entropy = map(torch.from_numpy, (decoded.index, decoded.entropy))
        return Sampled(index, entropy, decoded.T, decoded.classes)
    if isinstance(decoded, AnchoredLogits):
        return Anchored(*map(torch.from_numpy, (decoded.value, decoded.rest, decoded.shift)))
    if isinstance(decoded, HardLabels):
        return Hard(torch.from_numpy(decoded.index), decoded.classes)
    if isinstance(decoded, Items | AttentionMap):
        return Parts({name: torch.from_numpy(part) for name, part in decoded.arrays().items()})
    return Dense(torch.from_numpy(decoded.values))


class TargetSource(Protocol):
    """Rows → targets. ``size``: (height, width) of the pixels it must be given, None for none;
    ``probed``, ``labelled``: must it be given boxes, or labels, to answer for?"""

    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def probed(self) -> bool: ...
    @property
    def labelled(self) -> bool: ...

    def __call__(
        self, view: int, samples: np.ndarray, pixels: np.ndarray | None, **given: np.ndarray
    ) -> dict[str, BatchTarget]:
        """Targets of ``samples`` (int64 (B,), indices into ``cache.ids``) in view number ``view``.

        ``pixels`` is the rendered views, uint8 (B, *size, 3), or None when ``size`` is None. Where
        it is probed, ``probes`` is given, float32 (B, P, 4): see :mod:`softcache.probes`; where it is labelled
        ``labels``, int64 (B,), the cache's classes.
        """
        ...


class CacheTargets:
    """What the teacher said, read from the cache: the named targets (or target), or all."""

    size = None
    probed = labelled = False

    def __init__(self, cache: Cache, names: str | Iterable[str] | None = None):
        self.cache = cache
        self.names = cache.names(names)

    def __call__(
        self, view: int, samples: np.ndarray, pixels: np.ndarray | None = None, **given: np.ndarray
    ) -> dict[str, BatchTarget]:
        if not self.names:
            return {}
        decoded = self.cache.read(view, samples, self.names)
        return {name: to_tensors(one) for name, one in decoded.items()}
