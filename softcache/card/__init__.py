"""A cache's card: the README of a dataset's page, made of nothing but its manifest.

What stands in a manifest may be anybody's: strings are put in as :mod:`softcache.card.markup` has them, never as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softcache import licences
from softcache.cache import Cache
from softcache.card import header, targets, teachers
from softcache.card.markup import bibtex, block, bullets, code, folded, line
from softcache.card.rebuilding import command, rebuild
from softcache.errors import NotBuilt, SoftcacheError, counted
from softcache.identity import IMPORTED, Identity
from softcache.recipe import Recipe
from softcache.remote import shown

MOST_CLASSES = 2000  # that are written out
_UNFOLDED = 20


def markdown(cache: Cache, remote: str | None = None, tag: str | None = None) -> str:
    """The card of a finished cache.

    ``remote`` and ``tag`` are where it lies, if it lies anywhere; of a folder's address nothing is told.
    Raises :class:`NotBuilt` for an unfinished one.
    """
    if cache.manifest is None:
        raise NotBuilt(
            f"{cache.path} is not finished: run the same build-cache command again, then ask for its card"
        )
    sections = [
        header.of(cache, _title(cache)),
        f"# {_title(cache, code)}",
        _what(cache),
        "## Dataset",
        *_dataset(cache),
        "## Licences",
        *_licences(cache),
        "## Views",
        *_views(cache),
        "## Teacher",
        *teachers.told(cache),
        "## Targets",
        *targets.told(cache),
        "## How to open it",
        block("python", ["import softcache as sc", 'cache = sc.open("CACHE")', _example(cache)]),
        *_pull(remote, tag),
        "## How to rebuild it",
        *_rebuild(cache),
        *_caveats(cache),
        "## Citation",
        _citation(cache),
        "Cite the dataset and the teacher, too.",
        "## Format",
        _format(cache),
    ]
    return "\n\n".join(sections) + "\n"


def _what(cache: Cache) -> str:
    canaries = cache.constants.get("canary/sample")
    seen = canaries.shape[0] if canaries and canaries.shape else 0
    but = f", but for {counted(seen, 'rendered view')} by which yours are recognised" if seen else ""
    return (
        "What a teacher said of every view of every image of a dataset, kept with a stated error, to train students from it "
        f"with the teacher nowhere on the machine.\nThe images are not in it{but}: bring the dataset."
    )


def _title(cache: Cache, name: Any = str) -> str:
    names = dict.fromkeys(line(who.name, 200) or "a teacher" for who, _ in teachers.speakers(cache))
    return (
        f"Soft targets of {' and '.join(name(n) for n in names)}: {counted(cache.samples, 'image')}, "
        f"{counted(cache.views, 'view')} of each"
    )


def _dataset(cache: Cache) -> Iterator[str]:
    source = cache.parts[0].identity.source
    lines = [f"{counted(cache.samples, 'sample')}, read as {code(source.layout)}"]
    lines += [f"split {code(source.split)}"] if source.split else []
    lines.append(f"sha256 over its ids {code(source.ids)}")
    lines.append(f"sha256 over its ids and images {code(source.content)}")
    lines += [f"sha256 over its boxes {code(source.boxes)}"] if source.boxes else []
    yield bullets(lines)
    classes = source.classes or []
    listed = ", ".join(code(name, 100) for name in classes[:MOST_CLASSES])
    if len(classes) > MOST_CLASSES:
        listed += f", and {len(classes) - MOST_CLASSES:,} more in `cache.classes`"
    count = counted(len(classes), "class")
    if not classes:
        yield "It names no classes."
    elif len(classes) <= _UNFOLDED:
        yield f"{count}, in order: {listed}"
    else:
        yield folded(count, f"In order: {listed}")


def _licences(cache: Cache) -> Iterator[str]:
    manifest = cache.manifest
    assert manifest is not None
    stated = {what: cache.licences.get(what) for what in licences.WHAT}
    yield bullets([f"of the {what}: {code(said) if said else 'not stated'}" for what, said in stated.items()])
    bound = [what for what, said in stated.items() if said and licences.not_commercial(said)]
    if bound:
        yield f"**For non-commercial use**, says the licence of the {' and of the '.join(bound)}."
    for warning in licences.warnings(manifest):
        yield f"Note that {warning}."
    if licences.refusal(manifest):
        yield "**As they stand, nothing says that it may be passed on.**"


def _views(cache: Cache) -> Iterator[str]:
    recipe = cache.parts[0].identity.recipe
    yield (
        f"{counted(cache.views, 'view')} of every image, by the recipe {code(recipe.spec)} with seed {recipe.seed}. Each is "
        "stored beside its targets, and rendered again from the image to the last bit."
        if cache.replayable
        else "What the teacher saw is not known."
    )
    if not cache.replayable:
        return
    try:
        phases = Recipe(recipe.spec, recipe.seed).words()
    except SoftcacheError:
        yield "This softcache does not know all of its ops."
        return
    ends = [first for first, _ in phases[1:]] + [cache.views]
    for (first, sentences), end in zip(phases, ends, strict=True):
        if len(phases) > 1:
            yield f"Views {first:,} to {end - 1:,}:"
        yield "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))


def _example(cache: Cache) -> str:
    name = min(cache.targets, default="logits")
    return f'cache[cache.ids[0], 0]["{name}"]'


def _pull(remote: str | None, tag: str | None) -> Iterator[str]:
    if remote is None or tag is None:
        return
    where, what = "REMOTE", ""
    if remote.startswith("s3://"):
        where = shown(remote).partition("?")[0]
    elif remote.startswith("hf:"):
        where, what = "hf:CLONE", "`CLONE` is a clone of this repository."
    yield "## How to get it"
    yield block("", [command("softcache", "pull", where, tag, "-o", "CACHE")])
    yield (
        what + " Parts are had with `--targets` and `--views`; every file is compared with its digest."
    ).strip()


def _rebuild(cache: Cache) -> Iterator[str]:
    if cache.parts[0].identity.teacher.name.startswith(IMPORTED):
        yield "Its targets were imported from arrays: it cannot be rebuilt without them."
        return
    yield block("", rebuild(cache))
    for part in cache.parts[1:]:
        grid = part.identity.grid
        what = ", ".join(code(name) for name in part.targets)
        views = f"the views {grid.first:,} to {grid.views - 1:,} of " if grid.first else ""
        yield f"Then it was extended by {views}{what}, by the teacher {code(part.identity.teacher.name)}."
    libraries = cache.parts[0].identity.libraries
    yield (
        f"Equal bytes need the same kind of processor and the same versions: "
        f"{', '.join(f'{code(name)} {code(version)}' for name, version in libraries.items())}."
    )


def _caveats(cache: Cache) -> Iterator[str]:
    found = list(_known(cache))
    if found:
        yield "## What to know"
        yield bullets(found)


def _known(cache: Cache) -> Iterator[str]:
    if not cache.replayable:
        yield "It is not replayable: nobody knows which pixels the teacher saw. Read it by id, or train on frozen targets."
    elif cache.views == 1:
        yield "It has one view of every image. A student learns less from that than from several, or from labels alone."
    if len(cache.invalid):
        yield f"{counted(len(cache.invalid), 'sample')} (`cache.invalid`) could not be read and hold nothing."
    if cache.mixed:
        yield "Views are mixed with those of other samples: hold none of them out, and validate on another split."
    if cache.tiled:
        yield "Views are mosaics of several samples, which have no one label."
    for who, _ in teachers.speakers(cache):
        yield from teachers.caveats(who)


def _citation(cache: Cache) -> str:
    digest = cache.digest
    return block(
        "bibtex",
        [
            f"@misc{{softcache-{digest[:12]},",
            f"  title = {{{bibtex(_title(cache))}}},",
            f"  note = {{softcache, format {_version(cache.parts[0].identity)}, sha256 {digest}}},",
            "}",
        ],
    )


def _format(cache: Cache) -> str:
    version = _version(cache.parts[-1].identity)
    return (
        f"softcache {version}, digest {code(cache.digest)}. It is a Zarr v3 group; `softcache verify CACHE --read-data` "
        "compares every byte with its digest. This card is made from the manifest by `softcache card`."
    )


def _version(identity: Identity) -> str:
    return ".".join(map(str, identity.version))
