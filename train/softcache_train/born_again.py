"""``softcache-train born-again``: each generation is the next one's teacher (Furlanello et al. 2018, "Born-Again Neural
Networks"; Gou et al. 2021 call it self-distillation).

The first learns from the cache that is given. What it has become then speaks once, into a cache of the same views, from
which the second learns; and so on. Every such cache names its parent, the cache that its teacher learned from, so that
the chain can be followed back. Run again after a stop, what is there is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from softcache.cache import Cache
from softcache.cache import open as open_cache
from softcache.errors import MismatchError, SpecError
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
    for number in range(1, generations + 1):
        folder = out / str(number)
        # Every generation draws its first weights anew, or it would begin where its teacher did.
        own = config.model_copy(update={"out": str(folder), "seed": config.seed + number - 1})
        say(f"\ngeneration {number} of {generations}, from {cache.path}")
        result = train(own, cache, source, val_source=val_source)
        yield Generation(number, cache.digest, cache.teacher("logits").get("parent"), result.out, result.top1)
        if number < generations:
            cache = _spoken(own, result.model, cache, where, out / f"{number}.cache", inherited)


def _inherited(config: Config, cache: Cache) -> list[str]:
    """The codecs of the targets that generations pass on, as flags."""
    if config.teacher is not None:
        raise SpecError("born-again students learn from caches: leave the live teacher out")
    if other := [name for name in config.targets if name != "logits"]:
        raise SpecError(
            f"a generation passes on its logits, and the config reads {other[0]!r} too: leave that objective out"
        )
    return [f"logits={cache.targets['logits'].spec}"]


def _spoken(config: Config, model: str, cache: Cache, where: str, path: Path, targets: list[str]) -> Cache:
    """What the student says of the cache's views: a cache in ``path``."""
    who = config.student if ":" in config.student else f"softcache_train.students:{config.student}"
    built, seen = (
        cache.identity,
        json.loads(Path(config.out or "", "checkpoint.json").read_text())["input_spec"],
    )
    flags: dict[str, object] = {
        "--source": where,
        "--split": built["source"]["split"],
        "--layout": built["source"]["layout"],
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
    said = [word for flag, value in flags.items() if value is not None for word in (f"{flag}={value}",)]
    softcache("build", *said, *(f"--target={one}" for one in targets), "-o", path)
    made = open_cache(path)
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
