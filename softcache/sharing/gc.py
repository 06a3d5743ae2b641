"""What no tag of a remote reaches: told, and deleted when that is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from softcache import blobs
from softcache.errors import SpecError
from softcache.remote import Item, Remote, connect
from softcache.sharing.push import YOUNG, reached
from softcache.store import TEMPORARY

AGE = 2 * YOUNG
_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class Garbage:
    """What no tag reaches.

    Attributes:
        tags: name → digest. old: what is old enough to be deleted. young: how much is not: a push may be under way.
        deleted: was it?
    """

    tags: dict[str, str]
    old: list[Item]
    young: list[Item]
    deleted: bool


def gc(remote: str | Path | Remote, *, delete: bool = False, age: float = AGE) -> Garbage:
    """Find the blobs and manifests that no tag reaches, and delete them if ``delete``.

    What is younger than ``age`` seconds stays: pushes that are under way need what they have sent. ``age`` is at least a
    day, longer where a push takes more than half of one.

    Raises:
        SpecError: a shorter age, or nothing was pushed there.
        DamageError, StoreError: a tag, or what it points at, cannot be read: nothing is deleted then.
    """
    if not age >= AGE:  # nor not a number
        raise SpecError(
            f"an age of {age / 3600:g} hours: what is younger than {AGE / 3600:g} may belong to a push"
        )
    remote = connect(remote) if isinstance(remote, str | Path) else remote
    blobs.require_something(remote)
    tags = blobs.tags(remote)
    # Listed before what is needed is asked for: what a push adds meanwhile is not even looked at.
    stored = [item for folder in ("manifests", "blobs", "tags") for item in remote.list(folder)]
    garbage = _unreached(remote, stored, tags)
    if delete and (now := blobs.tags(remote)) != tags:
        tags, garbage = now, _unreached(remote, garbage, now)
    old = [item for item in garbage if item.age > age]
    if delete:
        for item in old:  # manifests first: none is left without its blobs
            remote.delete(item.name)
    return Garbage(tags, old, [item for item in garbage if item.age <= age], delete)


def _unreached(remote: Remote, stored: list[Item], tags: dict[str, str]) -> list[Item]:
    digests = set(tags.values())
    kept = {blobs.blob(sha) for sha in reached(remote, digests)} | {blobs.manifest(d) for d in digests}
    return [item for item in stored if item.name not in kept and _ours(item.name)]


def _ours(name: str) -> bool:
    """Did a push put this there? What else lies there is somebody's."""
    sha = name.rpartition("/")[2]
    left_behind = name.endswith(TEMPORARY)
    return left_behind or bool(_MANIFEST.fullmatch(name)) or (len(sha) == 64 and name == blobs.blob(sha))
