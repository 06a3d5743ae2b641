"""A cache sent to a remote: what is not there yet, verified on the way, and a tag put on it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from softcache import blobs, card, licences, pulled, spec
from softcache import cache as caches
from softcache import manifest as m
from softcache.cache import Cache
from softcache.errors import DamageError, MismatchError, NotBuilt, NotPulled, SoftcacheError, SpecError
from softcache.inventory import File
from softcache.pulled import Pulled
from softcache.remote import Remote, connect
from softcache.remote.folder import Folder
from softcache.sharing import transfer
from softcache.store import Store, require_apart

YOUNG = 12 * 3600.0  # seconds in which a blob that no tag reaches is not collected, for sure: half of gc's

_MOST_REPLACED = 1 << 20  # bytes of what lies where a tag should

_CARD = "README.md"
_OURS = b"\n<!-- written by softcache push, which writes it anew as long as this line is the last -->\n"


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        digest: of the cache that the tag points at now. before: that it pointed at, if it did.
        files, bytes: sent; the manifest is one of them. there, there_bytes: what was there already.
    """

    digest: str
    before: str | None
    files: int
    bytes: int
    there: int
    there_bytes: int


def push(
    cache: Cache | str | Path,
    remote: str | Path | Remote,
    tag: str,
    *,
    private: bool = False,
    progress: bool = True,
) -> Pushed:
    """Send a cache to a remote and put a tag on it. Run again after a crash: what was sent is not sent again.

    Args:
        remote: a folder, ``s3://BUCKET/PREFIX`` or ``hf:FOLDER``.
        tag: its name there. Where it points at another cache, it is moved.
        private: strangers cannot read the remote, so that licences do not matter. Of a folder that is taken for granted.

    Raises:
        NotBuilt: the cache is not finished.
        DamageError: a file of it is not what its manifest says: nothing of it can be seen there then.
        NotPulled: it is here in part, and the rest is not on that remote.
        SpecError: strangers may read there, and a licence forbids that or is not stated; the tag is no word; this is an
            export; the remote lies in the cache's folder, or around it.
        MismatchError: somebody else moved the tag while this ran.
        StoreError: the remote cannot be read or written.
    """
    cache = cache if isinstance(cache, Cache) else caches.open(cache)
    remote = connect(remote) if isinstance(remote, str | Path) else remote
    name = blobs.tag_file(tag)
    if cache.manifest is None:
        raise NotBuilt(f"{cache.path} is not finished: run the same build-cache command again, then push")
    if cache.tars:
        raise SpecError(f"{cache.path} is an export: import it, and push the cache that this makes")
    if isinstance(remote, Folder):
        require_apart(cache.path, remote.root)
    if remote.public and not private:
        _check_licences(cache, cache.manifest, remote, progress)
    pointed = remote.get(name, _MOST_REPLACED)  # as it is: a tag that holds no digest is put right
    before = None if pointed is None else blobs.digest_in(pointed)
    mine = list(blobs.all_files(cache))
    wanted = {file.entry.sha256: file for file in mine}
    there = _there(remote, wanted, [before] if before else [])
    missing = [file for sha, file in wanted.items() if sha not in there]
    sent = {file.file for file in missing}
    here = cache.pulled or pulled.read(cache.store)  # what is streamed is a part, too
    for file in mine:  # what is not read on its way
        if file.file not in sent and (here is None or here.has(file) or cache.store.exists(file.file)):
            _check(cache, file)
    transfer.each(missing, lambda file: _send(cache, remote, file, here), "sent", progress)
    raw = cache.store.get(m.MANIFEST, m.MAX_JSON)
    blobs.opened(raw, cache.digest, str(cache.store.path(m.MANIFEST)), cache.store)
    remote.put(blobs.manifest(cache.digest), raw)
    if remote.card:
        _put_card(cache, remote, tag)
    if before != cache.digest:
        _move(remote, tag, name, pointed, cache.digest)
    done = Pushed(
        cache.digest,
        before,
        len(missing) + 1,
        sum(file.entry.bytes for file in missing) + len(raw),
        len(there),
        sum(wanted[sha].entry.bytes for sha in there),
    )
    if progress:
        _tell(remote, tag, done)
    return done


