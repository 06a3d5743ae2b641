"""The commands ``licence`` and ``card``: whose a cache is, and the README that tells it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """The two, of the ``softcache`` command."""
    licence = commands.add_parser(
        "licence",
        help="state the licences of a cache, its source and its teacher",
        epilog="example: softcache licence caches/x source=CC-BY-4.0 teacher=Apache-2.0 cache=CC-BY-4.0",
    )
    licence.add_argument("cache", type=Path)
    licence.add_argument(
        "licences", nargs="*", metavar="WHAT=LICENCE", help="WHAT is source, teacher or cache"
    )
    licence.set_defaults(run=_licence)

    card = commands.add_parser("card", help="the README of a cache, for a dataset's page")
    card.add_argument("cache", type=Path)
    card.add_argument("-o", "--out", type=Path, metavar="FILE", help="write it there, and not on stdout")
    card.set_defaults(run=_card)


def _licence(arguments: argparse.Namespace) -> int:
    from softcache import licences
    from softcache.cache import open

    before = open(arguments.cache)
    cache = licences.state(before, arguments.licences)
    for what in licences.WHAT:
        print(f"{what}: {cache.licences.get(what, 'not stated')}")
    if cache.digest != before.digest:
        print(
            f"the digest was {before.digest} and is {cache.digest}; no other file was touched",
            file=sys.stderr,
        )
    assert cache.manifest is not None
    if why := licences.refusal(cache.manifest):
        print(f"it may not be published: {why}", file=sys.stderr)
    for warning in licences.warnings(cache.manifest):
        print(f"NOTE: {warning}", file=sys.stderr)
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from softcache.cache import open
    from softcache.card import markdown
    from softcache.store import Store, require_apart

    cache = open(arguments.cache)
    text = markdown(cache)
    if arguments.out is None:
        print(text, end="")
        return 0
    out = arguments.out.resolve()
    require_apart(cache.path, arguments.out)
    Store(out.parent).put(out.name, text.encode())
    return 0
