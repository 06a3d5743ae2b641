"""The card: a README that tells what the manifest tells, and in which a stranger's strings stay text."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_cli import run

import softcache as sc
from softcache import licences
from softcache import manifest as m
from softcache.cache import Cache
from softcache.card import MOST_CLASSES, markdown
from softcache.card.header import of as header_of
from softcache.card.markup import bibtex, block
from softcache.cli import build_cache
from softcache.errors import NotBuilt, SpecError
from softcache.identity import VERSION
from softcache.store import Store
from softcache.testing import ToyImages, remove, toy_detector, toy_teacher

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.*"))
OPEN = {"source": "CC-BY-4.0", "teacher": "Apache-2.0", "cache": "CC0-1.0"}


def split(card: str) -> tuple[dict[str, Any], str]:
    """The YAML of the header as a parser of front matter finds it, and the Markdown after it."""
    found = re.match(r"\A---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), card[found.end() :]


def tokens(text: str) -> list[Token]:
    """What stands in Markdown, by another's parser; bare addresses are links to it, as they are on the web."""
    everything: list[Token] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        everything += [token, *(token.children or ())]
    return everything


def tables(text: str) -> Iterator[list[list[str]]]:
    rows: list[list[str]] = []
    for token, after in zip(tokens(text), [*tokens(text)[1:], None], strict=True):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            assert after is not None
            rows[-1].append(after.content)
        elif token.type == "table_close":
            yield rows
            rows = []


def changed(cache: Cache, **fields: Any) -> Cache:
    """The cache with another manifest in memory: ``fields`` are dotted paths with ``__`` for the dot."""
    assert cache.manifest is not None
    raw = cache.manifest.model_dump(mode="json", exclude={"digest"})
    for path, value in fields.items():
        at = raw
        *before, last = path.split("__")
        for key in before:
            at = at.setdefault(key, {})
        at[last] = value
    manifest = m.Manifest.model_validate_json(json.dumps(raw))
    return Cache(Store(cache.path), manifest.identity, manifest.signed())


# -- what it tells ---------------------------------------------------------------------------------------------


def test_the_header_is_what_hugging_face_reads(small_path: Path, small_copy: Path):
    head, _ = split(markdown(licences.state(sc.open(small_copy), OPEN)))
    assert head == {
        "license": "cc0-1.0",
        "pretty_name": "Soft targets of softcache.testing:ToyTeacher: 20 images, 2 views of each",
        "tags": ["softcache", "knowledge-distillation", "soft-targets"],
        "size_categories": ["n<1K"],
        "task_categories": ["image-classification", "image-feature-extraction"],
        "source_datasets": ["extended"],
    }
    assert split(markdown(sc.open(small_path)))[0]["license"] == "unknown"


@pytest.mark.parametrize(
    ("stated", "called"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("AGPL-3.0-only", {"license": "agpl-3.0"}),
        ("ODbL-1.0", {"license": "odbl"}),
        ("LicenseRef-ours", {"license": "other", "license_name": "LicenseRef-ours"}),
    ],
)
def test_licences_have_hugging_faces_words(small_cache: Cache, stated: str, called: dict[str, str]):
    head, _ = split(markdown(changed(small_cache, licences={"cache": stated})))
    assert called.items() <= head.items() and ("license_name" in head) == ("license_name" in called)


@pytest.mark.parametrize(
    ("samples", "category"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (50_000, "10K<n<100K"),
        (1_281_167, "1M<n<10M"),
        (2 * 10**12, "n>1T"),
    ],
)
def test_the_size_is_one_of_hugging_faces(small_cache: Cache, samples: int, category: str):
    small_cache.samples = samples
    assert split(header_of(small_cache, "title") + "\n")[0]["size_categories"] == [category]


