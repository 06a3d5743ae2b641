"""A cache fetched from a remote, or the targets, views and the sample of it that somebody asks for."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from softcache import blobs, pulled
from softcache import cache as caches
from softcache import manifest as m
from softcache.cache import Cache
from softcache.errors import MismatchError, SpecError, StoreError
from softcache.inventory import File, files
from softcache.pulled import VIEWS, Pulled
from softcache.remote import Remote, connect
from softcache.sharing import transfer
from softcache.store import CLAIMS, TEMPORARY, Store


def pull(
    remote: str | Path | Remote,
    tag: str,
    out: str | Path | Store,
    *,
    targets: str | Iterable[str] | None = None,
    views: tuple[int, int | None] | None = None,
    sample: float = 1.0,
    progress: bool = True,
) -> Cache:
    """Fetch a cache, or some of it. Run again after a crash: what is here is not fetched again.

    Args:
        remote: a folder, ``s3://BUCKET/PREFIX`` or ``hf:FOLDER``. tag: a tag there, or a cache's digest.
        out: the folder. Where it holds some of the cache already, this is added; where the cache was extended since,
            what is new.
        targets: the names of those to fetch, or one name; all by default. With none, what is always there comes, and no row.
        views: from this one to before that one (None: to the last); all by default.
        sample: the share of the samples, rounded up to whole blocks: the first of every view, which are a random sample.

    Returns:
        The open cache. Rows that were not fetched raise :class:`~softcache.errors.NotPulled`.

    Raises:
        SpecError: there is no such tag, target or view, or the folder holds something else.
        MismatchError: the folder holds another cache; or a newer softcache wrote this one.
        DamageError: the remote holds other bytes than it should, twice.
        StoreError: the remote cannot be read, or the folder not written: it may be full.
    """
    remote = connect(remote) if isinstance(remote, str | Path) else remote
    store = out if isinstance(out, Store) else Store(out)
    digest = blobs.resolve(remote, tag)  # once: somebody may move it while this runs
    raw = blobs.read_manifest(remote, digest)
    cache = blobs.opened(raw, digest, f"{remote.where}/{blobs.manifest(digest)}", store)
    with _alone(store):
        before = _before(store, cache, remote, tag)
        here = (before or _nothing(cache, remote, tag)).add(
            _asked(cache, remote, tag, targets, views, sample)
        )
        if not store.exists(m.MANIFEST):
            (before or _nothing(cache, remote, tag)).to_file(store)
        # Only a pull that came to its end says what is here: a manifest that is gone may have been damaged, with more.
        known = before if store.exists(m.MANIFEST) else None
        size = _fetch(remote, cache, here, known, progress)
        _commit(cache, here, raw)
    if progress:
        _tell(cache, here, remote, *size)
    return caches.open(store.root)


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    with store.claim("pull") as mine:
        if not mine:
            raise StoreError(f"another pull into {store.root} is running: wait for its end")
        yield
    store.drop_claims()


def _before(store: Store, cache: Cache, remote: Remote, tag: str) -> Pulled | None:
    """What the folder holds of the cache; None where nobody says so, and what is there has to be looked at."""
    found = pulled.read(store)
    if store.exists(m.MANIFEST):
        old = caches.open(store.root)
        if old.digest != cache.digest and not _extends(cache, old):
            raise _another(store, old.digest, cache, tag, _same_but_licences(cache, old))
        return found or _nothing(cache, remote, tag).model_copy(update={"blocks": _blocks(old)})
    if found is not None and found.digest != cache.digest:
        raise _another(store, found.digest, cache, tag)
    if found is None and _occupied(store):
        assert cache.manifest is not None
        identity = cache.parts[0].identity_file  # without its manifest, as when that was damaged and deleted
        if not store.exists(identity) or store.digest(identity) != cache.manifest.identity_file.sha256:
            raise SpecError(
                f"{store.root} is not empty, and does not hold this cache: choose another folder for -o"
            )
    return found


def _occupied(store: Store) -> bool:
    """Is there anything but what a pull that was killed at once leaves behind?"""
    names = [path.name for path in store.root.iterdir()] if store.root.is_dir() else []
    return any(name not in (CLAIMS, pulled.FILE + TEMPORARY) for name in names)


def _nothing(cache: Cache, remote: Remote, tag: str) -> Pulled:
    return Pulled(remote=remote.address, tag=tag, digest=cache.digest, blocks={})


def _extends(new: Cache, old: Cache) -> bool:
    """Is the new one the old one with more parts? Its licences may be others then."""
    assert new.manifest is not None and old.manifest is not None
    return len(new.manifest.parts) > len(old.manifest.parts) and _same_but_licences(new, old)


def _same_but_licences(new: Cache, old: Cache) -> bool:
    """Has the new one all that the old one has, whatever the licences are?"""
    assert new.manifest is not None and old.manifest is not None
    cut = new.manifest.parts[: len(old.manifest.parts)]
    same = {"digest": "", "licences": {}}
    return new.manifest.model_copy(update={**same, "parts": cut}) == old.manifest.model_copy(update=same)


def _another(store: Store, held: str, cache: Cache, tag: str, licences: bool = False) -> MismatchError:
    if licences:
        return MismatchError(
            f"{store.root} holds the cache {held}, and {tag} is {cache.digest}, the same with other licences: pull into "
            f"another folder; or delete {m.MANIFEST} and {pulled.FILE} here, and pull again, to have the licences of {tag}"
        )
    return MismatchError(
        f"{store.root} holds some of the cache {held}, and {tag} is {cache.digest}, which is no extension of it: pull into "
        f"another folder, or say {held} for the tag"
    )


def _blocks(cache: Cache) -> dict[str, list[int]]:
    """All blocks of all views, of all targets."""
    return dict.fromkeys((*cache.targets, VIEWS), [cache.grid.blocks_per_view] * cache.views)


def _asked(
    cache: Cache,
    remote: Remote,
    tag: str,
    targets: str | Iterable[str] | None,
    views: tuple[int, int | None] | None,
    sample: float,
) -> Pulled:
    start, stop = views or (0, None)
    stop = cache.views if stop is None else stop
    if not 0 <= start < stop <= cache.views:
        raise SpecError(f"views {start}:{stop}, and the cache has the views 0:{cache.views}")
    if not 0 < sample <= 1:
        raise SpecError(f"a sample of {sample:g}: it is a share of the samples, such as 1% or 0.01")
    try:
        names = cache.names(targets)
    except MismatchError as e:
        raise SpecError(str(e)) from None
    every = cache.grid.blocks_per_view
    some = math.ceil(round(sample * every, 9))
    blocks = {name: [some * (start <= view < stop) for view in range(cache.views)] for name in names}
    # whom a view is mixed with, or made a mosaic of, may stand in any block
    rows = (every if cache.mixed or cache.tiled else some) if blocks else 0
    blocks[VIEWS] = [rows * (start <= view < stop) for view in range(cache.views)]
    return _nothing(cache, remote, tag).model_copy(update={"blocks": blocks})


def _fetch(
    remote: Remote, cache: Cache, here: Pulled, known: Pulled | None, progress: bool
) -> tuple[int, int]:
    """Fetch what is missing of what should be here. Of what a pull is ``known`` to have put here whole a size tells; all
    else that lies there (of a pull that was broken off, of a stream) is read and compared. Returns how many files and bytes
    were fetched."""
    store = cache.store

    def put(file: File) -> None:
        store.put(file.file, blobs.fetch(remote, file))

    def missing(file: File) -> bool:
        if store.size(file.file) != file.entry.bytes:
            return True
        trusted = known is not None and file.view is not None and known.has(file)
        return not trusted and store.digest(file.file) != file.entry.sha256

    tables = [file for file in blobs.first_files(cache) if missing(file)]
    transfer.each(tables, put, "fetched", False)
    wanted = [file for file in blobs.all_files(cache) if here.has(file) and missing(file)]
    transfer.each(wanted, put, "fetched", progress)
    moved = tables + wanted
    return len(moved), sum(file.entry.bytes for file in moved)


def _commit(cache: Cache, here: Pulled, raw: bytes) -> None:
    """All that was asked for is here: the manifest comes last."""
    store, whole = cache.store, here.blocks == _blocks(cache)
    here.to_file(store)
    for file in files(cache):
        if file.content is None:
            continue
        if not whole and store.exists(file.file):
            store.delete(file.file)  # it was whole, and is a part of what it grew to
        elif whole and (not store.exists(file.file) or store.get(file.file) != file.content):
            store.put(file.file, file.content)
    if not store.exists(m.MANIFEST) or store.get(m.MANIFEST, m.MAX_JSON) != raw:
        store.put(m.MANIFEST, raw)
    if whole:
        store.delete(pulled.FILE)


def _tell(cache: Cache, here: Pulled, remote: Remote, count: int, size: int) -> None:
    what = "all of it is here" if here.blocks == _blocks(cache) else pulled.told(here, cache)
    print(
        f"{cache.path}: {cache.digest} from {remote.where}, fetched {transfer.amount(count, size)}; {what}",
        file=sys.stderr,
    )
    if any(first := here.blocks.get(VIEWS, [])) and not first[0]:
        print(
            "training begins with view 0, which is not here: pull it too to train on this, or read its rows by hand",
            file=sys.stderr,
        )
