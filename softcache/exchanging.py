"""The commands ``export`` and ``import``, and ``--format`` of ``build-cache``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcache import flags
from softcache.errors import SpecError

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache.members import Embed
    from softcache.source import Source

EXPORT_EXAMPLE = """examples:
  softcache export caches/x --to webdataset -o tars/x --embed-views --source data/cifar10
  softcache export caches/x --to hdf5 -o x.h5"""
IMPORT_EXAMPLE = """examples:
  softcache import tars/x -o caches/x           # what softcache export wrote
  softcache import x.h5 -o caches/x

  softcache import old.h5 -o caches/old --source data/x --split train \\
      --map logits=/train/logits --ids /train/names --classes names.txt \\
      --recipe 'resize(256)|center_crop(224)' --target 'logits=full(f16)'

Say --recipe unknown where the teacher saw what no recipe here can say: crops that were drawn elsewhere, for example."""

# Of arrays that somebody has: flags of a build that say the same there.
_BUILD_FLAGS = (
    *flags.SOURCE, "recipe", "targets", "views", "classes", "input_size", "mean", "std", "color", "label_smoothing",
    "block_rows", "skip_corrupt", "ignore_labels", "progress",
)  # fmt: skip
_NEEDED = {
    "source": "the images that the teacher saw",
    "arrays": "which array is which target, such as --map logits=/train/logits",
    "ids": "the array that names the sample of each row, or 'order' where rows follow the source's",
    "recipe": "how the teacher saw the images, such as 'resize(256)|center_crop(224)', or unknown",
}


def add(commands: Any) -> None:
    """Put the commands into the command line."""
    export = commands.add_parser("export", help="a cache in another container", epilog=EXPORT_EXAMPLE)
    export.formatter_class = argparse.RawDescriptionHelpFormatter
    export.add_argument("cache", type=Path)
    export.add_argument("--to", required=True, choices=list(_EXPORTS), help="the container")
    export.add_argument("-o", "--out", type=Path, required=True, metavar="PATH", help="where to write it")
    export.add_argument(
        "--decoded",
        action="store_true",
        help="hdf5: also the decoded values, of what decodes to plain numbers",
    )
    _add_embed(export)
    for name in flags.SOURCE:
        flags.add(export, name, default=None)
    export.set_defaults(run=_export)

    back = commands.add_parser(
        "import", help="a cache from an export, or from arrays of yours", epilog=IMPORT_EXAMPLE
    )
    back.formatter_class = argparse.RawDescriptionHelpFormatter
    back.add_argument("path", type=Path, help="what export wrote; or arrays: HDF5, NPZ or NPY")
    back.add_argument("-o", "--out", type=Path, required=True, metavar="CACHE", help="the cache's new folder")
    _add_mapping(back.add_argument_group("arrays of yours"))
    back.set_defaults(run=_import)


def _add_mapping(group: Any) -> None:
    said: Any = {"action": "append", "dest": "arrays", "metavar": "TARGET=ARRAY"}
    group.add_argument("--map", help="such as logits=/train/logits; repeatable", **said)
    group.add_argument("--ids", help="the array of each row's id; 'order': rows follow the source's order")
    forms = "logits (default), log_probabilities or probabilities"
    group.add_argument("--from", dest="form", metavar="FORM", help=forms)
    invalid = "keep the rows of samples that have none as invalid"
    group.add_argument("--ignore-missing", action="store_true", default=None, help=invalid)
    for name in _BUILD_FLAGS:
        flags.add(group, name, default=None)


def add_format(parser: argparse.ArgumentParser) -> None:
    """The flags of a build that exports what it built."""
    parser.add_argument(
        "--format", choices=["webdataset"], help="then export the cache, into the folder CACHE-webdataset"
    )
    _add_embed(parser)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    of = "webdataset: put {} behind the targets of each row, to stream both (needs --source)"
    for value, what in (("images", "the source's image files"), ("views", "the very pixels the teacher saw")):
        flag = f"--embed-{value}"
        which.add_argument(flag, dest="embed", action="store_const", const=value, help=of.format(what))


def _export(arguments: argparse.Namespace) -> int:
    from softcache.cache import open

    _EXPORTS[arguments.to](open(arguments.cache), arguments)
    return 0


def _to_webdataset(cache: Cache, arguments: argparse.Namespace) -> None:
    if arguments.decoded:
        raise SpecError("--decoded is for --to hdf5")
    if arguments.embed and arguments.source is None:
        raise SpecError(f"--embed-{arguments.embed} needs --source: the cache holds no images")
    if arguments.source is not None and not arguments.embed:
        raise SpecError(
            "--source is for --embed-images or --embed-views: an export without pixels needs no images"
        )
    source = flags.open_source(arguments, cache) if arguments.embed else None
    _webdataset(cache, arguments.out, arguments.embed, source)


def _webdataset(cache: Cache, out: Path, embed: Embed | None, source: Source | None) -> None:
    from softcache.exchange.webdataset import export

    digest = export(cache, out, embed=embed or "nothing", source=source)
    print(f"{out}: {digest}", file=sys.stderr)


def _to_hdf5(cache: Cache, arguments: argparse.Namespace) -> None:
    from softcache.exchange.hdf5 import export

    if arguments.embed or arguments.source is not None:
        raise SpecError("images are put into --to webdataset only: leave out --embed-… and --source")
    export(cache, arguments.out, decoded=arguments.decoded)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes", file=sys.stderr)


_EXPORTS: dict[str, Callable[[Any, argparse.Namespace], None]] = {
    "webdataset": _to_webdataset,
    "hdf5": _to_hdf5,
}


def check_format(arguments: argparse.Namespace) -> None:
    """:class:`SpecError` for something to be embedded in no export."""
    if arguments.embed and not arguments.format:
        raise SpecError(f"--embed-{arguments.embed} is for --format webdataset, which exports what was built")


def after_build(cache: Cache, arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Export what was built, as ``--format`` says; the first of several builders does."""
    if arguments.format is None or options.get("rank", 0):
        return
    from softcache.source import Source

    named = {k: options.get(k) for k in (*flags.SOURCE[1:], "limit")}
    source = Source(options["source"], **named) if arguments.embed else None
    _webdataset(cache, cache.path.with_name(f"{cache.path.name}-{arguments.format}"), arguments.embed, source)


