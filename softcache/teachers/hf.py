"""``hf:FOLDER``: a detector of transformers as ``save_pretrained`` leaves it, or ``hf:FILE.json``, its config alone.

DETR, Deformable-DETR, RT-DETR and RT-DETRv2: what they answer is in :mod:`.detr`. Weights are the folder's safetensors, or
``--weights``; a config without weights gives random ones, the same every time. No network is reached.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from softcache.errors import SoftcacheError, TeacherError
from softcache.teachers import Options, Teacher

_log = logging.getLogger(__name__)
_NEEDED = (5, 3)  # whose decoders are called as ours read them


def load(name: str, options: Options) -> Teacher:
    """The detector in the folder or of the config ``name``. Raises :class:`TeacherError`."""
    try:
        import transformers
    except ImportError as e:
        raise TeacherError(f"hf:{name} needs transformers: pip install 'softcache[hf]' ({e})") from e
    from softcache.teachers.detr import FAMILIES

    if tuple(map(int, transformers.__version__.split(".")[:2])) < _NEEDED:
        raise TeacherError(
            f"hf:{name} needs transformers {'.'.join(map(str, _NEEDED))} or newer, and {transformers.__version__} is here: "
            "pip install -U 'softcache[hf]'"
        )
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TeacherError(
            f"hf:{name} needs the file {file}, and nothing is downloaded: save the model there once, with "
            "save_pretrained, and name its folder"
        )
    said = _json(file)
    kind = said.get("model_type")
    if kind not in FAMILIES:
        raise TeacherError(
            f"{file} is the config of a {kind!r}, and hf: runs {', '.join(FAMILIES)}: take a detector of these, or export "
            "yours as ONNX"
        )
    architecture, teacher = FAMILIES[kind]
    with _alone(transformers):
        model, form = _model(getattr(transformers, architecture), said, path, options)
    return teacher(model, f"hf:{architecture}", replace(options, weights=None), _spec(file.parent), form)


def _model(architecture: Any, said: dict[str, Any], path: Path, options: Options) -> tuple[Any, str | None]:
    """The network in float32, and the format of its weights. Raises :class:`TeacherError`: they do not fit."""
    import torch

    from softcache.teachers import weights

    try:
        config = architecture.config_class.from_dict(said)
        files = _files(path, options)
        if not files:
            _log.warning(
                "hf:%s has no weights (say --weights FILE): they are random, the same every time", path
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return architecture(config), None
        read = [weights.read(replace(options, weights=file)) for file in files]
        state = {name: value for part, _ in read for name, value in part.items()}
        model, told = architecture.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except SoftcacheError:
        raise
    except Exception as e:  # transformers raises many kinds
        raise TeacherError(
            f"transformers cannot make the model of {path}: {type(e).__name__}: {_line(e)}"
        ) from e
    counts = ".num_batches_tracked"
    wrong = [f"{n} is missing in the file" for n in sorted(told["missing_keys"]) if not n.endswith(counts)]
    wrong += [
        f"{n} is {tuple(a)} in the file and {tuple(b)} in the network"
        for n, a, b in sorted(told["mismatched_keys"])
    ]
    wrong += [f"{n} is not in the network" for n in sorted(told["unexpected_keys"]) if not n.endswith(counts)]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise TeacherError(
            f"the weights {files[0]} do not fit the config of {path}: {'; '.join(wrong[:4])}{more}"
        )
    return model, read[0][1]


def _files(path: Path, options: Options) -> list[Path]:
    """The files of weights, none for a config alone. Raises :class:`TeacherError` for a folder without them."""
    if options.weights is not None:
        return [options.weights]
    if not path.is_dir():
        return []
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / Path(name).name for name in sorted(set(_json(index)["weight_map"].values()))]
    found = [path / n for n in ("model.safetensors", "pytorch_model.bin") if (path / n).is_file()]
    if not found:
        raise TeacherError(
            f"{path} holds no model.safetensors, and nothing is downloaded: put it there, or name another with --weights"
        )
    return found[:1]


def _spec(folder: Path) -> dict[str, Any]:
    """The input that ``preprocessor_config.json`` describes, where there is one.

    A picture whose shortest side is stated is taken to be square: views have one size, and are letterboxed into it.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    said = _json(file)
    scale = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255
    scale = 1 if abs(scale - 1) < 1e-6 else scale
    mean, std = said.get("image_mean"), said.get("image_std")
    if not said.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found: dict[str, Any] = {"mean": [m / scale for m in mean], "std": [s / scale for s in std]}
    size = said.get("size")
    if isinstance(size, Mapping):
        size = [size[k] for k in ("height", "width")] if "height" in size else size.get("shortest_edge")
    return found | ({"size": size} if size else {})


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TeacherError(f"{file} cannot be read as JSON: {_line(e)}; is it whole?") from None
    if not isinstance(found, dict):
        raise TeacherError(f"{file} holds no JSON object: is it the right file?")
    return found


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0][:200]


@contextmanager
def _alone(transformers: Any) -> Iterator[None]:
    """Without the network, and without its reports and bars: what does not fit is told in our words."""
    from huggingface_hub import constants

    told, bars = transformers.logging, transformers.utils.logging.is_progress_bar_enabled()
    before, level = constants.HF_HUB_OFFLINE, told.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    told.set_verbosity(logging.CRITICAL)
    told.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        told.set_verbosity(level)
        if bars:
            told.enable_progress_bar()
