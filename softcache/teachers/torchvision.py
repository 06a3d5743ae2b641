"""``torchvision:NAME``: a classification model of torchvision, its weights from a file of yours."""

from __future__ import annotations

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
    from softcache.teachers.module import ModuleTeacher

    known = models.list_models(module=models)
    if name not in known:
        raise TeacherError(f"torchvision has no classification model {name!r}{nearest(name, known)}")
    if options.weights is None:
        raise TeacherError(
            f"torchvision:{name} needs --weights FILE: nothing is downloaded. Save them once as safetensors"
        )
    published = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    view = published.transforms()
    spec = {"size": tuple(view.crop_size) * (3 - len(view.crop_size)), "mean": view.mean, "std": view.std}
    classes = _head(options)
    model = models.get_model(name, weights=None, **({"num_classes": classes} if classes else {}))
    return ModuleTeacher(model, f"torchvision:{name}", options, spec)


def _head(options: Options) -> int | None:
    """How many classes a safetensors file was trained for: the length of its last bias; None where unknown."""
    if options.weights is None or options.weights.suffix != ".safetensors" or not options.weights.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(options.weights, "pt") as file:
            heads = [k for k in file.keys() if k.split(".")[0] in ("fc", "classifier", "head", "heads")]  # noqa: SIM118
            biases = [file.get_slice(k).get_shape()[0] for k in heads if k.endswith("bias")]
    except SafetensorError:
        return None  # the loader says what is wrong with it
    return biases[-1] if biases else None
