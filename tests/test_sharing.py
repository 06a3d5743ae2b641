"""Caches travel whole, in parts, and verified; an interrupted transfer goes on; what nobody needs is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3
from conftest import SMALL

import softcache as sc
from softcache import blobs, licences
from softcache import manifest as m
from softcache.cache import Cache
from softcache.cli import main
from softcache.errors import DamageError, MismatchError, NotBuilt, NotPulled, SpecError, StoreError
from softcache.pulled import FILE
from softcache.remote import Remote, connect
from softcache.remote.folder import Folder
from softcache.sharing.push import YOUNG
from softcache.spec import canonical_json, digest
from softcache.store import Store
from softcache.testing import DAMAGES, FailingDisk, FullDisk, flip_bit, toy_teacher

QUIET: dict[str, Any] = {"private": True, "progress": False}


@pytest.fixture(params=["folder", "hf", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket") + "/shared/caches"
    return {"folder": str(tmp_path / "r"), "hf": f"hf:{tmp_path / 'r'}"}[request.param]


@pytest.fixture
def shared(small_path: Path, tmp_path: Path) -> Path:
    """A folder that the small cache was pushed to, as ``v1``."""
    sc.push(small_path, tmp_path / "shared", "v1", progress=False)
    return tmp_path / "shared"


def tree(path: Path) -> dict[str, bytes]:
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def same_rows(a: Cache, b: Cache, names: list[str], view: int, samples: np.ndarray) -> bool:
    one, other = a.read(view, samples, names), b.read(view, samples, names)
    return all(
        np.array_equal(
            np.asarray(getattr(one[n], "values", one[n])), np.asarray(getattr(other[n], "values", other[n]))
        )
        for n in names
    )


def grown(small_path: Path, small_folder: Path, out: Path) -> Path:
    """Another cache of the same images: one view more."""
    sc.build(out, source=small_folder, teacher=toy_teacher(), **SMALL | {"views": 3})
    return out


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_a_cache_is_not_pushed_into_itself(small_copy: Path, where: str):
    (home := small_copy.parent / "home").mkdir()
    cache, before = small_copy.rename(home / "cache"), tree(home / "cache")
    with pytest.raises(SpecError, match="its own files only: write beside it"):
        sc.push(cache, cache / where, "v1", progress=False)
    assert tree(home) == {f"cache/{name}": data for name, data in before.items()}


def test_a_part_is_not_exported(shared: Path, small_cache: Cache, tmp_path: Path, capsys: Any):
    """Said before anything is written; the command that is named fetches all of it."""
    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits", views=(0, 1), progress=False)
    for kind in ("webdataset", "hdf5"):
        assert main(["export", str(cache.path), "--to", kind, "-o", str(tmp_path / "out")]) == 1
        told = capsys.readouterr().err
        assert f"all of it: softcache pull {shared} v1 -o {cache.path} fetches the rest" in told
        assert not (tmp_path / "out").exists()
    assert sc.pull(shared, "v1", cache.path, progress=False).pulled is None


def test_of_a_damaged_part_verify_says_where_to_mend_it_from(shared: Path, tmp_path: Path, capsys: Any):
    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits", progress=False)
    DAMAGES["truncate"](cache.path / "targets/logits/value/c.0.0.0")
    assert main(["verify", str(cache.path)]) == 2
    told = capsys.readouterr().err
    assert f"1 damaged file: softcache repair {cache.path} --from {shared}" in told and "build" not in told
    file = cache.path / m.MANIFEST
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamageError, match=f"pull the same from {shared} again"):
        sc.open(cache.path)


def test_names_of_files_do_not_reach_the_terminal(
    shared: Path, small_copy: Path, capsys: pytest.CaptureFixture[str]
):
    (small_copy / "\033[31mred").write_text("")
    (bad := shared / "blobs" / "\033[2J.tmp").write_text("")
    os.utime(bad, (0, 0))
    assert main(["repair", str(small_copy)]) == 2 and main(["gc", str(shared)]) == 0
    told = capsys.readouterr().out
    assert "[31mred" in told and "[2J.tmp" in told and "\033" not in told


# -- whole ---------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_pulled_byte_for_byte(address: str, small_path: Path, tmp_path: Path):
    done = sc.push(small_path, address, "v1", **QUIET)
    assert done.digest == sc.open(small_path).digest and done.before is None and done.there == 0
    pulled = sc.pull(address, "v1", tmp_path / "p", progress=False)
    assert tree(tmp_path / "p") == tree(small_path)
    assert pulled.pulled is None and sc.verify(pulled, read_data=True) == []


def test_a_remote_lies_as_the_format_says(shared: Path, small_path: Path):
    names, name = tree(shared), sc.open(small_path).digest
    assert names["tags/v1"] == name.encode() + b"\n"
    assert names[f"manifests/{name}.json"] == (small_path / m.MANIFEST).read_bytes()
    stored = {n: v for n, v in names.items() if n.startswith("blobs/")}
    assert all(n == f"blobs/{digest(v)[:2]}/{digest(v)[2:4]}/{digest(v)}" for n, v in stored.items())
    there = {v for n, v in tree(small_path).items() if n != m.MANIFEST and not n.endswith("zarr.json")}
    assert set(stored.values()) == there and len(names) == len(stored) + 2


def test_a_push_sends_what_is_not_there(address: str, small_path: Path, small_folder: Path, tmp_path: Path):
    first = sc.push(small_path, address, "v1", **QUIET)
    again = sc.push(small_path, address, "v1", **QUIET)
    assert again.files == 1 and again.there == first.files - 1  # the manifest
    other = grown(small_path, small_folder, tmp_path / "grown")
    more = sc.push(other, address, "v1", **QUIET)
    assert more.before == first.digest and more.digest == sc.open(other).digest
    assert more.there >= first.files / 2 and more.files + more.there > first.files
    assert blobs.tags(connect(address)) == {"v1": more.digest}
    assert sc.pull(address, first.digest, tmp_path / "old", progress=False).digest == first.digest


def test_an_unfinished_cache_is_not_pushed(small_copy: Path, tmp_path: Path):
    (small_copy / m.MANIFEST).unlink()
    with pytest.raises(NotBuilt):
        sc.push(small_copy, tmp_path / "r", "v1", progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_not_pushed(small_copy: Path, tmp_path: Path, damage: str):
    DAMAGES[damage](small_copy / "targets/map/value/c.1.0.0.0.0")
    with pytest.raises(DamageError, match="targets/map/value"):
        sc.push(small_copy, tmp_path / "r", "v1", progress=False)
    assert not (tmp_path / "r" / "tags").exists() and not (tmp_path / "r" / "manifests").exists()


def test_what_is_there_already_is_read_here_before_the_tag_moves(shared: Path, small_copy: Path):
    flip_bit(small_copy / "targets/map/value/c.1.0.0.0.0", 9)
    with pytest.raises(DamageError, match="targets/map/value"):
        sc.push(small_copy, shared, "v2", progress=False)
    assert blobs.tags(Folder(shared)).keys() == {"v1"}


@pytest.mark.parametrize(
    "tag", ["", "../x", "a/b", ".hidden", "x" * 101, "a b", "a" * 64, "-x", "ü", "v1.tmp", "A1" * 32]
)
def test_a_tag_is_a_plain_word(small_path: Path, tmp_path: Path, tag: str):
    with pytest.raises(SpecError, match="tag"):
        sc.push(small_path, tmp_path / "r", tag, progress=False)
    assert not (tmp_path / "r").exists()


def test_a_tag_that_is_not_there_is_told_with_those_that_are(shared: Path, tmp_path: Path):
    with pytest.raises(SpecError, match="did you mean 'v1'"):
        sc.pull(shared, "v2", tmp_path / "p", progress=False)
    with pytest.raises(SpecError, match="nothing was pushed"):
        sc.pull(tmp_path / "nothing", "v1", tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists() and not (tmp_path / "nothing").exists()


def test_a_dataset_repository_has_a_card_until_somebody_makes_it_his_own(small_path: Path, tmp_path: Path):
    for _ in range(2):
        sc.push(small_path, f"hf:{tmp_path}", "v1", **QUIET)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\n") and sc.open(small_path).digest in text and str(tmp_path) not in text
    (tmp_path / "README.md").write_text("mine")
    sc.push(small_path, f"hf:{tmp_path}", "v2", **QUIET)
    assert (tmp_path / "README.md").read_text() == "mine"


# -- two at once -----------------------------------------------------------------------------------------------


class Meddled:
    """A remote; ``then`` is called before the first call of ``word`` whose name starts so."""

    def __init__(self, remote: Remote, word: str, start: str, then: Callable[[], Any]):
        self._remote, self._word, self._start, self._then = remote, word, start, then

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._remote, name)
        if name != self._word:
            return found

        def call(first: str, *args: Any) -> Any:
            if first.startswith(self._start) and self._then:
                then, self._then = self._then, None
                then()
            return found(first, *args)

        return call


def test_of_two_pushers_the_second_is_told_that_the_tag_moved(
    address: str, small_path: Path, small_folder: Path, tmp_path: Path
):
    other = grown(small_path, small_folder, tmp_path / "grown")
    meddled: Any = Meddled(
        connect(address), "replace", "tags/", lambda: sc.push(other, address, "v1", **QUIET)
    )
    with pytest.raises(MismatchError, match=sc.open(other).digest):
        sc.push(small_path, meddled, "v1", **QUIET)
    assert blobs.tags(connect(address)) == {"v1": sc.open(other).digest}
    sc.pull(address, "v1", tmp_path / "p", progress=False)
    moved = sc.push(small_path, address, "v1", **QUIET)
    assert moved.before == sc.open(other).digest and moved.files == 1


def test_two_processes_push_the_same_cache_at_once(address: str, small_path: Path, tmp_path: Path):
    command = [sys.executable, "-m", "softcache.cli", "push", str(small_path), address, "v1", "--private"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [(p.communicate(timeout=60)[1], p.returncode) for p in both]
    assert all(code == 0 for _, code in told), told
    assert tree(Path(sc.pull(address, "v1", tmp_path / "p", progress=False).path)) == tree(small_path)


def test_a_tag_that_moves_between_two_reads_changes_nothing(
    shared: Path, small_path: Path, small_folder: Path, tmp_path: Path
):
    other = grown(small_path, small_folder, tmp_path / "grown")
    meddled: Any = Meddled(
        Folder(shared), "get", "manifests/", lambda: sc.push(other, shared, "v1", progress=False)
    )
    found = sc.pull(meddled, "v1", tmp_path / "p", progress=False)
    assert found.digest == sc.open(small_path).digest and sc.verify(found, read_data=True) == []
    with pytest.raises(MismatchError, match=r"say .* for the tag"):
        sc.pull(shared, "v1", tmp_path / "p", progress=False)
    sc.pull(shared, found.digest, tmp_path / "p", progress=False)


# -- in parts --------------------------------------------------------------------------------------------------


def test_some_targets(shared: Path, small_cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits")
    assert "logits of 20 of 20 samples in views 0-1 of 2" in capsys.readouterr().err
    assert cache.digest == small_cache.digest and cache.ids == small_cache.ids
    assert not list((tmp_path / "p").rglob("zarr.json")) and not (tmp_path / "p/targets/map").exists()
    assert same_rows(cache, small_cache, ["logits"], 1, np.arange(20))
    assert cache.read_views(0, np.arange(20)) == small_cache.read_views(0, np.arange(20))
    assert sc.verify(cache, read_data=True) == [] and sc.diff(cache, small_cache)["same"]


def test_some_views(shared: Path, small_cache: Cache, tmp_path: Path):
    cache = sc.pull(shared, "v1", tmp_path / "p", views=(1, 2), progress=False)
    assert same_rows(cache, small_cache, ["logits", "map", "vector"], 1, np.arange(20))
    for read in (cache.read, cache.read_views):
        with pytest.raises(NotPulled, match="--views 0:1"):
            read(0, np.arange(3))
    assert sc.verify(cache, read_data=True) == []


def test_a_sample(shared: Path, small_cache: Cache, tmp_path: Path):
    """Blocks of 8, 8 and 4: a tenth is the first of them."""
    cache = sc.pull(shared, "v1", tmp_path / "p", sample=0.1, progress=False)
    here = cache.pulled_samples()
    assert here.tolist() == sorted(small_cache.grid.permutation.inverse(np.arange(8)).tolist())
    assert small_cache.pulled_samples().tolist() == list(range(20))
    for view in (0, 1):
        assert same_rows(cache, small_cache, ["logits", "map", "vector"], view, here)
        assert cache.read_views(view, here) == small_cache.read_views(view, here)
        with pytest.raises(NotPulled):
            cache.read(view, np.setdiff1d(np.arange(20), here)[:1])
        with pytest.raises(NotPulled):
            cache.read_views(view, np.setdiff1d(np.arange(20), here)[:1])
    assert sc.verify(cache, read_data=True) == []


def test_every_way_to_read_what_was_not_pulled_names_the_command_that_fetches_it(
    shared: Path, small_folder: Path, tmp_path: Path
):
    import softcache_train as st

    out = tmp_path / "with a space"
    cache = sc.pull(shared, "v1", out, targets="logits", views=(0, 1), progress=False)
    source = sc.Source(small_folder)
    reads: list[tuple[Callable[[], Any], str | None, int]] = [
        (lambda: cache.read(0, np.arange(4), "map"), "map", 0),
        (lambda: cache.read(0, np.arange(4), "vector", slab=False), "vector", 0),
        (lambda: cache.read(1, np.arange(4), "logits"), "logits", 1),
        (lambda: cache[cache.ids[3], 0]["map"], "map", 0),
        (lambda: cache[cache.ids[3], 1].view, "logits", 1),
        (lambda: cache.read_views(1, np.arange(4)), "logits", 1),
        (lambda: sc.with_targets(source, cache, targets="map")[0], "map", 0),
        (lambda: next(iter(st.Loader(cache, source, global_batch=4, targets="map"))), "map", 0),
        (lambda: next(iter(st.Loader(cache, source, global_batch=4, workers=0))), "map", 0),
        (lambda: sc.open([out, out]).read(0, np.arange(4), "1.map"), "map", 0),
    ]
    for read, target, view in reads:
        with pytest.raises(NotPulled) as e:
            read()
        views = "" if view == 0 and target == "logits" else f" --views {view}:{view + 1}"
        command = f"softcache pull {shared} v1 -o '{out}' --targets {target}{views}"
        assert str(e.value).endswith(command), (target, view, e.value)
        assert ("say targets=['logits'] to read what is here" in str(e.value)) == (target != "logits")
    assert len(next(iter(st.Loader(cache, source, global_batch=4, targets="logits")))) == 4
    assert sc.with_targets(source, cache, targets="logits")[0]["view"] == 0


def test_that_command_works(
    shared: Path, small_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import shlex

    monkeypatch.chdir(tmp_path)
    cache = sc.pull(shared, "v1", "p", targets="logits", sample=0.1, progress=False)
    with pytest.raises(NotPulled) as e:
        cache.read(1, np.arange(20), "map")
    words = shlex.split(str(e.value).rpartition(": ")[2])
    assert words[0] == "softcache" and main(words[1:]) == 0
    assert same_rows(sc.open("p"), small_cache, ["map"], 1, np.arange(20))


def test_a_folder_that_was_named_from_here_is_found_from_elsewhere(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    cache = sc.pull("shared", "v1", "p", targets="logits", progress=False)
    assert cache.pulled and cache.pulled.remote == str(shared)
    (tmp_path / "p/targets/logits/value/c.0.1.0").unlink()
    monkeypatch.chdir("/")
    assert len(sc.repair(tmp_path / "p").mended) == 1


def test_a_student_trains_on_what_is_here(
    shared: Path, small_cache: Cache, small_folder: Path, tmp_path: Path
):
    import softcache_train as st

    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits", views=(0, 1), sample=0.5, progress=False)
    source = sc.Source(small_folder)
    here = set(cache.pulled_samples().tolist())
    loader = st.Loader(cache, source, global_batch=4, targets="logits")
    for _ in range(2):
        for batch in loader:
            assert batch.view == 0 and set(batch.index.tolist()) <= here
            said = small_cache.read(0, batch.index, "logits")["logits"].values
            assert np.array_equal(batch["logits"].values.numpy(), said)
    dataset = sc.with_targets(source, cache, targets="logits")
    assert set(dataset.samples.tolist()) == here and {dataset[i]["view"] for i in range(len(dataset))} == {0}


def test_another_pull_adds(shared: Path, small_path: Path, small_cache: Cache, tmp_path: Path):
    out = tmp_path / "p"
    sc.pull(shared, "v1", out, targets="logits", views=(0, 1), progress=False)
    before = {n: (out / n).stat().st_mtime_ns for n in tree(out) if n != FILE}
    cache = sc.pull(shared, "v1", out, targets="map", views=(1, 2), progress=False)
    assert same_rows(cache, small_cache, ["logits"], 0, np.arange(20))
    assert same_rows(cache, small_cache, ["map"], 1, np.arange(20))
    with pytest.raises(NotPulled):
        cache.read(0, np.arange(20), "map")
    assert {n: (out / n).stat().st_mtime_ns for n in before} == before
    assert sc.verify(cache, read_data=True) == []
    sc.pull(shared, "v1", out, progress=False)
    assert tree(out) == tree(small_path) and sc.open(out).pulled is None


def test_pulling_more_takes_nothing_from_the_training_set(
    shared: Path,
    small_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    import softcache_train as st

    out = tmp_path / "p"
    sc.pull(shared, "v1", out, targets="logits", views=(0, 1), progress=False)
    cache = sc.pull(shared, "v1", out, views=(1, 2), sample=0.1)
    assert (
        "logits of 20 of 20 samples in view 0 and 8 of 20 samples in view 1 of 2" in capsys.readouterr().err
    )
    assert len(cache.pulled_samples("logits")) == 20 and cache.pulled_views("logits") == 1
    assert "1 are left out" in caplog.text
    loader = st.Loader(cache, sc.Source(small_folder), global_batch=4, targets="logits")
    assert len(loader) == 5 and {batch.view for _ in range(2) for batch in loader} == {0}
    cache = sc.pull(shared, "v1", out, targets=["map", "vector"], views=(0, 1), sample=0.1, progress=False)
    assert len(cache.pulled_samples("logits")) == 20 and len(cache.pulled_samples()) == 8
    cache.pulled_views()
    assert "logits have more samples here" in caplog.text
    assert main(["show", str(out)]) == 0
    assert "map, vector of 8 of 20 samples in views 0-1 of 2" in capsys.readouterr().out


def test_a_pull_without_the_first_view_says_what_it_is_not_good_for(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache = sc.pull(shared, "v1", tmp_path / "p", views=(1, 2))
    assert "view 0, which is not here" in capsys.readouterr().err and len(cache.pulled_samples()) == 20
    with pytest.raises(NotPulled, match="--views 0:1"):
        cache.pulled_views()


def test_mixed_views_have_their_partners(small_folder: Path, tmp_path: Path):
    settings = SMALL | {"recipe": "random_resized_crop(8)|mixup", "targets": {"logits": "full(u8)"}}
    built = sc.build(tmp_path / "c", source=small_folder, teacher=toy_teacher(), **settings)
    sc.push(built, tmp_path / "r", "v1", progress=False)
    cache = sc.pull(tmp_path / "r", "v1", tmp_path / "p", sample=0.1, progress=False)
    here = cache.pulled_samples()
    assert len(here) == 8 and cache.read_views(1, here) == built.read_views(1, here)
    assert any(v.mix and v.mix.partner not in here for v in cache.read_views(1, here))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"targets": "logit"}, "did you mean 'logits'"),
        ({"views": (1, 1)}, "views 1:1"),
        ({"views": (0, 3)}, "has the views 0:2"),
        ({"views": (-1, 1)}, "views -1:1"),
        ({"sample": 0.0}, "a share"),
        ({"sample": 1.5}, "a share"),
        ({"sample": float("nan")}, "a share"),
    ],
)
def test_what_a_cache_has_not_is_not_pulled(shared: Path, tmp_path: Path, asked: dict[str, Any], told: str):
    with pytest.raises(SpecError, match=told):
        sc.pull(shared, "v1", tmp_path / "p", progress=False, **asked)
    assert not (tmp_path / "p" / m.MANIFEST).exists()


def test_damage_in_a_part_is_damage_and_not_absence(shared: Path, tmp_path: Path):
    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits", progress=False)
    (tmp_path / "p" / "targets/logits/value/c.1.1.0").unlink()
    flip_bit(tmp_path / "p" / "targets/logits/value/c.0.1.0", 5)
    found = sc.verify(cache, read_data=True)
    assert {(d.target, d.field, d.view, d.shard) for d in found} == {
        ("logits", "value", 0, 1),
        ("logits", "value", 1, 1),
    }
    with pytest.raises(DamageError, match="missing"):
        sc.open(tmp_path / "p").read(1, np.arange(20), "logits")


@pytest.mark.parametrize("some", [{}, {"targets": "logits"}])
def test_without_a_manifest_what_is_here_is_compared(
    shared: Path, small_path: Path, tmp_path: Path, some: dict[str, Any]
):
    out = tmp_path / "p"
    sc.pull(shared, "v1", out, progress=False, **some)
    shard = "targets/logits/value/c.0.1.0"
    flip_bit(out / shard, 5)
    (out / m.MANIFEST).unlink()
    cache = sc.pull(shared, "v1", out, progress=False, **some)
    assert (out / shard).read_bytes() == (small_path / shard).read_bytes()
    assert sc.verify(cache, read_data=True) == []


def test_what_a_stream_left_is_compared(shared: Path, small_path: Path, tmp_path: Path):
    sc.stream(shared, "v1", tmp_path / "p", keep=1 << 30).read(0, np.arange(20), "logits")
    flip_bit(tmp_path / "p" / "targets/logits/value/c.0.1.0", 5)
    sc.pull(shared, "v1", tmp_path / "p", progress=False)
    assert tree(tmp_path / "p") == tree(small_path)


def test_the_same_cache_with_other_licences_is_not_put_over_it(
    shared: Path, small_copy: Path, small_path: Path, tmp_path: Path
):
    out = tmp_path / "p"
    sc.pull(shared, "v1", out, progress=False)
    held = sc.open(out).digest
    stated = licences.state(sc.open(small_copy), {"source": "MIT"})
    sc.push(stated, shared, "v1", progress=False)
    with pytest.raises(MismatchError, match=f"{held}.*{stated.digest}.*other licences"):
        sc.pull(shared, "v1", out, progress=False)
    assert (out / m.MANIFEST).read_bytes() == (small_path / m.MANIFEST).read_bytes()
    (out / m.MANIFEST).unlink()
    assert sc.pull(shared, "v1", out, progress=False).licences == stated.licences


def test_a_folder_that_holds_something_else_is_refused(shared: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("a thesis")
    with pytest.raises(SpecError, match="not empty"):
        sc.pull(shared, "v1", tmp_path, progress=False)
    assert (tmp_path / "mine").read_text() == "a thesis"


def test_a_pull_that_was_killed_at_once_goes_on(shared: Path, small_path: Path, tmp_path: Path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / (FILE + ".tmp")).write_text("{")
    (tmp_path / "p" / ".claims").mkdir()
    assert sc.pull(shared, "v1", tmp_path / "p", progress=False).pulled is None
    assert tree(tmp_path / "p") == tree(small_path)


def test_a_cache_that_grew_is_pulled_into_the_folder_of_the_old_one(
    shared: Path, small_folder: Path, small_copy: Path, tmp_path: Path
):
    for name in ("all", "some"):
        sc.pull(shared, "v1", tmp_path / name, progress=False)
    sc.extend(small_copy, source=small_folder, teacher=toy_teacher(), views=3, progress=False)
    before, after = tree(shared), sc.push(small_copy, shared, "v1", progress=False)
    assert after.there > after.files and before.keys() < tree(shared).keys()
    sc.pull(shared, "v1", tmp_path / "all", progress=False)
    assert tree(tmp_path / "all") == tree(small_copy)
    part = sc.pull(shared, "v1", tmp_path / "some", targets="logits", progress=False)
    assert sc.verify(part, read_data=True) == [] and part.pulled_views("map") == 2 and part.views == 3


def test_a_part_that_is_here_can_be_pushed_on_where_the_rest_is(shared: Path, tmp_path: Path):
    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits", progress=False)
    assert sc.push(cache, shared, "v2", progress=False).files == 1
    with pytest.raises(NotPulled, match="softcache pull"):
        sc.push(cache, tmp_path / "elsewhere", "v1", progress=False)


# -- broken off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 5_000, 30_000])
def test_a_disk_that_fills_is_told_and_gone_on_with(
    shared: Path, small_path: Path, tmp_path: Path, capacity: int
):
    out = tmp_path / "p"
    with pytest.raises(StoreError, match="the disk is full"):
        sc.pull(shared, "v1", Store(out, FullDisk(capacity)), progress=False)
    assert not (out / m.MANIFEST).exists()
    with pytest.raises(sc.SoftcacheError):
        sc.open(out)
    sc.pull(shared, "v1", out, progress=False)
    assert tree(out) == tree(small_path)


def test_an_operation_that_fails_leaves_no_manifest_before_its_files(
    shared: Path, small_path: Path, tmp_path: Path
):
    """Every operation of a disk, some of them: the manifest is there when all is, and the next pull ends well."""
    for at in range(1, 400, 23):
        out = tmp_path / f"p{at}"
        try:
            sc.pull(shared, "v1", Store(out, FailingDisk(at)), targets="logits", progress=False)
        except StoreError:
            if (out / m.MANIFEST).exists():
                assert sc.verify(out, read_data=True) == []
        cache = sc.pull(shared, "v1", out, targets="logits", progress=False)
        assert sc.verify(cache, read_data=True) == [] and cache.pulled is not None
        assert not [n for n in tree(out) if n.endswith(".tmp")]


def test_an_interrupted_first_pull_says_how_to_go_on(shared: Path, tmp_path: Path):
    with pytest.raises(StoreError):
        sc.pull(shared, "v1", Store(tmp_path / "p", FullDisk(20_000)), progress=False)
    with pytest.raises(NotPulled, match=r"interrupted: softcache pull .* v1 -o"):
        sc.open(tmp_path / "p")


def test_what_is_whole_is_not_fetched_again(
    small_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = s3.Faulty()
    with store.serve() as endpoint:
        s3.use(monkeypatch, endpoint)
        sc.push(small_path, "s3://bucket/p", "v1", **QUIET)
        with pytest.raises(StoreError):
            sc.pull("s3://bucket/p", "v1", Store(tmp_path / "p", FullDisk(25_000)), progress=False)
        here = tree(tmp_path / "p")
        missing = {digest(data) for name, data in tree(small_path).items() if name not in here}
        store.asked.clear()
        sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
        asked = {name.rpartition("/")[2] for _, name in store.asked if "/blobs/" in name}
        assert len(here) > 5 and asked and asked <= missing
    assert tree(tmp_path / "p") == tree(small_path)


def killed(command: list[str], when: Callable[[], bool]) -> None:
    """Run softcache's command as a process, and kill it with a signal it cannot catch."""
    process = subprocess.Popen([sys.executable, "-m", "softcache.cli", *command], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not when() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Faulty]:
    store = s3.Faulty()
    store.delay = 0.05
    with store.serve() as endpoint:
        s3.use(monkeypatch, endpoint)
        yield store


