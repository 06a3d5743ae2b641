"""``softcache-train born-again``: each generation is the next one's teacher (Furlanello et al. 2018, "Born-Again Neural
Networks"; Gou et al. 2021 call it self-distillation).

The first learns from the cache that is given. What it has become then speaks once, into a cache of the same views, from
which the second learns; and so on. Every such cache names its parent, the cache that its teacher learned from, so that
the chain can be followed back. Run again after a stop, what is there is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from softcache.cache import Cache
from softcache.cache import open as open_cache
from softcache.errors import MismatchError, SpecError
from softcache.several import Combined
from softcache.source import Source
from softcache_train.commands import say, softcache
from softcache_train.config import Config
from softcache_train.loop import train


@dataclass(frozen=True)
class Generation:
    """One student: its ``cache``'s digest, that of the cache its teacher learned from (of the first: None), its run's
    folder and its ``top1``."""

    number: int
    cache: str
    parent: str | None
    out: str
    top1: float | None


def run(
    config: Config,
    cache: Cache,
    source: Source,
    where: str,
    out: Path,
    generations: int,
    *,
    val_source: Source | None = None,
) -> Iterator[Generation]:
    """Train ``generations`` students, each from the one before it, in ``out/1``, ``out/2``, …; ``source`` lies at ``where``.

    Raises :class:`SpecError` for what cannot be passed on, and what :func:`softcache_train.train` raises.
    """
    if generations < 1:
        raise SpecError(f"{generations} generations: at least one")
    inherited = _inherited(config, cache)
    if generations > 1:
        _check_source(cache, source)
    for number in range(1, generations + 1):
        folder = out / str(number)
        # Every generation draws its first weights anew, or it would begin where its teacher did.
        own = config.model_copy(update={"out": str(folder), "seed": config.seed + number - 1})
        say(f"\ngeneration {number} of {generations}, from {cache.path}")
        result = train(own, cache, source, val_source=val_source)
        yield Generation(number, cache.digest, cache.teacher("logits").get("parent"), result.out, result.top1)
        if number < generations:
            flags = _flags(own, result.model, cache, source) | {"--source": where, "--target": inherited}
            cache = _spoken(flags, cache, out / f"{number}.cache")


def _inherited(config: Config, cache: Cache) -> str:
    """The target that generations pass on, with its codec."""
    if isinstance(cache, Combined):
        raise SpecError("a generation's cache has one parent: give one --cache, an ensemble's if you like")
    if config.teacher is not None:
        raise SpecError("born-again students learn from caches: leave the live teacher out")
    if other := [name for name in config.targets if name != "logits"]:
        raise SpecError(
            f"a generation passes on its logits, and the config reads {other[0]!r} too: leave that objective out"
        )
    if "logits" not in cache.targets:
        raise SpecError(f"a generation passes on its logits, and {cache.path} has none to begin with")
    if len(cache.pulled_samples("logits")) < cache.samples or cache.pulled_views("logits") < cache.views:
        raise SpecError(
            f"{cache.path} was pulled in part, and every generation is of all of it: pull all its logits"
        )
    cache.require_replayable("a generation's build")
    return f"logits={cache.targets['logits'].spec}"


def _check_source(cache: Cache, source: Source) -> None:
    """Refuse before anything is trained a source of which a build would not make the cache's samples and classes again."""
    if source.sample(cache.samples).ids_digest != cache.identity["source"]["ids"]:
        raise MismatchError(
            f"every generation is of the {cache.samples:,} samples of {cache.path}, and a build would take others of "
            f"{source.describe()}: give the source as it was when that cache was built"
        )
    if cache.classes and source.classes and cache.classes != source.classes:
        raise MismatchError(
            f"the classes of {source.describe()} are in another order than those of {cache.path}, which its students "
            "answer in: give the source that the cache was built from"
        )


def _flags(config: Config, model: str, cache: Cache, source: Source) -> dict[str, object]:
    """What ``build`` is asked for by who learned from ``cache``: its samples and views again. True is a flag without a
    value, None none."""
    who = config.student if ":" in config.student else f"softcache_train.students:{config.student}"
    built = cache.identity
    seen = json.loads(Path(config.out or "", "checkpoint.json").read_text())["input_spec"]
    return {
        "--split": source.split,
        "--layout": source.layout,
        # as many as a limit takes are always the same
        "--limit": cache.samples if cache.samples < len(source) else None,
        "--skip-corrupt": True if len(cache.invalid) else None,
        "--ignore-labels": True if not (built["source"]["classes"] or built["source"]["labels"]) else None,
        "--teacher": who,
        "--weights": model,
        "--input-size": ",".join(map(str, seen["size"])),
        "--mean": ",".join(map(repr, seen["mean"])),
        "--std": ",".join(map(repr, seen["std"])),
        "--color": seen.get("color", "RGB"),
        "--recipe": built["recipe"]["spec"],
        "--seed": built["recipe"]["seed"],
        "--views": cache.views,
        "--block-rows": cache.grid.block_rows,
        "--batch": built["teacher"]["batch"],
    }


def _spoken(flags: Mapping[str, object], cache: Cache, path: Path) -> Cache:
    """What the student says of the cache's views: a cache in ``path``."""
    said = {flag: value for flag, value in flags.items() if value is not None}
    softcache("build", *(f if v is True else f"{f}={v}" for f, v in said.items()), "-o", path)
    made = open_cache(path)
    if made.identity["source"]["ids"] != cache.identity["source"]["ids"]:
        raise MismatchError(
            f"{path} is of other samples than {cache.path}, so the source changed meanwhile: restore it, remove "
            f"{path}, and run again"
        )
    if made.teacher("logits").get("parent") != cache.digest:
        raise MismatchError(f"{path} names another parent than {cache.path}: remove it, or give another -o")
    return made


def table(found: list[Generation]) -> str:
    """For a person."""
    lines = [f"{'generation':>10}  {'top-1':>7}  {'cache':12}  {'parent':12}  run"]
    for g in found:
        top1 = "-" if g.top1 is None else f"{g.top1:.2%}"
        lines.append(f"{g.number:>10}  {top1:>7}  {g.cache[:12]}  {(g.parent or '-')[:12]:12}  {g.out}")
    return "\n".join(lines)


def as_json(found: list[Generation]) -> str:
    return json.dumps([asdict(g) for g in found], indent=2)
