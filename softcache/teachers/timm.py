"""``timm:NAME``: a model of timm, its weights from a file of yours."""

from __future__ import annotations

from functools import partial

from softcache.errors import TeacherError, nearest
from softcache.teachers import Options, Teacher


def load(name: str, options: Options) -> Teacher:
    """The model without weights, then ``options.weights``. Nothing is downloaded."""
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as e:
        raise TeacherError(f"timm:{name} needs timm: pip install 'softcache[timm]' ({e})") from e
    from softcache.teachers import weights
    from softcache.teachers.module import ModuleTeacher

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise TeacherError(f"timm has no model {name!r}{nearest(architecture, timm.list_models())}")
    if options.weights is None:
        raise TeacherError(
            f"timm:{name} needs --weights FILE: nothing is downloaded. Save them once as safetensors"
        )
    model = weights.make(partial(timm.create_model, name, pretrained=False), options)
    config = resolve_model_data_config(model)
    spec = {"size": config["input_size"][1:], "mean": config["mean"], "std": config["std"]}
    return ModuleTeacher(model, f"timm:{name}", options, spec)
