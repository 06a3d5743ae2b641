"""Losses: what the student says and what the teacher said → a scalar. One a file, listed in :data:`OBJECTIVES`.

A loss is a function of the student's and the teacher's tensors, or, where it learns or remembers something, a module made
of their shapes. Its keyword arguments are the keys that a config may give it; those called ``labels``, ``mask``, ``index``
are given by the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from softcache_train.objectives.activation_boundary import ActivationBoundary, activation_boundary
from softcache_train.objectives.attention import attention
from softcache_train.objectives.cc import cc
from softcache_train.objectives.channelwise import Channelwise, channelwise
from softcache_train.objectives.combine import combine
from softcache_train.objectives.crd import CRD
from softcache_train.objectives.cross_entropy import cross_entropy
from softcache_train.objectives.cross_head import CrossHead
from softcache_train.objectives.dist import dist
from softcache_train.objectives.dkd import dkd
from softcache_train.objectives.fsp import fsp
from softcache_train.objectives.gradient_attention import gradient_attention, input_gradient
from softcache_train.objectives.gram import gram
from softcache_train.objectives.hard import hard
from softcache_train.objectives.hint import Hint, hint
from softcache_train.objectives.infonce import InfoNCE
from softcache_train.objectives.kd import kd
from softcache_train.objectives.levels import levels
from softcache_train.objectives.logits_mse import logits_mse
from softcache_train.objectives.masked_attention import masked_attention
from softcache_train.objectives.mutual import mutual
from softcache_train.objectives.nst import nst
from softcache_train.objectives.own_exits import own_exits
from softcache_train.objectives.pearson import Pearson, pearson
from softcache_train.objectives.peer import Peer
from softcache_train.objectives.probs_mse import probs_mse
from softcache_train.objectives.rkd import rkd
from softcache_train.objectives.vid import Vid

__all__ = [
    "CRD",
    "OBJECTIVES",
    "ActivationBoundary",
    "Channelwise",
    "CrossHead",
    "Hint",
    "InfoNCE",
    "Known",
    "Pearson",
    "Peer",
    "Vid",
    "activation_boundary",
    "attention",
    "cc",
    "channelwise",
    "combine",
    "cross_entropy",
    "dist",
    "dkd",
    "fsp",
    "gradient_attention",
    "gram",
    "hard",
    "hint",
    "input_gradient",
    "kd",
    "levels",
    "logits_mse",
    "masked_attention",
    "mutual",
    "nst",
    "own_exits",
    "pearson",
    "probs_mse",
    "rkd",
]

OF_BATCH = ("labels", "mask", "index")
"""What a loss is given of the batch, where it has an argument of that name."""
OF_CACHE = ("samples", "head")
"""What a loss that has state is made with, likewise: the number of samples, and the last layer of its target's teacher."""


@dataclass(frozen=True)
class Known:
    """A loss that a config may name.

    ``reads``: ``labels`` of the batch; ``logits``, a target of class logits; ``inside``, what a module of the student
    gives and a target of one of ``kinds``; ``gradient``, that of the student's loss by the image, and such a target; or
    ``batch``, the student's answer and the whole batch; or ``exits``, modules of ``student`` alone, logits and then as many
    features. ``modules``: how many of the student's it compares at once. ``mixes``: does it know what to do with mixed
    views? ``probabilities``: is all that it takes of the teacher's logits their softmax at its T (at 1 where it has none)?
    Then probabilities of several teachers may be averaged for it.
    """

    loss: Callable[..., Any]
    reads: str = "logits"
    kinds: tuple[str, ...] = ("logits",)
    mixes: bool = True
    student: tuple[str, ...] = ()
    probabilities: bool = False
    modules: int = 1

    @property
    def options(self) -> tuple[str, ...]:
        """What a config may set."""
        named = list(inspect.signature(self.loss).parameters)[2:]
        return () if self.reads == "labels" else tuple(n for n in named if n not in (*OF_BATCH, *OF_CACHE))

    @property
    def types(self) -> Mapping[str, Any]:
        """Those that its arguments are annotated with."""
        return get_type_hints(self.loss.__init__ if inspect.isclass(self.loss) else self.loss)

    @property
    def made_with(self) -> tuple[str, ...]:
        """Which of :data:`OF_CACHE` it takes."""
        return tuple(name for name in OF_CACHE if name in inspect.signature(self.loss).parameters)

    @property
    def required(self) -> tuple[str, ...]:
        """Those that it must set."""
        takes = inspect.signature(self.loss).parameters
        return tuple(name for name in self.options if takes[name].default is inspect.Parameter.empty)

    @property
    def has_state(self) -> bool:
        return inspect.isclass(self.loss)

    def given(self) -> tuple[str, ...]:
        """Which of :data:`OF_BATCH` it takes."""
        call = self.loss.forward if self.has_state else self.loss  # pyright: ignore[reportFunctionMemberAccess]
        return tuple(name for name in OF_BATCH if name in inspect.signature(call).parameters)


MAPS = ("feature_map",)
STRONG = ("feature_map", "attention_map")
EXITS = ("exit1", "exit2", "linear", "exit1.embedding", "exit2.embedding", "embedding")  # of our own students
ROWS = ("embedding", "feature_map", "logits")

OBJECTIVES: dict[str, Known] = {
    "activation_boundary": Known(ActivationBoundary, "inside", MAPS),
    "attention": Known(attention, "inside", STRONG),
    "cc": Known(cc, "inside", ROWS),
    "ce": Known(cross_entropy, "labels", ()),
    "channelwise": Known(Channelwise, "inside", MAPS),
    "crd": Known(CRD, "inside", ROWS),
    "cross_head": Known(CrossHead, student=("embedding",), probabilities=True),
    "dist": Known(dist, probabilities=True),
    "dkd": Known(dkd, mixes=False, probabilities=True),
    "fsp": Known(fsp, "inside", (*MAPS, "embedding"), modules=2),
    "gradient_attention": Known(gradient_attention, "gradient", ("attribution",), mixes=False),
    "gram": Known(gram, "inside", (*MAPS, "embedding")),
    "hard": Known(hard, probabilities=True),
    "hint": Known(Hint, "inside", ("feature_map", "embedding")),
    "infonce": Known(InfoNCE, "inside", ROWS),
    "kd": Known(kd, probabilities=True),
    "levels": Known(levels, "inside", MAPS),
    "logits_mse": Known(logits_mse),
    "masked_attention": Known(masked_attention, "inside", STRONG, mixes=False),
    "mutual": Known(Peer, "batch", probabilities=True),
    "nst": Known(nst, "inside", MAPS),
    "own_exits": Known(own_exits, "exits", (), mixes=False, student=EXITS),
    "pearson": Known(Pearson, "inside", MAPS),
    "probs_mse": Known(probs_mse, probabilities=True),
    "rkd": Known(rkd, "inside", ROWS),
    "vid": Known(Vid, "inside", MAPS),
}
