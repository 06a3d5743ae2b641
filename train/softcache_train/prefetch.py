"""What lets a step find its batch ready: work ahead of it by threads, and memory that is used again."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


def ahead(
    steps: Iterable[int], workers: int, read: Callable[[int], A], make: Callable[[A], B]
) -> Iterator[tuple[int, A, B]]:
    """Each step, in order, with ``asked = read(step)`` and ``make(asked)``.

    One thread reads, in the order of the steps; ``workers`` threads make. At most ``workers + 2`` steps are under way.
    Without workers all is done in the thread that iterates.
    """
    if not workers:
        for step in steps:
            asked = read(step)
            yield step, asked, make(asked)
        return
    reader = ThreadPoolExecutor(1, thread_name_prefix="softcache-read")
    makers = ThreadPoolExecutor(workers, thread_name_prefix="softcache-render")

    def begin(step: int) -> tuple[A, Future[B]]:
        asked = read(step)
        return asked, makers.submit(make, asked)

    waiting: deque[tuple[int, Future[tuple[A, Future[B]]]]] = deque()

    def first() -> tuple[int, A, B]:
        step, begun = waiting.popleft()
        asked, made = begun.result()
        return step, asked, made.result()

    try:
        for step in steps:
            waiting.append((step, reader.submit(begin, step)))
            if len(waiting) > workers + 1:
                yield first()
        while waiting:
            yield first()
    finally:
        for pool in (reader, makers):
            pool.shutdown(cancel_futures=True)


class Buffers:
    """Arrays that are used again once nobody holds them, nor a tensor made of them; safe to share between threads.

    A fresh array of some megabytes costs a page fault for each 4 kB of it, more than filling it. Where there is CUDA,
    images lie in pinned memory, which torch uses again by itself as soon as they are copied.
    """

    def __init__(self, most: int):
        self._most = most  # of a shape
        self._kept: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}
        self._lock = threading.Lock()
        self._pinned = torch.cuda.is_available()
        # a copy to another accelerator may be under way when the last name of a tensor is gone
        self._again = not torch.accelerator.is_available()

    def images(self, shape: tuple[int, ...]) -> Tensor:
        """Room for float32, whatever is in it."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.float32, pin_memory=True)
        return torch.from_numpy(self.array(shape, "float32"))

    def array(self, shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
        """Room for an array, whatever is in it."""
        if not self._again:
            return np.empty(shape, dtype)
        with self._lock:
            kept = self._kept.setdefault((shape, dtype), [])
            for i in range(len(kept)):
                if sys.getrefcount(kept[i]) <= _NOBODY:
                    return kept[i]
            new = np.empty(shape, dtype)
            if len(kept) < self._most:
                kept.append(new)
            return new

    def pinned(self, targets: dict[str, Any]) -> dict[str, Any]:
        """The targets of a batch, where copies of them are asynchronous."""
        if not self._pinned:
            return targets
        return {name: together([one], lambda t: t[0].pin_memory()) for name, one in targets.items()}


_NOBODY = next(sys.getrefcount(kept[i]) for kept in [[np.empty(0)]] for i in range(1))


def together(
    parts: Sequence[T], join: Callable[[list[Tensor]], Tensor] = lambda tensors: torch.cat(tensors)
) -> T:
    """One target of several batches as that of one: their tensors joined, and what else they say, which is the same."""
    first: Any = parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            return join(values)
        if isinstance(values[0], dict):
            return {key: join([one[key] for one in values]) for key in values[0]}
        return values[0]

    return type(first)(**{field.name: joined(field.name) for field in fields(first)})
