"""Where shared bytes lie: a folder, an object store, a folder that is a Hugging Face dataset repository.

A remote holds named bytes and knows nothing of caches (:mod:`softcache.blobs` does). Whoever writes to it is not
trusted: what is read is limited in size, and its content is judged by who asked for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from softcache.errors import SpecError

KINDS = "a folder, s3://BUCKET/PREFIX, or hf:FOLDER"
_USER_INFO = re.compile(r"://.*@", re.DOTALL)
_QUERY = re.compile(r"(://[^\s?]*)\?\S*")
_HINTS = {"file": "a folder is named by its path alone", "s3": "write s3://BUCKET/PREFIX"}


@dataclass(frozen=True)
class Item:
    """What a remote holds under a name: its bytes, and the seconds since they were put there."""

    name: str
    bytes: int
    age: float


class Remote(Protocol):
    """Named bytes. Safe to use from threads.

    Every method raises :class:`~softcache.errors.StoreError` with one line that says what, where, why and what to do.

    Attributes:
        where: the address as it may be shown, without user info. address: the same, good from any working directory.
        public: may strangers read what is put here, as far as can be told from the address?
        card: does a README.md belong to it?
    """

    where: str
    address: str
    public: bool
    card: bool

    def get(self, name: str, limit: int) -> bytes | None:
        """The bytes; None where there are none. :class:`~softcache.errors.DamageError` as soon as there are more than
        ``limit``."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Put them there, whole or not at all, over what had the name."""
        ...

    def replace(self, name: str, data: bytes, old: bytes | None) -> bool:
        """:meth:`put`, if ``old`` is what lies there now (None: nothing). False, and nothing done, where it is not."""
        ...

    def list(self, prefix: str) -> Iterator[Item]:
        """Everything below ``prefix``, a folder's name without the slash."""
        ...

    def delete(self, name: str) -> None:
        """Take it away; nothing where it is not there."""
        ...


def connect(address: str | Path) -> Remote:
    """The remote at an address. :class:`SpecError` for an address that is none, or for user info in it."""
    text = str(address)
    if _USER_INFO.search(text):
        raise SpecError(
            "the remote was given with a user name or password, which would be kept in shell histories and "
            "logs: leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    kind, colon, rest = text.partition(":")
    if isinstance(address, Path) or not colon or "/" in kind:
        from softcache.remote.folder import Folder

        return Folder(Path(text).expanduser())
    if kind == "hf":
        if "//" in rest:
            raise SpecError(
                "hf: takes the folder of a clone, such as hf:../my-dataset, and no URL: git clone it first"
            )
        from softcache.remote.hf import HuggingFace

        return HuggingFace(Path(rest).expanduser())
    if kind == "s3" and rest.startswith("//"):
        from softcache.remote.s3 import S3

        return S3.at(text)
    hint = f" ({_HINTS[kind]})" if kind in _HINTS else ""
    raise SpecError(f"a remote of the kind {shown(kind)!r} is not known{hint}: name {KINDS}")


def shown(text: str) -> str:
    """``text`` without the user info and the queries of addresses, and without what cannot be printed."""
    clean = _QUERY.sub(r"\1", _USER_INFO.sub("://", text))
    return "".join(c if c.isprintable() else " " for c in clean)