def _import(arguments: argparse.Namespace) -> int:
    from softcache.exchange import hdf5, webdataset

    names = ("arrays", "ids", "form", "ignore_missing", *_BUILD_FLAGS)
    said = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    ours = next((kind for kind in (webdataset, hdf5) if kind.recognise(arguments.path)), None)
    if ours is None:
        cache = _of_arrays(arguments, said)
    elif said:
        raise SpecError(
            f"{_spelled(next(iter(said)))}: {arguments.path} is an exported cache, which says it itself: leave it out"
        )
    else:
        cache = ours.restore(arguments.path, arguments.out)
    print(f"{arguments.out}: {cache.digest}", file=sys.stderr)
    return 0


def _of_arrays(arguments: argparse.Namespace, said: dict[str, Any]) -> Cache:
    from softcache.exchange import arrayfile
    from softcache.exchange.foreign import import_arrays

    if arguments.path.is_dir():
        raise SpecError(f"{arguments.path} is no export: softcache export writes them")
    with arrayfile.opened(arguments.path) as found:
        for name, what in _NEEDED.items():
            if name not in said:
                there = ", ".join(found.names) or "nothing"
                raise SpecError(f"{_spelled(name)} is missing: {what}. In {arguments.path} there are {there}")
    arrays: dict[str, str] = {}
    for text in said.pop("arrays"):
        target, equals, array = text.partition("=")
        if not equals or not target or not array or target in arrays:
            raise SpecError(f"--map {text}: say TARGET=ARRAY, each target once, such as logits=/train/logits")
        arrays[target] = array
    return import_arrays(arguments.out, arguments.path, arrays=arrays, **said)


def _spelled(name: str) -> str:
    return {"arrays": "--map", "form": "--from", "ids": "--ids"}.get(name) or flags.spelled(name)
