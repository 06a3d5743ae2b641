"""The commands that share caches: ``push``, ``pull``, ``tags``, ``repair`` and ``gc``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softcache.errors import printable

REMOTE = (
    "a folder, s3://BUCKET/PREFIX (keys and endpoint from AWS_…), or hf:FOLDER, a dataset repository's clone"
)
HOUR = 3600.0


def add(commands: Any) -> None:
    """Add them to the parser's commands."""
    push = _command(commands, "push", _push, "send a cache to a remote, and put a tag on it")
    push.add_argument("cache", type=Path)
    push.add_argument("remote", help=REMOTE)
    push.add_argument("tag", help="its name there; one that exists is moved")
    push.add_argument(
        "--private", action="store_true", help="strangers cannot read there: licences do not matter"
    )

    pull = _command(
        commands,
        "pull",
        _pull,
        "fetch a cache, or some of it, from a remote",
        epilog="example: softcache pull s3://caches/shared cifar10-r56 -o caches/x --targets logits --views 0:4",
    )
    pull.add_argument("remote", help=REMOTE)
    pull.add_argument("tag", help="a tag there, or a cache's digest")
    pull.add_argument("-o", "--out", type=Path, metavar="DIR", help="the folder; the tag's name by default")
    pull.add_argument("--targets", type=_words, metavar="A,B", help="these only")
    pull.add_argument("--views", type=_views, metavar="A:B", help="the views from A to before B only")
    pull.add_argument(
        "--sample", type=_share, default=1.0, metavar="P", help="a random share of the samples: 1%% or 0.01"
    )

    tags = _command(commands, "tags", _tags, "the tags of a remote, and the caches they are on")
    tags.add_argument("remote", help=REMOTE)
    tags.add_argument(
        "--delete", metavar="TAG", help="take this tag off; gc then finds what it alone reached"
    )

    repair = _command(commands, "repair", _repair, "find what is damaged, and put it right")
    repair.add_argument("cache", type=Path)
    repair.add_argument("--from", dest="remote", metavar="REMOTE", help=REMOTE)

    gc = _command(commands, "gc", _gc, "what no tag of a remote reaches")
    gc.add_argument("remote", help=REMOTE)
    gc.add_argument("--delete", action="store_true", help="delete it; without, it is only told")
    gc.add_argument(
        "--age",
        type=float,
        metavar="HOURS",
        default=24.0,
        help="what is younger stays, for a push may need it (24; longer where a push takes more than half of that)",
    )


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, **more: Any
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **more)
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(run=run)
    return parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _views(text: str) -> tuple[int, int | None]:
    start, colon, stop = text.partition(":")
    try:
        first = int(start or 0)
        return first, int(stop) if stop else None if colon else first + 1
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B, such as 0:4") from None


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, such as 1% or 0.01") from None


def _push(arguments: argparse.Namespace) -> int:
    from softcache.sharing import push

    done = push(arguments.cache, arguments.remote, arguments.tag, private=arguments.private)
    if arguments.json:
        print(json.dumps(asdict(done), indent=2))
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from softcache.sharing import pull

    out = arguments.out or Path(arguments.tag)
    cache = pull(
        arguments.remote,
        arguments.tag,
        out,
        targets=arguments.targets,
        views=arguments.views,
        sample=arguments.sample,
    )
    if arguments.json:
        here = cache.pulled.model_dump() if cache.pulled else None
        print(json.dumps({"path": str(cache.path), "digest": cache.digest, "pulled": here}, indent=2))
    return 0


def _tags(arguments: argparse.Namespace) -> int:
    from softcache.blobs import all_tags, require_something, untag
    from softcache.remote import connect

    remote = connect(arguments.remote)
    if arguments.delete:
        untag(remote, arguments.delete)
    else:
        require_something(remote)
    found, bad = all_tags(remote)
    if arguments.json:
        print(json.dumps(found, indent=2))
    for tag, digest in () if arguments.json else found.items():
        print(f"{tag:30} {digest}")
    for problem in bad:
        print(problem, file=sys.stderr)
    return 2 if bad else 0


def _repair(arguments: argparse.Namespace) -> int:
    from softcache.sharing import repair

    done = repair(arguments.cache, arguments.remote)
    if arguments.json:
        print(json.dumps(asdict(done), indent=2))
    else:
        for name in done.mended:
            print(printable(f"{name}: mended"))
        for damage in done.left:
            print(printable(str(damage)))
    return 2 if done.left else 0


def _gc(arguments: argparse.Namespace) -> int:
    from softcache.sharing import gc

    found = gc(arguments.remote, delete=arguments.delete, age=arguments.age * HOUR)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    for item in found.old:
        print(printable(f"{item.name} {item.bytes:,} bytes, {item.age / HOUR:,.0f} hours old"))
    size, young = (sum(item.bytes for item in items) / 1e6 for items in (found.old, found.young))
    verb = "deleted" if found.deleted else "to be deleted (with --delete)"
    print(
        f"{len(found.tags)} tags; {len(found.old):,} files ({size:,.1f} MB) {verb}, none of them reached by a tag"
    )
    if found.young:
        kept = f"are younger than {arguments.age:g} hours and stay: a push may need them"
        print(f"{len(found.young):,} more ({young:,.1f} MB) {kept}")
    return 0
