"""Options read from a YAML file, of ``build-cache`` and of ``softcache-train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softcache.errors import SpecError


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in the YAML file at ``path``. Raises :class:`SpecError` for anything else."""
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SpecError(f"cannot read the config {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SpecError(f"the config {path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(options, dict):
        raise SpecError(f"the config {path} holds no options; it is lines like 'views: 10'")
    return options
