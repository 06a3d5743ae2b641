"""The training loop."""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from softcache import canary, erasure
from softcache.beside import classes_of
from softcache.cache import Cache
from softcache.codecs.anchored import Anchored
from softcache.codecs.argmax import Argmax
from softcache.codecs.packed import Packed
from softcache.codecs.sample import Sample
from softcache.codecs.topk import TopK
from softcache.errors import MismatchError, SoftcacheError, SpecError
from softcache.keyed import hash64
from softcache.source import Source
from softcache.spec import canonical_json, digest
from softcache.store import Store
from softcache_train import checkpoint, mixing, online, ranks, students, terms, validation
from softcache_train.checkpoint import Checkpoint
from softcache_train.config import Config, Objective
from softcache_train.loader import Loader
from softcache_train.mixing import Mixer
from softcache_train.objectives import OBJECTIVES
from softcache_train.progress import Progress
from softcache_train.ranks import Ranks
from softcache_train.taps import Tapped
from softcache_train.targets import CacheTargets, TargetSource
from softcache_train.terms import Distillation


@dataclass(frozen=True)
class Result:
    """What a run came to.

    ``out`` is its folder and ``model`` the student's weights in it. ``top1`` in 0…1, None without
    labelled images to validate on. ``step_ms`` and ``images_per_second`` (over all ranks) are
    medians over the epochs, validation not counted; None where no epoch could be timed. Of a student with exits
    ``exits`` are the top-1 of each, from the first to the deepest, and ``ensemble`` that of the mean of their logits.
    """

    out: str
    model: str
    epochs: int
    top1: float | None
    step_ms: float | None
    images_per_second: float | None
    exits: tuple[float, ...] = ()
    ensemble: float | None = None


class TrainingDiverged(SoftcacheError):  # noqa: N818 - named for what it is
    """The loss is no longer a number."""


PARTIAL = (Argmax, Packed, Sample, TopK)  # codecs that leave out logits


def train(config: Config, cache: Cache, source: Source, *, val_source: Source | None = None) -> Result:
    """Train a student from a cache, or go on with the run in the same folder.

    The loss is the weighted sum of the objectives, by default (1 − alpha) · CE + alpha · KD(T) (Hinton et al. 2015); where
    views are mixed, CE is λ of the label's and 1 − λ of the partner's. A run that was stopped and
    resumed at any step ends with the very weights of one that was not (on one kind of CPU, with as
    many threads). Under torchrun every rank calls this alike; batch norm then sees a rank's share
    of the batch, and rank 0's statistics are kept. Progress goes to stderr. Seeds torch's global
    stream.

    Raises:
        MismatchError: the source or the run's folder belong to another cache or other options.
        SpecError: options that do not fit the cache.
        TrainingDiverged: the loss is not finite, noticed at the next checkpoint; the last one, if any, is kept.
        KeyboardInterrupt: Ctrl-C, once the step is done and a checkpoint written.
    """
    with ranks.join() as team, _interrupts() as interrupted:
        return _train(team, interrupted, config, cache, source, val_source)


