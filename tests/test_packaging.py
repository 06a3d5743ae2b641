"""One version for two distributions; commands that exist; pins of names and versions alone."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = {
    folder: tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for folder in (".", "train")
}
COMMANDS = {name: target for p in PROJECTS.values() for name, target in p["scripts"].items()}


def test_one_version():
    cache, train = PROJECTS["."], PROJECTS["train"]
    assert train["version"] == cache["version"]
    pins = [d for d in train["dependencies"] if re.match(r"softcache\b", d)]
    assert pins == [f"softcache=={cache['version']}"]


@pytest.mark.parametrize("module", ["softcache", "softcache_train"])
def test_version_attribute(module):
    assert importlib.import_module(module).__version__ == PROJECTS["."]["version"]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_leads_somewhere(command):
    module, _, function = COMMANDS[command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_constraints_are_names_and_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:  # no address, no path, no local build such as 2.15.0+cpu
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+(; python_version < \"3\.\d+\")?", pin), pin
