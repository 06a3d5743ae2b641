"""Tars of plain files, and ``.npy`` files in them, whose every byte follows from names, sizes, dtypes and shapes.

A header is POSIX ustar: mode 0644, owner 0, time 0, no names of owners, no extensions of any kind. So a tar is never
parsed here: who knows what should be in it compares each header with the one it makes itself, and links, devices, paths
that lead outside, long names, sparse files and sizes that lie are all simply other bytes.
"""

from __future__ import annotations

import struct

import numpy as np

from softcache.errors import SpecError

BLOCK = 512
END = bytes(2 * BLOCK)
MOST = 8**11 - 1  # bytes of a member: eleven octal digits
_NAME = 100
_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNED = 64


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member. :class:`SpecError` for what ustar does not hold."""
    raw = name.encode()
    if len(raw) > _NAME or size > MOST:
        raise SpecError(
            f"a tar does not hold {name!r} of {size:,} bytes: names have up to {_NAME} bytes and members up to {MOST:,}; "
            "build the cache with a smaller --block-rows"
        )
    numbers = (b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"%011o\0" % 0)
    tail = (b"0", b"", b"ustar\0", b"00", b"", b"", b"0000000\0", b"0000000\0", b"")
    layout = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
    checksum = sum(layout.pack(raw, *numbers, b" " * 8, *tail))
    return layout.pack(raw, *numbers, b"%06o\0 " % checksum, *tail)


def padding(size: int) -> int:
    """How many zeros follow a member of this size."""
    return -size % BLOCK


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the values of an ``.npy`` file, version 1.0, in C order and little-endian."""
    descr = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(map(int, shape))!r}, }}"
    before = len(_MAGIC) + 2
    text += " " * (-(before + len(text) + 1) % _ALIGNED) + "\n"
    return _MAGIC + struct.pack("<H", len(text)) + text.encode()
