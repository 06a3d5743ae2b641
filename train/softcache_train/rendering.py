"""The pixels of a batch: decoded and rendered, in this process or in one of its own. No torch here: such a process
starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

import numpy as np

from softcache.errors import SourceError, SpecError
from softcache.recipe import View, gather, render
from softcache.source.kept import Kept

Size = tuple[int, int]


class Room(Protocol):
    """Room for an array of uint8, whatever is in it."""

    def __call__(self, shape: tuple[int, ...], /) -> np.ndarray: ...


def fresh(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def draw(
    image: Kept, samples: Sequence[int], views: Sequence[Sequence[View]], sizes: Sequence[Size], room: Room
) -> list[np.ndarray]:
    """What is shown of the samples, at each size: uint8 (len(views) · len(samples), h, w, 3), first all samples in
    their first views, then all in their second. An image is decoded once for all of them.
    """
    found = [room((len(views) * len(samples), *size, 3)) for size in sizes]
    for i, sample in enumerate(samples):
        own = image(sample)
        for turn, shown in enumerate(views):
            images = gather(
                sample, shown[i], lambda n, own=own, sample=sample: own if n == sample else image(n)
            )
            for size, out in zip(sizes, found, strict=True):
                out[turn * len(samples) + i] = render(own, shown[i], size, images)
    return found


class Processes:
    """Processes that :func:`draw`, each with a part of the room for decoded images.

    Raises :class:`SpecError` where the source cannot be handed to another process.
    """

    def __init__(self, image: Kept, count: int):
        try:
            pickle.dumps(image)
        except Exception as e:
            raise SpecError(
                f"processes=True: {image.source.describe()} cannot be handed to other processes ({e}); leave it out, and "
                "the workers are threads"
            ) from e
        own = Kept(image.source, image.room // count, image.index)
        # not forked: threads of ours may hold locks at that moment
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(own,))

    def draw(
        self, samples: Sequence[int], views: Sequence[Sequence[View]], sizes: Sequence[Size]
    ) -> list[np.ndarray]:
        try:
            return self._pool.submit(_draw, samples, views, sizes).result()
        except BrokenProcessPool as e:
            raise SourceError(
                "a process that decodes images was ended from outside, perhaps for want of memory: take fewer workers, or "
                "threads (processes=False)"
            ) from e

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


_image: Kept | None = None  # of a process of a pool


def _begin(image: Kept) -> None:
    global _image
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _image = image


def _end_with_parent() -> None:
    """A trainer that was killed closes nothing, and this process holds the other end of its own queue: it would wait on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _draw(samples: Sequence[int], views: Sequence[Sequence[View]], sizes: Sequence[Size]) -> list[np.ndarray]:
    assert _image is not None
    return draw(_image, samples, views, sizes, fresh)
