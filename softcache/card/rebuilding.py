"""The command that a cache was built by, as far as its manifest tells: paths are for the reader to put in."""

from __future__ import annotations

import shlex

from softcache import flags
from softcache.cache import Cache
from softcache.errors import SoftcacheError, printable
from softcache.identity import Identity, MemberId, TeacherId
from softcache.targets import Target, request


def command(*words: str) -> str:
    """One line for a shell, whatever the words are."""
    return shlex.join(printable(word) for word in words)


def rebuild(cache: Cache) -> list[str]:
    """The lines of ``build-cache …`` that make part 0 of a cache again."""
    identity = cache.parts[0].identity
    said: list[tuple[str, str | None]] = [
        ("source", "SOURCE"),
        *_source(identity),
        *_teacher(identity.teacher),
        ("recipe", identity.recipe.spec),
        ("views", str(identity.grid.views)),
        ("seed", str(identity.recipe.seed)),
        *(("targets", _target(target)) for target in cache.parts[0].targets.values()),
        ("batch", str(identity.teacher.batch)),
        ("block_rows", str(identity.grid.block_rows)),
        *([("skip_corrupt", None)] if len(cache.invalid) else []),
        *(("licences", f"{what}={licence}") for what, licence in cache.licences.items()),
    ]
    lines = [command(flags.spelled(name), *([] if value is None else [value])) for name, value in said]
    *before, last = ["build-cache -o CACHE", *lines]
    return [*(f"{one} \\" if i == 0 else f"    {one} \\" for i, one in enumerate(before)), f"    {last}"]


def _source(identity: Identity) -> list[tuple[str, str | None]]:
    source = identity.source
    return [("split", source.split)] if source.split else []


def _teacher(who: TeacherId) -> list[tuple[str, str | None]]:
    members: list[TeacherId | MemberId] = [*(who.members or [who])]
    found: list[tuple[str, str | None]] = [("teacher", member.name) for member in members]
    if any(_from_a_file(member) for member in members):
        found += [("weights", f"WEIGHTS{i}" if len(members) > 1 else "WEIGHTS") for i in range(len(members))]
    if "pickle" in (who.weights_format or ""):
        found.append(("allow_pickle", None))
    if who.precision != "fp32":
        found.append(("precision", who.precision))
    if who.flip_tta:
        found.append(("flip_tta", None))
    if who.columns:
        found.append(("classes", "CLASSES"))
    if who.label_smoothing is not None:
        found.append(("label_smoothing", repr(who.label_smoothing)))
    if who.head:
        found.append(("head", who.head))
    return found


def _from_a_file(member: TeacherId | MemberId) -> bool:
    """Does it need ``--weights``? An ONNX file holds its own."""
    own = ("onnx:", "hf:", "ultralytics:")
    return member.weights_format is not None and not member.name.startswith(own)


def _target(target: Target) -> str:
    """As it is asked for, with its kind where that does not follow."""
    plain = f"{target.name}={target.spec}"
    try:
        follows = request(plain).resolve(target.shape, target.layout).kind == target.kind
    except SoftcacheError:
        follows = False
    return plain if follows else f"{target.name}:{target.kind}={target.spec}"