def _train(
    team: Ranks,
    interrupted: threading.Event,
    config: Config,
    cache: Cache,
    source: Source,
    val_source: Source | None,
) -> Result:
    device, num_classes = team.device, class_count(config, cache)
    torch.manual_seed(config.seed)
    student = students.make(config.student, num_classes).to(device)
    input_spec = cache.identity["teacher"]["input_spec"] | getattr(student, "input_spec", {})
    pairing = canary.pair(cache, source, every=config.check_source)
    divided = validation.split(cache, source, pairing, val_source, config.val_limit)
    loader = Loader(
        cache,
        source,
        global_batch=config.global_batch,
        seed=config.seed,
        input_spec=input_spec,
        workers=config.workers,
        rank=team.rank,
        world=team.world,
        target_source=_target_source(config, cache, device),
        samples=divided.train,
        views=config.views,
        views_per_image=config.views_per_image,
        shuffle=config.shuffle,
        processes=config.processes,
        pairing=pairing,
        policy=config.policy,
        recipe=config.recipe,
        warp_threshold=config.warp_threshold,
    )
    _check_labels(config, loader, num_classes)
    held_out = validation.load(cache, source, divided, loader.size)
    amp = _autocast_dtype(config, device)
    whole = _distillation(config, cache, student, loader.size, input_spec["std"], amp).to(device)
    optimizer = _optimizer(config, whole)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    store = Store(config.out or _default_out(config, cache))
    state = checkpoint.read(store)
    if state is None:
        state = Checkpoint(config.identity(), cache.digest, num_classes, input_spec)
    else:
        checkpoint.require_same(state, config.identity(), cache.digest, store.root)
        checkpoint.restore(store, state, student, optimizer, whole.terms)
        scaler.load_state_dict(state.scaler)
    loader.epoch, loader.step = state.epoch, state.step
    weights = torch.tensor([o.weight for o in config.terms], device=device)
    none = torch.zeros(len(weights), dtype=torch.float64, device=device)
    totals = none + torch.tensor(state.totals or 0, dtype=torch.float64, device=device)  # of each term
    totals *= team.rank == 0  # what was summed before is counted once
    parts = config.objectives is not None or (team.world > 1 and whole.student.idle(loader.size, device))
    model = team.parallel(whole, parts)
    mixed = config.approximate_mixing
    mixer = mixed and Mixer(mixing.parse(mixed), config.seed, team.rank)

    progress = Progress(config.epochs, len(loader), config.global_batch, shown=team.rank == 0)
    progress.say(pairing.message)
    progress.say(held_out.message)
    if team.rank == 0 and (note := _smoothing_note(config, cache, loader.samples)):
        progress.say(note)
    if mixed:
        progress.say(f"NOTE: approximate_mixing={mixed}: {mixing.NOTE}")
    if state.files:
        after = "finished" if state.epoch == config.epochs else "going on"
        progress.say(f"{store.root} holds {state.epoch} epochs and {state.step} steps: {after}")
    for epoch in range(state.epoch, config.epochs):
        progress.begin(epoch)
        for batch in loader:
            torch.manual_seed(hash64("step", config.seed, epoch, loader.step, team.rank))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * len(loader) + loader.step - 1, len(loader))

            batch = batch.to(device)
            if mixer:
                batch = mixer(batch, epoch, loader.step)
            losses = model(batch, epoch, first=loader.step == 1 and _begins(config, epoch))
            loss = weights @ losses

            share = len(batch) / config.global_batch
            optimizer.zero_grad()
            scaler.scale(loss * share * team.world).backward()  # ranks average: weigh by rows
            if config.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            totals += losses.detach() * share
            progress.step(loader.step)

            stop = team.any(interrupted.is_set())
            if stop or loader.step % (config.checkpoint_every or len(loader) + 1) == 0:
                state = replace(
                    state,
                    epoch=epoch,
                    step=loader.step,
                    totals=_finite(team.sum(totals), epoch, store),
                    scaler=scaler.state_dict(),
                )
                if team.rank == 0:
                    checkpoint.save(store, state, student, optimizer, whole.terms)
            if stop:
                progress.say(f"stopped in epoch {epoch + 1} after step {loader.step}")
                raise KeyboardInterrupt

        means = [total / len(loader) for total in _finite(team.sum(totals), epoch, store)]
        entry = {
            "epoch": epoch + 1,
            "loss": sum(o.weight * mean for o, mean in zip(config.terms, means, strict=True)),
            **{o.label: mean for o, mean in zip(config.terms, means, strict=True)},
            **progress.rates(),
            **validation.score(student, held_out, input_spec, device),
            **({"targets": f"approximate: {mixed}"} if mixed else {}),
        }
        progress.end(entry)
        totals.zero_()
        state = replace(
            state,
            epoch=epoch + 1,
            step=0,
            totals=totals.tolist(),
            history=[*state.history, entry],
            scaler=scaler.state_dict(),
        )
        if team.rank == 0:
            checkpoint.save(store, state, student, optimizer, whole.terms)

    last = state.history[-1]
    return Result(
        out=str(store.root),
        model=str(store.path(checkpoint.file_name("model", state.epoch, state.step))),
        epochs=state.epoch,
        top1=last["top1"],
        step_ms=_median(state, "step_ms"),
        images_per_second=_median(state, "images_per_second"),
        exits=tuple(last.get("exits", ())),
        ensemble=last.get("ensemble"),
    )


def learning_rate(config: Config, step: int, steps: int) -> float:
    """At ``step`` of the run, with ``steps`` an epoch: a linear rise, then a half cosine to
    zero."""
    warmup, total = config.warmup_epochs * steps, config.epochs * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _distillation(
    config: Config,
    cache: Cache,
    student: nn.Module,
    size: tuple[int, int],
    std: Sequence[float],
    amp: torch.dtype | None,
) -> Distillation:
    tapped = Tapped(student, [name for o in config.terms for name in o.inside])
    device = next(student.parameters()).device
    made = terms.make(config.terms, cache, tapped.shapes(size, device), config.seed, std)
    return Distillation(tapped, made, amp)


