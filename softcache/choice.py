"""Choose codecs for a budget, or for a fidelity, from what a pilot tells; once for a cache, whoever builds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from softcache import chosen as c
from softcache import codecs, documents, inventory, sizes
from softcache.beginning import begun
from softcache.cache import Cache
from softcache.candidates import Candidate, Tried, try_all
from softcache.commission import Commission, Say
from softcache.errors import MismatchError, SpecError
from softcache.measure import size
from softcache.pilot import try_out
from softcache.store import Store

Chosen = dict[str, Candidate]


@dataclass(frozen=True)
class Limits:
    """What was asked for: ``budget``, bytes of the whole cache; ``max_kl``, nats of T²·KL at the worst of T = 1, 2, 4, 8."""

    budget: int | None
    max_kl: float | None

    def __bool__(self) -> bool:
        return self.budget is not None or self.max_kl is not None

    def words(self) -> str:
        """``a budget of 20.0 GB and T²·KL of at most 0.001``."""
        told = [] if self.budget is None else [f"a budget of {size(self.budget)}"]
        return " and ".join(
            told + ([] if self.max_kl is None else [f"T²·KL of at most {self.max_kl:g} nats"])
        )


def limits(budget: int | str | None, max_kl: float | None) -> Limits:
    """Read them. Raises :class:`SpecError` for a budget that is none, and for a KL that is not above 0."""
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise SpecError(f"max_kl {max_kl}: nats above 0, such as 1e-3")
    return Limits(None if budget is None else sizes.read(budget), max_kl)


# -- once for a cache --------------------------------------------------------------------------------------


def settled(store: Store, asked: Commission, wanted: Limits, say: Say) -> Commission:
    """The commission with its codecs chosen: as they were for the build that has begun in the store, or now.

    What is decided is put there before anything else of the build, so that whoever goes on with it, or takes part, keeps to
    it.

    Raises:
        MismatchError: the build that has begun chose for something else, or did not choose.
        SpecError: nothing meets what is wanted; it says what comes nearest.
    """
    known = _known(store, asked, wanted)
    if known is None:
        decided = record(*decide(asked, wanted), wanted)
        known = _first(store, asked, wanted, decided)
    for line in known.why:
        say(line)
    by_name = known.chosen
    return replace(
        asked, asked=tuple(replace(one, codec=codecs.parse(by_name[one.name])) for one in asked.asked)
    )


def _first(store: Store, asked: Commission, wanted: Limits, decided: c.Choice) -> c.Choice:
    """What is decided, unless another builder came first."""
    while True:
        with store.claim("choice") as mine:
            if known := _known(store, asked, wanted):
                return known
            if mine:
                store.put(c.FILE, decided.to_bytes())
                return decided
        time.sleep(0.05)


def _known(store: Store, asked: Commission, wanted: Limits) -> c.Choice | None:
    """What was chosen before; None where no build has begun."""
    started = begun(store) is not None
    known = documents.read_choice(store)
    if known is None:
        if started:
            raise MismatchError(
                f"{store.root} was begun without a choice of codecs: leave out --budget and --max-kl to go on with it, or "
                "name another folder"
            )
        return None
    specs = {one.name: one.codec.spec for one in asked.asked}
    for what, there, here in (
        ("budget", known.budget, wanted.budget),
        ("max_kl", known.max_kl, wanted.max_kl),
        ("targets", known.asked, specs),
    ):
        if there != here:
            raise MismatchError(
                f"the codecs of {store.root} were chosen for other wishes: {what} is {there} there and {here} here. Repeat "
                "those to go on with it, or name another folder"
            )
    return known


def kept_to(store: Store, asked: Commission) -> None:
    """Of a build that chooses nothing: raises :class:`MismatchError` where one chose other codecs in its folder and stopped
    before it began, since the choice would go into this one's manifest."""
    if begun(store) is not None or (known := documents.read_choice(store)) is None:
        return
    here = {one.name: one.codec.spec for one in asked.asked}
    if known.chosen != here:
        raise MismatchError(
            f"codecs were chosen for {store.root}, {known.chosen}, and {here} are asked for: repeat --budget and --max-kl "
            f"to go on with them, or name another folder, or delete {store.path(c.FILE)}"
        )


