"""A remote in an object store that speaks S3. Alone in importing obstore."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from softcache.errors import DamageError, SoftcacheError, SpecError, StoreError
from softcache.remote import Item, shown

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_RETRIES = {
    "max_retries": 5,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(minutes=5),
}
_TIMES = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
_PIECE = 1 << 20
_ONE_REQUEST = 1 << 30  # bytes put in one; S3 takes five times that

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_WHY = {
    "NoSuchBucket": "there is no such bucket; check the address, and AWS_ENDPOINT_URL",
    "no credentials": f"there are no credentials; set {_KEYS} (AWS_SKIP_SIGNATURE=true reads what is public)",
    "401": f"the server wants other credentials (401); check {_KEYS}",
    "403": f"the server refuses (403); check {_KEYS}, and that they may read and write there",
    "301": "the bucket is in another region; set AWS_REGION",
    "5xx": "the server fails again and again ({status}); run the same command later, it goes on where it stopped",
    "unreachable": "the server cannot be reached, or broke the connection off again and again; check the network and "
    "AWS_ENDPOINT_URL, and run the same command again: it goes on where it stopped",
}


class S3:
    """See :class:`softcache.remote.Remote`. Endpoint, region and credentials are those of the AWS_… environment."""

    public = True
    card = False

    def __init__(self, store: Any, where: str):
        self._store, self.where, self.address = store, where, where

    @classmethod
    def at(cls, address: str) -> S3:
        """``s3://BUCKET/PREFIX``."""
        try:
            from obstore.store import S3Store
        except ImportError:
            raise SpecError(f"{address} needs obstore: pip install 'softcache[s3]'") from None
        parts = urlsplit(address)
        if not parts.netloc or parts.query or parts.fragment:
            raise SpecError(
                f"{shown(address)!r} is no address of a bucket: s3://BUCKET/PREFIX, without a query"
            )
        endpoint = _endpoint()
        options = {**_TIMES, "allow_http": bool(endpoint and endpoint.startswith("http://"))}
        try:
            store = S3Store(
                parts.netloc,
                prefix=parts.path.strip("/") or None,
                config={"endpoint": endpoint} if endpoint else {},
                client_options=options,  # pyright: ignore[reportArgumentType]
                retry_config=_RETRIES,  # pyright: ignore[reportArgumentType]
            )
        except Exception as e:  # the library's own, and ValueError
            raise _explain(e, f"{address} cannot be used") from None
        return cls(store, address)

    def get(self, name: str, limit: int) -> bytes | None:
        data = bytearray()
        try:
            for piece in self._store.get(name).stream(_PIECE):
                data += piece
                if len(data) > limit:
                    raise DamageError(f"{self.where}/{name} is longer than {limit:,} bytes")
        except Exception as e:
            if isinstance(e, FileNotFoundError) and _code(e) != "NoSuchBucket":
                return None
            raise _explain(e, f"cannot read {self.where}/{name}") from None
        return bytes(data)

    def put(self, name: str, data: bytes) -> None:
        self._put(name, data, "overwrite")

    def _put(self, name: str, data: bytes, mode: Any) -> None:
        try:
            self._store.put(name, data, mode=mode, use_multipart=len(data) > _ONE_REQUEST)
        except Exception as e:
            if type(e).__name__ in ("AlreadyExistsError", "PreconditionError"):
                raise _Changed from None
            raise _explain(e, f"cannot write {self.where}/{name}") from None

    def replace(self, name: str, data: bytes, old: bytes | None) -> bool:
        mode: Any = "create"
        if old is not None:
            try:
                found = self._store.get(name)
                now, mode = found.bytes(), {"e_tag": found.meta["e_tag"]}
            except FileNotFoundError:
                return False
            except Exception as e:
                raise _explain(e, f"cannot read {self.where}/{name}") from None
            if now != old:
                return False
        try:
            self._put(name, data, mode)
        except _Changed:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Item]:
        try:
            for batch in self._store.list(prefix):
                now = datetime.now(UTC)
                for found in batch:
                    age = (now - found["last_modified"]).total_seconds()
                    yield Item(found["path"], found["size"], age)
        except Exception as e:
            raise _explain(e, f"cannot list {self.where}/{prefix}") from None

    def delete(self, name: str) -> None:
        try:
            self._store.delete(name)
        except FileNotFoundError:
            pass
        except Exception as e:
            raise _explain(e, f"cannot delete {self.where}/{name}") from None


def _endpoint() -> str | None:
    """What the environment names, checked: the library panics at one that is no URL."""
    name = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if name is None:
        return None
    try:
        parts = urlsplit(os.environ[name])
        good = parts.port != 0 and re.fullmatch(
            r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?(/[\w.~/-]*)?", os.environ[name], re.ASCII
        )
    except ValueError:
        good = None
    if not good:
        raise SpecError(
            f"{name} is no address of a server: https://HOST or https://HOST:PORT, with nothing before the host"
        )
    return os.environ[name]


class _Changed(Exception):  # noqa: N818
    """What was to be replaced is not what it was."""


def _code(e: Exception) -> str | None:
    """The S3 error code in an answer."""
    found = re.search(r"<Code>(\w+)</Code>", str(e))
    return found[1] if found else None


def _explain(e: Exception, what: str) -> SoftcacheError:
    """One line for what the library says in many. Nothing that could hold an address is passed on as it is."""
    if isinstance(e, SoftcacheError):
        return e
    text = str(e)
    found = re.search(r"status code: (\d{3})", text)
    status = found[1] if found else ""
    key = _code(e) or ""
    if "/latest/api/token" in text or "/latest/meta-data" in text:
        key = "no credentials"
    elif status.startswith("5"):
        key = "5xx"
    elif status and key not in _WHY:
        key = status
    elif re.search(
        r"error sending request|connect|timed out|body from connection|HTTP error", text, re.IGNORECASE
    ):
        key = "unreachable"
    if key in _WHY:
        return StoreError(f"{what}: {_WHY[key].format(status=status)}")
    return StoreError(f"{what}: {shown(text.splitlines()[0])[:300] if text else type(e).__name__}")
