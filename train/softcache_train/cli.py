"""``softcache-train``: train a student from a cache, with the teacher nowhere on the machine."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from softcache.errors import SoftcacheError, SpecError

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache.source import Source
    from softcache_train.config import Config

USAGE = """
softcache-train CONFIG --cache CACHE --source SOURCE [options]
       softcache-train born-again CONFIG --cache CACHE --source SOURCE --generations N -o OUT [options]
       softcache-train compare CONFIG CONFIG … --cache CACHE --source SOURCE --seeds N -o OUT [options]
       softcache-train demo [options]
"""
EXAMPLE = """
example:
  softcache-train train/configs/cifar10_resnet8_kd.yaml --cache caches/cifar10 \\
      --source data/cifar10 --set epochs=10 lr=0.05

Run again after a stop, the same command goes on where it was. On several processors:
  torchrun --nproc-per-node 2 -m softcache_train.cli CONFIG --cache … --source …
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}; see softcache-train --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 good, 1 usage, 2 damage, 3 mismatch, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not faulthandler.is_enabled():
        faulthandler.enable(
            sys.__stderr__ or sys.stderr
        )  # a file that is cut while it is mapped ends a process
    sys.path.append(str(Path.cwd()))  # so that package.module:factory finds your own code
    try:
        if argv[:1] == ["demo"]:
            from softcache_train import demo

            return demo.main(argv[1:])
        if argv[:1] == ["born-again"]:
            return _born_again(_parser("born-again").parse_args(argv[1:]))
        if argv[:1] == ["compare"]:
            return _compare(_parser("compare").parse_args(argv[1:]))
        return _train(_parser().parse_args(argv))
    except SoftcacheError as e:
        print(f"softcache-train: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("softcache-train: stopped; run the same command again to go on", file=sys.stderr)
        return 130


def _parser(command: str = "") -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softcache-train",
        usage=USAGE.strip(),
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many = "+" if command == "compare" else None
    parser.add_argument("config", metavar="CONFIG", help="a YAML file of options", nargs=many)
    parser.add_argument(
        "--cache",
        required=True,
        action="append",
        help="the folder that build-cache wrote; repeated, several caches as one: of several teachers, or of other samples",
    )
    parser.add_argument("--source", required=True, help="the images it was built from")
    parser.add_argument("--split", help="the source's split; by default the cache's own")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options over those of CONFIG, values as in YAML",
    )
    parser.add_argument("-o", "--out", required=bool(command), help="the run's folder (the option out)")
    if command == "born-again":
        parser.add_argument(
            "--generations",
            type=int,
            default=3,
            metavar="N",
            help="students, each taught by the one before (3)",
        )
    if command == "compare":
        parser.add_argument("--seeds", type=int, default=3, metavar="N", help="students of each config (3)")
        parser.add_argument(
            "--beside",
            nargs=2,
            metavar=("FACTORY", "FILE"),
            help="a network to measure with them, such as the teacher: package.module:factory and its safetensors",
        )
    if command == "compare":  # a live teacher is one config's own option
        parser.set_defaults(teacher=None, weights=None)
    else:
        parser.add_argument(
            "--teacher",
            action="append",
            help="run this teacher at every step in place of the cache's targets; repeated, several as one",
        )
        parser.add_argument("--weights", action="append", help="the live teachers' weights, safetensors")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return parser


def _train(args: argparse.Namespace) -> int:
    from softcache_train.loop import train
    from softcache_train.progress import of_exits

    config, cache, source, val_source = _asked(args)
    result = train(config, cache, source, val_source=val_source)
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        top1 = "not measured" if result.top1 is None else f"{result.top1:.2%}"
        print(f"top-1 {top1} after {result.epochs} epochs")
        if result.ensemble is not None:
            print(of_exits(result.exits, result.ensemble))
        if result.step_ms is not None:
            print(f"{result.step_ms:.1f} ms a step, {result.images_per_second:,.0f} images/s")
        print(f"the student: {result.model}")
    return 0


def _born_again(args: argparse.Namespace) -> int:
    from softcache_train import born_again

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SpecError("born-again builds a cache between its students: run it in one process")
    config, cache, source, val_source = _asked(args)
    found = list(
        born_again.run(
            config, cache, source, args.source, Path(args.out), args.generations, val_source=val_source
        )
    )
    print(born_again.as_json(found) if args.json else born_again.table(found))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from softcache_train import compare
    from softcache_train import config as configs

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SpecError("compare trains one student after the other: run it in one process")
    paths = [Path(path) for path in args.config]
    if len({path.stem for path in paths}) < len(paths):
        raise SpecError("two of the configs have one name, by which the table tells them apart")
    args.config, out = paths[0], Path(args.out)
    _, cache, source, val_source = _asked(args)
    asked = {path.stem: configs.load(path, args.set) for path in paths}
    beside = tuple(args.beside) if args.beside else None
    rows = compare.run(asked, cache, source, out, args.seeds, val_source=val_source, teacher=beside)
    print((out / "compare.json").read_text() if args.json else compare.table(rows))
    return 0


def _asked(args: argparse.Namespace) -> tuple[Config, Cache, Source, Source | None]:
    """What the command line names: the config, the cache, its source, and where to validate."""
    from softcache import several
    from softcache.source import Source
    from softcache_train import config as configs

    flags = {"out": args.out, "teacher": _one_or_all(args.teacher), "weights": _one_or_all(args.weights)}
    config = configs.load(args.config, args.set, {k: v for k, v in flags.items() if v is not None})
    cache = several.open(args.cache[0] if len(args.cache) == 1 else args.cache)
    built = cache.identity["source"]
    source = Source(args.source, split=args.split or built["split"], layout=built["layout"])
    val_source = None
    if config.val_split is not None:
        val_source = Source(args.source, split=config.val_split, layout=built["layout"])
    return config, cache, source, val_source


def _one_or_all(said: list[str] | None) -> str | list[str] | None:
    return said[0] if said and len(said) == 1 else said


if __name__ == "__main__":
    sys.exit(main())
