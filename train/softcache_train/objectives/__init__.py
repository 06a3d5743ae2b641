"""Losses: student output and target → a scalar. One a file."""

from softcache_train.objectives.combine import combine
from softcache_train.objectives.cross_entropy import cross_entropy
from softcache_train.objectives.kd import kd

__all__ = ["combine", "cross_entropy", "kd"]