def outgrown(cache: Cache) -> str:
    """A line for a person where a cache has come to take more than the budget that its codecs were chosen for."""
    known = cache.manifest and cache.manifest.choice
    if not known or known.budget is None or (now := inventory.size(cache)) <= known.budget:
        return ""
    return (
        f"NOTE: {cache.path} takes {size(now)} now, and its codecs were chosen for a budget of {size(known.budget)}: "
        "nothing that is added is counted in that"
    )


def decide(asked: Commission, wanted: Limits) -> tuple[Tried, Chosen]:
    """Try the candidates in a pilot, and choose among them."""
    tried = try_all(try_out(asked))
    return tried, choose(tried, wanted)


def record(tried: Tried, chosen: Chosen, wanted: Limits) -> c.Choice:
    """What goes into the manifest."""
    considered = [
        c.Considered(
            target=one.target,
            codec=one.codec,
            bytes_per_view=round(tried.bytes_per_view(one), 2),
            total_bytes=tried.whole({**chosen, one.target: one}).bytes,
            figures={
                key: float(f"{value:.4g}") for key, value in one.figures.items() if math.isfinite(value)
            },
            eligible=one.same,
        )
        for some in tried.candidates.values()
        for one in some
    ]
    return c.Choice(
        budget=wanted.budget,
        max_kl=wanted.max_kl,
        asked={name: one.codec for name, one in tried.asked.items()},
        chosen={name: one.codec for name, one in chosen.items()},
        bytes=tried.whole(chosen).bytes,
        why=why(tried, chosen, wanted),
        considered=considered,
    )


# -- the rule ----------------------------------------------------------------------------------------------


def choose(tried: Tried, wanted: Limits) -> Chosen:
    """One candidate of each target, of the form that was asked for.

    With ``max_kl`` logits take the fewest bytes whose T²·KL is within it at every temperature; other targets stay as asked.
    With ``budget`` the targets that are still open share it so that the worst of them loses as little of the student's
    gradient as can be, then the next worst, and so on. Raises :class:`SpecError` where nothing meets what is wanted.
    """
    open_ = {
        name: sorted((one for one in some if one.same and one.error is not None), key=tried.bytes_per_view)
        for name, some in tried.candidates.items()
    }
    fixed = {name: one for name, one in tried.asked.items() if not open_[name]}
    if wanted.max_kl is not None:
        fixed |= _within_kl(open_, wanted.max_kl)
    free = {name: some for name, some in open_.items() if name not in fixed}
    if wanted.budget is None:
        return {**tried.asked, **fixed}
    return _within_budget(tried, fixed, free, wanted)


def _within_kl(open_: Mapping[str, list[Candidate]], most: float) -> Chosen:
    found = {}
    for name, some in open_.items():
        known = [one for one in some if one.kl is not None]
        if not known:
            continue
        meeting = [one for one in known if (one.kl or 0.0) <= most]
        if not meeting:
            nearest = min(known, key=lambda one: one.kl or 0.0)
            raise SpecError(
                f"no codec keeps T²·KL of {name} within {most:g} nats at T = 1, 2, 4, 8: {nearest.codec} comes nearest, "
                f"with {nearest.kl:.2g}; say --max-kl {_up(nearest.kl or 0.0)}"
            )
        found[name] = meeting[0]
    if not found:
        raise SpecError(
            "max_kl is of logits that hold probabilities, and no target has any: leave it out, or keep logits=full(u8)"
        )
    return found