def test_a_killed_push_and_a_killed_pull_go_on(slow: s3.Faulty, small_path: Path, tmp_path: Path):
    out, remote = tmp_path / "p", "s3://bucket/p"
    for enough in (3, 12):
        killed(["push", str(small_path), remote, "v1", "--private"], lambda n=enough: len(slow.objects) >= n)
        assert not any("tags/" in name or "manifests/" in name for name in slow.objects)
    sent = {name for name in slow.objects if "/blobs/" in name}
    slow.asked.clear()
    assert main(["push", str(small_path), remote, "v1", "--private"]) == 0
    assert not sent & {name for verb, name in slow.asked if verb == "PUT"}
    for enough in (3, 20):
        killed(["pull", remote, "v1", "-o", str(out)], lambda n=enough: len(Store(out).names()) >= n)
        assert not (out / m.MANIFEST).exists()
    assert main(["pull", remote, "v1", "-o", str(out)]) == 0
    assert tree(out) == tree(small_path)


# -- a remote that lies --------------------------------------------------------------------------------------------


@pytest.fixture
def liar(small_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Faulty]:
    """A store that the small cache was pushed to as ``v1``; it then does as it is told."""
    store = s3.Faulty()
    with store.serve() as endpoint:
        s3.use(monkeypatch, endpoint)
        sc.push(small_path, "s3://bucket/p", "v1", **QUIET)
        yield store


