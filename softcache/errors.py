"""One exception tree. Every message says what, where, the likely cause and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_MESSAGE = 1000


class SoftcacheError(Exception):
    """Base of everything softcache raises on purpose. ``exit_code`` is the command line's status.

    Its message is one line of at most :data:`MAX_MESSAGE` characters, whatever names and values of a file it quotes.
    """

    exit_code = 1

    def __init__(self, message: str = ""):
        told = printable(message)
        if len(told) > MAX_MESSAGE:
            told = f"{told[: MAX_MESSAGE // 2 - 2]} … {told[1 - MAX_MESSAGE // 2 :]}"
        super().__init__(told)


class SpecError(SoftcacheError):
    """A spec string, flag or option that cannot be understood."""


class SourceError(SoftcacheError):
    """A source that is missing, empty, ambiguous or not recognised."""


class UnreadableImage(SourceError):  # noqa: N818 - named for what it is, as NotBuilt is
    """An image whose bytes cannot be decoded."""


class TeacherError(SoftcacheError):
    """A teacher that cannot be loaded, or whose output cannot be cached."""


class CodecError(SoftcacheError):
    """Values that a codec cannot hold within its bound."""


class StoreError(SoftcacheError):
    """Bytes that could not be put on, or taken from, the disk."""


class NoCache(SoftcacheError):  # noqa: N818
    """A folder, or nothing, where a cache was expected."""


class NotBuilt(SoftcacheError):  # noqa: N818
    """A row whose block has no receipt yet: the build has not reached it."""


class NotPulled(SoftcacheError):  # noqa: N818
    """A row that is in the cache, and not in what was pulled of it. The message has the command that fetches it."""


class InvalidRow(SoftcacheError):  # noqa: N818
    """A row whose image could not be read when the cache was built with ``skip_corrupt``."""


class DamageError(SoftcacheError):
    """Bytes that are not what the manifest says they are."""

    exit_code = 2


class MismatchError(SoftcacheError):
    """Two things that do not belong together: a cache and another recipe, source, teacher or codec."""

    exit_code = 3


def counted(number: int, what: str) -> str:
    """``"1 image"``, ``"1,234 images"``, ``"2 classes"``."""
    ending = "" if number == 1 else "es" if what.endswith(("s", "x")) else "s"
    return f"{number:,} {what}{ending}"


def printable(text: str) -> str:
    """``text`` without what would move a terminal's cursor, colour it or break its line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def suggest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` when a known word is close to ``word``, else nothing."""
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """What :func:`suggest` says, or else the known words."""
    names = sorted(known)
    hint = suggest(word, names)
    if hint or not names:
        return hint
    shown = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
    return f" (known: {shown})"