def _within_budget(
    tried: Tried, fixed: Chosen, free: Mapping[str, list[Candidate]], wanted: Limits
) -> Chosen:
    budget = wanted.budget or 0
    chosen = {name: some[0] for name, some in free.items()}  # the smallest
    least = _needed(tried, fixed | chosen)
    if least > budget:
        raise _nothing_meets(tried, fixed | chosen, wanted, least)
    left = set(free)
    while left:
        for level in sorted({one.error or 0.0 for name in left for one in free[name]}):
            fine = {n: next((o for o in free[n] if (o.error or 0.0) <= level), None) for n in left}
            trial = chosen | {name: one for name, one in fine.items() if one is not None}
            if all(fine.values()) and _needed(tried, fixed | trial) <= budget:
                chosen = trial
                break
        left.remove(max(left, key=lambda name: chosen[name].error or 0.0))
    return fixed | chosen


def _needed(tried: Tried, chosen: Chosen) -> int:
    """Bytes of the cache, with a reserve, and with what the manifest then tells of the choice."""
    many = sum(map(len, tried.candidates.values()))
    return tried.whole(chosen, 2 * _RECORD * (many + 2)).at_most


_RECORD = 500  # bytes that a candidate takes in the record, or so


def _nothing_meets(tried: Tried, least: Chosen, wanted: Limits, needed: int) -> SpecError:
    told = ", ".join(f"{name}={one.codec}" for name, one in sorted(least.items()))
    fitting = (
        f"; {one.target}={one.codec} would fit, which keeps another form: ask for it by name"
        for some in tried.candidates.values()
        for one in some
        if not one.same and _needed(tried, {**least, one.target: one}) <= (wanted.budget or 0)
    )
    kl = f" with {Limits(None, wanted.max_kl).words()}" if wanted.max_kl is not None else ""
    return SpecError(
        f"no codecs keep the cache within a budget of {size(wanted.budget or 0)}{kl}: the smallest, {told}, take "
        f"{size(needed)}. Say --budget {_up(needed / 1e6)}MB, or fewer views, targets or samples{next(fitting, '')}"
    )


def _up(value: float) -> str:
    """Two digits, rounded up."""
    if not value:
        return "1e-12"
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / digit) * digit:.12g}"


# -- in words ----------------------------------------------------------------------------------------------


def why(tried: Tried, chosen: Chosen, wanted: Limits) -> list[str]:
    """What was chosen, and what would have been the next."""
    whole = tried.whole(chosen).bytes
    lines = [f"chosen for {wanted.words()}, from a pilot: {size(whole)} in all"]
    for name, one in sorted(chosen.items()):
        others = sorted(
            (o for o in tried.candidates[name] if o.same and o.error is not None), key=tried.bytes_per_view
        )
        told = f"{name}={one.codec}: {tried.bytes_per_view(one):,.1f} bytes a view, {_lost(one)}"
        if one not in others:
            lines.append(f"{told}; as asked for, since nothing else keeps that form")
        elif wanted.max_kl is not None and one.kl is not None:
            smaller = [o for o in others if tried.bytes_per_view(o) < tried.bytes_per_view(one)]
            lines.append(told + _next(tried, smaller[-1:], lambda o: f"has T²·KL {o.kl or 0.0:.2g}"))
        elif wanted.budget is None:
            lines.append(f"{told}; as asked for: max_kl is of logits")
        else:
            finer = [o for o in others if (o.error or 0.0) < (one.error or 0.0)]
            lines.append(
                told + _next(tried, finer[:1], lambda o: f"would make it {size(_with(tried, chosen, o))}")
            )
    return lines


def _next(tried: Tried, others: list[Candidate], told: Callable[[Candidate], str]) -> str:
    return "".join(f"; {o.codec} ({tried.bytes_per_view(o):,.1f} bytes) {told(o)}" for o in others)


def _with(tried: Tried, chosen: Chosen, one: Candidate) -> int:
    return tried.whole({**chosen, one.target: one}).bytes


def _lost(one: Candidate) -> str:
    told = [] if one.kl is None else [f"T²·KL {one.kl:.2g}"]
    return ", ".join(told + ([] if one.error is None else [f"gradient off by {one.error:.2%}"]))
