"""A checkpoint file of yours → the state dict of a network, and what it says of the network's head."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from softcache.errors import TeacherError
from softcache.teachers import Options

State = Mapping[str, torch.Tensor]

_HOLDERS = ("state_dict", "model", "model_ema", "ema")  # where trainers put it, the first one counts
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning


def load(model: torch.nn.Module, options: Options, name: str) -> str | None:
    """Load ``options.weights`` strictly; the format they were in, or None where none were given."""
    if options.weights is None:
        return None
    state, kind = read(options)
    own = model.state_dict()
    state = _without_prefix(state, own)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        told = _misfit(state, own) or str(e).splitlines()[0]
        raise TeacherError(f"the weights {options.weights} do not fit the teacher {name}: {told}") from None
    return kind


def read(options: Options) -> tuple[State, str]:
    """The tensors in ``options.weights`` by name, and the file's format.

    Raises :class:`TeacherError`: no such file, another kind of file, or no state dict in it.
    """
    path = Path(options.weights or "")
    if not path.is_file():
        raise TeacherError(f"the weights {path} do not exist: put the teacher's file there, or name another")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), "safetensors"
    if not options.allow_pickle:
        raise TeacherError(
            f"the weights {path} are not safetensors, and a pickle can run any code: convert them, or say --allow-pickle"
        )
    try:
        # Reference trainers keep their flags beside the weights, as a Namespace: plain attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds here
        raise TeacherError(f"the weights {path} cannot be read: {str(e).splitlines()[0]}") from None
    return _state_in(found, path), "pickle"


def student(options: Options) -> tuple[str | None, int | None]:
    """What ``softcache-train`` writes into a student's file: the cache that it learned from, and its number of classes."""
    path = Path(options.weights or "")
    if path.suffix != ".safetensors" or not path.is_file():
        return None, None
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            said = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return None, None  # whoever loads it says what is wrong
    cache, _, classes = said.get("softcache.cache", "").partition(" ")
    return (
        cache if re.fullmatch("[0-9a-f]{64}", cache) else None,
        int(classes) if re.fullmatch("[1-9][0-9]{0,8}", classes) else None,
    )


def _read_safetensors(path: Path) -> State:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as e:
        raise TeacherError(f"the weights {path} are no safetensors file: {e}") from None


def _state_in(found: Any, path: Path) -> State:
    if isinstance(found, dict):
        for state in (*(found.get(key) for key in _HOLDERS), found):
            if state and isinstance(state, dict) and _is_state(state):
                return state
    held = f" but {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else ""
    raise TeacherError(
        f"the weights {path} hold no state dict (names and tensors), by itself or under {', '.join(_HOLDERS)}{held}: "
        "save model.state_dict()"
    )


def _is_state(state: dict[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())


def _without_prefix(state: State, own: State) -> State:
    """Names as the network has them: wrappers put a word before every one."""
    if all(name.startswith("module.") or name == "n_averaged" for name in state):  # an averaged model's count
        state = {name: value for name, value in state.items() if name != "n_averaged"}
    for prefix in _PREFIXES * 2:  # the one around the other, in either order
        if all(n.startswith(prefix) for n in state) and not any(n.startswith(prefix) for n in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _misfit(state: State, own: State) -> str:
    """What keeps the state from being the network's (the counts of batch norms do not)."""
    told = [
        f"{n} is {tuple(state[n].shape)} in the file and {tuple(own[n].shape)} in the network"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    counts = ".num_batches_tracked"
    told += [f"{n} is missing in the file" for n in own if n not in state and not n.endswith(counts)]
    told += [f"{n} is not in the network" for n in state if n not in own]
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "")


def make(create: Callable[..., torch.nn.Module], options: Options) -> torch.nn.Module:
    """``create()``, or ``create(num_classes=C)`` where the head in ``options.weights`` has C other classes."""
    model = create()
    own = model.state_dict()
    state = _without_prefix(read(options)[0], own)
    heads = {
        state[n].shape[0]
        for n, value in own.items()
        if n in state and value.ndim and state[n].ndim == value.ndim
        if state[n].shape[1:] == value.shape[1:] and state[n].shape[0] != value.shape[0]
    }
    # a network that comes without a head (timm's dinov2) gets one where the file has one
    heads = heads or {v.shape[0] for n, v in state.items() if n not in own and n.endswith("bias") and v.ndim}
    return create(num_classes=heads.pop()) if len(heads) == 1 else model


def digest(model: torch.nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of the state, however it was loaded."""
    h = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()
