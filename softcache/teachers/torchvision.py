"""``torchvision:NAME``: a classification model or a detector of torchvision, its weights from a file of yours."""

from __future__ import annotations

from functools import partial

from softcache.errors import TeacherError, nearest
from softcache.teachers import Options, Teacher


def load(name: str, options: Options) -> Teacher:
    """The model without weights, then ``options.weights``. Nothing is downloaded."""
    try:
        from torchvision import models
    except ImportError as e:
        raise TeacherError(
            f"torchvision:{name} needs torchvision: pip install 'softcache[torchvision]' ({e})"
        ) from e
    from softcache.teachers import weights
    from softcache.teachers.module import ModuleTeacher

    detectors = models.list_models(module=models.detection)
    if name in detectors:
        from softcache.teachers.torchvision_detection import load as load_detector

        return load_detector(name, options)
    known = models.list_models(module=models)
    if name not in known:
        raise TeacherError(
            f"torchvision has no classification model or detector {name!r}{nearest(name, known + detectors)}"
        )
    if options.weights is None:
        raise TeacherError(
            f"torchvision:{name} needs --weights FILE: nothing is downloaded. Save them once as safetensors"
        )
    published = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    view = published.transforms()
    spec = {"size": tuple(view.crop_size) * (3 - len(view.crop_size)), "mean": view.mean, "std": view.std}
    model = weights.make(partial(models.get_model, name, weights=None), options)
    return ModuleTeacher(model, f"torchvision:{name}", options, spec)
