"""Open, check and read a cache. It knows nothing of teachers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softcache import manifest as m
from softcache import pulled, spec, tars, views
from softcache.arrays import block_arrays, constant, view_rows
from softcache.beside import Beside
from softcache.block import Block
from softcache.codecs import Fields
from softcache.documents import read_identity, read_ids, read_manifest, read_receipt
from softcache.errors import (
    DamageError,
    InvalidRow,
    MismatchError,
    NoCache,
    NotBuilt,
    SourceError,
    SpecError,
    nearest,
)
from softcache.identity import Identity, TeacherId
from softcache.indices import integers, is_whole
from softcache.parts import Part, follow, identity_file, together
from softcache.reader import Files, Reader
from softcache.recipe import View
from softcache.row import Row
from softcache.store import Store
from softcache.targets import Target
from softcache.zarrfile import Array, map_plain


def open(path: str | Path) -> Cache:
    """Open the cache in a folder; while it is being built, what is committed can be read.

    Raises:
        NoCache: there is none.
        NotPulled: it is being pulled.
        DamageError: its manifest is not what was written.
        MismatchError: it was written by a newer major version.
    """
    store = Store(path)
    here = pulled.read(store)
    if os.path.lexists(store.path(m.MANIFEST)):
        return open_finished(store, here)
    if here is not None:
        raise pulled.unfinished(store, here)
    if store.exists(identity_file(0)):
        return Cache(store, read_identity(store), None)
    if not store.root.is_dir():
        what = "is a file" if store.root.exists() else "does not exist"
    else:
        what = f"holds no {m.MANIFEST}" if any(store.root.iterdir()) else "is empty"
    raise NoCache(f"{store.root} is no cache: it {what}. Build one with build-cache … -o FOLDER")


def open_finished(store: Store, here: pulled.Pulled | None = None) -> Cache:
    """The cache, or the export of one to tars, whose manifest is in a store. Raises as :func:`open`."""
    manifest = read_manifest(store, here.remote if here else "")
    cache = Cache(store, manifest.identity, manifest, here)
    if store.exists(tars.NAME):
        cache.reader.shards = cache.tars = tars.Tars(store, cache)
    return cache


class Cache:
    """A manifest and its shards. Safe to use from threads, and after a fork.

    Attributes:
        samples: number of samples. views: views of each.
        targets: name → :class:`~softcache.targets.Target`.
        parameters: numbers kept of every view's pixel ops.
        mixed: are views mixed with those of other samples? tiled: are views mosaics?
        replayable: is it known what the teacher saw? Where it is not, views are whole images.
        identity: what was built, as plain JSON values; targets and views are those of all parts, the rest is part 0's.
        parts: what it was made of, see :mod:`softcache.parts`.
        manifest: None while the build is unfinished. sealed: what it says of each part.
        tars: where its rows lie, of an export to WebDataset; else None.
        pulled: what is here of it, see :mod:`softcache.pulled`; None for all.
        teacher_rows: rows that a teacher answered in the very call of ``build`` that returned this; 0 when opened.
        pace: and how fast, see :meth:`softcache.meter.Meter.pace`; empty when opened.
    """

    def __init__(
        self,
        store: Store,
        identity: Identity,
        manifest: m.Manifest | None,
        here: pulled.Pulled | None = None,
    ):
        self.store, self.manifest, self.pulled = store, manifest, here
        self.parts: tuple[Part, ...] = follow(
            [identity, *(p.identity for p in manifest.parts)] if manifest else [identity]
        )
        self.sealed: tuple[m.Sealed, ...] = (manifest, *manifest.parts) if manifest else ()
        self._identity = whole = together(self.parts)
        self._where = str(store.root)  # in messages
        self.identity: dict[str, Any] = whole.model_dump(mode="json")
        self.grid = whole.make_grid()
        self.samples, self.views = self.grid.samples, self.grid.views
        self.teacher_rows = 0
        self.pace: dict[str, float] = {}
        self.targets: dict[str, Target] = whole.make_targets()
        recipe = whole.recipe
        self.parameters, self.mixed, self.tiled = recipe.parameters, recipe.mixed, recipe.tiled
        self.replayable = recipe.replayable
        seen = view_rows(0, self.parameters, self.mixed, self.tiled)
        self.arrays = {a.path: a for a in block_arrays(self.grid, self.targets, seen)}
        # A finished cache has every block; one that is being built is asked before a file is touched.
        check = self._built if manifest is None else lambda block: None
        self.tars: tars.Tars | None = None
        shards = Files(store) if here is None else pulled.Some(store, here)
        self.reader = Reader(shards, self.grid, list(self.arrays.values()), check)
        self._beside = Beside(self)

    @property
    def path(self) -> Path:
        return self.store.root

    @property
    def complete(self) -> bool:
        return self.manifest is not None

    @property
    def digest(self) -> str:
        """The cache's name: the sha256 of its manifest. :class:`NotBuilt` while there is none."""
        if self.manifest is None:
            raise NotBuilt(f"{self.path} is not finished: run the same build-cache command again")
        return self.manifest.digest

    @property
    def classes(self) -> tuple[str, ...] | None:
        classes = self._identity.source.classes
        return None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        state = self.manifest.digest[:12] if self.manifest else "unfinished"
        return f"Cache({str(self.path)!r}, {self.samples} samples × {self.views} views, {', '.join(self.targets)}; {state})"

    @cached_property
    def ids(self) -> Sequence[str]:
        """The samples' ids in source order."""
        offsets, text = self.constant("ids/offsets"), self.constant("ids/bytes")
        return read_ids(offsets, text, self._identity, f"{self.path}/ids")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {id: i for i, id in enumerate(self.ids)}

    def index(self, id: str) -> int:
        """The sample with this id. :class:`SourceError` when there is none."""
        try:
            return self._index[id]
        except (KeyError, TypeError):
            strings = "" if isinstance(id, str) else "; ids are strings"
            raise SourceError(
                f"the cache {self.path} has no id {id!r}{nearest(str(id), self._some_ids())}{strings}"
            ) from None

    def _some_ids(self) -> Sequence[str]:
        return self.ids if self.samples <= 10_000 else self.ids[:3]

    @cached_property
    def invalid(self) -> np.ndarray:
        """Samples (int64, sorted) whose image could not be read: their rows hold nothing."""
        if self.manifest is None:
            raise NotBuilt(f"{self.path} is not finished: which images are unreadable is not known yet")
        return np.array(self.manifest.invalid, np.int64)

    @property
    def equivariance(self) -> dict[str, dict[str, float]]:
        """How far each spatial target moves with its view, as the build measured; see docs/format.md."""
        return {} if self.manifest is None else self.report.equivariance

    @property
    def licences(self) -> dict[str, str]:
        """Those of ``source``, ``teacher`` and ``cache`` that were stated: see :mod:`softcache.licences`."""
        return {} if self.manifest is None else {**self.manifest.licences}

    @cached_property
    def report(self) -> m.Report:
        """What was measured, of all parts. :class:`NotBuilt` while there is no manifest."""
        if self.manifest is None:
            raise NotBuilt(f"{self.path} is not finished: run the same build-cache command again")
        views = [part.grid.views - part.grid.first for part in self.parts]
        whose = [part.named for part in self.parts]
        return m.together([(v, w, s.report) for v, w, s in zip(views, whose, self.sealed, strict=True)])

    def teacher(self, target: str) -> dict[str, Any]:
        """Who said a target: the identity of its teacher, as plain JSON values."""
        return self.teacher_id(target).model_dump(mode="json")

    def teacher_id(self, target: str) -> TeacherId:
        """As :meth:`teacher`."""
        self._require(target)
        return next(part for part in self.parts if target in part.targets).identity.teacher

    @property
    def constants(self) -> dict[str, m.Constant]:
        """Its constant arrays by path, those of parts below ``parts/NUMBER/``; none while it is being built."""
        return {path: one for part in self.sealed for path, one in part.constants.items()}

    def constant(self, path: str) -> np.ndarray:
        """A constant array of the cache (``ids/offsets``, ``canary/pixels``), mapped."""
        array = self._constant_array(path)
        return map_plain(self.store.path(array.file()), array).reshape(array.shape)

    def _constant_array(self, path: str) -> Array:
        if self.manifest is not None:
            known = self.constants
            if path not in known:
                own = path.startswith(("ids/", "canary/"))  # which every cache has
                asked = known if own else [name for name in known if "constants/" in name]
                told = f"{self.path} has no constant {path!r}{nearest(path, asked)}"
                raise DamageError(told) if own else SpecError(told)
            return known[path].array(path)
        offsets = constant("ids/offsets", (self.samples + 1,), "int64")
        if path == offsets.path:
            return offsets
        if path != "ids/bytes":
            raise NotBuilt(f"{self.path} is not finished: its {path} is written at the end of the build")
        characters = self.constant(offsets.path)[-1]
        return constant("ids/bytes", (int(characters),), "uint8")

    # -- rows ------------------------------------------------------------------------------------------

    def __getitem__(self, row: tuple[str, int]) -> Row:
        """``cache[id, view]`` → the row's targets by name."""
        id, view = row
        sample = self.index(id)
        self._check(view, np.array([sample]))
        return Row(self, sample, view)

    def read(
        self,
        view: int,
        samples: np.ndarray,
        names: str | Iterable[str] | None = None,
        *,
        slab: bool = True,
    ) -> dict[str, Any]:
        """The decoded targets of some samples under one view.

        Args:
            view: ``0 … views-1``.
            samples: int64 ``(n,)``, indices into :attr:`ids`, in any order.
            names: which targets, one or several; all by default.
            slab: keep the small fields of the whole view in this process's memory, which makes the next reads of it
                fast. Without, rows come from the mapped files, whose memory all processes share.

        Returns:
            name → :class:`~softcache.targets.Logits` (``SparseLogits``, ``HardLabels``), feature map or embedding, rows in
            the order of ``samples``.

        Raises:
            NotBuilt, InvalidRow, DamageError.
            IndexError: a view or sample out of range. SpecError: what is no view, sample or name at all.
        """
        samples = integers(samples)
        self._check(view, samples)
        positions = self.grid.positions(samples)
        return {name: self._target(name, view, positions, slab) for name in self.names(names)}

    def names(self, wanted: str | Iterable[str] | None = None) -> tuple[str, ...]:
        """The targets that ``wanted`` names, one or several; all by default.

        Raises :class:`MismatchError` where there is none of a name, :class:`SpecError` for what is no name.
        """
        if wanted is None:
            return tuple(self.targets)
        if isinstance(wanted, str):
            wanted = [wanted]
        names = tuple(wanted) if isinstance(wanted, Iterable) else (wanted,)
        for name in names:
            self._require(name)
        return names

    def _require(self, name: str) -> None:
        if not isinstance(name, str):
            raise SpecError(f"targets are asked for by name, such as {min(self.targets)!r}, not as {name!r}")
        if name not in self.targets:
            hint = nearest(name, self.targets)
            raise MismatchError(f"the cache {self._where} has no target {name!r}{hint}")

    def read_views(self, view: int, samples: np.ndarray, *, slab: bool = True) -> list[View]:
        """The realised views of some samples, as they were rendered for the teacher, with all that they are shown with.

        ``slab`` as in :meth:`read`.
        """
        samples = integers(samples)
        self._check(view, samples)
        return views.read(self, view, samples, slab)

    def require_replayable(self, wanted: str) -> None:
        """Raises :class:`MismatchError` where nobody knows what the teacher saw; ``wanted`` asks for it."""
        if not self.replayable:
            raise MismatchError(
                f"{self._where} was imported with an unknown recipe: what its teacher saw is not known, and {wanted} shows "
                "that. Its targets can be read by id, and trained on with policy=frozen"
            )

    def _check(self, view: int, samples: np.ndarray) -> None:
        if not is_whole(view):
            raise SpecError(f"view {view!r}: views are whole numbers, here from 0 to {self.views - 1}")
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        if samples.size and (samples.min() < 0 or samples.max() >= self.samples):
            raise IndexError(f"sample out of range of {self.samples}")
        invalid = self.invalid_among(view, samples)
        if len(invalid) and (bad := np.intersect1d(samples, invalid)).size:
            raise InvalidRow(
                f"{self.ids[bad[0]]!r} has no targets: its image was unreadable when the cache was built, or an import had "
                "no row of it"
            )

    def invalid_among(self, view: int, samples: np.ndarray) -> np.ndarray | list[int]:
        """Invalid samples, at least those of ``samples``, also while the build is unfinished."""
        return self.invalid if self.complete else self._invalid_in(view, samples)

    def _invalid_in(self, view: int, samples: np.ndarray) -> list[int]:
        """What the receipts of the touched blocks call invalid; :class:`NotBuilt` where there is none yet."""
        blocks = np.unique(self.grid.positions(samples) // self.grid.block_rows)
        return [i for b in blocks for i in self._built(self.grid.block(view, int(b))).invalid]

    def _read(self, name: str, view: int, samples: np.ndarray, slab: bool) -> Any:
        return self._target(name, view, self.grid.positions(samples), slab)

    def _target(self, name: str, view: int, positions: np.ndarray, slab: bool) -> Any:
        self._require(name)
        slab = slab and self.whole_view(name, view)
        fields = self.reader.fields(f"targets/{name}", view, positions, slab)
        return self.targets[name].decode(fields | self.beside(name, positions))

    def beside(self, name: str, positions: np.ndarray) -> Fields:
        """What rows of a target at these positions are decoded with beside their own fields."""
        return self._beside(name, positions)

    def whole_view(self, target: str, view: int) -> bool:
        """Are all rows of a target (``view``: of the views themselves) here, in one view?"""
        last = self.grid.blocks_per_view - 1
        return self.complete and (self.pulled is None or self.pulled.covers(target, view, last))

    def pulled_samples(self, targets: str | Iterable[str] | None = None) -> np.ndarray:
        """int64, sorted: the samples of which these targets (all that were pulled, by default) are here, in the first view
        that was pulled of them. All samples, of a cache that is whole."""
        if self.pulled is None:
            return np.arange(self.samples)
        names = self.names(targets)
        blocks = self.pulled.least([*names, pulled.VIEWS])
        return np.flatnonzero(self.grid.positions(np.arange(self.samples)) < blocks * self.grid.block_rows)

    def pulled_views(self, targets: str | Iterable[str] | None = None) -> int:
        """How many of the first views are here, of these targets (all that were pulled, by default), each with at least the
        samples of the first one; a warning names others. All views, of a cache that is whole. :class:`NotPulled` where not
        even the first is."""
        if self.pulled is None:
            return self.views
        names = self.names(targets)
        views = self.pulled.views([*names, pulled.VIEWS])
        if not views:
            raise pulled.missing(self.store, self.pulled, names[0], 0, 0)
        for line in self.pulled.unused([*names, pulled.VIEWS]):
            logging.getLogger(__name__).warning(f"{self.path}: {line}")
        return views

    def _built(self, block: Block) -> m.Receipt:
        if not self.store.exists(self.parts[0].receipt(block)):
            raise NotBuilt(
                f"view {block.view}, block {block.index} of {self.path} is not built yet: finish the build"
            )
        return read_receipt(self.store, self.parts[0], block)[0]

    def table(self, part: int) -> np.ndarray:
        """Digest and size of every file of a part: ``(blocks, arrays + 1)`` of :data:`softcache.manifest.ENTRY`."""
        if self.manifest is None:
            raise NotBuilt(f"{self.path} is not finished: it has no table of files yet")
        one, sealed = self.parts[part], self.sealed[part]
        grid, name = one.grid, one.table_file
        blocks = grid.blocks_per_view * (grid.views - grid.first)
        size = blocks * (len(one.arrays) + 1) * m.ENTRY.itemsize
        data = self.store.get(name, min(size, m.MAX_TABLE))
        if spec.digest(data) != sealed.files.sha256:
            raise DamageError(f"{self.store.path(name)} is not the table the manifest names")
        return m.unpack_table(name, data, blocks, len(one.arrays))
