"""The command line: each command calls one public function.

Messages and progress go to stderr; ``--json`` puts one JSON value on stdout. Exit status: 0 good, 1 usage or a bad
input, 2 damage, 3 mismatch, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from softcache.errors import SoftcacheError, SpecError, nearest
from softcache.options import read_yaml

EXAMPLE = """example:
  build-cache --source data/cifar10 --split train \\
      --teacher softcache_train.students:resnet56 --weights cifar10_resnet56.safetensors \\
      --recipe 'crop(32, pad=4)|flip' --views 10 --target 'logits=full(u8)' --target 'layer3=int8' -o caches/cifar10

Run the same command again after a crash or Ctrl-C: it goes on where it stopped."""

PLAN_EXAMPLE = """A few hundred samples go through the teacher, into a cache in a temporary folder (TMPDIR) that is deleted.
The flags are those of build-cache, and so is a config file: softcache plan cifar10.yaml --epochs 200

Exit status 1 when the cache would not fit on the disk of -o."""

PLAN_FLAGS = (
    ("--pilot", 256, "samples to try, two views of each"),
    ("--epochs", 30, "that a student will be trained for, to compare with the teacher online"),
)

# One entry a keyword argument of softcache.build: (metavar, help); a flag's type follows from the signature.
BUILD_FLAGS: dict[str, tuple[str | None, str]] = {
    "source": (
        "PATH",
        "Parquet (Hugging Face layout), a dataset saved to disk by datasets, WebDataset tars, an ImageFolder or a folder of "
        "images without labels; the layout is recognised and printed",
    ),
    "split": ("NAME", "the split, where the source has several"),
    "limit": ("N", "a keyed sample of N images (not the first N)"),
    "layout": (
        "NAME",
        "parquet, arrow, webdataset, imagefolder or folder, where it is not recognised rightly",
    ),
    "image_column": ("NAME", "the column that holds the images (WebDataset: their extension)"),
    "label_column": ("NAME", "and the one that holds the labels"),
    "teacher": (
        "SPEC",
        "torchvision:NAME, timm:NAME, onnx:FILE or package.module:factory; said several times, they run as one",
    ),
    "weights": ("FILE", "the teacher's weights, .safetensors; once for each of several teachers"),
    "allow_pickle": (None, "allow --weights to be a pickle (recorded in the cache)"),
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
    "batch": ("N", "rows a teacher's batch (part of the cache's identity)"),
    "block_rows": ("N", "rows a block; about 64 MiB by default"),
    "skip_corrupt": (None, "keep the rows of unreadable images as invalid, instead of refusing"),
    "ignore_labels": (None, "the source's labels are not the teacher's classes: keep neither"),
    "rank": ("N", "this builder's number, of --world that work on one cache"),
    "world": ("N", "how many builders work on this cache"),
    "workers": ("N", "threads that decode and render"),
    "progress": (None, "the live line (--no-progress: silent)"),
}


_REPEATED = ("targets", "teacher", "weights")


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

    show = commands.add_parser("show", help="what a cache holds")
    show.add_argument("cache", type=Path)
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
        _add_flag(verify, name, default=None)
    verify.set_defaults(run=_verify)

    diff = commands.add_parser("diff", help="where two caches differ")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.set_defaults(run=_diff)

    for one in (show, verify, diff):
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
    for name in BUILD_FLAGS:
        _add_flag(parser, name, default=argparse.SUPPRESS)
    if planned:
        for flag, number, help in PLAN_FLAGS:
            parser.add_argument(flag, type=int, default=number, metavar="N", help=f"{help} ({number})")
    what = "the plan" if planned else "the summary of the cache"
    parser.add_argument("--json", action="store_true", help=f"{what} as JSON on stdout")


def _add_flag(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    metavar, help = BUILD_FLAGS[name]
    flag = "--target" if name == "targets" else "--" + name.replace("_", "-")
    if name in _REPEATED:
        parser.add_argument(flag, dest=name, action="append", metavar=metavar, help=help, default=default)
    elif metavar is None:
        action = argparse.BooleanOptionalAction if name == "progress" else "store_true"
        parser.add_argument(flag, dest=name, action=action, help=help, default=default)
    else:
        parser.add_argument(
            flag, dest=name, type=_types().get(name, str), metavar=metavar, help=help, default=default
        )


def _types() -> dict[str, Callable[[str], Any]]:
    whole = dict.fromkeys(("limit", "views", "seed", "batch", "block_rows", "rank", "world", "workers"), int)
    return {**whole, "label_smoothing": float, "input_size": _size, "mean": _floats, "std": _floats}


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def _size(text: str) -> tuple[int, ...]:
    numbers = tuple(int(x) for x in text.split(","))
    return numbers * 2 if len(numbers) == 1 else numbers


def _build(arguments: argparse.Namespace) -> int:
    from softcache.builder import build
    from softcache.card import summary

    cache = _validated(build)(arguments.out, **_options(arguments))
    if arguments.json:
        print(json.dumps(summary(cache) | {"teacher_rows": cache.teacher_rows}, indent=2))
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said to ``build``: the config file's options, and the flags over them."""
    options = {k: v for k, v in vars(arguments).items() if k in BUILD_FLAGS}
    if arguments.config is not None:
        options = _read_config(arguments.config) | options
    for name in ("source", "teacher"):
        if name not in options:
            raise SpecError(f"--{name} is missing: {BUILD_FLAGS[name][1]}")
    return options


