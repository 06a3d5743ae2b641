"""Imports go down only, and who only reads a cache needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# The table of docs/design.md. Teachers stand beside the builder and may be imported from floor 5 upwards.
FLOORS = [
    {"errors", "sizes", "spec", "keyed", "options", "indices"},
    {"codecs", "store", "remote", "ustar"},
    {"source", "recipe", "targets", "pixels"},
    {
        "block",
        "zarrfile",
        "identity",
        "chosen",
        "arrays",
        "parts",
        "manifest",
        "warp",
        "geometry",
        "probes",
        "shown",
    },
    {
        "bases",
        "beside",
        "cache",
        "canary",
        "documents",
        "erasure",
        "inventory",
        "licences",
        "pulled",
        "blobs",
        "members",
        "reader",
        "row",
        "several",
        "tars",
        "views",
    },
    {
        "anchoring",
        "beginning",
        "noise",
        "job",
        "layers",
        "mend",
        "meter",
        "measure",
        "memorised",
        "drive",
        "choice",
        "candidates",
        "commission",
        "forecast",
        "losses",
        "reckoning",
        "telling",
        "loop",
        "builder",
        "extension",
        "rows",
        "probe",
        "finish",
        "checker",
        "card",
        "show",
        "flags",
        "pilot",
        "adapter",
        "drawing",
        "exchange",
        "sharing",
        "teachers",
    },
    {"testing", "hostile", "cli", "exchanging", "extending", "publishing", "moving"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TEACHING = {"timm", "torchvision", "ultralytics", "transformers", "onnxruntime"}

TORCH = {"torch", "safetensors", *TEACHING}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module, at the top level of the file) of every import in a file; TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            skipped |= {inner for child in node.body for inner in ast.walk(child)}
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            # ``from softcache import cache`` names a module, ``from softcache.spec import parse`` does not
            if node.module in ("softcache", "softcache_train"):
                yield from ((f"{node.module}.{alias.name}", node not in lazy) for alias in node.names)
            else:
                yield node.module, node not in lazy


def files(package: Path) -> list[Path]:
    found = sorted(package.rglob("*.py"))
    assert found
    return found


def room_of(path: Path) -> str:
    """``softcache/source/parquet.py`` → ``source``."""
    return path.relative_to(REPO / "softcache").parts[0].removesuffix(".py")


def rooms_in(path: Path) -> Iterator[tuple[str, bool]]:
    """The rooms of softcache that a file imports."""
    for module, top in imports(path):
        if module.startswith("softcache."):
            yield module.split(".")[1], top


OURS = [p for p in files(REPO / "softcache") if room_of(p) != "__init__"]


def test_every_room_has_a_floor():
    assert {room_of(p) for p in OURS} <= set(FLOOR)


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_go_down_only(path: Path):
    here = room_of(path)
    for room, _ in rooms_in(path):
        if room == "__version__":
            continue
        assert room in FLOOR, f"{path} imports softcache.{room}, which has no floor"
        climb = f"{path} on floor {FLOOR[here]} imports {room} on floor {FLOOR[room]}"
        assert FLOOR[room] <= FLOOR[here], climb


def test_no_two_rooms_import_each_other():
    below: dict[str, set[str]] = {}
    for path in OURS:
        below.setdefault(room_of(path), set()).update(
            r for r, _ in rooms_in(path) if r in FLOOR and r != room_of(path)
        )
    done: set[str] = set()
    while rest := below.keys() - done:
        free = {room for room in rest if below[room] <= done}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


def test_the_package_itself_imports_none_of_its_rooms():
    assert not [room for room, _ in rooms_in(REPO / "softcache" / "__init__.py") if room in FLOOR]


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(REPO)))
def test_torch_stays_above_the_cache_and_teachers_libraries_stay_in_teachers(path: Path):
    found = {module.split(".")[0] for module, _ in imports(path)}
    if FLOOR[room_of(path)] <= 4:
        assert not found & TORCH
    if room_of(path) != "teachers":
        assert not found & TEACHING
    assert not {module.split(".")[0] for module, top in imports(path) if top} & TEACHING
    assert not found & {"softcache_train", "zarr"}


TRAIN = files(REPO / "train" / "softcache_train")


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.name)
def test_the_trainer_imports_up_to_the_cache_and_only_online_a_teacher_lazily(path: Path):
    for room, top in rooms_in(path):
        if path.name == "online.py" and FLOOR[room] == 5:
            assert not top, f"{path} imports softcache.{room} at the top"
        elif path.name.startswith("demo"):
            continue  # the demo builds a cache too
        else:
            assert FLOOR[room] <= 4, f"{path} imports softcache.{room}"
    assert not {module.split(".")[0] for module, _ in imports(path)} & TEACHING


def fresh(code: str) -> set[str]:
    """The modules that are loaded after ``code`` ran in a fresh interpreter."""
    ended = "\nimport sys; print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + ended], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.rsplit("MODULES", 1)[1].split()}


def test_opening_reading_pairing_and_verifying_need_no_torch(small_path: Path, small_folder: Path):
    loaded = fresh(
        f"""
import numpy as np, softcache as sc
cache = sc.open({str(small_path)!r})
cache.read(0, np.arange(20)); cache[cache.ids[0], 1]["logits"].dense(2.0); cache.read_views(1, np.arange(3))
sc.pair(cache, sc.Source({str(small_folder)!r}))
assert sc.verify(cache, read_data=True) == []
"""
    )
    assert not loaded & TORCH and "zarr" not in loaded


def test_every_room_below_the_builder_is_imported_without_torch():
    rooms = sorted(
        room for room, floor in FLOOR.items() if floor <= 4 and (REPO / "softcache" / room).exists()
    )
    rooms += sorted(
        r for r, floor in FLOOR.items() if floor <= 4 and (REPO / "softcache" / f"{r}.py").exists()
    )
    assert len(rooms) > 10
    assert not fresh("; ".join(f"import softcache.{room}" for room in rooms)) & TORCH


def test_a_numpy_teacher_is_built_from_without_torch(tmp_path: Path):
    loaded = fresh(
        f"""
import softcache as sc
from softcache.testing import ToyImages, toy_teacher
sc.build({str(tmp_path / "c")!r}, source=ToyImages(4), teacher=toy_teacher(), progress=False)
"""
    )
    assert not loaded & TORCH


def test_a_dataset_has_targets_without_torch(small_path: Path, small_folder: Path):
    loaded = fresh(
        f"""
import softcache as sc
item = sc.with_targets(sc.Source({str(small_folder)!r}), sc.open({str(small_path)!r}))[0]
assert item["image"].shape == (3, 8, 8) and item["logits"].shape == (4,)
"""
    )
    assert not loaded & TORCH


def test_importing_the_package_is_instant_work():
    """Names are loaded when they are first used."""
    assert not fresh("import softcache; dir(softcache); softcache.__version__") & {
        "numpy",
        "PIL",
        "pydantic",
        *TORCH,
    }


def test_every_public_name_is_there():
    import softcache

    assert {"open", "build", "Source", "verify"} <= set(dir(softcache))
    for name in dir(softcache):
        assert getattr(softcache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = softcache.nothing