def of(small_path: Path, name: str) -> str:
    sha = digest((small_path / name).read_bytes())
    return f"p/{blobs.blob(sha)}"


SHARD = "targets/vector/value/c.1.1.0"


@pytest.mark.parametrize("fault", ["swap", "cut", "endless"])
def test_a_bad_body_is_fetched_once_more(liar: s3.Faulty, small_path: Path, tmp_path: Path, fault: str):
    liar.faults = {of(small_path, SHARD): [fault]}
    sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
    assert tree(tmp_path / "p") == tree(small_path)


@pytest.mark.parametrize("fault", ["swap", "cut", "endless"])
def test_a_body_that_stays_bad_is_named_and_not_kept(
    liar: s3.Faulty, small_path: Path, tmp_path: Path, fault: str
):
    name = of(small_path, SHARD)
    liar.always = {name: fault}
    with pytest.raises(DamageError, match=f"{name.removeprefix('p/')} .*{SHARD}") as e:
        sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
    assert "\n" not in str(e.value) and not (tmp_path / "p" / SHARD).exists()
    assert not (tmp_path / "p" / m.MANIFEST).exists()
    assert sum(asked == ("GET", name) for asked in liar.asked) == 2
    liar.always = {}
    sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
    assert tree(tmp_path / "p") == tree(small_path)


