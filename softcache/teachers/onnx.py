"""``onnx:FILE``: a graph in a file, run by onnxruntime on one thread of the CPU.

Its outputs are targets by their names; ``logits`` is the one named so, or the only one. ``detections`` is what a detector's
outputs mean (:mod:`.heads`). A graph that takes uint8 pixels normalises them by itself, and one that asks for the size of
the original is told that of its input.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from softcache import spec
from softcache.errors import MismatchError, SpecError, TeacherError, suggest
from softcache.identity import InputSpec, TeacherId
from softcache.targets.layout import Layout
from softcache.teachers import Options, Teacher, heads, input_spec
from softcache.teachers.classes import names_in

DETECTIONS = "detections"
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def load(name: str, options: Options) -> Teacher:
    """The graph in the file ``name``. Raises :class:`TeacherError`, :class:`MismatchError` for another than expected."""
    try:
        import onnxruntime
    except ImportError as e:
        raise TeacherError(f"onnx:{name} needs onnxruntime: pip install 'softcache[onnx]' ({e})") from e
    path = Path(name)
    if options.weights is not None:
        raise SpecError(f"onnx:{name} holds its weights itself: leave --weights out")
    if options.precision != "fp32" or options.device not in (None, "cpu"):
        raise SpecError(
            f"onnx:{name} runs on the CPU in the precision it was exported in: leave out --device, --precision"
        )
    if not path.is_file():
        raise TeacherError(f"the graph {path} does not exist: put the file there, or name another")
    return OnnxTeacher(path, options, onnxruntime)


class OnnxTeacher:
    """NCHW or NHWC, of any or of a fixed batch (through which a batch goes piece by piece)."""

    probed = True

    def __init__(self, path: Path, options: Options, onnxruntime: Any):
        data = path.read_bytes()
        self._name, self._options, self._weights = f"onnx:{path.name}", options, spec.digest(data)
        if options.expected not in (None, self._weights):
            raise MismatchError(
                f"{path} is not the graph that the cache was built with: its sha256 is {self._weights[:16]}… and was "
                f"{options.expected[:16]}…; name the file of then"
            )
        self._version: str = onnxruntime.__version__
        self._session = _session(data, self._name, onnxruntime)
        outputs = [o.name for o in self._session.get_outputs()]
        detects = DETECTIONS in options.taps and DETECTIONS not in outputs
        if options.head and not detects:
            raise SpecError(
                f"--head says what {DETECTIONS!r} of {self._name} are: ask for that target, or leave it out"
            )
        self._read_input(options, detects)
        alone = outputs[0] if len(outputs) == 1 and not detects else None
        self._logits = "logits" if "logits" in outputs and not detects else alone
        for tap in options.taps:
            if tap not in outputs and not (tap == DETECTIONS and detects):
                raise TeacherError(
                    f"{self._name} has no output {tap!r}{suggest(tap, outputs)}: {self._has(outputs)}"
                )
        if self._logits is None and not options.taps:
            raise TeacherError(
                f"{self._name} has no output 'logits', and not one alone: {self._has(outputs)}. Name what to keep, "
                f"such as --target '{outputs[0]}=f16'"
            )
        metadata = self._session.get_modelmeta().custom_metadata_map
        told = (names_in(metadata[key]) for key in ("classes", "names", "labels") if key in metadata)
        self.classes = next((names for names in told if names), None)

    @staticmethod
    def _has(outputs: list[str]) -> str:
        return f"it has {', '.join(outputs)}"

    def _read_input(self, options: Options, detects: bool) -> None:
        inputs = self._session.get_inputs()
        # Exports of the DETR family ask for the size of the original, to give boxes in its pixels.
        sizes = [i for i in inputs[1:] if i.type == "tensor(int64)" and i.shape[1:] == [2]]
        if len(inputs) != 1 + len(sizes) or len(sizes) > 1:
            names = ", ".join(i.name for i in inputs)
            raise TeacherError(
                f"{self._name} takes {len(inputs)} inputs ({names}): export it with the image alone"
            )
        self._original = sizes[0].name if sizes else None
        image, self._input = inputs[0], inputs[0].name
        shape = image.shape
        self._channels_last = len(shape) == 4 and shape[1] != 3 and shape[3] == 3
        if len(shape) != 4 or (shape[1] != 3 and not self._channels_last) or image.type not in _DTYPES:
            raise TeacherError(
                f"{self._name} takes {image.name} {shape} of {image.type}: an image is (batch, 3, height, width) or "
                f"(batch, height, width, 3), of {', '.join(_DTYPES)}"
            )
        self._dtype = _DTYPES[image.type]
        self._batch = shape[0] if isinstance(shape[0], int) else None
        given: dict[str, Any] = {}
        size = shape[1:3] if self._channels_last else shape[2:4]
        if all(isinstance(side, int) for side in size):
            given["size"] = tuple(size)
            if options.input_size not in (None, given["size"]):
                raise SpecError(
                    f"{self._name} takes images of {size[0]}x{size[1]} only: leave out --input-size"
                )
        self._head: heads.Head | None = None
        self.layouts: dict[str, Layout] = {}
        if detects:
            given |= self._find_head(options.head, given.get("size") or options.input_size)
        if self._dtype is np.uint8:
            if options.mean not in (None, (0, 0, 0)) or options.std not in (None, (1, 1, 1)):
                raise SpecError(
                    f"{self._name} takes uint8 pixels and normalises by itself: leave out --mean, --std"
                )
            given |= {"mean": (0, 0, 0), "std": (1, 1, 1)}
        self.input_spec: InputSpec = input_spec(options, given, self._name)

    def _find_head(self, head: str | None, size: tuple[int, int] | None) -> dict[str, Any]:
        """Look at what the graph answers to a black picture; returns what such graphs are fed."""
        if size is None:
            raise TeacherError(f"{self._name} takes images of any size: state one with --input-size 640")
        shape = (1, *size, 3) if self._channels_last else (1, 3, *size)
        names = [o.name for o in self._session.get_outputs()]
        step = self._batch or 1
        black = np.zeros((step, *shape[1:]), self._dtype)
        found = {name: value[:1] for name, value in self._piece(names, black, step, strict=False).items()}
        self._head = heads.fitting(head, found, size, self._name)
        self._detected = self._head.outputs(found, size) or ()
        self.layouts[DETECTIONS] = self._head.layout({n: found[n] for n in self._detected}, size)
        return dict(self._head.INPUT)

    def __call__(self, pixels: np.ndarray, **_given: np.ndarray) -> dict[str, np.ndarray]:
        x = self._fed(pixels)
        step = self._batch or len(x)
        wanted = {name: name for name in self._options.taps if name not in self.layouts}
        if self._logits is not None:
            wanted["logits"] = self._logits
        outputs = sorted({*wanted.values(), *(self._detected if self._head else ())})
        pieces = [self._piece(outputs, x[i : i + step], step) for i in range(0, len(x), step)]
        said = {
            name: np.concatenate([piece[name] for piece in pieces]).astype(np.float32) for name in outputs
        }
        answer = {name: said[output] for name, output in wanted.items()}
        if self._head:
            detected = {name: said[name] for name in self._detected}
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused with its image
                answer[DETECTIONS] = self._head.read(detected, self.input_spec.size)
        return answer

    def _fed(self, pixels: np.ndarray) -> np.ndarray:
        x = pixels[..., ::-1] if self.input_spec.color == "BGR" else pixels
        if self._dtype is not np.uint8:
            mean, std = (np.array(v, np.float32) * 255 for v in (self.input_spec.mean, self.input_spec.std))
            x = ((x.astype(np.float32) - mean) / std).astype(self._dtype)
        return np.ascontiguousarray(x if self._channels_last else x.transpose(0, 3, 1, 2))

    def _piece(
        self, outputs: list[str], x: np.ndarray, step: int, strict: bool = True
    ) -> dict[str, np.ndarray]:
        """The answers to up to ``step`` pictures; ``strict``: each must have a row a picture."""
        full = np.concatenate([x, np.zeros((step - len(x), *x.shape[1:]), x.dtype)]) if len(x) < step else x
        feed = {self._input: full}
        if self._original:
            height, width = x.shape[1:3] if self._channels_last else x.shape[2:4]
            feed[self._original] = np.tile(np.array([[width, height]], np.int64), (step, 1))
        try:
            values = self._session.run(outputs, feed)
        except Exception as e:  # onnxruntime's own kinds have no common base
            raise TeacherError(f"{self._name} failed on a batch of {full.shape}: {_line(e)}") from None
        for name, value in zip(outputs, values, strict=True):
            if strict and np.shape(value)[:1] != (step,):
                raise TeacherError(
                    f"the output {name!r} of {self._name} is {np.shape(value)} for {step} images: a target has a row "
                    "an image"
                )
        return {name: np.asarray(value)[: len(x)] for name, value in zip(outputs, values, strict=True)}

    def identity(self) -> TeacherId:
        return TeacherId(
            name=self._name,
            weights=self._weights,
            weights_format="onnx",
            input_spec=self.input_spec,
            processor=f"cpu {_capability()}, onnxruntime on one thread",
            head=heads.spelled(self._head) if self._head else None,
            **self._options.said(),
        )

    def libraries(self) -> dict[str, str]:
        return {"onnxruntime": self._version}


def _session(data: bytes, name: str, onnxruntime: Any) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.use_deterministic_compute = True
    settings.log_severity_level = 4
    with tempfile.TemporaryDirectory() as nothing:
        # The digest is of this file alone, so no other file may be part of it.
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
        try:
            return onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        except Exception as e:  # its kinds have no common base
            why = _line(e)
    if "external" in why.lower():
        raise TeacherError(
            f"{name} keeps weights in other files: save it as one file (onnx.save with no external data)"
        )
    hint = (
        "export it for an older opset, or install a newer onnxruntime"
        if "opset" in why or "IR version" in why
        else ("is it an ONNX file, and whole?")
    )
    raise TeacherError(f"onnxruntime {onnxruntime.__version__} cannot load {name}: {why}; {hint}")


def _line(e: Exception) -> str:
    """What onnxruntime says, without the signatures of its functions."""
    text = " ".join(str(e).split())
    starts = (text.find(word) for word in ("Unsupported model IR", "ONNX Runtime only", "External data"))
    return text[max(0, *starts) :][:200]


def _capability() -> str:
    """The vector instructions that it will use: sums depend on them."""
    from numpy._core._multiarray_umath import __cpu_features__  # type: ignore[attr-defined]

    return next((f for f in ("AVX512F", "AVX2") if __cpu_features__.get(f)), "without AVX2")
