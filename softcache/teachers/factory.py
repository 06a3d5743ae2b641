"""``package.module:factory``: whatever your own code makes."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from softcache.errors import TeacherError, nearest
from softcache.teachers import Options, Teacher
from softcache.teachers.wrap import wrap


def load(spec: str, options: Options) -> Teacher:
    """Import the module, call the factory, wrap what it gives.

    It is called without arguments; where the weights are those of a student of ours, with the ``num_classes`` they are for.

    An ``input_spec`` is looked for on the object, the factory and the module, in this order.
    """
    module_name, _, factory_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise TeacherError(
            f"cannot import {e.name!r} for the teacher {spec!r}: install it, or run where Python finds it"
        ) from e
    factory: Any = getattr(module, factory_name, None)
    if not callable(factory):
        known = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise TeacherError(f"{module_name} has no factory {factory_name!r}{nearest(factory_name, known)}")
    given = _classes(factory, options)
    try:
        made = factory(**given)
    except Exception as e:  # other people's code raises all kinds
        how = f"called with {given}" if given else "called without arguments"
        raise TeacherError(f"the factory {spec}, {how}, failed: {type(e).__name__}: {e}") from e
    specs = (getattr(holder, "input_spec", None) for holder in (made, factory, module))
    return wrap(made, spec, options, next((s for s in specs if s is not None), None))


def _classes(factory: Any, options: Options) -> dict[str, int]:
    if options.weights is None:
        return {}
    from softcache.teachers import weights

    _, classes = weights.student(options)
    return (
        {"num_classes": classes} if classes and "num_classes" in inspect.signature(factory).parameters else {}
    )