@pytest.mark.parametrize("fault", [500, 503, 403, "stop"])
def test_a_server_that_fails_ends_the_pull_and_the_next_goes_on(
    liar: s3.Faulty, small_path: Path, tmp_path: Path, fault: int | str
):
    liar.always = {of(small_path, SHARD): fault}
    with pytest.raises(StoreError) as e:
        sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
    assert "\n" not in str(e.value) and "of-a-test" not in str(e.value)
    liar.always = {}
    sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
    assert tree(tmp_path / "p") == tree(small_path)


def test_a_blob_that_is_gone_is_told(shared: Path, small_path: Path, tmp_path: Path):
    (shared / of(small_path, SHARD).removeprefix("p/")).unlink()
    with pytest.raises(StoreError, match=f"the bytes of {SHARD}"):
        sc.pull(shared, "v1", tmp_path / "p", progress=False)
    sc.push(small_path, shared, "v1", progress=False)
    sc.pull(shared, "v1", tmp_path / "p", progress=False)


@pytest.mark.parametrize("content", [b"", b"../../x\n", b"0" * 64 + b"\n\n", b"g" * 64 + b"\n", b"0" * 1000])
def test_a_tag_that_holds_no_digest_is_refused(shared: Path, tmp_path: Path, content: bytes):
    (shared / "tags/v1").write_bytes(content)
    with pytest.raises(DamageError, match="tags/v1"):
        sc.pull(shared, "v1", tmp_path / "p", progress=False)


