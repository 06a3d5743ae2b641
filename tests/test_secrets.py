"""Nothing of who made a cache, where and with which secrets is in a byte of it, of an export, or of its card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import layouts
import numpy as np
import pytest

from softcache.errors import SourceError
from softcache.source import Source

REPO = Path(__file__).resolve().parents[1]

# Runs commands of ours on a machine with that name, and that user.
DRIVER = """
import getpass, json, os, platform, socket, sys
host, user = os.environ["PLANTED_HOST"], os.environ["PLANTED_USER"]
said = os.uname()
named = os.uname_result((said.sysname, host, said.release, said.version, said.machine))
os.uname = lambda: named
socket.gethostname = socket.getfqdn = platform.node = lambda *a: host
getpass.getuser = os.getlogin = lambda: user
assert platform.uname().node == host
from softcache.cli import main
for words in json.loads(sys.argv[1]):
    if status := main(words):
        sys.exit(status)
"""
TEACHER = """
import torch
def net():
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)
    found = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear)
    found.input_spec = {"size": 16, "mean": (0, 0, 0), "std": (1, 1, 1)}
    return found
"""
BUILD = (
    "build",
    "--teacher",
    "softcache.testing:toy_teacher",
    "--ignore-labels",
    "--no-progress",
    "--source",
)


class Machine:
    """A machine with a planted marker in everything that a cache must not tell."""

    def __init__(self, root: Path):
        self.markers: dict[str, str] = {}
        self.home = root / self.plant("home")
        self.work = self.home / self.plant("working-folder")
        self.work.mkdir(parents=True)
        (self.work / "nets.py").write_text(TEACHER)
        secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "WANDB_API_KEY", "DATABASE_URL")
        self.environment = {name: self.plant(name) for name in (*secrets, "HOSTNAME", "USER", "LOGNAME")}
        self.environment |= {
            "PLANTED_HOST": self.plant("host"),
            "PLANTED_USER": self.plant("user"),
            "DATABASE_URL": f"https://someone:{self.plant('password')}@host/db",
            "HOME": str(self.home),
            "TMPDIR": str(self._folder("temporary")),
            "PYTHONPATH": os.pathsep.join([str(REPO), str(self.work)]),
            "OMP_NUM_THREADS": "1",
        }

    def plant(self, what: str) -> str:
        self.markers[what] = f"planted{len(self.markers):02}x{what.replace('_', '').lower()}"
        return self.markers[what]

    def _folder(self, what: str) -> Path:
        folder = self.home / self.plant(what)
        folder.mkdir()
        return folder

    def source(self, layout: str) -> Path:
        """Images in a folder whose path reads as an address with user info."""
        where = self.work / f"https://someone:{self.plant('source')}@host/images"
        layouts.write(layout, where, count=6)
        return where

    def weights(self) -> str:
        from safetensors.torch import save_file

        sys.path.insert(0, str(self.work))
        try:
            import nets  # pyright: ignore[reportMissingImports]

            path = self._folder("weights") / "net.safetensors"
            save_file(nets.net().state_dict(), path)
        finally:
            sys.path.pop(0)
            sys.modules.pop("nets", None)
        return str(path)

    def out(self, name: str) -> Path:
        return self._folder(f"out-{name}") / name

    def run(self, *commands: Sequence[object]) -> str:
        """Commands of ``softcache``; what they say on stdout."""
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, words],
            cwd=self.work, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def told(self, path: Path) -> list[str]:
        """What of the planted is in a file, or in the files of a folder and their names."""
        return leaks(path, self.markers)


def leaks(path: Path, markers: Mapping[str, str]) -> list[str]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    assert files
    names = "\n".join(str(p.relative_to(path.parent)) for p in files).encode()
    found = []
    for where, data in (("the files' names", names), *((str(p), p.read_bytes()) for p in files)):
        low = data.lower()
        found += [f"{what} in {where}" for what, marker in markers.items() if marker.encode() in low]
    return found


def test_builds_of_every_layout_tell_nothing(tmp_path: Path):
    machine = Machine(tmp_path)
    built = {layout: (machine.source(layout), machine.out(layout)) for layout in layouts.WRITERS}
    machine.run(*((*BUILD, source, "-o", out) for source, out in built.values()))
    for _, out in built.values():
        assert machine.told(out) == []


def test_nor_do_exports_a_card_and_what_is_pushed_and_pulled(tmp_path: Path):
    machine = Machine(tmp_path)
    source, out, tars, one = machine.source("parquet"), *map(machine.out, ("cache", "tars", "one.h5"))
    pulled, card, remote = machine.out("pulled"), out.with_name("README.md"), tmp_path / "remote"
    kept = (
        "--views",
        2,
        "--target",
        "logits=full(u8)",
        "--target",
        "map=int8",
        "--licence",
        "source=CC-BY-4.0",
    )
    said = machine.run(
        (*BUILD, source, *kept, "-o", out),
        ("licence", out, "teacher=MIT", "cache=MIT"),
        ("export", out, "--to", "webdataset", "-o", tars, "--embed-views", "--source", source),
        ("export", out, "--to", "hdf5", "-o", one, "--decoded"),
        ("card", out, "-o", card),
        ("card", out),
        ("push", out, f"hf:{remote}", "v1"),
        ("pull", f"hf:{remote}", "v1", "--targets", "logits", "-o", pulled),
    )
    assert (pulled / ".pulled.json").exists() and any(remote.rglob("v1"))
    for path in (out, tars, one, card, remote, pulled):
        assert machine.told(path) == []
    assert card.read_text() in said and "teacher: MIT" in said


def test_nor_do_the_paths_of_a_teacher_and_its_weights(tmp_path: Path):
    pytest.importorskip("torch")
    machine = Machine(tmp_path)
    source, out, weights = machine.source("imagefolder"), machine.out("cache"), machine.weights()
    words = ("--source", source, "--teacher", "nets:net", "--weights", weights, "--no-progress")
    text = machine.run(("build", *words, "--target", "logits=full(u8)", "-o", out), ("card", out))
    assert machine.told(out) == [] and not [
        what for what, marker in machine.markers.items() if marker in text
    ]
    assert "--weights WEIGHTS" in text and "--source SOURCE" in text and "`safetensors`" in text


def test_nor_does_where_imported_arrays_lay(tmp_path: Path):
    machine = Machine(tmp_path)
    source, out, arrays = machine.source("folder"), machine.out("cache"), machine.out("old.npz")
    np.savez(arrays, logits=np.zeros((6, 3), np.float32))
    words = (
        "--map",
        "logits=logits",
        "--ids",
        "order",
        "--recipe",
        "unknown",
        "--input-size",
        8,
        "--source",
        source,
    )
    machine.run(("import", arrays, *words, "-o", out))
    assert machine.told(out) == []


def test_what_is_planted_where_a_cache_does_tell_it_is_found(tmp_path: Path):
    """The search itself: class names and ids are told, and so is what is written into a file or its name."""
    machine = Machine(tmp_path)
    source, out = machine.source("imagefolder"), machine.out("cache")
    cats = next(source.rglob("cat"))
    cats.rename(cats.with_name(machine.plant("class")))
    machine.run(
        (
            "build",
            "--source",
            source,
            "--teacher",
            "softcache.testing:toy_teacher",
            "--ignore-labels",
            "-o",
            out,
        )
    )
    found = machine.told(out)
    assert len(found) == 1 and "class in" in found[0] and "ids/bytes" in found[0]
    named = tmp_path / machine.markers["host"]
    named.write_text(machine.markers["user"].upper())
    assert leaks(named, machine.markers) == ["host in the files' names", f"user in {named}"]


def test_images_of_a_data_yaml_that_share_only_the_home_folders_parent_are_refused(
    tmp_path: Path, monkeypatch
):
    """Their ids would be paths from there, and begin with the name of the user."""
    home = tmp_path / "home" / "someone"
    monkeypatch.setenv("HOME", str(home))
    layouts.write("yolo", home / "a")
    layouts.write("yolo", tmp_path / "b")
    both = f"[{home / 'a' / 'images' / 'train'}, {tmp_path / 'b' / 'images' / 'train'}]"
    (home / "data.yaml").write_text(f"names: [cat, dog]\ntrain: {both}\n")
    with pytest.raises(SourceError, match="ids would tell where your folders are"):
        Source(home / "data.yaml", split="train")
    layouts.write("yolo", home / "b")
    (home / "data.yaml").write_text("names: [cat, dog]\ntrain: [a/images/train, b/images/train]\n")
    assert Source(home / "data.yaml", split="train").ids[0] == "a/images/train/000.png"
