"""A manifest is the very bytes a build wrote, or it is refused: 2 for damage, 3 for a newer format."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import manifest as m
from softcache.errors import DamageError, MismatchError, SoftcacheError
from softcache.identity import VERSION, differences
from softcache.parts import identity_file
from softcache.spec import canonical_json, digest
from softcache.store import Store
from softcache.testing import flip_bit

Change = Callable[[dict[str, Any]], object]


def edit(path: Path, change: Change) -> None:
    """Change the values of a manifest as an editor would: the digest stays what it was."""
    file = path / m.MANIFEST
    value = json.loads(file.read_bytes())
    change(value)
    file.write_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def sign(path: Path, change: Change) -> None:
    """Change the values as an enemy would: with the right digests, of the identity's own file too."""
    file = path / m.MANIFEST
    value = json.loads(file.read_bytes())
    before = json.dumps(value.get("identity"))
    change(value)
    if json.dumps(value.get("identity")) != before:
        raw = canonical_json(value["identity"])
        value["identity_file"] = {"sha256": digest(raw), "bytes": len(raw)}
        (path / identity_file(0)).write_bytes(raw)
    del value["digest"]
    file.write_bytes(canonical_json(value | {"digest": digest(canonical_json(value))}))


def at(*keys: Any, to: Any) -> Change:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


def refused(path: Path, error: type[SoftcacheError]) -> str:
    with pytest.raises(error) as caught:
        sc.open(path)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    return str(caught.value)


# -- the good one ----------------------------------------------------------------------------------------------


def test_a_manifest_is_its_digest(small_path: Path):
    cache, raw = sc.open(small_path), (small_path / m.MANIFEST).read_bytes()
    value = json.loads(raw)
    assert value.pop("digest") == cache.digest == digest(canonical_json(value))
    assert cache.manifest is not None and cache.manifest.to_bytes() == raw


def test_signing_it_anew_changes_nothing(small_copy: Path):
    before = (small_copy / m.MANIFEST).read_bytes()
    sign(small_copy, lambda value: None)
    assert (small_copy / m.MANIFEST).read_bytes() == before


def test_no_path_host_user_or_time_is_in_any_json(small_path: Path, small_folder: Path):
    import getpass
    import platform

    for file in small_path.rglob("*.json"):
        text = file.read_text()
        for secret in (str(small_path), str(small_folder), str(Path.home()) + "/", platform.node()):
            assert len(secret) < 4 or secret not in text
        assert f'"{getpass.getuser()}"' not in text


# -- half-written, edited, spelled otherwise -------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
def test_a_half_written_manifest_is_damage(small_copy: Path, share: float):
    raw = (small_copy / m.MANIFEST).read_bytes()
    (small_copy / m.MANIFEST).write_bytes(raw[: math.ceil(len(raw) * share)][:-1])
    assert "run the same build-cache again" in refused(small_copy, DamageError)


EDITS: dict[str, Change] = {
    "a seed": at("identity", "recipe", "seed", to=1),
    "a class": at("identity", "source", "classes", 0, to="ape"),
    "the order of classes": lambda v: v["identity"]["source"]["classes"].reverse(),
    "top-1": at("report", "top1", to=1.0),
    "an invalid row": at("invalid", to=[3]),
    "the digest": at("digest", to="0" * 64),
    "no digest": lambda v: v.pop("digest"),
    "an unknown key": at("extra", to=1),
    "an unknown key inside": at("identity", "grid", "extra", to=1),
    "a missing key": lambda v: v["identity"].pop("grid"),
    "another format": at("format", to="zarr"),
    "text for a number": at("identity", "grid", "samples", to="20"),
    "a number for text": at("identity", "recipe", "spec", to=5),
    "a fraction of a row": at("identity", "grid", "samples", to=20.5),
    "null": at("identity", to=None),
    "a list": at("identity", to=[]),
    "true for one": at("identity", "grid", "views", to=True),
    "no samples": at("identity", "grid", "samples", to=0),
    "negative views": at("identity", "grid", "views", to=-2),
    "huge samples": at("identity", "grid", "samples", to=10**30),
    "huge block rows": at("identity", "grid", "block_rows", to=2**62),
    "a huge digit string": at("identity", "recipe", "seed", to="HUGE"),
    "infinity": at("report", "top1", to=math.inf),
    "not a number": at("report", "top1", to=math.nan),
    "a negative size": at("files", "bytes", to=-1),
    "a short sha256": at("files", "sha256", to="ab"),
    "a sha256 in capitals": at("files", "sha256", to="AB" * 32),
    "version text": at("identity", "version", to="1.0"),
    "an empty version": at("identity", "version", to=[]),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_damage(small_copy: Path, change: Change):
    edit(small_copy, change)
    file = small_copy / m.MANIFEST
    file.write_bytes(file.read_bytes().replace(b'"HUGE"', b"9" * 5000))
    message = refused(small_copy, DamageError)
    assert "edited" in message and m.MANIFEST in message and "run the same build-cache again" in message


SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "indented": lambda raw: json.dumps(json.loads(raw), sort_keys=True, indent=1).encode(),
    "another order of keys": lambda raw: json.dumps(dict(reversed(json.loads(raw).items()))).encode(),
    "no newline at the end": lambda raw: raw[:-1],
    "a space at the end": lambda raw: raw + b" ",
    "a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "utf-16": lambda raw: raw.decode().encode("utf-16"),
    "an escaped letter": lambda raw: raw.replace(b'"ant"', b'"\\u0061nt"'),
    "a key twice": lambda raw: raw.replace(b'"format":', b'"format":"softcache","format":'),
    "a capital exponent": lambda raw: raw.replace(b"e-", b"E-"),
    "a trailing zero": lambda raw: raw.replace(b'"mean":[0.0', b'"mean":[0.00'),
}