@pytest.mark.parametrize("content", [b"rotten", b"0" * 1000, b"1" * 64 + b"\n"])
def test_a_rotten_tag_stands_in_the_way_of_nothing_but_gc(
    shared: Path, small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
):
    (shared / "tags/bad").write_bytes(content)
    old = time.time() - 2 * YOUNG
    for blob in (shared / "blobs").rglob("*"):
        os.utime(blob, (old, old))
    points = content[:1] == b"1"  # at a manifest that is not there
    assert main(["tags", str(shared)]) == (0 if points else 2)
    told = capsys.readouterr()
    assert told.out.startswith("bad" if points else "v1") and (points or "tags/bad" in told.err)
    with pytest.raises(sc.SoftcacheError, match="111" if points else "--delete bad"):
        sc.gc(shared)
    sc.push(small_path, shared, "v2", progress=False)
    sc.push(small_path, shared, "bad", progress=False)
    assert blobs.tags(Folder(shared)).keys() == {"bad", "v1", "v2"}
    (shared / "tags/bad").write_bytes(content)
    assert main(["tags", str(shared), "--delete", "bad"]) == 0
    assert blobs.tags(Folder(shared)).keys() == {"v1", "v2"} and sc.gc(shared).old == []


@pytest.mark.parametrize("command", ["tags", "gc"])
def test_where_nothing_was_pushed_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    assert main([command, str(tmp_path / "nowhere")]) == 1
    assert "nothing was pushed to" in capsys.readouterr().err


