"""The options of a training run: the keys of a config file and of ``--set``, validated."""

from __future__ import annotations

import inspect
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
    TypeAdapter,
    ValidationError,
    model_validator,
)

from softcache.errors import SpecError, counted, nearest
from softcache.options import read_yaml
from softcache_train import mixing
from softcache_train.objectives import OBJECTIVES

Fraction = Annotated[float, Field(ge=0, le=1)]

NO_EFFECT_ON_WEIGHTS = frozenset(
    {"workers", "processes", "val_limit", "check_source", "checkpoint_every", "out", "warp_threshold"}
)


class Objective(BaseModel):
    """A term of the loss, written ``name: {key: value, …}``; keys that are not these are the loss's own options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    """One of :data:`softcache_train.objectives.OBJECTIVES`."""
    weight: NonNegativeFloat = 1.0
    target: str | tuple[str, ...] | None = None
    """The cache's targets that it learns from; ``logits`` by default where it learns from logits."""
    student: str | tuple[str, ...] | None = None
    """The student's modules whose outputs are compared with them; by default its logits, or the modules of the targets'
    names."""
    mask: str | None = None
    """A cached attention map that weighs the places, for a loss that takes one."""
    start: NonNegativeInt = 0
    stop: PositiveInt | None = None
    """Its epochs: from ``start`` to before ``stop``; all by default."""
    combine: Literal["geometric", "arithmetic"] = "geometric"
    """The mean of several targets of logits: of them, or of their probabilities at T."""
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _written(cls, said: Any) -> Any:
        if isinstance(said, str):
            said = {said: {}}
        if not isinstance(said, Mapping) or "name" in said:
            return said
        if len(said) != 1:
            raise ValueError("an objective is written name: {key: value}, such as kd: {weight: 0.9, T: 4}")
        (name, keys), own = next(iter(said.items())), set(cls.model_fields) - {"name", "options"}
        keys = keys or {}
        if not isinstance(keys, Mapping):
            raise ValueError(f"{name} is written {name}: {{key: value}}, such as {name}: {{weight: 0.9}}")
        return {"name": name, "options": {k: v for k, v in keys.items() if k not in own}} | {
            k: v for k, v in keys.items() if k in own
        }

    @model_validator(mode="after")
    def _is_known(self) -> Objective:
        if self.name not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.name!r}{nearest(self.name, OBJECTIVES)}")
        takes, own = OBJECTIVES[self.name].options, set(type(self).model_fields) - {"name", "options"}
        for key in self.options:
            if key not in takes:
                raise ValueError(f"{self.name} has no option {key!r}{nearest(key, own | set(takes))}")
        return self

    @model_validator(mode="after")
    def _reads_something(self) -> Objective:
        known = OBJECTIVES[self.name]
        for key in ("target", "student"):
            if getattr(self, key) == ():
                raise ValueError(f"{self.name}: {key} names none: leave it out, or name one")
        if known.reads == "inside" and not self.target:
            raise ValueError(
                f"{self.name} compares maps or embeddings: say target: layer3, and student: if its name differs"
            )
        if known.reads == "labels" and (self.target or self.student):
            raise ValueError(f"{self.name} learns from labels, and has no target")
        if known.reads == "exits" and self.target:
            raise ValueError(f"{self.name} learns from the student's own last exit, and has no target")
        if self.mask and "mask" not in known.given():
            raise ValueError(f"{self.name} takes no mask")
        many = known.modules
        if len(self.targets) > many and (known.reads != "logits" or "head" in known.made_with):
            raise ValueError(
                f"{self.name} learns from {counted(many, 'target')}, not from {', '.join(self.targets)}: give each a term "
                "of its own"
            )
        if known.reads != "exits" and len(self.inside) not in (0, many):
            raise ValueError(
                f"{self.name} compares {counted(many, 'module')} of the student, not {', '.join(self.inside)}"
            )
        if self.combine == "arithmetic" and not known.probabilities:
            raise ValueError(
                f"{self.name}: combine: arithmetic is the mean of probabilities, which {self.name} does not learn from; "
                "leave it out"
            )
        if missing := [name for name in known.required if name not in self.options]:
            raise ValueError(f"{self.name} needs {missing[0]}: say {self.name}: {{{missing[0]}: …}}")
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"{self.name}: stop={self.stop} is not after start={self.start}")
        T = self.options.get("T", 1.0)  # noqa: N806 - the field's name
        if type(T) not in (int, float) or not 0 < T < float("inf"):
            raise ValueError(f"{self.name}: T: a temperature is finite and above 0, not {T!r}")
        for key, value in self.options.items():
            wanted = known.types.get(key, Any)
            try:
                TypeAdapter(wanted, config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError:
                said = getattr(wanted, "__name__", wanted)
                word = (
                    " (1e-6 is a word in YAML: 1.0e-6)" if wanted is float and isinstance(value, str) else ""
                )
                raise ValueError(f"{self.name}: {key} is of type {said}, not {value!r}{word}") from None
        return self

    def on(self, epoch: int) -> bool:
        """Is it its turn?"""
        return self.start <= epoch and (self.stop is None or epoch < self.stop)

    @property
    def targets(self) -> tuple[str, ...]:
        """The cache's targets that it learns from."""
        reads = OBJECTIVES[self.name].reads
        said = self.target or {"logits": "logits", "gradient": "input.gradient"}.get(reads)
        if said is None:
            return ()
        return (said,) if isinstance(said, str) else said

    @property
    def read(self) -> tuple[str, ...]:
        """All that it reads of the cache."""
        return self.targets + ((self.mask,) if self.mask else ())

    @property
    def inside(self) -> tuple[str, ...]:
        """The student's modules that it listens to; none for its logits."""
        if self.student:
            return (self.student,) if isinstance(self.student, str) else self.student
        if OBJECTIVES[self.name].reads != "inside":
            return OBJECTIVES[self.name].student
        return tuple(name.removesuffix(".attention").removesuffix(".strength") for name in self.targets)

    @property
    def T(self) -> float:  # noqa: N802 - the field's name
        """Its temperature; 1 where it has none."""
        takes = inspect.signature(OBJECTIVES[self.name].loss).parameters
        return self.options.get("T", takes["T"].default if "T" in takes else 1.0)

    @property
    def labelled(self) -> bool:
        """Does it learn from labels, too?"""
        known = OBJECTIVES[self.name]
        return known.reads in ("labels", "gradient", "batch") or "labels" in known.given()

    @property
    def label(self) -> str:
        """It, in logs and messages: ``kd``, ``hint(layer3)``."""
        plain = self.student is None and OBJECTIVES[self.name].reads != "inside"
        return self.name if plain or not self.inside else f"{self.name}({', '.join(self.inside)})"


OF_TWO = ("T", "alpha", "target", "combine")  # what says the loss where no objectives do


class Config(BaseModel):
    """How a student is trained. The loss is the weighted sum of its ``objectives``; without them (1 − alpha) · CE +
    alpha · KD(T)."""

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

    clip_norm: PositiveFloat | None = None
    """The largest norm of the gradient, of the student and of all adapters together."""

    objectives: list[Objective] | None = None
    """The terms of the loss."""
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

    approximate_mixing: str | None = None
    """``mixup(0.8)``, ``cutmix`` or ``mix``: views are mixed that the teacher saw unmixed, see
    :mod:`softcache_train.mixing`."""
    policy: Literal["exact", "warp", "frozen"] = "exact"
    """How cached targets go with the views that are shown; see :mod:`softcache_train.policy`."""
    recipe: str | None = None
    """How fresh views are drawn at every epoch: for ``warp`` and ``frozen``, a live teacher, or labels only."""
    warp_threshold: Fraction = 0.95
    """The least cosine, of those the build measured, that lets a target be warped."""

    seed: NonNegativeInt = 0
    views_per_image: PositiveInt = 1
    """How many views of every image a batch holds; an epoch is so many times as long. See
    :class:`softcache_train.order.Order`."""
    shuffle: Literal["auto", "global", "blocks"] = "auto"
    """See :mod:`softcache_train.shuffle`."""
    workers: NonNegativeInt = 2
    """How many decode and render; 0 does it between the steps."""
    processes: bool = False
    """Workers are processes, not threads: faster on small images."""
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
        if self.objectives is not None:
            self._check_objectives(self.objectives)
        if self.approximate_mixing is not None:
            mixing.parse(self.approximate_mixing)
        if self.weights is not None and self.teacher is None:
            raise ValueError("weights are a live teacher's: set teacher too")
        return self

    def _check_objectives(self, objectives: list[Objective]) -> None:
        if said := sorted(self.model_fields_set & set(OF_TWO)):
            raise ValueError(
                f"{', '.join(said)} and objectives: say each in its objective, such as kd: {{T: 4}}"
            )
        if not any(o.weight for o in objectives):
            raise ValueError("objectives: none of them has a weight above 0")
        labels = [o.label for o in objectives]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"objectives: {twice[0]} is there twice")
        late = [o.label for o in objectives if o.start >= self.epochs]
        if late:
            raise ValueError(f"objectives: {late[0]} would start after the last of {self.epochs} epochs")
        weighed = [o for o in objectives if o.weight]
        for epoch in sorted({0, *(o.stop for o in weighed if o.stop)}):
            if epoch < self.epochs and not any(o.on(epoch) for o in weighed):
                raise ValueError(
                    f"objectives: none is on in epoch {epoch}, of 0 … {self.epochs - 1}: move a start or a stop"
                )

    @property
    def terms(self) -> list[Objective]:
        """The objectives; those of weight 0 left out."""
        asked = self.objectives
        if asked is None:
            target = self.target if isinstance(self.target, str) else tuple(self.target)
            kd = Objective(
                name="kd", weight=self.alpha, target=target, combine=self.combine, options={"T": self.T}
            )
            asked = [Objective(name="ce", weight=1 - self.alpha), kd]
        return [o for o in asked if o.weight]

    @property
    def targets(self) -> list[str]:
        """All that is read of the cache."""
        return list(dict.fromkeys(name for o in self.terms for name in o.read))

    def identity(self) -> dict[str, Any]:
        """The options that decide the weights; the others may change when a run is resumed."""
        later = (
            "objectives",
            "clip_norm",
            "views_per_image",
            "shuffle",
            "approximate_mixing",
        )  # runs begun before there were these go on
        unsaid = {n for n in later if getattr(self, n) == type(self).model_fields[n].default}
        return self.model_dump(mode="json", exclude=set(NO_EFFECT_ON_WEIGHTS) | unsaid)


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
        problems = [
            f"{'.'.join(map(str, p['loc'])) or 'options'}: {p['msg'].removeprefix('Value error, ')}"
            for p in e.errors()
        ]
        raise SpecError(f"{where}: {'; '.join(problems)}") from None
