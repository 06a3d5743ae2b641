"""What of a source's images is put beside a cache's targets: their files, or the pixels the teacher saw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from softcache import canary
from softcache.cache import Cache
from softcache.errors import MismatchError, SourceError, SpecError
from softcache.members import Embed
from softcache.recipe import View
from softcache.source import Source
from softcache.source.kept import ROOM, Kept


@dataclass(frozen=True, eq=False)
class Embedding:
    """Images, labels and views of a cache's samples."""

    cache: Cache
    source: Source
    pairing: canary.Pairing

    @cached_property
    def labels(self) -> np.ndarray:
        return canary.class_labels(self.cache, self.source, self.pairing.index)

    @cached_property
    def image(self) -> Kept:
        room = ROOM if self.cache.mixed or self.cache.tiled else 0
        return Kept(self.source, room, self.pairing.index)

    def content(self, sample: int) -> bytes:
        """The bytes of an image as they lie in the source."""
        data = self.source.encoded(int(self.pairing.index[sample]))
        if not isinstance(data, bytes):
            raise SourceError(
                f"{self.source.describe()}: its images are arrays, not files: export with --embed-views"
            )
        return data

    def label(self, sample: int, view: View) -> int:
        return -1 if view.mosaic else int(self.labels[sample])


def embedded(cache: Cache, embed: Embed, source: Source | None) -> Embedding | None:
    if embed == "nothing":
        return None
    cache.require_replayable(f"--embed-{embed}")
    if source is None:
        raise SpecError(
            f"to embed {embed} the images are needed: name the source (--source) the cache was built from"
        )
    if embed == "images" and (cache.mixed or cache.tiled):
        raise SpecError(
            f"the views of {cache.path} show several images each, which lie in different tars: export with --embed-views"
        )
    pairing = canary.pair(cache, source, tolerance=0, every=True)
    if not pairing.same_labels:
        raise MismatchError(
            f"the labels of {source.describe()} are not those the cache {cache.path} was built with: name the same source"
        )
    return Embedding(cache, source, pairing)
