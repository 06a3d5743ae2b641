"""Under which licences a cache's source, its teacher and the cache itself are, and whether it may be published.

They stand in the manifest and not in the identity: they change no value. They are what somebody stated, identifiers of
SPDX where there are some; nothing here is legal advice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping

from pydantic import TypeAdapter, ValidationError

from softcache import cache as caches
from softcache import manifest as m
from softcache.cache import Cache
from softcache.errors import NotBuilt, SpecError, nearest

WHAT = ("source", "teacher", "cache")
# what says that nothing may be passed on, or nothing at all
CLOSED = (
    "all-rights-reserved", "no-redistribution", "noassertion", "none", "proprietary", "unknown", "unlicensed",
)  # fmt: skip

_LICENCE = TypeAdapter(m.Licence)
_CLOSED = re.compile(rf"(?<![a-z0-9])({'|'.join(CLOSED)})(?![a-z0-9])")
_NO_DERIVATIVES = re.compile(r"CC[- ]BY([- ]NC)?[- ]ND", re.IGNORECASE)
_NOT_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|research-only", re.IGNORECASE)


def read(said: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """Licences from ``{"source": "CC-BY-4.0"}`` or ``["source=CC-BY-4.0"]``; an empty one is not stated, and ``""``.

    Raises :class:`SpecError`.
    """
    pairs = said.items() if isinstance(said, Mapping) else [_pair(text) for text in _texts(said)]
    found: dict[str, str] = {}
    for what, licence in pairs:
        if what not in WHAT:
            raise SpecError(f"licence of {what!r}: there is one of {', '.join(WHAT)}{nearest(what, WHAT)}")
        if what in found:
            raise SpecError(f"the licence of the {what} is stated twice")
        if licence:
            _check(what, licence)
        found[what] = licence
    return found


def _texts(said: Iterable[str]) -> list[str]:
    return [said] if isinstance(said, str) else list(said)


def _pair(text: str) -> tuple[str, str]:
    what, equals, licence = str(text).partition("=")
    if not equals:
        raise SpecError(f"licence {text!r} is written WHAT=LICENCE, like source=CC-BY-4.0")
    return what.strip(), licence.strip()


def _check(what: str, licence: str) -> None:
    try:
        _LICENCE.validate_python(licence, strict=True)
    except ValidationError:
        raise SpecError(
            f"licence of the {what} {str(licence)[:60]!r}: an identifier of SPDX such as CC-BY-4.0, or a word such as "
            "proprietary, up to 200 letters, digits, spaces and any of . + - ( )"
        ) from None


def state(cache: Cache, said: Mapping[str, str] | Iterable[str]) -> Cache:
    """Put licences into a finished cache's manifest; those that are not mentioned stay. Returns the cache, opened anew.

    Nothing else is touched, but the manifest has another digest, which is the cache's name.
    Raises :class:`SpecError`, and :class:`NotBuilt` while there is no manifest.
    """
    new = read(said)
    if cache.tars:
        raise SpecError(
            f"{cache.path} is an export to tars: state the licences of its cache, and export that again"
        )
    while True:
        with cache.store.claim("manifest") as mine:
            if mine:
                _write(caches.open(cache.path), new)
                break
        time.sleep(0.05)
    cache.store.drop_claims()
    return caches.open(cache.path)


def _write(cache: Cache, new: dict[str, str]) -> None:
    if cache.manifest is None:
        raise NotBuilt(f"{cache.path} is not finished: state its licences where you build it, by --licence")
    kept = {what: licence for what, licence in (cache.licences | new).items() if licence}
    if kept != cache.licences:
        changed = cache.manifest.model_copy(update={"licences": kept})
        cache.store.put(m.MANIFEST, changed.signed().to_bytes())


def refusal(manifest: m.Manifest) -> str:
    """Why a cache may not be published, one line that names the licence; empty where nothing stands against it.

    A licence that is missing forbids it, and one that has a word of :data:`CLOSED`. A cache is derived from its source
    and by its teacher: their licences must not be NoDerivatives ones of Creative Commons.
    """
    for what in WHAT:
        licence = manifest.licences.get(what, "")
        if not licence:
            return f"the licence of its {what} is not stated: softcache licence CACHE {what}=LICENCE"
        if _CLOSED.search(licence.lower().replace(" ", "-")):
            return f"the licence of its {what} is {licence!r}, which forbids passing it on"
        if what != "cache" and _NO_DERIVATIVES.search(licence):
            return (
                f"the licence of its {what} is {licence!r}, which forbids passing on what is derived from it"
            )
    return ""


def warnings(manifest: m.Manifest) -> list[str]:
    """What whoever publishes it should know, a line each."""
    stated = {what: manifest.licences.get(what, "") for what in ("source", "teacher")}
    own = manifest.licences.get("cache", "")
    if not own or not_commercial(own):
        return []
    return [
        f"the licence of its {what} ({licence}) is for non-commercial use, and that of the cache ({own}) "
        "does not say so"
        for what, licence in stated.items()
        if not_commercial(licence)
    ]


def not_commercial(licence: str) -> bool:
    """Does its name say that it is for non-commercial use?"""
    return _NOT_COMMERCIAL.search(licence) is not None
