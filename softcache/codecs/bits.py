"""Whole numbers of a few bits each, packed into bytes: the highest bit first, a row's last byte padded with zeros."""

from __future__ import annotations

import numpy as np


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` numbers of so many bits."""
    return -(-count * bits // 8)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned ``(n, count)``, each below ``2**bits`` → uint8 ``(n, packed_bytes(count, bits))``."""
    shifts = np.arange(bits - 1, -1, -1)
    split = (numbers[..., None].astype(np.uint32) >> shifts.astype(np.uint32)) & 1
    # not -1: there may be no rows
    return np.packbits(split.astype(np.uint8).reshape(len(numbers), numbers.shape[1] * bits), axis=1)


def unpack(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The inverse of :func:`pack`: uint32 ``(n, count)``."""
    split = np.unpackbits(data, axis=1, count=count * bits).reshape(len(data), count, bits)
    numbers = np.zeros(split.shape[:2], np.uint32)
    for bit in range(bits):
        numbers <<= np.uint32(1)
        numbers |= split[..., bit]
    return numbers