def forged(shared: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Point the tag at a manifest that somebody changed, with all digests made anew."""
    name = (shared / "tags/v1").read_text().strip()
    value = json.loads((shared / f"manifests/{name}.json").read_bytes())
    change(value)
    del value["digest"]
    made = digest(canonical_json(value))
    (shared / f"manifests/{made}.json").write_bytes(canonical_json(value | {"digest": made}))
    (shared / "tags/v1").write_text(made + "\n")


def resize(value: dict[str, Any], path: str, size: int) -> None:
    value["constants"][path]["bytes"] = size


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: resize(v, "ids/bytes", 1 << 40), "a size of ids/bytes"),
        (lambda v: v["files"].update(bytes=1 << 40), "too large"),
        (lambda v: v["identity_file"].update(bytes=1 << 40), "not the one it names|too large"),
        (lambda v: v["identity"]["grid"].update(views=7), "not the one it names"),
        (
            lambda v: v["constants"].update({"../../x/y": v["constants"]["ids/bytes"]}),
            "half-written or was edited",
        ),
        (lambda v: v["identity"].update(version=[9, 0]), "upgrade softcache"),
        (lambda v: v.update(extra=1), "half-written or was edited"),
    ],
)
def test_a_forged_manifest_is_refused_before_anything_is_written(
    shared: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
):
    forged(shared, change)
    with pytest.raises((DamageError, MismatchError), match=told):
        sc.pull(shared, "v1", tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists()


def test_a_table_that_names_impossible_sizes_is_refused(shared: Path, small_path: Path, tmp_path: Path):
    table = np.frombuffer((small_path / "files.bin").read_bytes(), m.ENTRY).copy()
    table["bytes"][3] = 1 << 40
    raw = table.tobytes()
    forged(shared, lambda v: v["files"].update(sha256=digest(raw)))
    path = shared / blobs.blob(digest(raw))
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    with pytest.raises(DamageError, match="a size that it cannot have"):
        sc.pull(shared, "v1", tmp_path / "p", progress=False)


def test_a_manifest_that_never_ends_is_left(liar: s3.Faulty, small_path: Path, tmp_path: Path):
    name = f"p/manifests/{sc.open(small_path).digest}.json"
    liar.always, liar.sent = {name: "endless"}, 0
    with pytest.raises(DamageError, match="longer than"):
        sc.pull("s3://bucket/p", "v1", tmp_path / "p", progress=False)
    assert liar.sent < 64 << 20


def test_links_in_a_remote_and_in_a_folder_are_not_followed(shared: Path, small_path: Path, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.mkdir()
    out = tmp_path / "p"
    sc.pull(shared, "v1", out, targets="logits", progress=False)
    (out / "targets/map").symlink_to(secret)
    with pytest.raises(DamageError, match="is a link"):
        sc.pull(shared, "v1", out, progress=False)
    assert not list(secret.iterdir())
    blob = shared / of(small_path, SHARD).removeprefix("p/")
    blob.rename(tmp_path / "blob")
    blob.symlink_to(tmp_path / "blob")
    with pytest.raises(DamageError):
        sc.pull(shared, "v1", tmp_path / "q", progress=False)


# -- mended ------------------------------------------------------------------------------------------------------


def test_every_damaged_file_is_mended_and_no_other_is_touched(
    shared: Path, small_copy: Path, small_path: Path
):
    names = sorted(n for n in tree(small_copy) if n != m.MANIFEST)
    for i, name in enumerate(names):
        list(DAMAGES.values())[i % len(DAMAGES)](small_copy / name)
    for aside in small_copy.rglob("*.aside"):
        aside.unlink()
    done = sc.repair(small_copy, shared)
    assert sorted(done.mended) == names and not done.left and tree(small_copy) == tree(small_path)


def test_a_repair_fetches_what_is_damaged_only(shared: Path, small_copy: Path, small_path: Path):
    flip_bit(small_copy / SHARD, 77)
    flip_bit(small_copy / "zarr.json", 9)
    (small_copy / "foreign").write_text("mine")
    done = sc.repair(small_copy, shared)
    assert sorted(done.mended) == sorted([SHARD, "zarr.json"])
    assert done.fetched == (small_path / SHARD).stat().st_size
    assert [d.file for d in done.left] == ["foreign"] and (small_copy / "foreign").read_text() == "mine"
    assert sc.repair(small_copy).mended == []


def test_without_a_remote_what_follows_from_the_manifest_is_mended(small_copy: Path):
    flip_bit(small_copy / SHARD, 77)
    (small_copy / "targets/zarr.json").unlink()
    done = sc.repair(small_copy)
    assert done.mended == ["targets/zarr.json"] and [d.file for d in done.left] == [SHARD]


def test_a_pulled_part_is_mended_from_where_it_came(shared: Path, tmp_path: Path):
    cache = sc.pull(shared, "v1", tmp_path / "p", targets="logits", progress=False)
    (tmp_path / "p" / "targets/logits/value/c.1.1.0").unlink()
    done = sc.repair(cache)
    assert done.mended == ["targets/logits/value/c.1.1.0"] and not done.left
    assert sc.verify(cache, read_data=True) == []


def test_a_damaged_manifest_is_pulled_again(shared: Path, small_copy: Path, small_path: Path):
    (small_copy / m.MANIFEST).unlink()
    flip_bit(small_copy / SHARD, 3)  # nobody says that what is here is whole: it is looked at
    sc.pull(shared, "v1", small_copy, progress=False)
    assert tree(small_copy) == tree(small_path)


def test_a_repair_from_a_remote_without_it_says_so(small_copy: Path, tmp_path: Path):
    flip_bit(small_copy / SHARD, 77)
    with pytest.raises(StoreError, match=SHARD):
        sc.repair(small_copy, tmp_path / "empty")


# -- what nobody needs -------------------------------------------------------------------------------------------


def age(remote: Path, hours: float) -> None:
    """Make everything there older."""
    for file in (f for f in remote.rglob("*") if f.is_file()):
        then = file.stat().st_mtime - hours * 3600
        os.utime(file, (then, then))


def test_what_no_tag_reaches_is_told_and_deleted_when_asked(
    shared: Path, small_path: Path, small_folder: Path, tmp_path: Path
):
    other = grown(small_path, small_folder, tmp_path / "grown")
    sc.push(other, shared, "v2", progress=False)
    (shared / "blobs/00").mkdir(exist_ok=True)
    (shared / "blobs/00/README").write_text("somebody's")
    blob = next(f for f in (shared / "blobs").rglob("*") if len(f.name) == 64)
    blob.with_name(blob.name + ".0123.tmp").write_text("left behind by a killed push")
    (shared / "tags/v1.0123.tmp").write_text("half a dig")
    before = tree(shared)
    assert blobs.tags(connect(shared)).keys() == {"v1", "v2"}
    assert [i.name.endswith(".tmp") for i in sc.gc(shared).young] == [True, True]
    blobs.untag(connect(shared), "v2")
    young = sc.gc(shared, delete=True)
    assert young.old == [] and len(young.young) > 3 and len(tree(shared)) == len(before) - 1
    age(shared, 25)
    told = sc.gc(shared)
    assert not told.deleted and len(told.old) == len(young.young) and len(tree(shared)) == len(before) - 1
    assert [i.name for i in sc.gc(shared, delete=True).old] == [i.name for i in told.old]
    assert len(tree(shared)) == len(before) - 1 - len(told.old) and "blobs/00/README" in tree(shared)
    assert sc.gc(shared).old == [] and sc.gc(shared).young == []
    assert sc.verify(sc.pull(shared, "v1", tmp_path / "p", progress=False), read_data=True) == []


def test_what_cannot_be_read_deletes_nothing(shared: Path, small_path: Path):
    age(shared, 25)
    before = tree(shared)
    (shared / "tags/v2").write_text("0" * 64 + "\n")
    with pytest.raises(StoreError, match="no manifest"):
        sc.gc(shared, delete=True)
    (shared / "tags/v2").write_text("what")
    with pytest.raises(DamageError, match="v2"):
        sc.gc(shared, delete=True)
    with pytest.raises(SpecError, match="a push"):
        sc.gc(shared, delete=True, age=60)
    (shared / "tags/v2").unlink()
    assert tree(shared) == before


def test_a_push_does_not_lean_on_what_may_be_collected(shared: Path, small_path: Path, tmp_path: Path):
    """Blobs that no tag reaches and that are old are sent again: gc may be about to delete them."""
    blobs.untag(connect(shared), "v1")
    age(shared, YOUNG / 3600 + 1)
    done = sc.push(small_path, shared, "v2", progress=False)
    assert done.there == 0
    age(shared, 100)
    assert sc.push(small_path, shared, "v3", progress=False).files == 1  # a tag reaches them
    assert sc.gc(shared).old == []


def test_a_tag_that_comes_while_garbage_is_collected_is_seen(
    shared: Path, small_path: Path, small_folder: Path, tmp_path: Path
):
    blobs.untag(connect(shared), "v1")
    age(shared, 25)
    meddled: Any = Meddled(
        Folder(shared), "list", "blobs", lambda: sc.push(small_path, shared, "v9", progress=False)
    )
    assert sc.gc(meddled, delete=True).tags.keys() == {"v9"}
    sc.pull(shared, "v9", tmp_path / "p", progress=False)


@pytest.mark.parametrize("public", ["hf", "s3"])
def test_what_strangers_may_read_has_licences(
    public: str, small_copy: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    remote = request.getfixturevalue("bucket") if public == "s3" else f"hf:{tmp_path / 'r'}"
    with pytest.raises(SpecError, match=r"licence of its source is not stated.*--private"):
        sc.push(small_copy, remote, "v1", progress=False)
    assert list(connect(remote).list("")) == []
    open_ones = {"source": "CC-BY-4.0", "teacher": "Apache-2.0", "cache": "CC-BY-4.0"}
    licences.state(sc.open(small_copy), open_ones | {"teacher": "proprietary"})
    with pytest.raises(SpecError, match="teacher is 'proprietary'"):
        sc.push(small_copy, remote, "v1", progress=False)
    sc.push(small_copy, remote, "v1", private=True, progress=False)
    closed = sc.pull(remote, "v1", tmp_path / "p", progress=False)
    licences.state(sc.open(small_copy), open_ones)
    assert sc.push(small_copy, remote, "v1", progress=False).files == 1
    (tmp_path / "p" / m.MANIFEST).unlink()
    again = sc.pull(remote, "v1", tmp_path / "p", progress=False)  # the same files
    assert again.digest != closed.digest and tree(tmp_path / "p") == tree(small_copy)


# -- what nobody may see -----------------------------------------------------------------------------------------


def test_no_secret_is_in_what_is_written(
    bucket: str,
    small_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-token")
    assert main(["push", str(small_path), bucket, "v1", "--private"]) == 0
    assert main(["pull", bucket, "v1", "-o", str(tmp_path / "p"), "--targets", "logits"]) == 0
    assert main(["pull", "s3://me:planted-word@bucket/p", "v1", "-o", str(tmp_path / "q")]) == 1
    assert not (tmp_path / "q").exists()
    told = "".join(capfd.readouterr())
    written = b"".join(tree(tmp_path / "p").values())
    remote = connect(bucket)
    there = b"".join(
        remote.get(i.name, 1 << 30) or b""
        for folder in ("blobs", "manifests", "tags")
        for i in remote.list(folder)
    )
    for secret in ("planted-secret", "planted-token", "planted-word", "access-of-a-test"):
        assert secret not in told and secret.encode() not in written + there
    assert str(tmp_path).encode() not in there and os.uname().nodename.encode() not in there


# -- commands ----------------------------------------------------------------------------------------------------


def test_commands(
    small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    name = sc.open(small_path).digest
    assert main(["push", str(small_path), "r", "v1", "--json"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["digest"] == name and f"v1 is {name}" in done.err
    assert main(["tags", "r"]) == 0 and capsys.readouterr().out.split() == ["v1", name]
    words = ["pull", "r", "v1", "--targets", "logits,map", "--views", ":1", "--sample", "10%", "--json"]
    assert main(words) == 0
    here = json.loads(capsys.readouterr().out)["pulled"]
    assert here["blocks"] == {"logits": [1, 0], "map": [1, 0], "view": [1, 0]} and here["remote"] == str(
        tmp_path / "r"
    )
    assert main(["verify", "v1", "--read-data"]) == 0
    flip_bit(tmp_path / "v1/targets/logits/value/c.0.0.0", 4)
    assert main(["verify", "v1", "--read-data"]) == 2
    assert main(["repair", "v1"]) == 0 and "c.0.0.0: mended" in capsys.readouterr().out
    assert main(["tags", "r", "--delete", "v1", "--json"]) == 0 and json.loads(capsys.readouterr().out) == {}
    assert main(["gc", "r"]) == 0 and "younger than 24 hours" in capsys.readouterr().out
    age(tmp_path / "r", 30)
    assert main(["gc", "r", "--delete"]) == 0 and "deleted" in capsys.readouterr().out
    assert tree(tmp_path / "r") == {}
    for wrong in (["--views", "a:b"], ["--sample", "much"], ["--views", "5:"]):
        with pytest.raises(SystemExit) if wrong[1] != "5:" else pytest.raises(AssertionError):
            assert main(["pull", "r", "v1", *wrong]) == 0