def test_it_tells_what_the_manifest_tells(small_copy: Path):
    cache = licences.state(sc.open(small_copy), OPEN | {"source": "CC-BY-NC-4.0"})
    _, text = split(markdown(cache, "s3://bucket/caches", "v1"))
    source, teacher = cache.identity["source"], cache.identity["teacher"]
    for told in (
        cache.digest, source["ids"], source["content"], teacher["weights"], teacher["name"], "fp32",
        "softcache {}.{}".format(*VERSION),
        "`ant`, `bee`, `cow`, `dog`", "CC-BY-NC-4.0", "For non-commercial use", "8×8 pixels, RGB",
        "mirrored left to right", "softcache pull s3://bucket/caches v1 -o CACHE", 'sc.open("CACHE")', "@misc{softcache-",
    ):  # fmt: skip
        assert told in text
    assert str(cache.path) not in text and str(cache.path.parent) not in text
    (table,) = tables(text)
    assert {len(row) for row in table} == {7}
    assert [row[0] for row in table] == ["target", "`logits`", "`map`", "`vector`"]
    report = cache.report
    assert (
        table[2][4] == f"{report.bytes_per_row['map']:,}"
        and f"{report.fidelity['map']['cosine']:.6f}" in table[2][5]
    )
    assert f"{report.equivariance['map']['flip']:.4f}" in table[2][6] and table[1][6] == "—"


def test_without_licences_it_says_that_nothing_allows_to_pass_it_on(small_cache: Cache, small_copy: Path):
    assert "nothing says that it may be passed on" in markdown(small_cache)
    assert "passed on" not in markdown(licences.state(sc.open(small_copy), OPEN))


def test_many_classes_are_folded_and_too_many_are_cut(small_cache: Cache):
    names = [f"class {i}" for i in range(MOST_CLASSES + 3)]
    text = markdown(changed(small_cache, identity__source__classes=names))
    assert "<details>\n<summary>2,003 classes</summary>" in text and "and 3 more in `cache.classes`" in text
    assert "`class 1999`" in text and "`class 2000`" not in text
    assert "It names no classes" in markdown(changed(small_cache, identity__source__classes=None))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"invalid": [1, 2]}, "2 samples (`cache.invalid`) could not be read"),
        ({"identity__teacher__precision": "bf16"}, "ran in `bf16`"),
        ({"identity__teacher__weights": None}, "have no digest"),
        ({"identity__teacher__weights_format": "pickle"}, "read from a pickle"),
        ({"identity__teacher__label_smoothing": 0.1}, "trained with label smoothing"),
    ],
)
def test_caveats_follow_from_the_manifest(small_cache: Cache, change: dict[str, Any], told: str):
    assert told in markdown(changed(small_cache, **change)) and told not in markdown(small_cache)


def test_one_view_mixes_and_phases_are_told(tmp_path: Path):
    def card(name: str, **options: Any) -> str:
        rest = {"source": ToyImages(8), "teacher": toy_teacher(), "progress": False}
        return markdown(sc.build(tmp_path / name, **rest | options))

    assert "It has one view of every image" in card("one", views=1)
    mixed = card("mixed", views=2, recipe="resize((8, 8))|mixup")
    assert "Views are mixed" in mixed and "It has one view" not in mixed
    phases = card("phases", views=5, recipe="2: resize((8, 8))|flip; resize((8, 8))")
    assert "Views 0 to 1:\n\n1. It is resized" in phases and "Views 2 to 4:\n\n1. It is resized" in phases


@pytest.mark.parametrize("recipe", ["unknown", "resize(8)|center_crop(8)"])
def test_an_imported_caches_card_says_what_is_not_known(tmp_path: Path, small_folder: Path, recipe: str):
    np.savez(tmp_path / "old.npz", logits=np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    cache = sc.import_arrays(
        tmp_path / "c", tmp_path / "old.npz", source=small_folder, arrays={"logits": "logits"}, ids="order", recipe=recipe,
        input_size=8,
        progress=False,
    )  # fmt: skip
    text = markdown(cache)
    assert "build-cache" not in text and "cannot be rebuilt" in text and "which teacher they are of" in text
    assert (
        ("What the teacher saw is not known." in text)
        == ("It is not replayable" in text)
        == (recipe == "unknown")
    )
    assert ("It is resized" in text) == (recipe != "unknown")


def test_a_detectors_card_says_what_columns_mean(tmp_path: Path):
    cache = sc.build(
        tmp_path / "c",
        source=ToyImages(8),
        teacher=toy_detector(),
        targets={"detections": "top(5)"},
        progress=False,
    )
    head, text = split(markdown(cache))
    assert head["task_categories"] == ["object-detection"]
    assert "`logits 4, boxes 4, distribution 16; sigmoid; 3 levels; toy`" in text


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_old_caches_have_one(golden: Path):
    cache = sc.open(golden / "cache")
    head, text = split(markdown(cache))
    assert head["license"] == cache.licences.get("cache", "unknown").lower() and cache.digest in text


def test_an_unfinished_cache_has_none(small_copy: Path):
    remove(small_copy / "softcache.json")
    with pytest.raises(NotBuilt, match="ask for its card"):
        markdown(sc.open(small_copy))


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ("s3://user:secret@bucket/x?signature=secret", "softcache pull s3://bucket/x v1 -o CACHE"),
        ("hf:/home/secret/data", "softcache pull hf:CLONE v1 -o CACHE"),
        ("/home/secret/data", "softcache pull REMOTE v1 -o CACHE"),
    ],
)
def test_how_to_get_it_tells_no_secret(small_cache: Cache, remote: str, told: str):
    text = markdown(small_cache, remote, "v1")
    assert told in text and "secret" not in text
    assert "softcache pull" not in markdown(small_cache)


