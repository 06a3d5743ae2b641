"""How caches lie on a remote: ``blobs/ab/cd/SHA256``, ``manifests/DIGEST.json``, ``tags/NAME``.

Blobs and manifests never change; a tag is 64 hex digits, the digest it points at, and may be moved. What is read is what
a stranger may have put there: every size is limited before, every digest compared after.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator

from softcache import manifest as m
from softcache import spec
from softcache.cache import Cache
from softcache.errors import DamageError, SpecError, StoreError, nearest
from softcache.inventory import File, files
from softcache.remote import Remote, shown
from softcache.store import TEMPORARY, Store
from softcache.zarrfile import Array

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")
_TAG_BYTES = 65
_MOST_TABLE = 1 << 30  # bytes of a table of files: 26 million of them
_TRIES = 2


def blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256[2:4]}/{sha256}"


def manifest(digest: str) -> str:
    return f"manifests/{digest}.json"


def tag_file(tag: str) -> str:
    """:class:`SpecError` for what is no name of a tag."""
    if not is_tag(tag):
        raise SpecError(
            f"{shown(tag)!r} is no name of a tag: letters, digits, '.', '_' and '-', up to 100 of them, and not what "
            "looks like a digest"
        )
    return f"tags/{tag}"


def is_tag(name: str) -> bool:
    """May a tag be called so? Not what a killed push leaves in a folder, nor what would be taken for a digest."""
    return bool(TAG.fullmatch(name)) and not DIGEST.fullmatch(name.lower()) and not name.endswith(TEMPORARY)


def read_tag(remote: Remote, tag: str) -> str | None:
    """The digest that a tag points at; None where there is no such tag. A digest points at itself."""
    if DIGEST.fullmatch(tag):
        return tag
    name = tag_file(tag)
    try:
        data = remote.get(name, _TAG_BYTES)
    except DamageError:  # longer
        data = b""
    if data is None:
        return None
    if (digest := digest_in(data)) is None:
        raise DamageError(
            f"{remote.where}/{name} does not hold a digest: push the cache again under the tag {tag!r}, or take it off with "
            f"softcache tags {shlex.quote(remote.where)} --delete {tag}"
        )
    return digest


def digest_in(data: bytes) -> str | None:
    """What a tag with this content points at; None where that is none."""
    digest = data.removesuffix(b"\n").decode("ascii", "replace")
    return digest if DIGEST.fullmatch(digest) else None


def all_tags(remote: Remote) -> tuple[dict[str, str], list[DamageError]]:
    """Every tag of a remote with the digest it points at, and what is wrong with those that point at none."""
    found, bad = {}, []
    for item in remote.list("tags"):
        name = item.name.removeprefix("tags/")
        try:
            if is_tag(name) and (digest := read_tag(remote, name)):
                found[name] = digest
        except DamageError as e:
            bad.append(e)
    return dict(sorted(found.items())), bad


def tags(remote: Remote) -> dict[str, str]:
    """Every tag of a remote, and the digest it points at. :class:`DamageError` where one points at none."""
    found, bad = all_tags(remote)
    if bad:
        raise bad[0]
    return found


def require_something(remote: Remote) -> None:
    """:class:`SpecError` where no push ever put anything."""
    if not any(next(iter(remote.list(folder)), None) for folder in ("manifests", "tags", "blobs")):
        raise SpecError(f"nothing was pushed to {remote.where}: check the address")


def untag(remote: Remote, tag: str) -> None:
    """Take a tag off. :class:`SpecError` where there is none of that name."""
    name = tag_file(tag)
    with contextlib.suppress(DamageError):  # one that points at nothing can be taken off, too
        resolve(remote, tag)
    remote.delete(name)


def resolve(remote: Remote, tag: str) -> str:
    """The digest that a tag points at. :class:`SpecError` where there is none of that name."""
    digest = read_tag(remote, tag)
    if digest is None:
        known, _ = all_tags(remote)
        raise SpecError(
            f"{remote.where} has no tag {tag!r}" + (nearest(tag, known) or ": nothing was pushed there")
        )
    return digest


def read_manifest(remote: Remote, digest: str) -> bytes:
    """The bytes of a manifest. :func:`opened` checks them."""
    data = remote.get(manifest(digest), m.MAX_JSON)
    if data is None:
        raise StoreError(
            f"{remote.where} has no manifest {digest}: push the cache again, or name another tag"
        )
    return data


def opened(data: bytes, digest: str, where: str, store: Store) -> Cache:
    """The cache that a manifest is of, without its files, over a folder where they will be.

    Raises:
        DamageError: it is not the manifest of that digest, or names files that no cache has.
        MismatchError: a newer softcache wrote it.
    """
    hint = "push the cache again"
    found = m.read(m.Manifest, data, where, hint)
    if found.digest != digest or not found.stands_for(data):
        raise DamageError(f"{where} is not the manifest {digest}: {hint}")
    if not all(part.holds_together() for part in (found, *found.parts)):
        raise DamageError(f"{where} was edited: an identity is not the one it names; {hint}")
    cache = Cache(store, found.identity, found)
    for path, constant in cache.constants.items():
        if constant.bytes != constant.array(path).plain_bytes():
            raise DamageError(f"{where} names a size of {path} that it cannot have: {hint}")
    for part in (found, *found.parts):
        if part.files.bytes > _MOST_TABLE or part.identity_file.bytes > m.MAX_JSON:
            raise DamageError(
                f"{where} names a table of files or an identity that is too large to be one: {hint}"
            )
    return cache


def first_files(cache: Cache) -> Iterator[File]:
    """What must be there before :func:`softcache.inventory.files` can tell the rest: the tables of files."""
    assert cache.manifest is not None
    for part, sealed in zip(cache.parts, (cache.manifest, *cache.manifest.parts), strict=True):
        yield File(part.table_file, sealed.files)


def all_files(cache: Cache) -> Iterator[File]:
    """Every file of a cache that may come from a remote, each of a size that it can have."""
    for file in files(cache):
        if file.content is not None:
            continue
        if file.view is not None and not _plausible(file, cache):
            raise DamageError(
                f"the cache {cache.digest} names {file.entry.bytes:,} bytes of {file.file}, a size that it cannot have"
            )
        yield file


def _plausible(file: File, cache: Cache) -> bool:
    if file.target is None:
        return file.entry.bytes <= m.MAX_JSON
    folder = file.target if file.target == "view" else f"targets/{file.target}"
    array: Array = cache.arrays[f"{folder}/{file.field}"]
    if array.big:
        return file.entry.bytes <= array.fixed_bytes() + array.rows * (array.row_bytes * 257 // 256 + 1024)
    return file.entry.bytes == array.plain_bytes()


def fetch(remote: Remote, file: File) -> bytes:
    """A file's bytes, of the size and with the sha256 that its cache names.

    Raises:
        DamageError: what the remote has is neither, twice.
        StoreError: it has nothing, or cannot be read.
    """
    name, problem = blob(file.entry.sha256), ""
    for _ in range(_TRIES):
        try:
            data = remote.get(name, file.entry.bytes)
        except DamageError as e:
            problem = str(e)
            continue
        if data is None:
            raise StoreError(f"{remote.where} has no {name}, the bytes of {file.file}: push the cache again")
        if len(data) == file.entry.bytes and spec.digest(data) == file.entry.sha256:
            return data
        problem = f"it has {len(data):,} of {file.entry.bytes:,} bytes"
        if len(data) == file.entry.bytes:
            problem = "its sha256 is another"
    raise DamageError(
        f"{remote.where}/{name} is not what it is called, {_TRIES} times: {problem}; it is {file.file}. Delete it there and "
        "push the cache again"
    )
