"""Somebody's dataset, in the loop they already have: it yields the cached view of an image, and its targets.

Nothing here needs torch: items hold numpy arrays, which a ``DataLoader`` makes tensors of.
"""

from __future__ import annotations

import multiprocessing.context
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache import canary
from softcache.cache import Cache
from softcache.errors import MismatchError, SpecError, counted
from softcache.indices import integers, is_whole
from softcache.keyed import in_turn
from softcache.pixels import normalise
from softcache.recipe import View, gather, render
from softcache.recipe.options import rendered
from softcache.several import Combined
from softcache.several import open as open_cache
from softcache.source import Source
from softcache.source.kept import ROOM, Kept

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    Base = Dataset["Item"]
else:
    Base = object  # to a DataLoader all the same, and without torch

KEYS = ("image", "index", "label", "lam", "partner_label", "view")
# of torchvision, timm, albumentations and kornia: what draws anew at every call
DRAWING = (
    "Rand",
    "ColorJitter",
    "ColorJiggle",
    "AutoAug",
    "TrivialAug",
    "AugMix",
    "Elastic",
    "MixUp",
    "CutMix",
)


class Item(UserDict[str, Any]):
    """An item of :class:`WithTargets`: reads and unpacks like a dict, and is none.

    From dicts, the Hugging Face ``Trainer`` takes out what the model's ``forward`` does not name: the targets.
    """


def with_targets(
    dataset: Any,
    cache: Cache,
    *,
    transform: Callable[[Any], Any] | None = None,
    size: int | tuple[int, int] | None = None,
    targets: str | Iterable[str] | None = None,
    seed: int = 0,
) -> WithTargets:
    """A map-style dataset of the images in ``dataset``, as their teacher saw them, with what it said.

    Args:
        dataset: what the cache was built from: a :class:`Source`, or anything that it takes and that yields
            undecoded bytes, PIL images or uint8 arrays. A Python dataset's items are called "0", "1", …; where
            the cache was built from files, hand over ``Source(dataset, ids=…)``.
        transform: takes the rendered view as a PIL image (RGB) and gives what becomes ``image``; for pixels only,
            as whatever moves or recolours them at random parts them from their targets. A Hugging Face image
            processor does. By default float32 (3, h, w), normalised as the teacher's pixels were.
        size: (h, w), or both in one number, to render the view at; the teacher's by default.
        targets: the names of those to read, or one name; all by default.
        seed: of the order of the views.

    Raises:
        MismatchError: the dataset is not the one the cache was built from, or the cache has no such target.
        NotBuilt: the cache is not finished.
        SpecError: a size or names that cannot be understood.
        SourceError: the dataset yields what is no image, such as normalised tensors.
    """
    shown = rendered(cache.identity["teacher"]["input_spec"]["size"] if size is None else size)
    cache.require_replayable("with_targets")
    source = dataset if isinstance(dataset, Source) else Source(dataset)
    _check_ids(source, cache)
    pairing = canary.pair(cache, source)
    if not pairing.same_labels and (source.labels >= 0).any():
        warnings.warn(pairing.message, stacklevel=2)
    if cache.tiled and (source.labels >= 0).any():
        warnings.warn(
            "the cache has mosaics, which show four samples and have no one label: their label is -1; learn from the "
            "targets alone",
            stacklevel=2,
        )
    if drawing := _drawing(transform):
        warnings.warn(
            f"the transform has {', '.join(drawing)}, which draws anew at every call: the student would be shown "
            "other pixels than the teacher, whose answers are not to them. Leave it out: cached views vary by themselves",
            stacklevel=2,
        )
    return WithTargets(source, cache, pairing, transform, shown, _names(cache, targets), seed)