# -- the command it tells --------------------------------------------------------------------------------------


def test_the_command_makes_the_same_cache_again(tmp_path: Path, small_folder: Path, capsys):
    text = """--recipe random_resized_crop(8)|flip --views 3 --seed 4 --block-rows 7 --batch 5 
        --target vector:embedding=int8 --target logits=full(u8) --target map=pool(2)|int8 --label-smoothing 0.1
        --licence source=CC-BY-4.0 --precision fp32 --no-progress --teacher softcache.testing:toy_teacher"""
    more = text.split()
    assert run(capsys, "--source", small_folder, *more, "-o", tmp_path / "a", command=build_cache)[0] == 0
    told = (
        command(sc.open(tmp_path / "a"))
        .replace("SOURCE", str(small_folder))
        .replace("CACHE", str(tmp_path / "b"))
    )
    # the teacher's own name is of its class, and the factory was named to make it
    words = shlex.split(told.replace("\\\n", "").replace(":ToyTeacher", ":toy_teacher"))
    assert words[0] == "build-cache"
    status, _, err = run(capsys, *words[1:], "--no-progress", command=build_cache)
    assert (status, err) == (0, "")
    assert sc.open(tmp_path / "b").digest == sc.open(tmp_path / "a").digest


def command(cache: Cache) -> str:
    """The one that builds it, as its card tells it."""
    found = tokens(split(markdown(cache))[1])
    return next(t.content for t in found if t.type == "fence" and t.content.startswith("build-cache"))


# -- strings of a stranger -------------------------------------------------------------------------------------

NASTY = [
    "`", "``", "```", "``` ```", "|", "\\|", "\\", "---", "\n---\n", "...", "<script>alert(1)</script>", "<!--", "&lt;",
    "[x](javascript:alert(1))", "![x](http://evil)", "https://evil.example", "a@b.example", "# x", "- x", "{{x}}", "$x$",
    "'", '"', "'; rm -rf ~; '", "$(rm -rf ~)", "!!python/object:os.system", "key: value", "\u202e", "\x00", "\x85", "\u2028",
    "\r\n", "", " ", "</details>", "~~~", "* * *", "}", "@misc{", "\ufeff", "%",
]  # fmt: skip
FIELDS = (
    "layout", "split", "spec", "name", "format", "precision", "processor", "head", "library", "version", "fidelity", "tag",
)  # fmt: skip
SECTIONS = [
    "Dataset", "Licences", "Views", "Teacher", "Targets", "How to open it", "How to get it", "How to rebuild it",
    "What to know", "Citation", "Format",
]  # fmt: skip

some = st.sampled_from(NASTY)
texts = st.one_of(some, st.lists(some, max_size=5).map("".join), st.text(max_size=60))


def seen(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)


