from __future__ import annotations

import contextlib
import keyword
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcache.errors import SpecError, counted
from softcache.spec import MAX_SPEC, Call, canonical_json, construct, digest, digest_ids, parse, unparse

words = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(
    lambda word: not keyword.iskeyword(word)
)
numbers = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = numbers | st.booleans() | st.text(max_size=12) | words
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3).map(tuple), max_leaves=5)
options = st.dictionaries(words, values, max_size=3).map(lambda d: tuple(sorted(d.items())))
calls = st.builds(Call, words, st.lists(values, max_size=3).map(tuple), options)


@given(st.lists(calls, min_size=1, max_size=4).map(tuple))
def test_a_spec_written_and_read_again_is_the_same(spec: tuple[Call, ...]):
    if len(unparse(spec)) <= MAX_SPEC:
        assert parse(unparse(spec)) == spec


def test_a_spec_is_read_left_to_right():
    assert parse("crop(32, pad=4)|flip") == (Call("crop", (32,), (("pad", 4),)), Call("flip"))


def test_a_bare_word_is_that_word_as_a_string():
    assert parse("full(u8)") == parse("full('u8')") == (Call("full", ("u8",)),)


def test_lists_are_tuples_so_that_a_call_can_be_a_key():
    (call,) = parse("a([1, (2, [3])], b=[x])")
    assert call == Call("a", ((1, (2, (3,))),), (("b", ("x",)),))
    hash(call)


@pytest.mark.parametrize("text", ["x('True')", "x('if')", "x('ﬁ')", "x('a b')", "x('')", "x((word,))"])
def test_strings_that_look_like_something_else_survive(text: str):
    assert parse(unparse(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "|",
        "a|",
        "a b",
        "a(",
        "1",
        "'a'",
        "a.b",
        "a.b()",
        "a()()",
        "a + b",
        "a or b",
        "lambda: 0",
        "a(b())",
        "a(__import__('os'))",
        "a(*b)",
        "a(**b)",
        "a(x=1, x=2)",
        "a(x for x in y)",
        "a({1: 2})",
        "a({1})",
        "a(b'x')",
        "a(1j)",
        "a(None)",
        "a(...)",
        "a(1e999)",
        "a(f'{x}')",
        "a(0x" + "f" * 40 + ")",
        "a(" + "-" * 3000 + "1)",
        "a(" + "(" * 500 + ")" * 500 + ")",
        "a[0]",
        "a(1 if b else 2)",
        "a(b := 1)",
        "a\0",
        "a(" + "1, " * 2000 + ")",
    ],
    ids=lambda t: ascii(t[:24]),
)
def test_anything_but_words_and_literals_is_refused(text: str):
    with pytest.raises(SpecError):
        parse(text)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_fail_in_another_way(text: str):
    with contextlib.suppress(SpecError):
        parse(text)


def test_parsing_runs_nothing(tmp_path):
    path = tmp_path / "ran"
    with pytest.raises(SpecError):
        parse(f"a(open({str(path)!r}, 'w'))")
    assert not path.exists()


class Thing:
    def __init__(self, size: int, pad: int = 0):
        self.size, self.pad = size, pad


def test_construct_makes_what_the_call_names():
    thing = construct(Call("thing", (3,), (("pad", 2),)), {"thing": Thing}, "kind")
    assert (thing.size, thing.pad) == (3, 2)


def test_an_unknown_word_names_the_nearest_known_one():
    with pytest.raises(SpecError, match=r"unknown kind 'thong' .did you mean 'thing'"):
        construct(Call("thong"), {"thing": Thing, "other": Thing}, "kind")


@pytest.mark.parametrize(
    "call", [Call("thing"), Call("thing", (1, 2, 3)), Call("thing", (1,), (("pod", 1),))]
)
def test_wrong_options_say_how_it_is_written(call: Call):
    with pytest.raises(SpecError, match=r"it is written thing\(size, pad=0\)$"):
        construct(call, {"thing": Thing}, "kind")


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == '{"a":[1.5,null,"é"],"b":1}\n'.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canonical_json_refuses_what_is_no_json(value: float):
    with pytest.raises(ValueError):
        canonical_json([value])


def test_digests_are_sha256():
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(memoryview(b"abc")) == digest(b"abc")


def test_ids_that_join_to_the_same_text_have_other_digests():
    assert len({digest_ids(ids) for ids in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4
    assert digest_ids(("ab", "c")) == digest_ids(["ab", "c"])


def test_one_is_not_told_as_many():
    told = [
        counted(n, what)
        for n, what in ((1, "image"), (0, "image"), (1234, "image"), (1, "class"), (2, "class"))
    ]
    assert (
        told == ["1 image", "0 images", "1,234 images", "1 class", "2 classes"]
        and counted(3, "box") == "3 boxes"
    )
