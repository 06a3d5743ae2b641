"""A ``torch.nn.Module`` as a teacher: weights, hooks, precision, normalisation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.errors import SpecError, TeacherError, nearest, suggest
from softcache.manifest import InputSpec, TeacherId
from softcache.teachers import Options, input_spec

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class ModuleTeacher:
    """Evaluation mode, no gradients; its output as ``logits`` and the tapped modules' outputs by name.

    Pixels are normalised on the device as ``(x / 255 - mean) / std``, channels in ``input_spec.color`` order.
    """

    def __init__(self, model: torch.nn.Module, name: str, options: Options, spec: Any = None):
        if options.precision not in PRECISIONS:
            raise SpecError(f"precision {options.precision!r}{nearest(options.precision, PRECISIONS)}")
        self._name, self._options, self.probed = name, options, True
        self._format = load_weights(model, options, name)
        self.input_spec: InputSpec = input_spec(options, spec or getattr(model, "input_spec", None), name)
        self.classes = getattr(model, "classes", None)
        self._device, self._model = _place(model.eval(), options.device)
        self._weights = state_digest(model)
        self._tapped: dict[str, torch.Tensor] = {}
        self._tap(options.taps)
        self._mean, self._std = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) * 255
            for v in (self.input_spec.mean, self.input_spec.std)
        )

    def _tap(self, names: tuple[str, ...]) -> None:
        modules = dict(self._model.named_modules())
        for name in names:
            if name not in modules or not name:
                known = [n for n in modules if n and n.count(".") <= 1]
                raise TeacherError(
                    f"the teacher {self._name} has no target {name!r}{suggest(name, known)}; it has logits and its "
                    f"modules: {', '.join(known[:30])}{', …' if len(known) > 30 else ''}"
                )
            modules[name].register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                raise TeacherError(
                    f"module {name!r} gives a {type(output).__name__}, not a tensor: tap one inside it"
                )
            if name in self._tapped:
                raise TeacherError(f"module {name!r} runs more than once for an image: tap one around it")
            self._tapped[name] = output.clone()  # an in-place op that follows must not change it

        return keep

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        if any(module.training for module in self._model.modules()):
            raise TeacherError(
                f"a part of the teacher {self._name} is in training mode: its answers would be noise"
            )
        x = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        if self.input_spec.color == "BGR":
            x = x.flip(1)
        x = (x.float() - self._mean) / self._std
        self._tapped.clear()
        dtype = PRECISIONS[self._options.precision]
        # fp32 is fp32: cuDNN would use TF32 (ten bits) by itself, and pick another algorithm from run to run.
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with exact, torch.autocast(self._device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            output = _logits_of(self._model(x), self._name)
        found = {"logits": output, **self._tapped}
        self._tapped.clear()
        return {k: v.float().cpu().numpy() for k, v in found.items()}

    def identity(self) -> TeacherId:
        return TeacherId(
            name=self._name,
            weights=self._weights,
            weights_format=self._format,
            input_spec=self.input_spec,
            precision=self._options.precision,
            processor=processor(self._device),
            batch=self._options.batch,
        )

    def libraries(self) -> dict[str, str]:
        return {"torch": torch.__version__}


def _place(model: torch.nn.Module, wanted: str | None) -> tuple[torch.device, torch.nn.Module]:
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        return device, model.to(device)
    except (RuntimeError, AssertionError) as e:
        raise TeacherError(f"the device {wanted!r} cannot be used here: {str(e).splitlines()[0]}") from None


def _logits_of(output: Any, name: str) -> torch.Tensor:
    for found in (output, getattr(output, "logits", None)):
        if isinstance(found, torch.Tensor):
            return found
    if isinstance(output, dict) and isinstance(output.get("logits"), torch.Tensor):
        return output["logits"]
    raise TeacherError(f"the teacher {name} gives a {type(output).__name__}; a tensor, or .logits, is needed")


def processor(device: torch.device) -> str:
    """The kind of processor: floats depend on it."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def load_weights(model: torch.nn.Module, options: Options, name: str) -> str | None:
    """Load ``options.weights`` strictly; the format they were in, or None where none were given."""
    if options.weights is None:
        return None
    path = Path(options.weights)
    if not path.is_file():
        raise TeacherError(f"the weights {path} do not exist: put the teacher's file there, or name another")
    state, kind = _read_weights(path, options.allow_pickle)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as e:
        lines = [line.strip() for line in str(e).splitlines()[1:4]]
        detail = " ".join(line[:200] for line in lines)
        raise TeacherError(f"the weights {path} do not fit the teacher {name}: {detail}") from None
    return kind


def _read_weights(path: Path, allow_pickle: bool) -> tuple[dict[str, torch.Tensor], str]:
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path), "safetensors"
        except (safetensors.SafetensorError, OSError) as e:
            raise TeacherError(f"the weights {path} are no safetensors file: {e}") from None
    if not allow_pickle:
        raise TeacherError(
            f"the weights {path} are not safetensors, and a pickle can run any code: convert them, or say --allow-pickle"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds here
        raise TeacherError(f"the weights {path} cannot be read: {str(e).splitlines()[0]}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise TeacherError(
            f"the weights {path} hold no state dict (names and tensors): save model.state_dict()"
        )
    return {k.removeprefix("module."): v for k, v in state.items()}, "pickle"


def num_classes(options: Options) -> dict[str, Any]:
    """``{"num_classes": C}`` for a safetensors file with a classifier's bias of C numbers, else nothing."""
    if options.weights is None or options.weights.suffix != ".safetensors" or not options.weights.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(options.weights, "pt") as file:
            heads = [k for k in file.keys() if k.split(".")[0] in ("fc", "classifier", "head", "heads")]  # noqa: SIM118
            biases = [file.get_slice(k).get_shape()[0] for k in heads if k.endswith("bias")]
    except SafetensorError:
        return {}  # the loader says what is wrong with it
    return {"num_classes": biases[-1]} if biases else {}


def state_digest(model: torch.nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of the state, however it was loaded."""
    h = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()
