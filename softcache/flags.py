"""The flags of ``build-cache``, ``plan`` and ``verify --live``, and how their values are read, from a config file too."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcache import sizes
from softcache.errors import SpecError

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache.source import Source

# One entry a keyword argument of softcache.build: (metavar, help); a flag's type follows from the signature.
BUILD: dict[str, tuple[str | None, str]] = {
    "source": (
        "PATH",
        "Parquet (Hugging Face layout), a dataset saved to disk by datasets, WebDataset tars, COCO JSON, a YOLO data.yaml, "
        "an ImageFolder or a folder of images without labels; the layout is recognised and printed",
    ),
    "split": ("NAME", "the split, where the source has several"),
    "limit": ("N", "a keyed sample of N images (not the first N)"),
    "layout": (
        "NAME",
        "parquet, arrow, webdataset, coco, yolo, imagefolder or folder, where it is not recognised rightly",
    ),
    "image_column": ("NAME", "the column that holds the images (WebDataset: their extension)"),
    "label_column": ("NAME", "and the one that holds the labels"),
    "teacher": (
        "SPEC",
        "torchvision:NAME, timm:NAME, onnx:FILE, ultralytics:FILE, hf:FOLDER, package.module:factory; several run as one",
    ),
    "weights": ("FILE", "the teacher's weights, .safetensors; once for each of several teachers"),
    "allow_pickle": (
        None,
        "allow --weights, or the teacher's own file, to be a pickle (recorded in the cache)",
    ),
    "recipe": (
        "SPEC",
        "how views are made, such as 'crop(32, pad=4)|flip' or 'random_resized_crop(224)|flip'",
    ),
    "views": ("N", "views of each image"),
    "seed": ("N", "keys the views and the order on disk"),
    "targets": (
        "NAME=CODEC",
        "what to keep, repeatable: 'logits=full(u8)'; any other name is a module: 'layer3=int8'",
    ),
    "precision": ("P", "fp32, bf16 or fp16"),
    "device": ("D", "torch device; CUDA where there is one"),
    "input_size": ("N or H,W", "the teacher's input size, where it does not say so itself"),
    "mean": ("R,G,B", "its normalisation, of values 0…1"),
    "std": ("R,G,B", "likewise"),
    "color": ("ORDER", "its channel order, RGB or BGR"),
    "flip_tta": (None, "logits are the mean over an image and its mirror image"),
    "classes": ("FILE", "the teacher's class names in its order, one a line, where it carries none"),
    "label_smoothing": ("E", "of the teacher's training; recorded, for who learns from it"),
    "head": ("SPEC", "what a detector's ONNX outputs are, where it is not plain: yolo, yolox or detr"),
    "licences": (
        "WHAT=LICENCE",
        "of the source, the teacher and the cache, repeatable: source=CC-BY-4.0; for its card, and for who publishes it",
    ),
    "budget": (
        "BYTES",
        "what the cache may take, such as 20GB or 1.5TiB: the codecs are chosen for it, from a pilot; the reasons are kept",
    ),
    "max_kl": ("NATS", "what T²·KL of logits may be at the worst of T = 1, 2, 4, 8, such as 1e-3: likewise"),
    "batch": ("N", "rows a teacher's batch (part of the cache's identity)"),
    "block_rows": ("N", "rows a block; about 64 MiB by default"),
    "skip_corrupt": (None, "keep the rows of unreadable images as invalid, instead of refusing"),
    "ignore_labels": (None, "the source's labels are not the teacher's classes: keep neither"),
    "rank": ("N", "this builder's number, of --world that work on one cache"),
    "world": ("N", "how many builders work on this cache"),
    "workers": ("N", "threads that decode and render"),
    "progress": (None, "the live line (--no-progress: silent)"),
}


# what names the images of a cache that is there
SOURCE = ("source", "split", "layout", "image_column", "label_column")

_REPEATED = ("targets", "teacher", "weights", "licences")


def add(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    """The flag that is called ``name`` in :data:`BUILD`."""
    metavar, help = BUILD[name]
    flag = spelled(name)
    if name in _REPEATED:
        parser.add_argument(flag, dest=name, action="append", metavar=metavar, help=help, default=default)
    elif metavar is None:
        action = argparse.BooleanOptionalAction if name == "progress" else "store_true"
        parser.add_argument(flag, dest=name, action=action, help=help, default=default)
    else:
        parser.add_argument(flag, dest=name, type=_reader(name), metavar=metavar, help=help, default=default)


def open_source(arguments: argparse.Namespace, cache: Cache) -> Source:
    """The source that the flags name; split and layout as the cache's, where they do not say."""
    from softcache.source import Source

    said = {name: getattr(arguments, name, None) for name in (*SOURCE[1:], "limit")}
    built = {name: cache.identity["source"][name] for name in ("split", "layout") if said[name] is None}
    return Source(arguments.source, **said | built)


