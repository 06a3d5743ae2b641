"""An export with pixels in it → batches, read from front to back: from a disk, or from wherever tars are served.

Nothing else is needed, neither the cache nor its source. Blocks come in an order of each epoch, rows of a block as they
lie (which is shuffled, see docs/format.md), and a window of rows is shuffled once more. What a batch holds is a function
of (seed, epoch, step, rank, world) and ``window`` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from softcache import manifest as m
from softcache import shown, tars
from softcache.block import Block
from softcache.cache import Cache, open_finished
from softcache.errors import DamageError, SpecError
from softcache.indices import is_whole
from softcache.keyed import Permutation, in_turn
from softcache.members import Member
from softcache.recipe import View, render
from softcache.source.decode import to_rgb
from softcache.store import Opened, Store
from softcache_train.loader import Batch, check_counts, normalise, refuse_constant
from softcache_train.targets import BatchTarget, to_tensors

WINDOW = 1024  # rows
_PIECE = 1 << 16  # numbers shuffled at a time


@dataclass(frozen=True, eq=False)
class _Arrays:
    """What a tar holds of a whole block: samples (rows,), fields by path, and views and labels by name."""

    samples: np.ndarray
    fields: dict[str, np.ndarray]
    told: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Row:
    """A row of a block with its image, as it stands in the tar."""

    of: _Arrays
    row: int
    member: Member
    content: bytes


class TarLoader:
    """Batches of an export with embedded images or views, as :class:`~softcache_train.Loader` gives them of a cache.

    Iterating gives the rest of one epoch, from ``epoch`` and ``step``, which say at every moment what comes next. An epoch
    shows every sample once, in one view; every rank has equally many steps, and no row comes twice. Every member is
    compared with its digest before it is used.

    Args:
        export: the folder; or a function that opens a file of it by name (``"tars.json"``), for reading bytes.
        global_batch: rows a step over all ranks; the last, partial batch of an epoch is dropped.
        size: (h, w) of the pixels; by default that of ``input_spec``. Embedded views have the teacher's.
        input_spec: see :class:`~softcache_train.Loader`.
        workers: threads that decode and render; one more reads.
        targets: names of the targets to read, or one name; all by default.
        views: train on the first so many of the views; all by default.
        window: how many rows are in memory to be shuffled.

    Raises:
        SpecError: the folder is no export with pixels, no full batch fits, or an option cannot be understood.
        MismatchError: the cache is not replayable: its pixels are not what the teacher saw.
        DamageError: naming tar and member, for what is not what was written.
    """

    def __init__(
        self,
        export: str | Path | Callable[[str], BinaryIO],
        *,
        global_batch: int,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        input_spec: Mapping[str, Any] | None = None,
        workers: int = 2,
        targets: str | Iterable[str] | None = None,
        rank: int = 0,
        world: int = 1,
        views: int | None = None,
        window: int = WINDOW,
    ):
        check_counts(global_batch, workers, rank, world)
        for name, value in (("workers", workers), ("window", window)):
            if not is_whole(value) or value < 1:
                raise SpecError(f"{name}={value!r}: it is a whole number, at least 1")
        self._store = Opened(export) if callable(export) else Store(export)
        if not callable(export) and not any(map(self._store.exists, (m.MANIFEST, tars.NAME))):
            raise SpecError(
                f"{export} is no export: softcache export … --to webdataset -o {export} makes one"
            )
        self.cache = open_finished(self._store)
        self._tars = _with_pixels(self.cache)
        if views is not None and not 1 <= views <= self.cache.views:
            raise SpecError(f"views={views}, and the cache {self.cache.path} holds {self.cache.views}")
        self.input_spec = input_spec or self.cache.identity["teacher"]["input_spec"]
        height, width = size or self.input_spec["size"]
        self.size = (height, width)
        seen = self._tars.contents.size
        if self._tars.manifest.embed == "views" and self.size != seen:
            raise SpecError(
                f"size={self.size}: the views in {self.cache.path} were rendered at {seen}; "
                "train at that, or export with --embed-images"
            )
        self.names = self.cache.names(targets)
        self.views, self.seed, self.window = views or self.cache.views, seed, window
        self.workers, self.rank, self.world, self.global_batch = workers, rank, world, global_batch
        grid = self.cache.grid
        self._valid = np.full(grid.blocks_per_view, grid.block_rows)  # rows of each block
        self._valid[-1] = grid.samples - (len(self._valid) - 1) * grid.block_rows
        np.subtract.at(self._valid, grid.positions(self.cache.invalid) // grid.block_rows, 1)
        if not len(self):
            raise SpecError(
                f"global_batch={global_batch} does not fit {self._valid.sum()} samples: an epoch would have no step"
            )
        self.epoch = self.step = 0

    def __len__(self) -> int:
        """Steps in an epoch."""
        return int(self._valid.sum()) // self.global_batch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        view = in_turn(self.views, epoch, "view", self.seed)
        for step, batch in enumerate(self._ahead(view, self._read(epoch, view, self.step)), self.step):
            self.step = step + 1
            yield batch
        self.epoch, self.step = epoch + 1, 0

    def _ahead(self, view: int, batches: Iterator[list[_Row]]) -> Iterator[Batch]:
        """Batches in order: one thread reads, the workers make the next few."""
        reader = ThreadPoolExecutor(1, thread_name_prefix="softcache-tars")
        makers = ThreadPoolExecutor(self.workers, thread_name_prefix="softcache-render")
        waiting: deque[Future[Batch]] = deque()
        try:
            coming = reader.submit(next, batches, None)
            while (rows := coming.result()) is not None:
                coming = reader.submit(next, batches, None)
                waiting.append(makers.submit(self._batch, view, rows))
                if len(waiting) > self.workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for pool in (makers, reader):
                pool.shutdown(cancel_futures=True)

    # -- which rows, and in which order ------------------------------------------------------------------

    def _read(self, epoch: int, view: int, step: int) -> Iterator[list[_Row]]:
        """The rows of each step from ``step`` on."""
        steps = len(self)
        start, stop = (steps * (r * self.global_batch // self.world) for r in (self.rank, self.rank + 1))
        each = (stop - start) // steps
        first, total = step * each, stop - start
        coming = shuffled(total, self.window, first, "window", self.seed, epoch, self.rank)
        soon = list(islice(coming, 2 * self.window))
        # of the rows that come before, those that an earlier step had are not wanted; all from ``sure`` on are
        sure = first + self.window
        late = {number for number in soon if number < sure}
        rows, held = (
            self._rows(epoch, view, start, total, lambda n: n >= sure or n in late),
            dict[int, _Row](),
        )
        numbers = chain(soon, coming)
        for _ in range(step, steps):
            batch = []
            for number in islice(numbers, each):
                while number not in held:
                    held.update([next(rows)])
                batch.append(held.pop(number))
            yield batch
        next(rows, None)  # the end of the last tar is looked at, too

    def _rows(
        self, epoch: int, view: int, start: int, total: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, _Row]]:
        """The wanted ones of this rank's ``total`` rows, which begin at number ``start`` of the epoch's stream, each with
        its number from there."""
        count = len(self._valid)
        order = Permutation(count, "tars", self.seed, epoch).inverse(np.arange(count))
        first = -start
        for index in order.tolist():
            numbers = range(first, first + int(self._valid[index]))
            first = numbers.stop
            if numbers.stop <= 0 or numbers.start >= total:
                continue
            block = self.cache.grid.block(view, index)
            rows = zip(self._tars.contents.rows(block).tolist(), numbers, strict=True)
            here = {row: n for row, n in rows if 0 <= n < total and wanted(n)}
            if here:
                yield from self._walk(block, here)

    def _walk(self, block: Block, wanted: Mapping[int, int]) -> Iterator[tuple[int, _Row]]:
        """These rows of a block, with their numbers."""
        paths = {p for p in self.cache.arrays if p.startswith("view/")}
        paths |= {
            f"targets/{name}/{field.name}" for name in self.names for field in self.cache.targets[name].fields
        }

        def asked(member: Member) -> bool:
            if member.kind in ("image", "pixels"):
                return member.row in wanted
            return member.kind in ("label", "shown") or (member.kind == "array" and member.of in paths)

        arrays = _Arrays(self.cache.grid.samples_of(block), {}, {})
        with self._store.stream(tars.file(block)) as tar:
            for member, content in self._tars.walk(block, tar, asked):
                if member.kind in ("image", "pixels"):
                    yield wanted[member.row], _Row(arrays, member.row, member, content)
                elif member.of.startswith("targets/"):
                    arrays.fields[member.of] = member.values(content)
                else:
                    arrays.told[member.of.removeprefix("view/")] = member.values(content)

    # -- batches -----------------------------------------------------------------------------------------

    def _batch(self, view: int, rows: list[_Row]) -> Batch:
        views = [shown.view_of(row.of.told, row.row) for row in rows]
        samples = np.array([row.of.samples[row.row] for row in rows])
        targets = self._targets(rows)
        refuse_constant(targets, len(np.unique(samples)))
        pixels = np.stack([self._pixels(row, v) for row, v in zip(rows, views, strict=True)])
        labels, others = (
            torch.tensor([int(row.of.told.get(of, row.of.told["label"])[row.row]) for row in rows])
            for of in ("label", "partner_label")
        )
        lam = torch.tensor([v.mix.blend.share if v.mix else 1.0 for v in views], dtype=torch.float32)
        images: Tensor = normalise(pixels, self.input_spec)
        return Batch(images, labels, others, lam, samples, (view,), views, targets)

    def _targets(self, rows: list[_Row]) -> dict[str, BatchTarget]:
        found = {}
        for name in self.names:
            target = self.cache.targets[name]
            paths = {field.name: f"targets/{name}/{field.name}" for field in target.fields}
            fields = {
                f: np.stack([row.of.fields[path][row.row] for row in rows]) for f, path in paths.items()
            }
            positions = self.cache.grid.positions(np.array([row.of.samples[row.row] for row in rows]))
            found[name] = to_tensors(target.decode(fields | self.cache.beside(name, positions)))
        return found

    def _pixels(self, row: _Row, view: View) -> np.ndarray:
        if row.member.kind == "pixels":
            return row.member.values(row.content)
        try:
            return render(to_rgb(row.content), view, self.size)
        except (OSError, ValueError) as e:
            raise DamageError(f"{self.cache.path}: the image {row.member.name} cannot be decoded: {e}") from e


def shuffled(count: int, window: int, first: int, *keys: int | str) -> Iterator[int]:
    """The numbers ``0 … count-1``, each put at most ``window`` places back or forward, by the keys; from place ``first`` on.

    Who takes them in this order and reads them in theirs holds at most ``window`` of them at a time. No array of them all:
    a number moves back by less than ``window``, so that what lies two windows before ``first`` has come by then.
    """
    moves, start = Permutation(max(count, 1), *keys), max(0, first - 2 * window)
    place, held, late = start, np.zeros(0, np.int64), np.zeros(0)
    for low in range(start, count, _PIECE):
        numbers = np.arange(low, min(low + _PIECE, count))
        held = np.concatenate([held, numbers])
        late = np.concatenate([late, numbers + moves.forward(numbers) * (window / count)])
        order = np.argsort(late, kind="stable")
        held, late = held[order], late[order]
        done = len(held) if numbers[-1] == count - 1 else int(np.searchsorted(late, numbers[-1] + 1))
        yield from held[max(0, first - place) : done].tolist()
        place, held, late = place + done, held[done:], late[done:]


def _with_pixels(cache: Cache) -> tars.Tars:
    if cache.tars is None or cache.tars.manifest.embed == "nothing":
        what = "an export without pixels" if cache.tars else "no export to tars"
        raise SpecError(
            f"{cache.path} is {what}: export the cache with --embed-images or --embed-views, or give a Loader its source"
        )
    cache.require_replayable("a TarLoader")
    return cache.tars
