"""Spec strings, canonical JSON and digests.

A spec is read left to right: ``crop(32, pad=4)|flip``, ``full(u8)``. It is parsed with :mod:`ast` and may
hold literals only; a bare word as an argument (``u8``) is that word as a string.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import keyword
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from softcache.errors import SpecError, nearest

T = TypeVar("T")

MAX_SPEC = 4096


@dataclass(frozen=True)
class Call:
    """One step of a spec: ``name(*args, **kwargs)``; ``kwargs`` as sorted pairs, so that it hashes."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [_word(a) for a in self.args] + [f"{k}={_word(v)}" for k, v in self.kwargs]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


def _word(value: Any) -> str:
    if isinstance(value, str) and _plain(value):
        return value
    if isinstance(value, tuple):
        inner = ", ".join(_word(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _plain(text: str) -> bool:
    """Does ``text`` stay itself when it is written without quotes?"""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def parse(text: str) -> tuple[Call, ...]:
    """``"a(1)|b"`` → ``(Call("a", (1,)), Call("b"))``. Raises :class:`SpecError` on anything else."""
    if len(text) > MAX_SPEC:
        raise SpecError(f"spec of {len(text)} characters; the limit is {MAX_SPEC}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        steps: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            steps.append(node.right)
            node = node.left
        return tuple(_call(step, text) for step in [node, *reversed(steps)])
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise SpecError(f"cannot read the spec {text!r}: {e}") from None


def _call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kwargs: dict[str, Any] = {}
        for option in node.keywords:
            if option.arg is None:
                raise SpecError(f"** is not allowed in the spec {text!r}")
            if option.arg in kwargs:
                raise SpecError(f"{option.arg!r} is given twice in the spec {text!r}")
            kwargs[option.arg] = _literal(option.value, text)
        return Call(node.func.id, tuple(_literal(a, text) for a in node.args), tuple(sorted(kwargs.items())))
    piece = ast.unparse(node)
    raise SpecError(f"{piece!r} in the spec {text!r} is not a word or a call like name(1, key=2)")


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(e, text) for e in node.elts)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        value = ...
    if isinstance(value, bool | str) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise SpecError(f"{ast.unparse(node)!r} in the spec {text!r} is not a number, word or tuple")


def unparse(calls: tuple[Call, ...]) -> str:
    """The canonical text: ``parse(unparse(x)) == x``."""
    return "|".join(map(str, calls))


def construct(call: Call, known: Mapping[str, Callable[..., T]], kind: str) -> T:
    """Make what ``call`` names from a table of classes, with errors that name the nearest known word."""
    if call.name not in known:
        raise SpecError(f"unknown {kind} {call.name!r}{nearest(call.name, known)}")
    factory = known[call.name]
    try:
        inspect.signature(factory).bind(*call.args, **dict(call.kwargs))
    except TypeError as e:
        raise SpecError(f"{kind} {str(call)!r}: {e}; it is written {_usage(call.name, factory)}") from None
    return factory(*call.args, **dict(call.kwargs))


def _usage(name: str, factory: Callable[..., Any]) -> str:
    """``top(n, background=0, inside=0, logits=u8)``, and the ``example`` of a class that has one."""
    options = inspect.signature(factory).parameters.values()
    told = [o.name if o.default is o.empty else f"{o.name}={_word(o.default)}" for o in options]
    example = getattr(factory, "example", "")
    return f"{name}({', '.join(told)})" + (f", such as {example}" if example else "")


def canonical_json(value: Any) -> bytes:
    """The one encoding of ``value``: sorted keys, no spaces, no NaN, UTF-8, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def extent(data: bytes) -> tuple[int, int]:
    """How deep arrays and objects are nested in JSON text, and how many keys its objects have; told without parsing it."""
    strings = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    outside = np.frombuffer(b"".join(strings[::2]), np.uint8)
    change = np.zeros(256, np.int32)
    change[list(b"[{")], change[list(b"]}")] = 1, -1
    return int(change[outside].cumsum().max(initial=0)), int((outside == ord(":")).sum())


def digest(data: bytes | memoryview) -> str:
    """``sha256`` in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_ids(ids: Iterable[str]) -> str:
    """sha256 over ids in order."""
    return digest(canonical_json(list(ids)))
