"""How many bytes the files of a whole cache will have, from a pilot's: one by one.

What does not depend on what the teacher says is exact (plain files, indices, ids, canaries, ``zarr.json``); of the rest,
rows under zstd and receipts, the pilot's mean is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from softcache import bases
from softcache import manifest as m
from softcache.arrays import block_arrays, constant, view_rows
from softcache.beginning import ids_arrays
from softcache.cache import Cache
from softcache.canary import COUNT
from softcache.codecs import Fields
from softcache.documents import read_receipt
from softcache.identity import Identity, TargetId
from softcache.inventory import metadata
from softcache.job import default_rows
from softcache.parts import Part
from softcache.source import Source
from softcache.targets import Target
from softcache.zarrfile import Array

RESERVE = 0.05  # of what zstd makes of rows: a pilot's rows are some of all


@dataclass(frozen=True)
class Kept:
    """A target as a codec keeps it.

    Attributes:
        varying: of each field, bytes a row beyond what is fixed in the file's size.
        figures: the names of what a receipt tells of it.
    """

    target: Target
    varying: Mapping[str, float]
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """``files``: (bytes of one, how many), in ``folders``; ``varying`` is the part of all bytes that zstd decides."""

    files: list[tuple[float, int]]
    folders: int
    varying: float

    @property
    def bytes(self) -> int:
        return round(sum(count * each for each, count in self.files))

    @property
    def at_most(self) -> int:
        """With a reserve for what the pilot's rows cannot tell."""
        return round(self.bytes + RESERVE * self.varying)

    @property
    def count(self) -> int:
        return sum(count for _, count in self.files)

    def on_disk(self, block: int) -> int:
        """In blocks of a disk, its folders among them."""
        return (
            sum(count * math.ceil(each / block) * block for each, count in self.files) + self.folders * block
        )


