"""Who spoke, in a card."""

from __future__ import annotations

from collections.abc import Iterator

from softcache.cache import Cache
from softcache.card.markup import bullets, code
from softcache.identity import IMPORTED, InputSpec, TeacherId


def speakers(cache: Cache) -> list[tuple[TeacherId, list[str]]]:
    """The teachers, each with its targets."""
    found: list[tuple[TeacherId, list[str]]] = []
    for part in cache.parts:
        who = part.identity.teacher.model_copy(update={"answer": None})
        for known, names in found:
            if known == who:
                names += [name for name in part.targets if name not in names]
                break
        else:
            found.append((who, list(part.targets)))
    return found


def told(cache: Cache) -> Iterator[str]:
    """A list about each."""
    said = speakers(cache)
    for who, names in said:
        if len(said) > 1:
            yield f"Of {', '.join(code(name) for name in names)}:"
        yield bullets(list(_teacher(who)))


def _teacher(who: TeacherId) -> Iterator[str]:
    yield code(who.name)
    for member in who.members or ():
        yield f"one of several: {code(member.name)}, {_weights(member.weights, member.weights_format)}"
    yield _weights(who.weights, who.weights_format)
    yield f"precision {code(who.precision)}, processor {code(who.processor)}, batches of {who.batch:,}"
    yield _input(who.input_spec)
    if who.parent:
        yield f"it learned from the cache {code(who.parent)}"
    if who.flip_tta:
        yield "logits are the mean over each view and its mirror image"
    if who.columns:
        yield "its classes were put into the order of the dataset's"
    if who.head:
        yield f"its outputs were read as those of {code(who.head)}"
    smoothing = who.label_smoothing
    yield f"label smoothing of its training: {'not stated' if smoothing is None else f'{smoothing:g}'}"


def _weights(digest: str | None, format: str | None) -> str:
    told = f"weights of sha256 {code(digest)}" if digest else "weights without a digest"
    return f"{told}, {f'read from {code(format)}' if format else 'not from a file'}"


def _input(spec: InputSpec) -> str:
    height, width = spec.size
    mean, std = (", ".join(f"{x:g}" for x in numbers) for numbers in (spec.mean, spec.std))
    return (
        f"sees {width}×{height} pixels, {spec.color}, less ({mean}) and divided by ({std}), of values 0 to 1"
    )


def caveats(who: TeacherId) -> Iterator[str]:
    """What to know of its answers."""
    name = code(who.name)
    if who.precision != "fp32":
        yield f"{name} ran in {code(who.precision)}: its answers are rounded before they were kept."
    if who.name.startswith(IMPORTED):
        yield "Its targets are arrays that were imported: whoever shares it has to say which teacher they are of."
    elif who.weights is None:
        yield f"The weights of {name} have no digest: it is known by its name and by its answer to a picture of noise."
    if who.weights_format and "pickle" in who.weights_format:
        yield f"The weights of {name} were read from a pickle, which can run code: have your own from whom you trust."
    if who.label_smoothing:
        yield f"{name} was trained with label smoothing, which takes away what its logits tell of classes that are alike."
