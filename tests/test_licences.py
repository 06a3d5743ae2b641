"""Licences: stated while building or afterwards, part of the manifest and not of the identity; who may publish."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from test_cli import MORE, TOY, run

import softcache as sc
from softcache import licences
from softcache.cli import build_cache
from softcache.errors import DamageError, SoftcacheError, SpecError
from softcache.testing import ToyImages, remove, toy_teacher

OPEN = {"source": "CC-BY-4.0", "teacher": "Apache-2.0", "cache": "CC-BY-4.0"}


def tree(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def build(out: Path, source: Any, **options: Any) -> Any:
    return sc.build(out, source=source, teacher=toy_teacher(), **SMALL | options)


def refused(**said: str) -> str:
    return licences.refusal(manifest(**said))


def manifest(**said: str) -> Any:
    """All that is asked of a manifest here."""

    class Stated:
        licences = {k: v for k, v in said.items() if v}  # noqa: RUF012

    return Stated()


# -- where they stand ------------------------------------------------------------------------------------------


def test_a_cache_without_licences_has_the_bytes_it_had_before_there_were_any(small_path: Path):
    assert b"licence" not in (small_path / "softcache.json").read_bytes()
    assert sc.open(small_path).licences == {}


def test_they_are_in_the_manifest_and_change_nothing_else(
    tmp_path: Path, small_folder: Path, small_path: Path
):
    cache = build(tmp_path / "c", small_folder, licences=OPEN)
    assert sc.open(tmp_path / "c").licences == OPEN == cache.licences
    ours, theirs = tree(tmp_path / "c"), tree(small_path)
    assert {name for name in theirs if ours[name] != theirs[name]} == {
        "softcache.json"
    } and ours.keys() == theirs.keys()
    assert sc.verify(cache, read_data=True) == []
    found = sc.diff(cache, sc.open(small_path))
    assert (
        not found["same"] and found["identity"] == [] and found["licences"][0] == ("cache", "CC-BY-4.0", None)
    )


def test_stated_afterwards_the_cache_is_what_it_would_have_been(
    tmp_path: Path, small_folder: Path, small_copy: Path
):
    before = tree(small_copy)
    cache = licences.state(sc.open(small_copy), OPEN)
    assert cache.digest == build(tmp_path / "c", small_folder, licences=OPEN).digest
    after = tree(small_copy)
    assert {name for name in before if after[name] != before[name]} == {
        "softcache.json"
    } and before.keys() == after.keys()
    one = licences.state(cache, ["teacher=MIT"])
    assert one.licences == OPEN | {"teacher": "MIT"}
    assert licences.state(one, dict.fromkeys(OPEN, "")).licences == {}
    assert tree(small_copy) == before  # to the last byte


def test_a_finished_cache_keeps_what_it_has_and_a_build_says_so(tmp_path: Path, capsys):
    options = {"progress": True, "targets": {"logits": "full(u8)"}}
    digest = build(tmp_path / "c", ToyImages(9), licences=OPEN, **options).digest
    capsys.readouterr()
    assert build(tmp_path / "c", ToyImages(9), **options).digest == digest
    assert "licence" not in capsys.readouterr().err
    assert build(tmp_path / "c", ToyImages(9), licences={"cache": "MIT"}, **options).digest == digest
    assert "softcache licence states others" in capsys.readouterr().err


def test_they_are_kept_when_a_damaged_block_is_made_anew(tmp_path: Path):
    digest = licences.state(build(tmp_path / "c", ToyImages(9)), OPEN).digest
    remove(next((tmp_path / "c" / "targets").rglob("c.0.*")))
    assert build(tmp_path / "c", ToyImages(9)).digest == digest


def test_an_unfinished_cache_takes_none(tmp_path: Path, small_copy: Path):
    remove(small_copy / "softcache.json")
    with pytest.raises(
        SoftcacheError, match="is not finished: state its licences where you build it, by --licence"
    ):
        licences.state(sc.open(small_copy), OPEN)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"src": "MIT"}, "licence of 'src': there is one of source, teacher, cache"),
        (["MIT"], r"licence 'MIT' is written WHAT=LICENCE"),
        (["source=MIT", "source=MIT"], "stated twice"),
        ({"source": "https://user:secret@host"}, "an identifier of SPDX"),
        ({"source": "a\nb"}, "an identifier of SPDX"),
        ({"source": "<script>"}, "an identifier of SPDX"),
        ({"source": "x" * 201}, "an identifier of SPDX"),
        ({"source": 3}, "an identifier of SPDX"),
    ],
)
def test_what_is_no_licence_is_refused_in_a_line(tmp_path: Path, said: Any, told: str):
    with pytest.raises(SpecError, match=told) as e:
        build(tmp_path / "c", ToyImages(9), licences=said)
    assert "\n" not in str(e.value) and not (tmp_path / "c").exists()


def test_a_manifest_with_an_odd_one_is_damage(small_copy: Path):
    """Whoever signs it: what stands in it is no markup and no address."""
    cache = sc.open(small_copy)
    assert cache.manifest is not None
    odd = cache.manifest.model_copy(update={"licences": {"source": "<script>"}}).signed()
    (small_copy / "softcache.json").write_bytes(odd.to_bytes())
    with pytest.raises(DamageError, match="licences"):
        sc.open(small_copy)


# -- may it be published? --------------------------------------------------------------------------------------


def test_all_three_have_to_be_stated():
    assert refused(**OPEN) == ""
    for what in OPEN:
        assert f"licence of its {what} is not stated" in refused(**OPEN | {what: ""})


@pytest.mark.parametrize(
    "licence",
    ["proprietary", "Proprietary", "all-rights-reserved", "All rights reserved", "no-redistribution", "NONE", "unknown",
     "MIT AND proprietary", "(MIT OR proprietary)", "NOASSERTION"],
)  # fmt: skip
@pytest.mark.parametrize("what", list(OPEN))
def test_what_is_closed_is_not_passed_on(what: str, licence: str):
    assert (
        refused(**OPEN | {what: licence})
        == f"the licence of its {what} is {licence!r}, which forbids passing it on"
    )


@pytest.mark.parametrize(
    "licence", ["CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "cc-by-nd-3.0", "MIT AND CC-BY-ND-4.0", "CC BY-ND"]
)
def test_of_no_derivatives_nothing_may_be_derived_and_a_cache_itself_may_be_so(licence: str):
    for what in ("source", "teacher"):
        assert "forbids passing on what is derived" in refused(**OPEN | {what: licence})
    assert refused(**OPEN | {"cache": licence}) == ""


@pytest.mark.parametrize(
    "licence",
    ["MIT", "CC0-1.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "Unlicense", "AGPL-3.0-only", "Nonesuch-1.0", "LicenseRef-ImageNet"],
)  # fmt: skip
def test_the_others_may_be_passed_on(licence: str):
    assert refused(source=licence, teacher=licence, cache=licence) == ""


def test_commerce_with_what_is_not_for_it_is_a_warning():
    assert licences.warnings(manifest(**OPEN)) == []
    for nc in ("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "PolyForm-Noncommercial-1.0.0"):
        (told,) = licences.warnings(manifest(**OPEN | {"source": nc}))
        assert "source" in told and nc in told
        assert len(licences.warnings(manifest(source=nc, teacher=nc, cache="MIT"))) == 2
        assert licences.warnings(manifest(source=nc, teacher=nc, cache="CC-BY-NC-4.0")) == []


# -- the command line ------------------------------------------------------------------------------------------


def test_flags_and_the_command(tmp_path: Path, small_folder: Path, capsys):
    said = ["--licence", "source=CC-BY-NC-4.0", "--licence", "cache=MIT"]
    assert (
        run(capsys, "--source", small_folder, *TOY, *MORE, *said, "-o", tmp_path / "c", command=build_cache)[
            0
        ]
        == 0
    )
    digest = sc.open(tmp_path / "c").digest
    status, out, err = run(capsys, "licence", tmp_path / "c")
    assert (status, out) == (0, "source: CC-BY-NC-4.0\nteacher: not stated\ncache: MIT\n")
    assert "it may not be published: the licence of its teacher is not stated" in err and digest not in err
    status, out, err = run(capsys, "licence", tmp_path / "c", "teacher=MIT")
    assert status == 0 and f"the digest was {digest} and is {sc.open(tmp_path / 'c').digest}" in err
    assert "may not" not in err and "NOTE: the licence of its source" in err
    assert run(capsys, "licence", tmp_path / "c", "techer=MIT")[0] == 1
    assert run(capsys, "license", tmp_path / "c")[0] == 1


def test_a_config_has_them_as_a_mapping(tmp_path: Path, small_folder: Path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"source: {small_folder}\nteacher: softcache.testing:toy_teacher\nlicences: {{source: CC0-1.0}}\n"
    )
    assert run(capsys, "build", config, "--no-progress", "-o", tmp_path / "c")[0] == 0
    assert sc.open(tmp_path / "c").licences == {"source": "CC0-1.0"}