def _check_licences(cache: Cache, manifest: m.Manifest, remote: Remote, progress: bool) -> None:
    if why := licences.refusal(manifest):
        raise SpecError(
            f"{cache.path} may not be published on {remote.where}: {why}. Where strangers cannot read there, say --private"
        )
    for line in licences.warnings(manifest) if progress else ():
        print(line, file=sys.stderr)


def _there(remote: Remote, wanted: dict[str, File], first: list[str]) -> set[str]:
    """Which blobs need not be sent: they are there with their size, and will stay.

    One that no tag reaches may be collected once it is old, so it is sent again, which makes it young.
    """
    found, old = set(), set()
    for item in remote.list("blobs"):
        sha = item.name.rpartition("/")[2]
        if sha in wanted and item.name == blobs.blob(sha) and item.bytes == wanted[sha].entry.bytes:
            (old if item.age > YOUNG else found).add(sha)
    for digest in dict.fromkeys([*first, *blobs.all_tags(remote)[0].values()] if old else []):
        try:
            kept = old & reached(remote, [digest])
        except SoftcacheError:  # what a tag that points at nothing readable would keep is sent again
            continue
        found |= kept
        old -= kept
        if not old:
            break
    return found


def reached(remote: Remote, digests: Iterable[str]) -> set[str]:
    """The sha256 of every blob that the caches of these digests are made of."""
    found: set[str] = set()
    for digest in digests:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            where = f"{remote.where}/{blobs.manifest(digest)}"
            cache = blobs.opened(blobs.read_manifest(remote, digest), digest, where, store)
            for table in blobs.first_files(cache):
                store.put(table.file, blobs.fetch(remote, table))
            found |= {file.entry.sha256 for file in blobs.all_files(cache)}
    return found


def _send(cache: Cache, remote: Remote, file: File, here: Pulled | None) -> None:
    entry = file.entry
    if here and not cache.store.exists(file.file):
        raise NotPulled(
            f"{file.file} was not pulled into {cache.path}, and is not on {remote.where}: fetch all with "
            f"{here.command(cache.path)}"
        )
    data = cache.store.get(file.file, entry.bytes)
    if len(data) != entry.bytes or spec.digest(data) != entry.sha256:
        raise _damaged(cache, file)
    remote.put(blobs.blob(entry.sha256), data)


def _check(cache: Cache, file: File) -> None:
    if cache.store.size(file.file) != file.entry.bytes or cache.store.digest(file.file) != file.entry.sha256:
        raise _damaged(cache, file)


def _damaged(cache: Cache, file: File) -> DamageError:
    return DamageError(
        f"{cache.store.path(file.file)} is damaged, so the cache is not pushed: verify --read-data says what else is; "
        "repair it, or build it anew"
    )


def _put_card(cache: Cache, remote: Remote, tag: str) -> None:
    """The card of what was pushed last; one that somebody made his own stays."""
    old = remote.get(_CARD, m.MAX_JSON)
    if old is None or old.endswith(_OURS):
        remote.put(_CARD, card.markdown(cache, remote.where, tag).encode() + _OURS)


def _move(remote: Remote, tag: str, name: str, before: bytes | None, digest: str) -> None:
    if remote.replace(name, digest.encode() + b"\n", before):
        return
    now = blobs.read_tag(remote, tag)
    if now != digest:  # an answer that was lost: it was us
        raise MismatchError(
            f"the tag {tag!r} of {remote.where} was moved to {now or 'nothing'} by somebody else while this ran: what was "
            "sent is kept; run the same command again to move the tag, or choose another one"
        )


def _tell(remote: Remote, tag: str, done: Pushed) -> None:
    sent, there = transfer.amount(done.files, done.bytes), transfer.amount(done.there, done.there_bytes)
    moved = f", moved from {done.before}" if done.before not in (None, done.digest) else ""
    print(f"{remote.where}: sent {sent}, {there} were there; {tag} is {done.digest}{moved}", file=sys.stderr)
