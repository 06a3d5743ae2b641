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
    from softcache.source import Source

EXPORT_EXAMPLE = (
    "example: softcache export caches/x --to webdataset -o tars/x --embed-views --source data/cifar10"
)
IMPORT_EXAMPLE = "example: softcache import tars/x -o caches/x"


def add(commands: Any) -> None:
    """Put the commands into the command line."""
    export = commands.add_parser("export", help="a cache in another container", epilog=EXPORT_EXAMPLE)
    export.add_argument("cache", type=Path)
    export.add_argument("--to", required=True, choices=list(_EXPORTS), help="the container")
    export.add_argument("-o", "--out", type=Path, required=True, metavar="PATH", help="where to write it")
    _add_embed(export)
    for name in flags.SOURCE:
        flags.add(export, name, default=None)
    export.set_defaults(run=_export)

    restore = commands.add_parser("import", help="the cache again, from an export", epilog=IMPORT_EXAMPLE)
    restore.add_argument("path", type=Path, help="what export wrote")
    restore.add_argument(
        "-o", "--out", type=Path, required=True, metavar="CACHE", help="the cache's new folder"
    )
    restore.set_defaults(run=_import)


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

    cache = open(arguments.cache)
    _EXPORTS[arguments.to](cache, arguments.out, arguments, lambda: flags.open_source(arguments, cache))
    return 0


def _to_webdataset(cache: Cache, out: Path, arguments: Any, source: Callable[[], Source]) -> None:
    from softcache.exchange.webdataset import export

    embed = arguments.embed or "nothing"
    if embed == "nothing" and getattr(arguments, "source", None) is not None and hasattr(arguments, "to"):
        raise SpecError(
            "--source is for --embed-images or --embed-views: an export without pixels needs no images"
        )
    if embed != "nothing" and arguments.source is None:
        raise SpecError(f"--embed-{embed} needs --source: the cache holds no images")
    digest = export(cache, out, embed=embed, source=source() if embed != "nothing" else None)
    print(f"{out}: {digest}", file=sys.stderr)


_EXPORTS: dict[str, Callable[[Any, Path, Any, Callable[[], Any]], None]] = {"webdataset": _to_webdataset}


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
    out = cache.path.with_name(f"{cache.path.name}-{arguments.format}")
    asked = argparse.Namespace(embed=arguments.embed, source=options["source"])
    _EXPORTS[arguments.format](cache, out, asked, lambda: Source(options["source"], **named))


def _import(arguments: argparse.Namespace) -> int:
    from softcache.exchange.webdataset import recognise, restore

    if not recognise(arguments.path):
        raise SpecError(f"{arguments.path} is no export: softcache export writes them")
    cache = restore(arguments.path, arguments.out)
    print(f"{arguments.out}: {cache.digest}", file=sys.stderr)
    return 0
