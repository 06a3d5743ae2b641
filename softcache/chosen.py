"""What a build decided about its codecs, and why: part of the manifest, and of no identity, since the codecs are in that."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from softcache.identity import Count, Many, Model

FILE = "receipts/choice.json"  # the first file of a build that chooses

_Name = Annotated[str, Field(max_length=128)]
_Spec = Annotated[str, Field(max_length=200)]
_Line = Annotated[str, Field(max_length=1000)]


class Considered(Model):
    """A codec of a target that was tried in the pilot.

    ``bytes_per_view`` of its target's files; ``total_bytes`` of the cache with it and with what was chosen of the others;
    ``figures``: see :mod:`softcache.losses`, four digits of each. ``eligible``: does it keep the form that was asked for?
    """

    target: _Name
    codec: _Spec
    bytes_per_view: FiniteFloat
    total_bytes: Count
    figures: dict[_Name, FiniteFloat]
    eligible: bool


class Choice(Model):
    """``asked`` and ``chosen``: the codec of each target. ``bytes``: of the whole cache, reckoned from the pilot.

    ``budget`` in bytes and ``max_kl`` in nats (of T²·KL, at the worst of T = 1, 2, 4, 8) are what it was chosen for.
    """

    budget: Count | None
    max_kl: FiniteFloat | None
    asked: dict[_Name, _Spec]
    chosen: dict[_Name, _Spec]
    bytes: Count
    why: Many[_Line]
    considered: Many[Considered]
