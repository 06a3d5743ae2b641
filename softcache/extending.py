"""The command ``softcache extend``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from softcache import flags

EXAMPLE = """examples:
  softcache extend caches/x --views 20 --source data/cifar10 --teacher … --weights …
  softcache extend caches/x --target layer3=int8 --source data/cifar10 --teacher … --weights …
  softcache extend caches/x --as big --target 'logits=full(u8)' --source data/cifar10 --teacher timm:…

No file of the cache is touched but its manifest and zarr.json files, the manifest last: until then the cache is what it
was. Run the same command again after a crash or Ctrl-C: it goes on where it stopped."""

OF_THE_CACHE = ("recipe", "seed", "block_rows", "skip_corrupt", "ignore_labels", "budget", "max_kl")


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    parser = commands.add_parser(
        "extend",
        help="more views, another target or another teacher for a cache",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cache", type=Path)
    for name in flags.BUILD:
        if name not in OF_THE_CACHE:
            flags.add(parser, name, default=argparse.SUPPRESS)
    parser.add_argument(
        "--as",
        dest="name",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="it is another teacher than the cache's, and its targets are called NAME.logits and so on",
    )
    parser.set_defaults(run=_extend)


def _extend(arguments: argparse.Namespace) -> int:
    from softcache.errors import SpecError
    from softcache.extension import extend
    from softcache.show import summary

    options = {k: v for k, v in vars(arguments).items() if k in flags.BUILD or k == "name"}
    for name in ("source", "teacher"):
        if name not in options:
            raise SpecError(f"--{name} is missing: {flags.BUILD[name][1]}")
    cache = flags.validated(extend)(arguments.cache, **options)
    if arguments.json:
        print(json.dumps(summary(cache) | {"teacher_rows": cache.teacher_rows}, indent=2))
    return 0