def test_an_identity_that_is_not_the_one_of_its_file_is_damage(small_copy: Path):
    own = (small_copy / identity_file(0)).read_bytes()
    sign(small_copy, at("identity", "recipe", "seed", to=77))
    (small_copy / identity_file(0)).write_bytes(own)
    sign(small_copy, at("identity_file", to={"sha256": digest(own), "bytes": len(own)}))
    assert "its identity is not the one" in refused(small_copy, DamageError)


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_the_same_values_spelled_otherwise_are_not_what_was_written(small_copy: Path, spell):
    raw = (small_copy / m.MANIFEST).read_bytes()
    assert spell(raw) != raw
    (small_copy / m.MANIFEST).write_bytes(spell(raw))
    refused(small_copy, DamageError)


@pytest.mark.parametrize(
    "text", [b"", b"\0", b"[]", b"null", b"1", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 9]
)
def test_what_is_no_manifest_is_damage(small_copy: Path, text: bytes):
    (small_copy / m.MANIFEST).write_bytes(text)
    refused(small_copy, DamageError)


def test_one_flipped_bit_anywhere_is_found(small_copy: Path):
    file = small_copy / m.MANIFEST
    raw = file.read_bytes()
    version = raw.index(b'"version":[') + len(b'"version":[')
    for place in {*range(0, len(raw), 71), version, len(raw) - 1}:
        for bit in range(8):
            flip_bit(file, 8 * place + bit)
            with pytest.raises((DamageError, MismatchError)) as caught:
                sc.open(small_copy)
            # 1 → 3, 5 or 9 cannot be told from a newer format
            assert place == version or caught.value.exit_code == 2
            file.write_bytes(raw)


def test_a_giant_manifest_is_not_read(small_copy: Path):
    os.truncate(small_copy / m.MANIFEST, m.MAX_JSON + 1)
    assert "at most" in refused(small_copy, DamageError)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_manifest_that_is_no_file_is_damage(small_copy: Path, kind: str):
    file = small_copy / m.MANIFEST
    file.rename(file.with_suffix(".real"))
    make = {"link": lambda: file.symlink_to(file.with_suffix(".real")), "folder": file.mkdir}
    make.get(kind, lambda: os.mkfifo(file))()
    refused(small_copy, DamageError)


# -- other versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [edit, sign])
def test_a_newer_major_version_is_a_mismatch(small_copy: Path, write):
    write(small_copy, at("identity", "version", to=[VERSION[0] + 1, 0]))
    message = refused(small_copy, MismatchError)
    assert f"version {VERSION[0] + 1}" in message and "upgrade softcache" in message


def test_a_newer_major_version_may_look_quite_different(small_copy: Path):
    (small_copy / m.MANIFEST).write_bytes(canonical_json({"identity": {"version": [9, 1]}, "shards": []}))
    refused(small_copy, MismatchError)


# -- signed by an enemy ----------------------------------------------------------------------------------------


def rename_target(name: str) -> Change:
    def change(value: dict[str, Any]) -> None:
        targets = value["identity"]["targets"]
        targets[name] = targets.pop("map")

    return change


def rename_constant(name: str) -> Change:
    def change(value: dict[str, Any]) -> None:
        value["constants"][name] = value["constants"].pop("canary/pixels")

    return change


PATHS = ["../../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a" * 300, "a\nb", "x/../../y", "~", "c:\\x"]


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_a_target_named_like_a_path_is_damage(small_copy: Path, name: str):
    sign(small_copy, rename_target(name))
    assert "target name" in refused(small_copy, DamageError)