def _begins(config: Config, epoch: int) -> bool:
    """Is it the first epoch of one of the objectives?"""
    return any(o.start == epoch for o in config.terms)


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Of the student's weights and the objectives' own."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """None for full precision, as always on a CPU."""
    if not config.amp or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _target_source(config: Config, cache: Cache, device: torch.device) -> TargetSource:
    if config.teacher is not None:
        return online.load(cache, config.teacher, config.weights, config.targets, str(device))
    return CacheTargets(cache, config.targets)


def class_count(config: Config, cache: Cache) -> int:
    """How many classes the student tells apart: as many as the logits it learns from, or else as the cache has."""
    terms.require_targets(config.terms, cache)
    if config.approximate_mixing:
        mixing.check(config.terms, cache)
    of_logits = [name for o in config.terms for name in o.targets if cache.targets[name].kind == "logits"]
    if config.teacher is None:
        for o in config.terms:
            _check_kept(o, cache, config.approximate_mixing is not None)
    classes = {classes_of(cache, name) for name in of_logits}
    if len(classes) > 1:
        raise MismatchError(f"the targets {', '.join(of_logits)} are of different numbers of classes")
    if not classes:
        classes = {classes_of(cache, n) for n, t in cache.targets.items() if t.kind == "logits"}
    if len(classes) != 1 and cache.classes:
        classes = {len(cache.classes)}
    if len(classes) != 1:
        raise SpecError(
            f"the cache {cache.path} neither holds logits nor names classes: add ce or kd, and what they need"
        )
    return classes.pop()


def _check_kept(objective: Objective, cache: Cache, mixed: bool = False) -> None:
    """Refuse before the images are read what the objective would refuse at the first step."""
    for target in (cache.targets[name] for name in objective.targets):
        several = len(objective.targets) > 1
        if isinstance(target.codec, (*PARTIAL, Anchored) if several else PARTIAL if mixed else ()):
            what = "several targets are combined" if several else "approximate_mixing mixes probabilities"
            raise SpecError(
                f"the target {target.name!r} holds {target.spec}, and {what} from whole logits: cache them with full(u8) or "
                "full(f16)"
            )
        if isinstance(target.codec, TopK) and "T" in OBJECTIVES[objective.name].options:
            target.codec.known_tail(target.shape).weights(objective.T)


def _check_labels(config: Config, loader: Loader, num_classes: int) -> None:
    labels = loader.labels[loader.samples]
    if labels.max() >= num_classes:
        raise MismatchError(
            f"the source has labels up to {labels.max()} and the teacher {num_classes} classes"
        )
    if not (ask := [o.label for o in config.terms if o.labelled]):
        return
    instead = "--set alpha=1" if config.objectives is None else f"the objectives without {ask[0]}"
    if labels.max() < 0:
        raise SpecError(f"the source has no labels: learn from the teacher only with {instead}")
    if loader.cache.tiled:
        raise SpecError(
            "the cache has mosaics, which show four samples each and have no one label: learn from the teacher only with "
            f"{instead}"
        )


def _smoothing_note(config: Config, cache: Cache, samples: np.ndarray) -> str | None:
    for objective in config.terms:
        if "T" not in OBJECTIVES[objective.name].options or objective.T <= 1:
            continue
        for name in objective.targets:
            if not (smoothing := cache.teacher(name).get("label_smoothing")):
                continue
            found = erasure.of(cache, name, objective.T, samples) if config.teacher is None else None
            told = (
                f". Of what {name!r} could tell of the classes that are not its answer: {found.words()}"
                if found
                else ""
            )
            return (
                f"NOTE: the teacher was trained with label smoothing {smoothing:g}, which erases what a high T would show "
                "of its classes' likeness (Müller et al. 2019; Shen et al. 2021 find that one-sided): compare with --set T=1"
                f"{told}"
            )
    return None


def _default_out(config: Config, cache: Cache) -> str:
    """One folder for each cache and set of options, so that the same command resumes."""
    name = digest(canonical_json([config.identity(), cache.digest]))[:8]
    return f"runs/{config.student.replace(':', '.')}-{name}"


def _median(state: Checkpoint, name: str) -> float | None:
    timed = [entry[name] for entry in state.history if name in entry]
    return statistics.median(timed) if timed else None


def _finite(totals: Tensor, epoch: int, store: Store) -> list[float]:
    sums = totals.tolist()
    if not all(map(math.isfinite, sums)):
        there = store.exists(checkpoint.NAME)
        kept = "the last checkpoint is kept" if there else "there is no checkpoint yet"
        raise TrainingDiverged(f"the loss is not finite in epoch {epoch + 1}: lower lr (--set lr=…); {kept}")
    return sums


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, to stop between two steps; the second stops at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
