"""The options of a training run: the keys of a config file and of ``--set``, validated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from softcache.errors import SpecError, nearest
from softcache.options import read_yaml

Fraction = Annotated[float, Field(ge=0, le=1)]

NO_EFFECT_ON_WEIGHTS = frozenset(
    {"workers", "val_limit", "check_source", "checkpoint_every", "out", "warp_threshold"}
)


class Config(BaseModel):
    """How a student is trained. The loss is (1 − alpha) · CE + alpha · KD(T)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    student: str
    """A name from :mod:`softcache_train.students`, or ``package.module:factory``."""
    epochs: PositiveInt
    """Each shows every training sample once, in one of the cache's views."""
    global_batch: PositiveInt = 128
    """Rows a step, over all ranks."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.1
    """The peak; cosine to zero over the run, step by step."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Linear rise to ``lr`` over so many epochs."""
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NonNegativeFloat = 5e-4

    T: PositiveFloat = 4.0
    alpha: Fraction = 0.9
    """The weight of KD; 0 trains from labels only, 1 from the teacher only."""
    target: str | list[str] = "logits"
    """The cache's target that KD learns from; several (``[0.logits, 1.logits]``) are combined."""
    combine: Literal["geometric", "arithmetic"] = "geometric"
    """The mean of several targets: of their logits, or of their probabilities at T."""
    views: PositiveInt | None = None
    """Train on the first so many of the cache's views; all by default."""
    teacher: str | list[str] | None = None
    """A live teacher in place of the cache's targets, for comparison; the cache gives the views. A list
    of teachers runs as one."""
    weights: str | list[str | None] | None = None
    """The live teacher's weights; a list for several."""

    policy: Literal["exact", "warp", "frozen"] = "exact"
    """How cached targets go with the views that are shown; see :mod:`softcache_train.policy`."""
    recipe: str | None = None
    """How fresh views are drawn at every epoch: for ``warp`` and ``frozen``, a live teacher, or labels only."""
    warp_threshold: Fraction = 0.95
    """The least cosine, of those the build measured, that lets a target be warped."""

    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 2
    """Threads that decode and render; 0 does it between the steps."""
    amp: Literal["auto", False] = "auto"
    """Mixed precision on CUDA (bfloat16, or float16 with loss scaling); never on a CPU."""
    val_split: str | None = None
    """Where to validate; see :mod:`softcache_train.validation` for the default."""
    val_limit: PositiveInt = 2000
    check_source: bool = False
    """Read every image of the source and compare it with what the cache was built from."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints within an epoch; there is one at the end of every epoch."""
    out: str | None = None
    """The run's folder; by default ``runs/<student>-<digest of cache and options>``."""

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0; set nesterov to false")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} leaves none of {self.epochs} epochs")
        if not self.target:
            raise ValueError("target names none: logits, or a list such as [0.logits, 1.logits]")
        if self.weights is not None and self.teacher is None:
            raise ValueError("weights are a live teacher's: set teacher too")
        return self

    @property
    def targets(self) -> list[str]:
        return [self.target] if isinstance(self.target, str) else self.target

    def identity(self) -> dict[str, Any]:
        """The options that decide the weights; the others may change when a run is resumed."""
        return self.model_dump(exclude=set(NO_EFFECT_ON_WEIGHTS))


def load(path: str | Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None) -> Config:
    """The config file at ``path``, with ``key=value`` overrides (values in YAML), then ``flags``.

    Raises :class:`SpecError` that names the file and the key for anything that cannot be
    understood.
    """
    path = Path(path)
    options = read_yaml(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SpecError(f"--set {override!r} is written key=value, like --set lr=0.05")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise SpecError(f"--set {override!r}: the value is not YAML") from e
    return check({**options, **(flags or {})}, str(path))


def check(options: dict[str, Any], where: str = "config") -> Config:
    """Options → :class:`Config`. Raises :class:`SpecError` with the nearest known key."""
    for key in options:
        if key not in Config.model_fields:
            raise SpecError(f"{where}: unknown option {key!r}{nearest(str(key), Config.model_fields)}")
    try:
        return Config(**options)
    except ValidationError as e:
        problems = [f"{'.'.join(map(str, p['loc'])) or 'options'}: {p['msg']}" for p in e.errors()]
        raise SpecError(f"{where}: {'; '.join(problems)}") from None
