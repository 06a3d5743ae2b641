"""What the manifest names of a part, and is missing or cut, is made anew: the very bytes that were there, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from softcache import cache as caches
from softcache import inventory
from softcache import manifest as m
from softcache.bases import Bases
from softcache.block import Block
from softcache.cache import Cache
from softcache.documents import read_receipt
from softcache.errors import DamageError, MismatchError, counted
from softcache.job import Job
from softcache.parts import Part
from softcache.store import Data


def reopened(job: Job, say: Callable[[str], None]) -> Job:
    """Where the manifest names the job's part: take back the receipts of its blocks that miss a file, so that they are
    computed again. The job that is returned knows what every file has to be."""
    if not job.store.exists(m.MANIFEST):
        return job
    cache, number = caches.open(job.store.root), job.part.number
    if number >= len(cache.parts):
        return job
    require_whole(cache)
    _tell_of_others(cache, number, say)
    table = _table(job, cache)
    found = [one for one in inventory.of_part(cache, number, table) if inventory.problem(cache, one)]
    if found:
        say(
            f"{counted(len(found), 'file')} of the cache missing or cut, for example {found[0].file}: making them anew"
        )
    bases = {array.file() for fields in job.bases.made.values() for array in fields.values()}
    lost = any(one.file in bases for one in found)
    kept = job.bases if lost else Bases(job.store, job.part, cache)
    job = replace(job, sealed=cache.sealed[number], table=table, bases=kept)
    blocks = {(f.view, f.shard) for f in found if f.view is not None and f.shard is not None}
    if lost:
        blocks |= {(view, index) for view in range(kept.views) for index in range(job.grid.blocks_per_view)}
    for view, index in blocks:
        job.store.path(job.part.receipt(job.grid.block(view, index))).unlink(missing_ok=True)
    return job


def require_whole(cache: Cache) -> None:
    """Refuse what was pulled in part: it misses files on purpose."""
    if cache.pulled:
        raise MismatchError(
            f"{cache.path} holds some of a cache, as it was pulled: pull all of it, then run this again; or repair it"
        )


def require_undamaged(cache: Cache, parts: Iterable[Part]) -> None:
    """Refuse a cache of which a file of these parts is missing or cut."""
    for part in parts:
        for one in inventory.of_part(cache, part.number, cache.table(part.number)):
            if why := inventory.problem(cache, one):
                made = "extend" if part.number else "build-cache"
                raise DamageError(
                    f"{cache.store.path(one.file)}: {why}. Run the {made} that made it again, or softcache repair "
                    f"{cache.path} --from REMOTE; then extend"
                )


def _tell_of_others(cache: Cache, number: int, say: Callable[[str], None]) -> None:
    for other in (part.number for part in cache.parts if part.number != number):
        try:
            whole = not any(
                inventory.problem(cache, one) for one in inventory.of_part(cache, other, cache.table(other))
            )
        except DamageError:
            whole = False
        if not whole:
            say(
                f"NOTE: files of what {'extend' if other else 'build-cache'} made are missing or cut: run it again, too"
            )


def _table(job: Job, cache: Cache) -> np.ndarray | None:
    """What every file of the part has to be; None where the table is lost, and cannot be made of the receipts."""
    try:
        return cache.table(job.part.number)
    except DamageError:
        try:
            receipts = [read_receipt(job.store, job.part, block) for block in job.grid.blocks()]
        except (DamageError, MismatchError):
            return None
        data = m.pack_table(receipts)
        if m.Entry.of(data) != cache.sealed[job.part.number].files:
            return None
        job.store.put(job.part.table_file, data)
        return cache.table(job.part.number)


def require_same(job: Job, block: Block, file: int, entry: m.Entry) -> None:
    """Refuse a file of a block, the receipt coming after its shards, that is not what the manifest names."""
    if job.table is None:
        return
    number = (block.view - job.grid.first) * job.grid.blocks_per_view + block.index
    if m.pack_entries([entry]) != job.table[number, file].tobytes():
        raise _other(job, f"view {block.view}, block {block.index}")


def put_again(job: Job, name: str, found: m.Entry, data: Callable[[], Data], entry: m.Entry) -> None:
    """Put a file that is missing or cut; refuse one that is not what the manifest names."""
    if job.store.size(name) != entry.bytes:
        if found.sha256 != entry.sha256:
            raise _other(job, name)
        job.store.put(name, data())


def _other(job: Job, what: str) -> MismatchError:
    return MismatchError(
        f"{what} of {job.store.root} is missing or cut, and comes out otherwise here than the manifest says: this machine "
        "does not compute what the first one did. Fetch it from where there is a whole copy, or build into a new folder"
    )
