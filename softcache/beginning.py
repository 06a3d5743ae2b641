"""What lies in a folder that is to be built into: nothing yet, a build or an extension that has begun, or something else."""

from __future__ import annotations

import time

import numpy as np

from softcache import cache as caches
from softcache import chosen, tars
from softcache import manifest as m
from softcache.arrays import constant
from softcache.documents import read_identity
from softcache.errors import MismatchError, SpecError
from softcache.identity import Identity, told
from softcache.parts import Part, identity_file, refuses
from softcache.store import Store
from softcache.zarrfile import Array


def begun(store: Store) -> Identity | None:
    """The identity of the build in the store, None for a new one; :class:`MismatchError` where something else lies."""
    if store.exists(tars.NAME):
        raise MismatchError(
            f"{store.root} is an export to tars, not a cache to be built: name another folder for it"
        )
    started = store.exists(identity_file(0))
    foreign = [] if started else [n for n in store.names() if not n.startswith("ids/") and n != chosen.FILE]
    if started or store.exists(
        identity_file(0)
    ):  # asked again: another builder may have begun while we looked
        if store.exists(m.MANIFEST):
            caches.open(store.root)  # an edited manifest is damage, not something to build over
        return read_identity(store)
    if store.root.exists() and not store.root.is_dir():
        raise SpecError(f"{store.root} is a file: name a folder for the cache")
    if foreign:
        raise MismatchError(
            f"{store.root} holds something else, for example {foreign[0]!r}: name an empty or a new folder for the cache"
        )
    return None


def continued(store: Store, number: int) -> Identity | None:
    """The identity of a part after the first, None for one that has not begun."""
    parts = caches.open(store.root).parts
    if number < len(parts):
        return parts[number].identity
    return read_identity(store, number) if store.exists(identity_file(number)) else None


def begin(store: Store, ids: tuple[str, ...], identity: Identity, before: tuple[Part, ...]) -> Identity:
    """Write the ids and the identity once; whoever comes second takes the first one's."""
    number = len(before)
    while True:
        with store.claim("identity") as mine:
            if store.exists(identity_file(number)):
                return read_identity(store, number)
            if mine:
                for array, values in () if before else ids_arrays(ids):
                    store.put(array.file(), array.encode(values))
                store.put(identity_file(number), identity.to_bytes())
                return identity
        time.sleep(0.05)


def check_follows(store: Store, identity: Identity, before: tuple[Part, ...]) -> None:
    """Refuse a part that cannot come after those, or whose teacher is another than was called so."""
    known = [part.identity.teacher for part in before if part.named == identity.named]
    if found := [d for one in known[:1] for d in one.unlike(identity.teacher)]:
        raise MismatchError(
            f"that is another teacher than the one of {store.root}: its {told(found)}. Give it a name of its own with "
            "--as NAME"
        )
    if why := refuses(before, identity):
        raise MismatchError(f"{store.root} cannot be extended by that: {why}")


def refusal(store: Store, stored: Identity, part: int, why: str) -> MismatchError:
    """What to say where a build, or a part, is there and is another."""
    if not part:
        more = ". More views, targets and teachers are added with softcache extend" * store.exists(m.MANIFEST)
        return MismatchError(
            f"{store.root} was begun as another build: {why}. Repeat its settings to go on with it, "
            f"or name another folder, or delete this one{more}"
        )
    first, views = stored.grid.first, stored.grid.views
    what = f"the views {first:,} to {views - 1:,}" if first else ", ".join(stored.targets)
    whose = f"{what}, by {stored.teacher.name}"
    if part < len(caches.open(store.root).parts):
        return MismatchError(
            f"{store.root} was extended by {whose}: {why}. What a cache holds is never changed"
        )
    return MismatchError(
        f"{store.root} is being extended by {whose}: {why}. Repeat its settings to go on with that; to give it up, delete "
        f"{store.path(f'parts/{part}')}, and what verify then says is no file of the cache"
    )


def ids_arrays(ids: tuple[str, ...]) -> list[tuple[Array, np.ndarray]]:
    """The constants ``ids/offsets`` and ``ids/bytes``."""
    raw = [i.encode() for i in ids]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in raw])]).astype(np.int64)
    text = np.frombuffer(b"".join(raw), np.uint8)
    return [
        (constant(f"ids/{n}", v.shape, v.dtype.name), v) for n, v in (("offsets", offsets), ("bytes", text))
    ]
