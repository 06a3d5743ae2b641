"""Students: one family a file, each a function from the number of classes to a ``torch.nn.Module``.

A student may carry ``input_spec`` (``size``, ``mean``, ``std``, ``color``); one that does not is
fed as the cache's teacher was. One that can answer early says so with two methods, by which its exits are measured:
``every_exit(images)``, the logits of all of them, the deepest's last, and ``at_exit(images, number)``, those of one,
counted from 1, for which nothing runs that they do not need.
"""

from __future__ import annotations

import importlib

from torch import nn

from softcache.errors import SpecError, nearest
from softcache_train.students.cifar_resnet import (
    resnet8,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
)
from softcache_train.students.deit import deit_nano, deit_tiny
from softcache_train.students.digits import digits_cnn, digits_mlp
from softcache_train.students.early_exits import resnet8_exits, resnet20_exits

__all__ = [
    "deit_nano",
    "deit_tiny",
    "digits_cnn",
    "digits_mlp",
    "make",
    "resnet8",
    "resnet8_exits",
    "resnet20",
    "resnet20_exits",
    "resnet32",
    "resnet44",
    "resnet56",
]

STUDENTS = {
    f.__name__: f
    for f in (
        *(resnet8, resnet20, resnet32, resnet44, resnet56),
        *(resnet8_exits, resnet20_exits),
        *(deit_nano, deit_tiny),
        *(digits_cnn, digits_mlp),
    )
}


def make(name: str, num_classes: int) -> nn.Module:
    """The student called ``name``, with freshly drawn weights (torch's global random stream).

    ``name`` is one of the names listed here, or ``package.module:factory`` for your own: a callable
    that takes ``num_classes`` and returns a module. Raises :class:`SpecError` for a name that leads
    nowhere.
    """
    if ":" not in name:
        if name not in STUDENTS:
            hint = nearest(name, STUDENTS)
            raise SpecError(f"unknown student {name!r}{hint}; your own is package.module:factory")
        return STUDENTS[name](num_classes=num_classes)
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise SpecError(f"cannot load the student {name!r}: {e}") from e
    try:
        model = factory(num_classes=num_classes)
    except Exception as e:  # other people's code raises all kinds
        raise SpecError(f"the student {name!r}, called with num_classes={num_classes}, failed: {e}") from e
    if not isinstance(model, nn.Module):
        raise SpecError(f"the student {name!r} made a {type(model).__name__}, not a torch module")
    return model
