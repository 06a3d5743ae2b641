"""Checkpoints: tensors as safetensors, the rest as JSON, and no pickle anywhere.

A run's folder holds ``model-<step>.safetensors`` (the student's plain state dict),
``optimizer-<step>.safetensors``, where objectives learn something themselves ``terms-<step>.safetensors``, and
``checkpoint.json``, which names them with their digests. The
JSON is written last and is the commit point: after a crash at any moment it names whole files.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from softcache.errors import DamageError, MismatchError, nearest
from softcache.spec import canonical_json, digest
from softcache.store import Store
from softcache_train import students

NAME = "checkpoint.json"
VERSION = 1
MAX_JSON = 1 << 26


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is, and what decides how it goes on."""

    config: dict[str, Any]
    """The options that decide the weights: :meth:`Config.identity`."""
    cache: str
    """The cache's name, a sha256."""
    num_classes: int
    input_spec: dict[str, Any]
    """What the student is fed with."""
    epoch: int = 0
    step: int = 0
    """The next step of the epoch."""
    totals: list[float] = field(default_factory=list)
    """Sums of each term of the loss over the epoch's steps so far."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each finished epoch."""
    scaler: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """``model``, ``optimizer`` and perhaps ``terms``: file and sha256."""
    version: int = VERSION


def save(
    store: Store, state: Checkpoint, model: nn.Module, optimizer: Optimizer, terms: nn.Module | None = None
) -> None:
    """Put a checkpoint into ``store`` and remove the one before it: of the student, the optimizer, and what the ``terms`` of
    the loss hold. Raises :class:`StoreError`."""
    files, parts = {}, {"model": model.state_dict(), "optimizer": _flatten(optimizer)}
    if terms is not None and (own := terms.state_dict()):
        parts["terms"] = own
    for kind, tensors in parts.items():
        # in one word: safetensors writes several in any order, and equal runs end with equal bytes
        said = {"softcache.cache": f"{state.cache} {state.num_classes}"}
        data = to_bytes(
            {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()},
            said if kind == "model" else None,
        )
        files[kind] = {"file": file_name(kind, state.epoch, state.step), "sha256": digest(data)}
        store.put(files[kind]["file"], data)
    store.put(NAME, canonical_json({**asdict(state), "files": files}))
    kept = {f["file"] for f in files.values()}
    for kind in files:
        for path in store.root.glob(f"{kind}-*.safetensors"):
            if path.name not in kept:
                path.unlink()


def file_name(kind: str, epoch: int, step: int) -> str:
    """Where the tensors of ``kind`` (``model``, ``optimizer``) lie at a moment of the run."""
    return f"{kind}-{epoch:04d}-{step:06d}.safetensors"


def read(store: Store) -> Checkpoint | None:
    """The checkpoint in ``store``, without its tensors; None where there is none.

    Raises :class:`DamageError` when it cannot be read and :class:`MismatchError` when a newer
    version wrote it.
    """
    if not store.exists(NAME):
        _require_room(store)
        return None
    try:
        raw = json.loads(store.get(NAME, limit=MAX_JSON))
        version = raw["version"]
        if version > VERSION:
            raise MismatchError(
                f"{store.path(NAME)} is of version {version}; this softcache-train reads {VERSION}"
            )
        return Checkpoint(**raw)
    except (ValueError, TypeError, KeyError) as e:
        raise DamageError(f"{store.path(NAME)} is not a checkpoint: {e}") from e


def _require_room(store: Store) -> None:
    """A run's folder is its own: nothing but what an unfinished first checkpoint left may be in it."""
    if store.root.exists() and not store.root.is_dir():
        raise MismatchError(f"{store.root} is a file: give a folder for the run with -o")
    foreign = [n for n in store.names() if not n.startswith(("model-", "optimizer-", "terms-"))]
    if foreign:
        raise MismatchError(
            f"{store.root} holds something else, for example {foreign[0]!r}: give an empty or a new folder with -o"
        )


def restore(
    store: Store,
    state: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    terms: nn.Module | None = None,
) -> None:
    """Load the checkpoint's tensors into a model, and into its optimizer and the loss's terms where they are given.

    Raises :class:`DamageError` for a file that is not what the JSON says and :class:`MismatchError`
    for tensors that do not fit the model.
    """
    try:
        model.load_state_dict(_tensors(store, state, "model"))
    except RuntimeError as e:
        raise MismatchError(
            f"the checkpoint in {store.root} does not fit the student "
            f"{state.config['student']!r}: {' '.join(str(e).split())}"
        ) from e
    if terms is not None and terms.state_dict():
        terms.load_state_dict(_tensors(store, state, "terms"))
    if optimizer is not None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _tensors(store, state, "optimizer").items():
            parameter, _, name = key.partition(".")
            slots.setdefault(int(parameter), {})[name] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})


def require_same(state: Checkpoint, config: dict[str, Any], cache: str, where: Path) -> None:
    """Raise :class:`MismatchError`, naming the field, unless ``state`` belongs to this run."""
    mine, theirs = {**config, "cache": cache}, {**state.config, "cache": state.cache}
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise MismatchError(
                f"the run in {where} has {key}={theirs.get(key)!r}, this one "
                f"{key}={mine.get(key)!r}: give another folder with -o, or the same options to resume"
            )


def load_student(path: str | Path) -> nn.Module:
    """The student of the run in folder ``path``, in eval mode, with the ``input_spec`` it was fed
    with.

    Raises :class:`DamageError` when there is no whole checkpoint and :class:`SpecError` when the
    student's own module cannot be imported.
    """
    store = Store(path)
    state = read(store)
    if state is None:
        raise DamageError(f"no checkpoint in {path}: {NAME} is missing")
    model = students.make(state.config["student"], state.num_classes)
    restore(store, state, model)
    model.input_spec = state.input_spec  # pyright: ignore[reportArgumentType]
    return model.eval()


def _flatten(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{name}": value
        for parameter, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def _tensors(store: Store, state: Checkpoint, kind: str) -> dict[str, Tensor]:
    if kind not in state.files:
        raise DamageError(f"{store.path(NAME)} names no {kind} file{nearest(kind, state.files)}")
    file = state.files[kind]
    data = store.get(file["file"])
    if digest(data) != file["sha256"]:
        raise DamageError(f"{store.path(file['file'])} is not the file that {NAME} describes")
    try:
        return from_bytes(data)
    except SafetensorError as e:
        raise DamageError(f"{store.path(file['file'])} is not safetensors: {e}") from e