def spelled(name: str) -> str:
    """How it is written on the command line."""
    return {"targets": "--target", "ids": "--id", "licences": "--licence"}.get(
        name, "--" + name.replace("_", "-")
    )


def words(options: Mapping[str, Any]) -> list[str]:
    """The command line that says these arguments of ``build``; of what is no path and no word, its type."""
    found: list[str] = []
    for name, value in options.items():
        if BUILD[name][0] is None:
            found += [spelled(name)] if value else []
        elif name in _REPEATED:
            found += [word for one in _listed(value) for word in (spelled(name), _said(one))]
        elif value is not None:
            found += [spelled(name), _said(value)]
    return found


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [f"{key}={one}" for key, one in value.items()]
    return list(value) if isinstance(value, list | tuple) else [value] * (value is not None)


def _said(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, str | int | float | Path) else type(value).__name__


def _reader(name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _types().get(name, str)(text)
        except ValueError:
            raise argparse.ArgumentTypeError(refusal(name, text)) from None

    return read


def refusal(name: str, value: Any) -> str:
    """What to say of a value that it cannot have."""
    like = ", such as 20GB" * (name == "budget")
    return f"{value!r} is not {BUILD[name][0] or 'true or false'}{like}"


def _types() -> dict[str, Callable[[str], Any]]:
    whole = dict.fromkeys(("limit", "views", "seed", "batch", "block_rows", "rank", "world", "workers"), int)
    return {
        **whole,
        "budget": _bytes,
        "max_kl": float,
        "label_smoothing": float,
        "input_size": _size,
        "mean": _triple,
        "std": _triple,
    }


def _bytes(text: str) -> int:
    try:
        return sizes.read(text)
    except SpecError as e:
        raise ValueError(str(e)) from None


def _triple(text: str) -> tuple[float, float, float]:
    red, green, blue = (float(x) for x in text.split(","))
    return red, green, blue


def _size(text: str) -> tuple[int, int]:
    numbers = [int(x) for x in text.split(",")]
    height, width = numbers * 2 if len(numbers) == 1 else numbers
    return height, width


def from_yaml(key: str, value: Any) -> Any:
    """A value of a config file: words are read as on the command line (``mean: 0.5,0.5,0.5``: YAML has no tuples)."""
    if isinstance(value, bool) and BUILD[key][0]:
        raise SpecError(f"{spelled(key)}: {refusal(key, value)}")
    if not isinstance(value, str):
        return value
    if key in ("targets", "licences"):
        return [value]
    try:
        return _reader(key)(value)
    except argparse.ArgumentTypeError as e:
        raise SpecError(f"{spelled(key)}: {e}") from None


def validated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked against its annotations."""
    import pydantic

    # Annotations name classes that the module imports lazily; pydantic resolves them in its namespace.
    checked = pydantic.validate_call(config={"arbitrary_types_allowed": True})(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return checked(*args, **kwargs)
        except pydantic.ValidationError as e:
            if e.title != function.__name__:
                raise
            name = str(e.errors()[0]["loc"][0])
            raise SpecError(f"{spelled(name)}: {refusal(name, kwargs[name])}") from None

    return call