@dataclass(frozen=True)
class Reckoning:
    """What a finished pilot tells of the whole cache.

    Attributes:
        cache: the pilot's. Its files are read when this is made (:meth:`of`), and not later.
        source, views, block_rows: of the whole; the last is None where it follows from the targets.
        sizes: of every file of the pilot's blocks, ``(blocks, arrays + 1)``.
    """

    cache: Cache
    manifest: m.Manifest
    source: Source
    views: int
    block_rows: int | None
    sizes: np.ndarray
    receipt: m.Receipt

    @classmethod
    def of(cls, cache: Cache, source: Source, views: int, block_rows: int | None) -> Reckoning:
        assert cache.manifest is not None
        part = cache.parts[0]
        receipt, _ = read_receipt(cache.store, part, next(part.grid.blocks()))
        sizes = cache.table(0)["bytes"].astype(float)
        return cls(cache, cache.manifest, source, views, block_rows, sizes, receipt)

    @cached_property
    def as_asked(self) -> dict[str, Kept]:
        """The targets as the pilot kept them."""
        rows = self.cache.samples * self.cache.views
        found = {}
        for name, target in self.cache.targets.items():
            varying = {}
            for column, array in zip(self.sizes.T, self.cache.arrays.values(), strict=False):
                if array.path.rpartition("/")[0] == f"targets/{name}":
                    beyond = column.sum() - len(column) * array.fixed_bytes()
                    varying[array.path.rpartition("/")[2]] = beyond / rows
            found[name] = Kept(target, varying, tuple(self.receipt.fidelity.get(name, ())))
        return found

    def whole(self, kept: Mapping[str, Kept], beside: int = 0) -> Size:
        """The cache with these targets, and ``beside`` bytes more in its manifest."""
        targets = {name: one.target for name, one in kept.items()}
        identity = self._identity(targets)
        recipe, grid = identity.recipe, identity.make_grid()
        arrays = block_arrays(grid, targets, view_rows(0, recipe.parameters, recipe.mixed, recipe.tiled))
        blocks, rows = grid.views * grid.blocks_per_view, grid.views * grid.samples
        found, zstd = [], 0.0
        for array in arrays:
            top, _, rest = array.path.partition("/")
            name, _, field = rest.rpartition("/")
            varying = kept[name].varying[field] * rows if top == "targets" else 0.0
            zstd += varying
            found.append((array.fixed_bytes() + varying / blocks, blocks))
        found.append((self._receipt(len(arrays), kept), blocks))
        constants = self._constants(identity, rows)
        derived = metadata(arrays, constants)
        size = len(identity.to_bytes())
        around = len(self.manifest.to_bytes()) - len(self.manifest.identity.to_bytes())
        once = [c.bytes for c in constants.values()] + [len(data) for data in derived.values()]
        once += [(len(arrays) + 1) * blocks * m.ENTRY.itemsize, size, around + size + beside]
        return Size(found + [(each, 1) for each in once], len(derived) + 1, zstd)

    def shards(self, one: Kept) -> float:
        """Bytes of the files of a target, and of its bases, in a cache that has no other."""
        identity = self._identity({one.target.name: one.target})
        grid = identity.make_grid()
        blocks, rows = grid.views * grid.blocks_per_view, grid.views * grid.samples
        arrays = block_arrays(grid, {one.target.name: one.target})
        shared = sum(array.plain_bytes() for array in _bases(identity))
        return shared + sum(a.fixed_bytes() for a in arrays) * blocks + sum(one.varying.values()) * rows

    def _identity(self, targets: Mapping[str, Target]) -> Identity:
        """That of the whole cache, but for its digests and words of source and build."""
        known = self.manifest.identity
        rows = self.block_rows or default_rows({**targets}, len(self.source), known.teacher.batch)
        grid = {"samples": len(self.source), "views": self.views, "block_rows": rows}
        return known.model_copy(
            update={
                "grid": known.grid.model_copy(update=grid),
                "targets": {name: TargetId(**target.identity()) for name, target in targets.items()},
            }
        )

    def _receipt(self, files: int, kept: Mapping[str, Kept]) -> float:
        """The pilot's mean, and what another number of files and figures makes."""
        entry, figure = self.receipt.files[0], 0.0001234567890123456
        fidelity = {name: dict.fromkeys(one.figures, figure) for name, one in kept.items()}
        asked = {name: dict.fromkeys(one, figure) for name, one in self.receipt.fidelity.items()}
        anchors = {name: entry.sha256 for name, one in kept.items() if one.target.shared}
        new = {"files": [entry] * files, "fidelity": fidelity, "anchors": anchors}
        ours = self.receipt.model_copy(update=new)
        theirs = self.receipt.model_copy(update={"fidelity": asked})
        return float(self.sizes[:, -1].mean()) + len(ours.to_bytes()) - len(theirs.to_bytes())

    def _constants(self, identity: Identity, rows: int) -> dict[str, m.Constant]:
        """Ids, and bases, are those of the whole source; of the others, the canaries, the whole cache may have more."""
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for path, c in self.manifest.constants.items():
            if path.startswith("anchors/"):
                continue
            lead = min(COUNT, rows) if path.startswith("canary/") else c.shape[0]
            shapes[path] = (lead, *c.shape[1:]), c.dtype
        shapes |= {array.path: (array.shape, array.dtype) for array, _ in ids_arrays(self.source.ids)}
        arrays = [constant(path, shape, dtype) for path, (shape, dtype) in shapes.items()]
        arrays += _bases(identity)
        return {
            a.path: m.Constant(sha256="0" * 64, bytes=a.plain_bytes(), dtype=a.dtype, shape=list(a.shape))
            for a in arrays
        }


def _bases(identity: Identity) -> list[Array]:
    return [array for fields in bases.constants(Part(0, identity)).values() for array in fields.values()]


def varying(target: Target, fields: Fields) -> dict[str, float]:
    """Bytes a row of each field beyond what is fixed, of encoded rows as they are really written."""
    found = {}
    for field in target.fields:
        rows = fields[field.name]
        shape = (1, len(rows), *field.shape)
        array = Array(field.name, field.dtype, shape, shape, ("",) * len(shape), plain=field.plain)
        beyond = len(array.encode(rows)) - array.fixed_bytes() if array.big else 0
        found[field.name] = beyond / max(len(rows), 1)
    return found
