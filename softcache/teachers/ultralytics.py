"""``ultralytics:FILE.pt`` or ``ultralytics:NAME.yaml``: detectors of Ultralytics (YOLO, RT-DETR), and its classifiers."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import SpecError, TeacherError, nearest
from softcache.teachers import Options, Teacher

_NEEDED = (8, 4, 120)  # which reads a pickle of its own classes and no others
# An architecture's last module → the library's class for it, and the tensor of that module with one value a class.
_BUILT = {
    "Detect": ("DetectionModel", "cv3.0.2.bias"),
    "v10Detect": ("DetectionModel", "cv3.0.2.bias"),
    "RTDETRDecoder": ("RTDETRDetectionModel", "enc_score_head.bias"),
    "Classify": ("ClassificationModel", "linear.bias"),
}


def load(name: str, options: Options) -> Teacher:
    """The model in a ``.pt``, or an architecture with ``options.weights``. Nothing is downloaded."""
    _library(name)
    from softcache.teachers.yolo import NETWORKS

    path = Path(name)
    if path.suffix not in (".pt", ".yaml", ".yml"):
        raise TeacherError(
            f"ultralytics:{name} is neither a file such as best.pt nor an architecture such as yolov8n.yaml: name one"
        )
    pickled = path.suffix == ".pt"
    model = _unpickled(path, options) if pickled else _built(name, options)
    head = _readable(name, type(model.model[-1]).__name__)
    return NETWORKS[head](model, f"ultralytics:{path.name}", options, pickled)


def _readable(name: str, head: str) -> str:
    if head not in _BUILT:
        raise TeacherError(
            f"ultralytics:{name} ends in the head {head}, which is neither a detector's nor a classifier's: "
            f"{', '.join(_BUILT)} are known"
        )
    return head


def _unpickled(path: Path, options: Options) -> Any:
    """The model that Ultralytics' trainer saved, its averaged weights where there are some."""
    from torch.nn import Module
    from ultralytics.nn.tasks import torch_safe_load

    if options.weights is not None:
        raise SpecError(f"ultralytics:{path.name} holds its weights itself: leave --weights out")
    if not path.is_file():
        raise TeacherError(
            f"the model {path} does not exist, and nothing is downloaded: put the file there, or name another"
        )
    if not options.allow_pickle:
        raise TeacherError(
            f"the model {path} is a pickle, which can run any code: say --allow-pickle if you trust where it is from"
        )
    try:
        found, _ = torch_safe_load(path, safe_only=True)
    except Exception as e:  # it raises many kinds
        raise TeacherError(f"the model {path} cannot be read: {str(e).splitlines()[0]}") from None
    model = found.get("ema") or found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, Module) or not hasattr(model, "model"):
        raise TeacherError(
            f"{path} holds no model of Ultralytics. The file of a state dict goes to --weights, and the teacher is its "
            "architecture, such as ultralytics:yolov8n.yaml"
        )
    return model.float()


def _built(name: str, options: Options) -> Any:
    """The architecture, for the classes in ``options.weights``; without them, random weights, always the same."""
    import torch
    from ultralytics.nn import tasks

    from softcache.teachers import weights

    plan = _plan(name)
    layers = plan["backbone"] + plan["head"]
    head = _readable(name, layers[-1][2])
    if any(layer[2] == "TorchVision" for layer in layers):
        raise TeacherError(
            f"ultralytics:{name} has a backbone that would be downloaded: name the .pt of the whole model"
        )
    kind, bias = _BUILT[head]
    classes = None
    if options.weights is None:
        logging.getLogger(__name__).warning(
            "ultralytics:%s has random weights: name a .pt, or say --weights FILE", name
        )
    else:
        last = f"model.{len(layers) - 1}.{bias}"
        classes = next((len(v) for n, v in weights.read(options)[0].items() if n.endswith(last)), None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(tasks, kind)(plan, nc=classes, verbose=False)


def _plan(name: str) -> dict[str, Any]:
    """The architecture in a file, or in the package."""
    import ultralytics
    from ultralytics.nn.tasks import yaml_model_load

    if not Path(name).is_file() and Path(name).name != name:
        raise TeacherError(f"the architecture {name} does not exist: put the file there, or name another")
    try:
        plan = yaml_model_load(name)
    except FileNotFoundError:
        known = (path.name for path in (Path(ultralytics.__file__).parent / "cfg/models").rglob("*.yaml"))
        raise TeacherError(f"Ultralytics has no architecture {name!r}{nearest(name, known)}") from None
    if not isinstance(plan, dict) or not (plan.get("backbone") and plan.get("head")):
        raise TeacherError(f"{name} is no architecture of Ultralytics: it has no backbone and head")
    return plan


def _library(name: str) -> None:
    """Import Ultralytics, or say what to install."""
    try:
        import torch  # noqa: F401 - first: its threads are counted before Ultralytics says that there is one

        with _contained():
            import ultralytics
    except ImportError as e:
        raise TeacherError(
            f"ultralytics:{name} needs Ultralytics: pip install 'softcache[ultralytics]' ({e})"
        ) from e
    if tuple(map(int, re.findall(r"\d+", ultralytics.__version__)[:3])) < _NEEDED:
        raise TeacherError(
            f"ultralytics:{name} needs Ultralytics {'.'.join(map(str, _NEEDED))} or newer, and {ultralytics.__version__} "
            "is here: pip install -U 'softcache[ultralytics]'"
        )


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Ultralytics, if it is imported in here, asks no network, talks to stderr, and leaves the environment as it was."""
    before = dict(os.environ)
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    try:
        with np.printoptions(), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ |= before
