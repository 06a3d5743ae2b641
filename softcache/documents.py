"""The documents of a cache, read and checked: its manifest, identities, receipts and ids."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from softcache import chosen, spec
from softcache import manifest as m
from softcache.block import Block
from softcache.chosen import Choice
from softcache.errors import DamageError, MismatchError
from softcache.identity import Identity
from softcache.parts import Part, identity_file
from softcache.store import Store


def read_manifest(store: Store, remote: str = "") -> m.Manifest:
    """The manifest of a finished cache. :class:`DamageError` unless it is the very one that was written.

    ``remote``: what it was pulled from, if it was.
    """
    where = str(store.path(m.MANIFEST))
    hint = f"delete it and run the same build-cache again: it is made anew from {store.root / 'receipts'}"
    if remote:
        hint = f"delete it and pull the same from {remote} again, which fetches nothing else that is here"
    raw = store.get(m.MANIFEST, m.MAX_JSON)
    manifest = m.read(m.Manifest, raw, where, hint)
    if not manifest.stands_for(raw):
        raise DamageError(f"{where} was edited: its digest does not match its content; {hint}")
    if not all(part.holds_together() for part in (manifest, *manifest.parts)):
        raise DamageError(f"{where} was edited: its identity is not the one that was begun with; {hint}")
    return manifest


def read_identity(store: Store, part: int = 0) -> Identity:
    """The identity of a build, or of a part of a cache, that has begun."""
    name, what = identity_file(part), "folder and build" if part == 0 else f"folder parts/{part} and extend"
    hint = f"this build cannot be resumed: delete the {what} again"
    return m.read(Identity, store.get(name, m.MAX_JSON), str(store.path(name)), hint)


def read_choice(store: Store) -> Choice | None:
    """What was decided about the codecs of the build in a store; None where nothing was."""
    if store.exists(chosen.FILE):
        hint = "delete it, and this build, which cannot be resumed without it"
        return m.read(Choice, store.get(chosen.FILE, m.MAX_JSON), str(store.path(chosen.FILE)), hint)
    return read_manifest(store).choice if store.exists(m.MANIFEST) else None


def read_receipt(store: Store, part: Part, block: Block) -> tuple[m.Receipt, bytes]:
    """A block's receipt and its bytes, checked to belong to this part."""
    name = part.receipt(block)
    raw = store.get(name, m.MAX_JSON)
    receipt = m.read(
        m.Receipt, raw, str(store.path(name)), "delete it and build again: its block is made anew"
    )
    if not receipt.stands_for(raw):
        raise DamageError(f"{store.path(name)} was changed since it was written; delete it and build again")
    if receipt.identity != part.identity.digest or receipt.block != (block.view, block.index):
        raise MismatchError(f"{store.path(name)} belongs to another build; delete it and build again")
    return receipt, raw


def read_ids(offsets: np.ndarray, text: np.ndarray, identity: Identity, where: str) -> tuple[str, ...]:
    """The samples' ids in source order, of the constants ``ids/offsets`` and ``ids/bytes``."""
    samples = identity.grid.samples
    known = (offsets.dtype, text.dtype, text.ndim) == (np.int64, np.uint8, 1) and offsets.shape == (
        samples + 1,
    )
    # ids that overlap would be far larger than their file
    if not known or offsets[0] or offsets[-1] != len(text) or (offsets[:-1] > offsets[1:]).any():
        raise DamageError(f"{where} cannot be read: its offsets are not those of {samples:,} ids")
    raw = text.tobytes()
    try:
        ids = tuple(raw[a:b].decode() for a, b in pairwise(offsets.tolist()))
    except UnicodeDecodeError as e:
        raise DamageError(f"{where} cannot be read: {e}") from None
    if spec.digest_ids(ids) != identity.source.ids:
        raise DamageError(f"{where} are not the ids of the manifest; restore the folder or rebuild")
    return ids
