"""A ``torch.nn.Module`` as a teacher: weights, hooks, precision, normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from softcache.errors import SoftcacheError, SpecError, TeacherError, nearest, suggest
from softcache.identity import InputSpec, TeacherId
from softcache.targets import gap_of, is_attribution, made_of
from softcache.teachers import Options, constants_of, failure, input_spec, layouts_of, weights
from softcache.teachers.classes import names_of
from softcache.teachers.explained import explained
from softcache.teachers.last_layer import HEAD, LastLayer

INPUT = "input.gradient"

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class ModuleTeacher:
    """Evaluation mode, no gradients; its output as ``logits`` and the tapped modules' outputs by name.

    Pixels are normalised on the device as ``(x / 255 - mean) / std``, channels in ``input_spec.color`` order.
    A module that carries ``layouts`` may answer a mapping of names to tensors; what it is asked for is then its own
    answer of that name, where no module is called so.
    A teacher whose network says more than logits derives from this, and has its own :meth:`_says` and :meth:`_answer`.
    """

    own = "logits"  # what it answers besides its modules, for people

    def __init__(self, model: torch.nn.Module, name: str, options: Options, spec: Any = None):
        if options.precision not in PRECISIONS:
            raise SpecError(f"precision {options.precision!r}{nearest(options.precision, PRECISIONS)}")
        self._name, self._options, self.probed = name, options, True
        self._format, self._parent = weights.load(model, options, name), weights.student(options)[0]
        self.input_spec: InputSpec = input_spec(options, spec or getattr(model, "input_spec", None), name)
        self.classes = names_of(getattr(model, "classes", None))
        self.layouts = layouts_of(model)
        self._modules = dict(model.named_modules())
        self._device, self._model = _place(model.eval(), options.device)
        self._weights = weights.digest(model)
        self._tapped: dict[str, torch.Tensor] = {}
        self._explained = tuple(n for n in options.taps if is_attribution(n) and n not in self._modules)
        self._last = LastLayer(model, name) if HEAD in options.taps and HEAD not in self._modules else None
        beside = (*self._explained, *([HEAD] if self._last else []))
        own = [name for name in options.taps if not self._says(name) and name not in beside]
        self._require(name for name in self._explained if name != INPUT)
        self._tap(own)
        self._mean, self._std = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) * 255
            for v in (self.input_spec.mean, self.input_spec.std)
        )

    def _says(self, name: str) -> bool:
        """Is the target one of :attr:`own`? If not it is a module, which is tapped."""
        return name == self.own or (bool(self.layouts) and name not in self._modules)

    def _answer(self, x: torch.Tensor, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalised pixels ``(B, 3, H, W)`` on the device → :attr:`own`, by name, each ``(B, …)``."""
        output = self._model(x, **given)
        if not self.layouts or not isinstance(output, Mapping):
            return {"logits": _logits_of(output, self._name)}
        wanted = [name for name in self._options.taps if self._says(name)]
        for name in wanted:
            if not isinstance(output.get(name), torch.Tensor):
                raise TeacherError(
                    f"the teacher {self._name} has no target {name!r}{nearest(name, output)}, nor a module of that name"
                )
        return {name: output[name] for name in (*wanted, *({"logits"} & output.keys()))}

    def _require(self, names: Iterable[str]) -> None:
        """Raise :class:`TeacherError` where a name is not a module's, what it is of left away."""
        for asked in names:
            name = asked.removesuffix(".attribution") if asked in self._explained else asked
            if name not in self._modules or not name:
                known = [n for n in self._modules if n and n.count(".") <= 1]
                hint = made_of(name, self._modules) or suggest(name, known)
                raise TeacherError(
                    f"the teacher {self._name} has no target {asked!r}{hint}; it has {self.own} and its "
                    f"modules: {', '.join(known[:30])}{', …' if len(known) > 30 else ''}"
                )

    def _tap(self, names: list[str]) -> None:
        self._require(names)
        for name in names:
            self._modules[name].register_forward_hook(self._keeper(name))

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

    def __call__(
        self, pixels: np.ndarray, *, labels: np.ndarray | None = None, **given: np.ndarray
    ) -> dict[str, np.ndarray]:
        if any(module.training for module in self._model.modules()):
            raise TeacherError(
                f"a part of the teacher {self._name} is in training mode: its answers would be noise"
            )
        dtype = PRECISIONS[self._options.precision]
        # fp32 is fp32: cuDNN would use TF32 (ten bits) by itself, and pick another algorithm from run to run.
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with exact, torch.autocast(self._device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            try:
                found = self._said(pixels, given)
                if labels is not None:
                    found |= self._explain(pixels, labels)
            except SoftcacheError:
                raise
            except Exception as e:
                raise failure(self._name, pixels, e) from e
        return {k: v.float().cpu().numpy() for k, v in found.items()}

    def _normal(self, pixels: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        if self.input_spec.color == "BGR":
            x = x.flip(1)
        return (x.float() - self._mean) / self._std

    @torch.inference_mode()
    def _said(self, pixels: np.ndarray, given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        self._tapped.clear()
        more = {n: torch.from_numpy(v).to(self._device) for n, v in given.items()}
        found = self._answer(self._normal(pixels), **more) | self._tapped
        self._tapped.clear()
        if self._last is not None:
            found[HEAD] = self._last.input_of(found.get("logits"))
        return found

    def _explain(self, pixels: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
        """What is of the label: zero where there is none."""
        x, y = self._normal(pixels), torch.from_numpy(labels).to(self._device)
        known, found = (y >= 0).view(-1, 1, 1, 1), {}
        for name in self._explained:
            if name == INPUT:
                made = self._gradient(x, y.clamp_min(0))
            else:
                module = self._modules[name.removesuffix(".attribution")]
                made, gap = explained(self._logits, self._model, module, x, y.clamp_min(0))
                found[gap_of(name)] = torch.where(y >= 0, gap.clamp(max=1), 0)
            found[name] = torch.where(known, made, 0)
        self._tapped.clear()
        return found

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        self._tapped.clear()
        return self._answer(x)["logits"].float()

    def _gradient(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(self._logits(x), labels, reduction="sum")
            return torch.autograd.grad(loss, x)[0] / (self._std / 255)

    def identity(self) -> TeacherId:
        return TeacherId(
            name=self._name,
            weights=self._weights,
            weights_format=self._format,
            input_spec=self.input_spec,
            processor=processor(self._device),
            parent=self._parent,
            **self._options.said(),
        )

    def libraries(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def constants(self) -> dict[str, np.ndarray]:
        return constants_of(self._model) | (self._last.constants() if self._last else {})


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
