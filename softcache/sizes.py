"""Numbers of bytes, as people write them."""

from __future__ import annotations

import math
import re

from softcache.errors import SpecError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base ** (power + 1)
    for power, letter in enumerate("kmgtp")
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")
_MOST = 1 << 62


def read(said: int | str) -> int:
    """``"20GB"``, ``"1.5 TiB"``, ``"300 kB"``, ``20_000_000`` → bytes. Raises :class:`SpecError` for what is no number of
    bytes above 0."""
    if isinstance(said, str):
        match = _WRITTEN.fullmatch(said)
        factor = _UNITS.get(match[2].lower()) if match else None
        value = float(match[1]) * factor if match and factor else math.nan
    else:
        value = said if type(said) is int else math.nan
    if not 1 <= value <= _MOST:
        raise SpecError(f"{said!r} is no number of bytes: say 20GB, 1.5TiB or 300MB")
    return int(value)