def _plan(arguments: argparse.Namespace) -> int:
    from softcache.builder import build
    from softcache.pilot import plan, tell

    @functools.wraps(build)
    def valid(out: Any, **options: Any) -> dict[str, Any]:
        return options

    options = _validated(valid)("", **_options(arguments))
    try:
        found = plan(arguments.out, pilot=arguments.pilot, epochs=arguments.epochs, **options)
    except KeyboardInterrupt:
        print("\nstopped; the pilot is deleted", file=sys.stderr)
        return 130
    print(json.dumps(asdict(found), indent=2) if arguments.json else tell(found, arguments.out))
    return 1 if found.fits is False else 0


def _read_config(path: Path) -> dict[str, Any]:
    options = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    for key in options:
        if key not in BUILD_FLAGS:
            raise SpecError(f"the config {path} has the unknown key {key!r}{nearest(key, BUILD_FLAGS)}")
    return {key: _typed(key, value) for key, value in options.items()}


def _typed(key: str, value: Any) -> Any:
    """YAML has no tuples: ``mean: 0.5,0.5,0.5`` is read as the flag would be."""
    if not isinstance(value, str) or key not in _types():
        return value
    try:
        return _types()[key](value)
    except ValueError:
        raise SpecError(f"--{key.replace('_', '-')}: {value!r} is not {BUILD_FLAGS[key][0]}") from None


def _validated(function: Callable[..., Any]) -> Callable[..., Any]:
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
            first = e.errors()[0]
            where = first["loc"][0]
            raise SpecError(
                f"--{str(where).replace('_', '-')}: {first['msg']} (it is {first['input']!r})"
            ) from None

    return call


# -- show, verify, diff ------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    from softcache.cache import open
    from softcache.card import summary, tell

    found = summary(open(arguments.cache))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for line in tell(found):
        print("".join(c if c.isprintable() else "�" for c in line))  # names are whatever the cache says
    return 0


_LIVE_FLAGS = (
    "source", "split", "limit", "layout", "image_column", "label_column", "teacher", "weights", "allow_pickle",
    "device", "input_size", "mean", "std", "color",
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
            print(damage)
    how = "every byte read" if arguments.read_data else "names and sizes; --read-data reads every byte"
    count = "1 damaged file" if len(damages) == 1 else f"{len(damages)} damaged files"
    mend = "delete what is damaged and run the same build-cache again: it makes what is missing anew"
    verdict = f"{count} ({how}); {mend}" if damages else f"{cache.digest} is whole ({how})"
    print(f"{arguments.cache}: {verdict}", file=sys.stderr)
    return 2 if damages else 0


def _verify_live(arguments: argparse.Namespace, cache: Any) -> int:
    from softcache.checker import verify_live
    from softcache.source import Source
    from softcache.teachers import Options
    from softcache.teachers.ensemble import assemble

    for name in ("source", "teacher"):
        if getattr(arguments, name) is None:
            raise SpecError(f"--live needs --{name}: the cache never loads its teacher by itself")
    if arguments.live < 1:
        raise SpecError(f"--live {arguments.live}: at least one row")
    said = {k: getattr(arguments, k) for k in ("split", "limit", "layout", "image_column", "label_column")}
    built = {k: cache.identity["source"][k] for k in ("split", "layout") if said[k] is None}
    source = Source(arguments.source, **said | built)
    said = {
        k: getattr(arguments, k) for k in ("allow_pickle", "device", "input_size", "mean", "std", "color")
    }
    taps = tuple(t for t in cache.targets if t != "logits")
    options = Options.like(cache.identity["teacher"], taps=taps, **said)
    teacher = assemble(arguments.teacher, arguments.weights, options)
    found = verify_live(cache, source, teacher, arguments.live)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{'target':20} {'measure':12} {'cache and live':>15} {'live and live':>15}")
    for name, sides in found.items():
        for key in sides["cache"]:
            print(f"{name:20} {key:12} {sides['cache'][key]:15.6g} {sides['control'][key]:15.6g}")
    return 0


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
        print(f"{field}: {a} | {b}")
    ids = found["ids"]
    print(
        f"ids: {ids['both']:,} in both, {ids['only_a']:,} only in {arguments.a}, {ids['only_b']:,} only in {arguments.b}"
    )
    for name, values in found["values"].items():
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in values.items()))
    return 3


def flags_of_build() -> set[str]:
    """The keyword arguments of :func:`softcache.build`, which the flags must equal."""
    from softcache.builder import build

    return {p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY}


if __name__ == "__main__":
    sys.exit(main())