class WithTargets(Base):
    """Made by :func:`with_targets`. Item ``i`` is an :class:`Item` of

    - ``image``: the rendered view, after the transform;
    - ``label``: the cache's class, by name where both have names; −1 where unknown, as of a mosaic, which shows four
      samples;
    - each target by its name: float32 as ``Target.shape`` says; of ``topk`` a dict of arrays, of ``argmax`` the class;
    - ``index``: the sample's place in ``cache.ids``; ``view``: the number of the view shown;
    - where the cache's recipe mixes: ``partner_label``, that of the sample it is mixed with, and ``lam``, float32 λ, the
      share of ``label`` (1, and the same label twice, where this one is not mixed).

    Images without targets (unreadable when the cache was built, not in it, not pulled) are left out; the others keep
    their order. Which view is shown is a function of (seed, epoch): every ``views`` epochs show each view once, in the order
    that ``softcache_train`` uses. The epoch is what :meth:`set_epoch` was told; until it is called, how often the
    sample was read before. Both are shared with the processes of a ``DataLoader``, also with persistent ones.

    Attributes:
        samples: int64 ``(len,)``, each item's place in ``cache.ids``.
        positions: int64 ``(len,)``, each item's place in the dataset that was handed over.
    """

    def __init__(
        self,
        source: Source,
        cache: Cache,
        pairing: canary.Pairing,
        transform: Callable[[Any], Any] | None,
        size: tuple[int, int],
        targets: tuple[str, ...],
        seed: int,
    ):
        self.source, self.transform, self.size = source, transform, size
        self.targets, self.seed = targets, seed
        valid = np.setdiff1d(cache.pulled_samples(targets), cache.invalid)
        self.samples = valid[np.argsort(pairing.index[valid])]
        self.positions = pairing.index[self.samples]
        labels = source.labels[pairing.index]
        if pairing.classes is not None:
            labels = np.where(labels >= 0, pairing.classes[labels], -1)
        self._labels = labels  # as in cache.ids
        self._decoded = Kept(source, ROOM if cache.mixed or cache.tiled else 0, pairing.index)
        self.views, self.input_spec = cache.pulled_views(targets), cache.identity["teacher"]["input_spec"]
        self.message = pairing.message
        self._paths = [one.path for one in cache.members] if isinstance(cache, Combined) else cache.path
        self._digest = cache.digest
        self._opened: Cache | None = cache
        self._clock = _Clock(len(self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        left = len(self.source) - len(self)
        out = f", {left:,} of the dataset left out" if left else ""
        return f"WithTargets({counted(len(self), 'image')}{out}; {self.message})"

    def set_epoch(self, epoch: int) -> None:
        """Show the view of this epoch, here and in worker processes that are there already."""
        if not is_whole(epoch) or not 0 <= epoch < 1 << 63:
            raise SpecError(f"epoch {epoch!r}: epochs are whole numbers of 63 bits, counted from 0")
        self._clock.epoch = int(epoch)

    def view(self, epoch: int) -> int:
        """The number of the view that images are seen in during ``epoch``."""
        return in_turn(self.views, epoch, "view", self.seed)

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several items, as a ``DataLoader`` asks for them: the targets of a batch are read at once."""
        rows = np.arange(len(self))[integers(indices)]  # as a list would: −1 is the last
        epochs = self._clock.tick(rows)
        items: dict[int, Item] = {}
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            items |= zip(here.tolist(), self._of_view(self.view(epoch), rows[here]), strict=True)
        return [items[place] for place in range(len(rows))]

    def _of_view(self, view: int, rows: np.ndarray) -> list[Item]:
        samples = self.samples[rows]
        # not by whole views: each process would hold one
        views = self.cache.read_views(view, samples, slab=False)
        decoded = self.cache.read(view, samples, self.targets, slab=False)
        return [
            Item(
                {
                    "image": self._image(sample, views[i]),
                    "label": self._label(sample, views[i]),
                    **(self._mix(sample, views[i]) if self.cache.mixed else {}),
                    **{name: target[i].arrays() for name, target in decoded.items()},
                    "index": sample,
                    "view": view,
                }
            )
            for i, sample in enumerate(samples.tolist())
        ]

    def _mix(self, sample: int, view: View) -> dict[str, Any]:
        if view.mix is None:
            return {"partner_label": self._label(sample, view), "lam": np.float32(1)}
        label = self._label(view.mix.partner, view.mix.view)
        return {"partner_label": label, "lam": np.float32(view.mix.blend.share)}

    def _label(self, sample: int, view: View) -> int:
        return -1 if view.mosaic else int(self._labels[sample])

    def _image(self, sample: int, view: View) -> Any:
        images = gather(sample, view, self._decoded)
        pixels = render(images[sample], view, self.size, images)
        if self.transform is None:
            return normalise(pixels, self.input_spec)
        from PIL import Image

        image = self.transform(Image.fromarray(pixels))
        # a Hugging Face processor makes a batch of one
        return image["pixel_values"][0] if hasattr(image, "keys") and "pixel_values" in image else image

    @property
    def cache(self) -> Cache:
        """The cache; in a process that did not inherit it, opened when it is first needed."""
        if self._opened is None:
            cache = open_cache(self._paths)
            if cache.digest != self._digest:
                raise MismatchError(f"{cache.path} holds another cache than when this dataset was made")
            self._opened = cache
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


class _Clock:
    """The epoch, or until there is one, how often each row was read: in memory that processes share."""

    def __init__(self, rows: int):
        self._epoch = RawArray("q", [-1])
        self._reads = RawArray("I", rows)

    @property
    def epoch(self) -> int:
        return self._epoch[0]

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def tick(self, rows: np.ndarray) -> np.ndarray:
        """The epoch that each of these rows is now read in."""
        if self.epoch >= 0:
            return np.full(len(rows), self.epoch)
        reads = np.frombuffer(self._reads, np.uint32)
        before = reads[rows]
        np.add.at(reads, rows, 1)
        return before

    def __getstate__(self) -> dict[str, Any]:
        if multiprocessing.context.get_spawning_popen() is not None:  # a worker shares it
            return self.__dict__
        return {name: bytes(shared) for name, shared in self.__dict__.items()}  # a copy has its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, kind in (("_epoch", "q"), ("_reads", "I")):
            kept = state[name]
            shared = kept
            if isinstance(kept, bytes):
                values = np.frombuffer(kept, kind)
                shared = RawArray(kind, len(values))
                np.frombuffer(shared, kind)[:] = values
            setattr(self, name, shared)


def _check_ids(source: Source, cache: Cache) -> None:
    """The two mistakes that are made with ids, told better than by what is missing."""
    if source.layout != "dataset" or source.ids_digest == cache.identity["source"]["ids"]:
        return
    counted = source.ids == tuple(map(str, range(len(source))))
    if counted and not cache.ids[-1].isdecimal():
        raise MismatchError(
            f"the items of a Python dataset are called '0', '1', …, and those of the cache {cache.path} have names "
            f"like {cache.ids[0]!r}. Say which item is which, with_targets(softcache.Source(dataset, ids=[…]), cache), "
            "or hand over the files that the cache was built from: softcache.Source(FOLDER)"
        )
    if len(source) < cache.samples:
        raise MismatchError(
            f"the dataset has {len(source):,} images and the cache {cache.path} {cache.samples:,}: hand over the whole "
            "dataset that the cache was built from, and take torch.utils.data.Subset of what with_targets returns"
        )


def _names(cache: Cache, targets: str | Iterable[str] | None) -> tuple[str, ...]:
    names = cache.names(targets)
    for name in names:
        if name in KEYS:
            raise SpecError(
                f"a target called {name!r} has no place beside the item's own: choose others with targets="
            )
    return names


def _drawing(transform: Any) -> list[str]:
    """The names of the parts of a transform that draw."""
    parts = getattr(transform, "transforms", None)
    if isinstance(parts, Iterable):
        return [name for part in parts for name in _drawing(part)]
    name = type(transform).__name__
    return [name] if name.startswith(DRAWING) else []
