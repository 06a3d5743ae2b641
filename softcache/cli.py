"""The command line: each command calls one public function.

Messages and progress go to stderr; ``--json`` puts one JSON value on stdout. Exit status: 0 good, 1 usage or a bad
input, 2 damage, 3 mismatch, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from softcache import exchanging, extending, flags, moving, publishing
from softcache.errors import SoftcacheError, SpecError, counted, nearest, printable
from softcache.options import read_yaml

EXAMPLE = """example:
  build-cache --source data/cifar10 --split train \\
      --teacher softcache_train.students:resnet56 --weights cifar10_resnet56.safetensors \\
      --recipe 'crop(32, pad=4)|flip' --views 10 --target 'logits=full(u8)' --target 'layer3=int8' -o caches/cifar10

Run the same command again after a crash or Ctrl-C: it goes on where it stopped."""

PLAN_EXAMPLE = """A few hundred samples go through the teacher, into a cache in a temporary folder (TMPDIR) that is deleted.
The flags are those of build-cache, and so is a config file: softcache plan cifar10.yaml --epochs 200

Exit status 1 when the cache would not fit on the disk of -o."""

OVERLAY_EXAMPLE = "example: softcache show caches/x --overlay pictures --source data/coco --split val2017"

_OVERLAY_FLAGS: dict[str, tuple[type, str, str]] = {
    "rows": (int, "N", "samples to draw, with all their views (8)"),
    "ids": (str, "ID", "draw this sample; repeatable"),
    "size": (int, "N", "pixels of a view's longer side; the teacher's by default"),
    "min_score": (float, "S", "a teacher's boxes below this score are not drawn (0.3)"),
}

PLAN_FLAGS = (
    ("--pilot", 256, "samples to try, two views of each"),
    ("--epochs", 30, "that a student will be trained for, to compare with the teacher online"),
)

ELSEWHERE = "a split that the teacher was not trained on: does it know these images by heart?"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Usage errors exit with 1: 2 means damage here."""
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def build_cache(argv: Sequence[str] | None = None) -> int:
    """The ``build-cache`` command."""
    parser = _Parser("build-cache", description="Run a teacher over a dataset once, and keep what it said.")
    _add_build(parser)
    return _run(lambda: _build(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """The ``softcache`` command."""
    parser = _Parser("softcache", description="Soft-target caches for knowledge distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build a cache (the same as build-cache)")
    _add_build(build)
    build.set_defaults(run=_build)

    plan = commands.add_parser("plan", help="what a cache would cost, and whether it pays, from a pilot")
    _add_build(plan, planned=True)
    plan.set_defaults(run=_plan)

    show = commands.add_parser("show", help="what a cache holds", epilog=OVERLAY_EXAMPLE)
    show.add_argument("cache", type=Path)
    show.add_argument(
        "--overlay", type=Path, metavar="DIR", help="draw it onto images of --source, PNG files in DIR"
    )
    for flag, (type_, metavar, help) in _OVERLAY_FLAGS.items():
        action = "append" if flag == "ids" else "store"
        spelled = flags.spelled(flag)
        show.add_argument(spelled, dest=flag, type=type_, metavar=metavar, help=help, action=action)
    for name in flags.SOURCE:
        flags.add(show, name, default=None)
    show.set_defaults(run=_show)

    verify = commands.add_parser(
        "verify",
        help="find damage, or compare with a living teacher",
        epilog="example: softcache verify caches/x --live 64 --source data/cifar10 --split train --teacher … --weights …",
    )
    verify.add_argument("cache", type=Path)
    verify.add_argument(
        "--read-data", action="store_true", help="read every byte and compare every file's sha256"
    )
    verify.add_argument("--live", type=int, metavar="N", help="run the teacher on N rows and compare")
    for name in _LIVE_FLAGS:
        flags.add(verify, name, default=None)
    verify.add_argument(
        "--as", dest="called", metavar="NAME", help="which teacher of an extended cache it is"
    )
    verify.set_defaults(run=_verify)

    diff = commands.add_parser("diff", help="where two caches differ")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.set_defaults(run=_diff)

    extending.add(commands)
    publishing.add(commands)
    exchanging.add(commands)
    moving.add(commands)
    for one in (show, verify, diff, commands.choices["extend"]):
        one.add_argument("--json", action="store_true", help="one JSON value on stdout")
    arguments = parser.parse_args(argv)
    return _run(lambda: arguments.run(arguments))


def _run(command: Callable[[], int]) -> int:
    sys.path.append(str(Path.cwd()))  # so that package.module:factory finds your own code
    try:
        return command()
    except SoftcacheError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("\nstopped; what was committed is kept: run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# -- build -------------------------------------------------------------------------------------------------


def _add_build(parser: argparse.ArgumentParser, planned: bool = False) -> None:
    """The flags of ``build``, and of ``plan``, which are the same and a few."""
    parser.epilog = PLAN_EXAMPLE if planned else EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "config", nargs="?", type=Path, help="YAML file of these options (targets is a mapping there)"
    )
    where = "the cache's folder" + ", where the disk is looked at" * planned
    parser.add_argument("-o", "--out", type=Path, required=not planned, metavar="CACHE", help=where)
    for name in flags.BUILD:
        flags.add(parser, name, default=argparse.SUPPRESS)
    if planned:
        for flag, number, help in PLAN_FLAGS:
            parser.add_argument(flag, type=int, default=number, metavar="N", help=f"{help} ({number})")
        parser.add_argument("--elsewhere", metavar="SPLIT", help=ELSEWHERE)
    else:
        exchanging.add_format(parser)
    what = "the plan" if planned else "the summary of the cache"
    parser.add_argument("--json", action="store_true", help=f"{what} as JSON on stdout")


def _build(arguments: argparse.Namespace) -> int:
    from softcache.builder import build
    from softcache.show import summary

    exchanging.check_format(arguments)
    options = _options(arguments)
    cache = flags.validated(build)(arguments.out, **options)
    exchanging.after_build(cache, arguments, options)
    if arguments.json:
        print(json.dumps(summary(cache) | {"teacher_rows": cache.teacher_rows}, indent=2))
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said to ``build``: the config file's options, and the flags over them."""
    options = {k: v for k, v in vars(arguments).items() if k in flags.BUILD}
    if arguments.config is not None:
        options = _read_config(arguments.config) | options
    for name in ("source", "teacher"):
        if name not in options:
            raise SpecError(f"--{name} is missing: {flags.BUILD[name][1]}")
    return options


def _plan(arguments: argparse.Namespace) -> int:
    from softcache.builder import build
    from softcache.forecast import plan
    from softcache.telling import tell

    @functools.wraps(build)
    def valid(out: Any, **options: Any) -> dict[str, Any]:
        return options

    options = flags.validated(valid)("", **_options(arguments))
    try:
        said = {name: getattr(arguments, name) for name in ("pilot", "epochs", "elsewhere")}
        found = plan(arguments.out, **said, **options)
    except KeyboardInterrupt:
        print("\nstopped; the pilot is deleted", file=sys.stderr)
        return 130
    print(json.dumps(asdict(found), indent=2) if arguments.json else tell(found, arguments.out))
    return 1 if found.fits is False else 0


def _read_config(path: Path) -> dict[str, Any]:
    options = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    for key in options:
        if key not in flags.BUILD:
            raise SpecError(f"the config {path} has the unknown key {key!r}{nearest(key, flags.BUILD)}")
    return {key: flags.from_yaml(key, value) for key, value in options.items()}


# -- show, verify, diff ------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    from softcache.cache import open
    from softcache.show import summary, tell

    cache = open(arguments.cache)
    pictures = _overlay(arguments, cache)
    found = summary(cache)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for line in tell(found):
            print(printable(line))  # names are whatever the cache says
    for path in pictures:
        print(path, file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _overlay(arguments: argparse.Namespace, cache: Any) -> list[Path]:
    """The pictures that were asked for."""
    said = {name: getattr(arguments, name) for name in _OVERLAY_FLAGS if getattr(arguments, name) is not None}
    if arguments.overlay is None:
        for name in (*said, *(n for n in flags.SOURCE if getattr(arguments, n) is not None)):
            raise SpecError(
                f"{flags.spelled(name)} is for --overlay DIR, which draws what the cache holds onto images"
            )
        return []
    from softcache.drawing import overlay

    if arguments.source is None:
        raise SpecError("--overlay needs --source: the cache holds no images")
    return overlay(cache, flags.open_source(arguments, cache), arguments.overlay, **said)


_LIVE_FLAGS = (
    *flags.SOURCE, "limit", "teacher", "weights", "allow_pickle", "device", "input_size", "mean", "std", "color",
)  # fmt: skip


def _verify(arguments: argparse.Namespace) -> int:
    from softcache.cache import open
    from softcache.checker import verify

    cache = open(arguments.cache)
    if arguments.live is not None:
        return _verify_live(arguments, cache)
    damages = verify(cache, read_data=arguments.read_data)
    if arguments.json:
        print(json.dumps([vars(d) for d in damages], indent=2))
    else:
        for damage in damages:
            print(printable(str(damage)))
    how = "every byte read" if arguments.read_data else "names and sizes; --read-data reads every byte"
    verdict = _verdict(cache, damages) if damages else f"{cache.digest} is whole"
    print(f"{arguments.cache}: {verdict} ({how})", file=sys.stderr)
    return 2 if damages else 0


def _verdict(cache: Any, damages: list[Any]) -> str:
    """How many files are wrong, and what to do about them."""
    from softcache.checker import FOREIGN
    from softcache.tars import HINT

    foreign = sum(damage.problem == FOREIGN for damage in damages)
    told = []
    if damaged := len(damages) - foreign:
        mend = "delete what is damaged and run the same build-cache again: it makes what is missing anew"
        if cache.tars:
            mend = HINT
        elif cache.pulled:
            mend = shlex.join(["softcache", "repair", str(cache.path), "--from", cache.pulled.remote])
        told.append(f"{counted(damaged, 'damaged file')}: {mend}")
    if foreign:
        told.append(f"{counted(foreign, 'file')} not of this cache, which holds its own only: move them away")
    return printable("; ".join(told))


def _verify_live(arguments: argparse.Namespace, cache: Any) -> int:
    from softcache.checker import least_share, verify_live
    from softcache.parts import by
    from softcache.teachers.ensemble import assemble
    from softcache.teachers.named import options_like

    for name in ("source", "teacher"):
        if getattr(arguments, name) is None:
            raise SpecError(f"--live needs --{name}: the cache never loads its teacher by itself")
    if arguments.live < 1:
        raise SpecError(f"--live {arguments.live}: at least one row")
    source = flags.open_source(arguments, cache)
    said = {
        k: getattr(arguments, k) for k in ("allow_pickle", "device", "input_size", "mean", "std", "color")
    }
    name = arguments.called or ""
    teacher = assemble(arguments.teacher, arguments.weights, options_like(by(cache.parts, name), **said))
    found = verify_live(cache, source, teacher, arguments.live, name=name)
    ours, theirs = by(cache.parts, name)[0].identity.teacher.name, teacher.identity().name
    if ours != theirs:
        told = f"NOTE: the teacher is called {theirs}, and was {ours}: its weights are the same"
        print(printable(told), file=sys.stderr)
    if left := [target for target in cache.targets if target not in found]:
        print(f"left out, of other teachers (--as NAME): {', '.join(left)}", file=sys.stderr)
    wrong = {name: int(sides["cache"]["wrong"]) for name, sides in found.items() if sides["cache"]["wrong"]}
    rows = min(arguments.live, cache.views * (cache.samples - len(cache.invalid)))
    for name, count in wrong.items():
        told = f"{count:,} of {rows:,} rows of {name} are not what the teacher says of these views: do not train on them"
        print(printable(told), file=sys.stderr)
    if not wrong:
        share = least_share(rows)
        print(f"no row of {rows:,} is wrong: fewer than {share:.2%} of all are, with 95 %", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 2 if wrong else 0
    print(f"{'target':20} {'measure':12} {'cache and live':>15} {'live and live':>15}")
    for name, sides in found.items():
        for key in sides["cache"]:
            print(
                f"{printable(name):20} {printable(key):12} {sides['cache'][key]:15.6g} {sides['control'][key]:15.6g}"
            )
    return 2 if wrong else 0


def _diff(arguments: argparse.Namespace) -> int:
    from softcache.cache import open
    from softcache.checker import diff

    found = diff(open(arguments.a), open(arguments.b))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0 if found["same"] else 3
    if found["same"]:
        print(f"the same cache, {found['digests'][0]}")
        return 0
    for field, a, b in found["identity"]:
        print(printable(f"{field}: {a} | {b}"))
    for what, a, b in found["licences"]:
        print(printable(f"licence of the {what}: {a or 'not stated'} | {b or 'not stated'}"))
    ids = found["ids"]
    print(
        f"ids: {ids['both']:,} in both, {ids['only_a']:,} only in {arguments.a}, {ids['only_b']:,} only in {arguments.b}"
    )
    for name, values in found["values"].items():
        print(printable(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in values.items())))
    return 3


if __name__ == "__main__":
    sys.exit(main())