@settings(max_examples=150)
@given(text=st.fixed_dictionaries(dict.fromkeys(FIELDS, texts)), classes=st.lists(texts, max_size=30))
def test_strings_of_a_stranger_stay_text(small_path: Path, text: dict[str, str], classes: list[str]):
    cache = changed(
        sc.open(small_path),
        identity__source__layout=text["layout"],
        identity__source__split=text["split"],
        identity__source__classes=classes,
        identity__recipe__spec=text["spec"],
        identity__teacher__name=text["name"],
        identity__teacher__weights_format=text["format"],
        identity__teacher__precision=text["precision"],
        identity__teacher__processor=text["processor"],
        identity__teacher__head=text["head"],
        identity__libraries={text["library"]: text["version"]},
        report__fidelity__logits={text["fidelity"]: 0.5},
        report__equivariance__map={text["fidelity"]: 0.5, "flip": 0.5},
    )
    head, rest = split(markdown(cache, "s3://b/" + text["name"], text["tag"]))
    assert head.keys() == {
        "license",
        "pretty_name",
        "tags",
        "size_categories",
        "task_categories",
        "source_datasets",
    }
    assert isinstance(head["pretty_name"], str)
    found = tokens(rest)
    # every piece of HTML and every heading is ours, and there is no link, picture or rule
    html = [t.content.strip() for t in found if t.type in ("html_block", "html_inline")]
    folded = (
        ["<details>", f"<summary>{len(classes)} classes</summary>", "</details>"] if len(classes) > 20 else []
    )
    assert [line for one in html for line in one.split("\n")] == folded
    assert not {t.type for t in found} & {
        "link_open",
        "image",
        "hr",
        "blockquote_open",
        "code_block",
        "em_open",
    }
    _, *headings = [b.content for a, b in pairwise(found) if a.type == "heading_open"]
    assert headings == [s for s in SECTIONS if s in headings] and len(headings) >= len(SECTIONS) - 1
    assert [len(row) for table in tables(rest) for row in table] == [7] * 4
    assert not re.search(
        r"evil|javascript|rm -rf|script>", " ".join(t.content for t in found if t.type == "text")
    )
    # each is there, in a span of code, as it was but for what cannot be printed
    spans = {t.content for t in found if t.type == "code_inline"}
    for told in (text["layout"], text["precision"], text["processor"], *classes):
        assert not seen(told).strip() or seen(told).strip() in spans


@settings(max_examples=50)
@given(name=texts, spec=texts)
def test_the_command_is_one_whatever_its_words_are(small_path: Path, name: str, spec: str):
    cache = changed(sc.open(small_path), identity__teacher__name=name, identity__recipe__spec=spec)
    told = command(cache)
    # a shell prints the words that it is given
    script = "build_cache() { printf '%s\\0' \"$@\"; }; " + told.replace("build-cache", "build_cache", 1)
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    words = done.stdout.decode().split("\0")
    assert words[words.index("--teacher") + 1] == seen(name) and words[words.index("--recipe") + 1] == seen(
        spec
    )


@given(st.lists(texts, min_size=1, max_size=4))
def test_a_block_of_code_is_one_whatever_its_lines_are(lines: list[str]):
    (token,) = tokens(block("", lines))
    assert token.type == "fence" and token.content == "".join(f"{seen(one)}\n" for one in lines)


@given(texts)
def test_a_value_of_bibtex_has_no_braces_and_no_commands(text: str):
    assert not set(bibtex(text)) & set('{}\\%$#&~^_@"')


# -- the command line ------------------------------------------------------------------------------------------


def test_card_on_stdout_and_into_a_file(tmp_path: Path, small_path: Path, capsys):
    status, out, err = run(capsys, "card", small_path)
    assert (status, err) == (0, "") and out == markdown(sc.open(small_path))
    assert run(capsys, "card", small_path, "-o", tmp_path / "README.md") == (0, "", "")
    assert (tmp_path / "README.md").read_text() == out


def test_a_card_is_not_put_into_the_cache(small_copy: Path, capsys):
    status, _, err = run(capsys, "card", small_copy, "-o", small_copy / "README.md")
    assert status == SpecError.exit_code and "write beside it" in err
    assert sc.verify(sc.open(small_copy)) == []


def test_show_tells_the_licences(small_copy: Path, capsys):
    licences.state(sc.open(small_copy), OPEN)
    assert (
        "licences CC-BY-4.0 (source), Apache-2.0 (teacher), CC0-1.0 (cache)"
        in run(capsys, "show", small_copy)[1]
    )
