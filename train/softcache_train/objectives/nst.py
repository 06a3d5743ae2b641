"""Neuron selectivity: the distribution of where channels fire.

Huang, Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv:1707.01219, §4.
"""

from __future__ import annotations

from torch import Tensor

from softcache_train.objectives.checks import check_tensors
from softcache_train.objectives.maps import alike
from softcache_train.objectives.precision import both, exactly
from softcache_train.objectives.rows import unit


def nst(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The mean over the batch of MMD² = 1/C'² Σ k(t, t') + 1/C² Σ k(s, s') − 2/(C·C') Σ k(s, t), a scalar, between a
    sample's channels as unit vectors over places, with k(x, y) = ⟨x, y⟩².

    ``student_map`` float (B, C, H, W); ``teacher_map`` (B, C', H', W'), with any number of channels. The larger of the two
    is averaged to the size of the smaller, before the vectors are scaled. Channels that are 0 everywhere stay 0. No sample
    is compared with another. Weight 50 in Tian et al. 2020 (arXiv:1910.10699). Raises :class:`MismatchError` for other
    shapes.
    """
    check_tensors("nst", "maps (B, C, H, W)", student_map, teacher_map, (4,))
    with exactly(student_map):
        s, t = (unit(x.flatten(2)) for x in alike(*both(student_map, teacher_map)))
        return _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.transpose(1, 2)).square().mean()
