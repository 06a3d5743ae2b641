"""``package.module:factory``: whatever your own code makes."""

from __future__ import annotations

import importlib
from typing import Any

from softcache.errors import TeacherError, nearest
from softcache.teachers import Options, Teacher
from softcache.teachers.wrap import wrap


def load(spec: str, options: Options) -> Teacher:
    """Import the module, call the factory without arguments, wrap what it gives.

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
    try:
        made = factory()
    except Exception as e:  # other people's code raises all kinds
        raise TeacherError(
            f"the factory {spec}, called without arguments, failed: {type(e).__name__}: {e}"
        ) from e
    specs = (getattr(holder, "input_spec", None) for holder in (made, factory, module))
    return wrap(made, spec, options, next((s for s in specs if s is not None), None))