@pytest.mark.parametrize("name", [p for p in PATHS if p != "a/b"], ids=ascii)
def test_a_constant_named_like_a_path_is_damage(small_copy: Path, name: str):
    sign(small_copy, rename_constant(name))
    refused(small_copy, DamageError)


@pytest.mark.parametrize(
    "change",
    [
        at("identity", "targets", "map", "codec", to="topk(16)"),
        at("identity", "targets", "map", "codec_version", to=2),
        at("identity", "targets", "map", "kind", to="boxes"),
        at("identity", "targets", "logits", "shape", to=[1]),
    ],
)
def test_a_target_this_version_cannot_read_is_a_mismatch(small_copy: Path, change: Change):
    sign(small_copy, change)
    refused(small_copy, MismatchError)


@pytest.mark.parametrize(
    "change",
    [
        at("identity", "targets", "map", "shape", to=[1 << 24, 1 << 24, 1 << 24]),
        at("identity", "targets", "map", "shape", to=[16, 0, 16]),
        at("identity", "teacher", "input_spec", "size", to=[10**6, 10**6]),
        at("identity", "teacher", "input_spec", "size", to=[-1, 8]),
        at("invalid", to=[20]),
        at("invalid", to=[-1]),
        at("constants", "ids/bytes", "dtype", to="float64"),
        at("constants", "ids/bytes", "dtype", to="object"),
        at("constants", "ids/bytes", "shape", to=[1 << 47]),
        at("constants", "ids/offsets", "shape", to=[5]),
        at("constants", "canary/pixels", "shape", to=[8, 8, 4, 6]),
        at("constants", "canary/sample", "dtype", to="float32"),
        at("constants", to={}),
    ],
)
def test_no_signed_lie_is_believed(small_copy: Path, small_folder: Path, change: Change):
    """Opened, listed, paired and read: damage is named, nothing is imported, allocated or left to an IndexError."""
    sign(small_copy, change)
    with pytest.raises(DamageError):
        cache = sc.open(small_copy)
        assert len(cache.ids) == 20
        sc.pair(cache, sc.Source(small_folder))
        cache.read(0, np.arange(20))


def huge(value: dict[str, Any]) -> None:
    value["identity"]["grid"].update(samples=1 << 40, views=1 << 20, block_rows=1)


def test_a_cache_that_claims_to_be_huge_opens_at_once_and_is_damage_when_read(small_copy: Path):
    sign(small_copy, huge)
    code = f"""
import resource, numpy as np
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
import softcache as sc
from softcache.errors import DamageError
cache = sc.open({str(small_copy)!r})
for use in (lambda: cache.ids, lambda: cache.read(0, np.array([1 << 39])), lambda: sc.verify(cache)):
    try:
        found = use()
    except DamageError as e:
        found = e
    assert found, found
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


def test_a_manifest_names_its_teacher_and_never_imports_it(small_copy: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    sign(small_copy, at("identity", "teacher", "name", to="evil:teacher"))
    cache = sc.open(small_copy)
    cache.read(0, np.arange(3))
    assert "evil" not in sys.modules


# -- the identity of a build that has begun, and receipts ------------------------------------------------------


def test_a_half_written_identity_is_damage(small_copy: Path):
    (small_copy / m.MANIFEST).unlink()
    (small_copy / identity_file(0)).write_bytes((small_copy / identity_file(0)).read_bytes()[:-9])
    assert "delete the folder" in refused(small_copy, DamageError)


def test_a_half_written_receipt_is_damage(small_copy: Path):
    (small_copy / m.MANIFEST).unlink()
    receipt = small_copy / "receipts" / "v0000-b000000.json"
    receipt.write_bytes(receipt.read_bytes()[:-9])
    cache = sc.open(small_copy)
    block = cache.grid.block(0, 0)
    with pytest.raises(DamageError, match="v0000-b000000"):
        cache.read(0, cache.grid.samples_of(block))


@pytest.mark.parametrize("other", ["v0000-b000001", "v0001-b000000"])
def test_a_receipt_of_another_block_is_refused(small_copy: Path, other: str):
    (small_copy / m.MANIFEST).unlink()
    receipts = small_copy / "receipts"
    (receipts / "v0000-b000000.json").write_bytes((receipts / f"{other}.json").read_bytes())
    cache = sc.open(small_copy)
    with pytest.raises(MismatchError, match="another build"):
        cache.read(0, cache.grid.samples_of(cache.grid.block(0, 0)))


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x"])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str):
    with pytest.raises(DamageError, match="not a name inside"):
        Store(tmp_path).get(name)


def test_differences_are_named_by_their_path():
    a, b = {"x": {"y": 1, "z": 2}, "w": [1]}, {"x": {"y": 3}, "w": [1]}
    assert differences(a, b) == [("x.y", 1, 3), ("x.z", 2, None)]
    assert differences(a, a) == []
