"""Which columns of an Arrow schema hold the images and the labels, as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import SourceError, nearest

LABEL_NAMES = ("label", "labels", "fine_label")


def pyarrow(file: Path) -> Any:
    """The library. Raises :class:`SourceError` where it is missing, which says that ``file`` needs it."""
    try:
        import pyarrow as library
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise SourceError(
            f"{file} needs pyarrow, which is not installed: pip install 'softcache[parquet]'"
        ) from None
    return library


def features(info: Any) -> dict[str, Any]:
    """The features that a Hugging Face ``info`` declares, by column; none where it is something else."""
    found = info.get("features") if isinstance(info, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: feature for name, feature in found.items() if isinstance(feature, dict)}


def _of_type(features: dict[str, Any], kind: str) -> list[str]:
    return [name for name, feature in features.items() if feature.get("_type") == kind]


def leaf(schema: Any, column: str, child: str) -> str | None:
    """``column.child`` where the column is a struct with that child."""
    kind = schema.field(column).type
    has = kind.num_fields and any(kind.field(i).name == child for i in range(kind.num_fields))
    return f"{column}.{child}" if has else None


def image_column(schema: Any, features: dict[str, Any], wanted: str | None) -> str:
    """The wanted column, or the only one that can hold images. Raises :class:`SourceError` otherwise."""
    from pyarrow import types

    structs = [name for name in schema.names if leaf(schema, name, "bytes")]
    binaries = [
        field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)
    ]
    if wanted is not None:
        return _wanted(wanted, [*structs, *binaries], schema, "image")
    declared = [n for n in _of_type(features, "Image") if n in [*structs, *binaries]]
    column = _only(declared or structs or binaries, schema, "image")
    if column is None:
        raise SourceError(f"no column holds images: {_columns(schema)}; name it with image_column=")
    return column


def whole_numbers(column: Any, where: str) -> np.ndarray:
    """Labels of an Arrow array: int64, -1 where there is none. Raises :class:`SourceError` for what is too large."""
    import pyarrow

    try:
        return column.cast(pyarrow.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    except pyarrow.ArrowInvalid as e:
        raise SourceError(f"{where}: a label is no class: {str(e).splitlines()[0]}") from e


def label_column(schema: Any, features: dict[str, Any], wanted: str | None) -> str | None:
    """Likewise for labels; None where none is declared and none is called so."""
    from pyarrow import types

    numbers = [field.name for field in schema if types.is_integer(field.type)]
    if wanted is not None:
        return _wanted(wanted, numbers, schema, "label")
    declared = [name for name in _of_type(features, "ClassLabel") if name in numbers]
    return _only(declared or [n for n in LABEL_NAMES if n in numbers], schema, "label")


def unused_labels(schema: Any, label: str | None) -> tuple[str, ...]:
    """A note for a person where there is no label column, but one that is called so."""
    named = [f"{name} ({schema.field(name).type})" for name in LABEL_NAMES if name in schema.names]
    if label is not None or not named:
        return ()
    return (f"no labels: the column {named[0]} holds no whole numbers, which classes are here",)


def _wanted(name: str, fit: list[str], schema: Any, what: str) -> str:
    if name in fit:
        return name
    if name in schema.names:
        raise SourceError(f"the column {name!r} cannot be the {what}: {_columns(schema)}")
    raise SourceError(f"there is no column {name!r}{nearest(name, schema.names)}")


def _only(names: list[str], schema: Any, what: str) -> str | None:
    if len(names) > 1:
        raise SourceError(
            f"several columns could be the {what} ({', '.join(names)}): choose with {what}_column=; "
            f"{_columns(schema)}"
        )
    return names[0] if names else None


def _columns(schema: Any) -> str:
    return "the columns are " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def names(paths: list[str | None]) -> list[str] | None:
    """The paths of images as ids, or None where they are no good names: absent, not unique, or absolute (an
    id goes into the cache, and a folder of somebody's machine should not)."""
    good = [path for path in paths if path and path[0] not in "/\\~" and path[1:2] != ":"]
    return good if len(set(good)) == len(paths) else None


def classes(features: dict[str, Any], label: str | None) -> tuple[str, ...] | None:
    """The class names that a ``ClassLabel`` declares."""
    found = features.get(label, {}).get("names") if label else None
    return tuple(map(str, found)) if isinstance(found, list) else None
