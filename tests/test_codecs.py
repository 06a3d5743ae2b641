"""Every codec keeps every promise: the tests of ``CODECS`` are inherited by a new member by being listed."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softcache import codecs
from softcache.codecs import CODECS, Codec
from softcache.codecs.fields import floats, half_down, half_up
from softcache.codecs.pool import Pooled
from softcache.errors import CodecError, SpecError
from softcache.measure import cosine, kl
from softcache.targets.items import ITEMS as KINDS

# One spec or more for every member of CODECS; a test below fails when one is missing.
SPECS = [
    "f16",
    "full(f16)",
    "full(u8)",
    "int4",
    "int8",
    "sign",
    "pool(2)|int4",
    "pool(2)|int8",
    "pool(3)|f16",
    "pool(3)|sign",
]
SPARSE = [
    "anchored(3, bits=3, extra=2)",
    "argmax",
    "head(int8)",
    "topk(1)",
    "topk(3, tail=spread)",
    "topk(9, at=(1, 3))",
    "packed(44)",
    "sample(50)",
]  # test_topk.py, test_packed.py, test_sample.py, test_anchored.py and test_head.py have their contract
PARTS = [
    "attention",
    "attention(1.5)",
    "strength",
    "strength(1)",
    "foreground(200)",
]  # likewise test_map_codecs.py and test_foreground.py
ITEMS = ["all", "all(logits=f16)", "top(3)", "top(3, background=2, logits=f16)"]  # and test_items.py theirs
SHAPES = {
    "logits": [(2,), (10,), (1000,)],
    "feature_map": [(1, 1, 1), (3, 2, 5), (16, 4, 4)],
    "embedding": [(1,), (7,), (384,), (1, 4), (5, 8)],
    "attribution": [(1, 4, 4), (3, 5, 2)],
}
CASES = [
    pytest.param(codecs.parse(text).codec, shape, id=f"{text}-{kind}-{'x'.join(map(str, shape))}")
    for text in SPECS
    for kind in codecs.parse(text).codec.kinds
    for shape in SHAPES[kind]
]
every_case = pytest.mark.parametrize(("codec", "shape"), CASES)


def rows(shape: tuple[int, ...], limit: float):
    """float32 rows up to the limit: of one size, of all sizes mixed, subnormal, constant."""
    number = st.floats(-limit, limit, width=32)
    tiny = st.floats(-(2.0**-120), 2.0**-120, width=32)
    special = st.sampled_from([0.0, -0.0, limit, -limit, 1e-45, -1e-40, 6e-8, 65504.0, 1.0, 2049.0, -0.1])
    usual = st.floats(-30, 30, width=32)
    full = (2, *shape)
    element = st.sampled_from([number, usual, tiny, special | usual, special])
    made = element.flatmap(lambda e: arrays(np.float32, full, elements=e, fill=e))
    return made.map(lambda x: np.clip(x, -np.float32(limit), np.float32(limit)))


def unrounded(codec: Codec, values: np.ndarray) -> np.ndarray:
    """What the codec would keep of the rows, were nothing rounded."""
    exact = getattr(codec, "exact", None)
    return values if exact is None else exact(values)


def errors(codec: Codec, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|decode(encode(x)) - x| and the stated bound, both float64 and of the values' shape."""
    shape, said = values.shape[1:], unrounded(codec, values)
    fields = codec.encode(values)
    decoded = codec.decode(fields, shape).astype(np.float64)
    bound = np.broadcast_to(codec.bound(fields, shape), said.shape)
    return np.abs(decoded - said.astype(np.float64)), bound


# -- the contract ----------------------------------------------------------------------------------------------


def test_every_codec_is_under_contract():
    assert {type(codecs.parse(text).codec) for text in SPECS + SPARSE + PARTS + ITEMS} - {Pooled} == set(
        CODECS.values()
    )
    assert {kind for codec in CODECS.values() for kind in codec.kinds} == {
        *SHAPES,
        "attention_map",
        *(k.name for k in KINDS),
    }


@every_case
@settings(max_examples=40)
@given(data=st.data())
def test_what_comes_back_is_within_the_bound(codec: Codec, shape: tuple[int, ...], data: st.DataObject):
    error, bound = errors(codec, data.draw(rows(shape, codec.limit)))
    assert (error <= bound).all(), f"off by {error.max()} with a bound of {bound.flat[error.argmax()]}"


@every_case
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 2e4])
def test_the_bound_is_no_larger_than_it_must_be(codec: Codec, shape: tuple[int, ...], scale: float):
    """On many random rows the worst error comes near it: a bound of infinity would be true, and worth nothing."""
    values = np.random.default_rng(0).normal(0, scale / 4, (20_000 // int(np.prod(shape)) + 200, *shape))
    error, bound = errors(codec, values.astype(np.float32).clip(-scale, scale))
    assert np.median(bound) <= scale / (12 if "Int4" in repr(codec) else 100)
    if int(np.prod(shape)) >= 4 and "Sign" not in repr(
        codec
    ):  # a row's extremes come back better than stated
        assert error.max() >= 0.5 * bound.flat[error.argmax()]


@every_case
def test_fields_are_what_was_announced(codec: Codec, shape: tuple[int, ...]):
    values = np.random.default_rng(1).normal(0, 3, (5, *shape)).astype(np.float32)
    fields = codec.encode(values)
    announced = {f.name: (np.dtype(f.dtype), (5, *f.shape)) for f in codec.fields(shape)}
    assert {name: (f.dtype, f.shape) for name, f in fields.items()} == announced
    decoded = codec.decode(fields, shape)
    assert (decoded.shape, decoded.dtype) == (unrounded(codec, values).shape, np.float32)


@every_case
def test_rows_are_encoded_one_by_one(codec: Codec, shape: tuple[int, ...]):
    """A row's bytes depend on the row alone, so a batch may be cut anywhere."""
    values = np.random.default_rng(2).normal(0, 3, (4, *shape)).astype(np.float32)
    together = codec.encode(values)
    for i in range(4):
        alone = codec.encode(values[i : i + 1])
        assert all(np.array_equal(together[f][i : i + 1], alone[f]) for f in together)


@every_case
def test_neither_way_changes_its_input_or_shares_memory_with_it(codec: Codec, shape: tuple[int, ...]):
    """The reader decodes from a buffer that the next read overwrites."""
    values = np.random.default_rng(3).normal(0, 3, (3, *shape)).astype(np.float32)
    before = values.copy()
    fields = codec.encode(values)
    assert np.array_equal(values, before)
    kept = {f: v.copy() for f, v in fields.items()}
    for v in fields.values():
        v.setflags(write=False)
    decoded = codec.decode(fields, shape)
    assert all(np.array_equal(fields[f], kept[f]) for f in fields)
    assert not any(np.shares_memory(decoded, v) for v in fields.values())


@every_case
def test_no_rows_are_no_problem(codec: Codec, shape: tuple[int, ...]):
    none = np.empty((0, *shape), np.float32)
    assert codec.decode(codec.encode(none), shape).shape == unrounded(codec, none).shape


@every_case
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 1e-45, "limit", "-limit"])
def test_constant_rows(codec: Codec, shape: tuple[int, ...], value: float | str):
    number = {"limit": codec.limit, "-limit": -codec.limit}.get(str(value), value)
    values = np.full((2, *shape), number, np.float32)
    error, bound = errors(codec, values)
    assert (error <= bound).all() and np.isfinite(bound).all()


@every_case
def test_at_the_limit_nothing_overflows(codec: Codec, shape: tuple[int, ...]):
    values = np.zeros((2, *shape), np.float32)
    values.reshape(2, -1)[0, 0], values.reshape(2, -1)[1, -1] = codec.limit, -codec.limit
    with np.errstate(all="raise", under="ignore"):
        error, bound = errors(codec, values)
    assert (error <= bound).all() and np.isfinite(bound).all()


@pytest.mark.parametrize("text", SPECS + SPARSE + PARTS + ITEMS)
def test_the_spec_string_makes_the_same_codec_again(text: str):
    named = codecs.parse(text)
    assert named.spec == text
    assert codecs.parse(named.spec) == named
    assert dataclasses.is_dataclass(named.codec) and named.codec.version >= 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        named.codec.version = 2  # type: ignore[misc]


# -- specs that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ful(u8)", "did you mean 'full'"),
        ("full(u9)", "did you mean 'u8'"),
        ("full", "full(dtype"),
        ("full(3)", "unknown number type"),
        ("full((u8,))", "unknown number type"),
        ("int8(4)", "int8"),
        ("full(u8)|int8", "only pool stands in front of another, and not full(u8)"),
        ("int8|pool(2)", "says what is kept and not how: say pool(2)|int8"),
        ("pool(2)", "says what is kept and not how"),
        ("pool(2)|full(u8)", "is for maps, which full(u8) does not hold"),
        ("pool(2)|argmax", "is for maps"),
        ("pol(2)|int8", "unknown step 'pol' (did you mean 'pool'"),
        ("pool(1)|int8", "n must be a whole number of at least 2"),
        ("pool(2.0)|int8", "n must be"),
        ("pool|int8", "it is written pool(n"),
        ("attention(tau=-1)", "tau must be a number above 0"),
        ("attention(tau=True)", "tau must be"),
        ("", "cannot read"),
    ],
)
def test_a_wrong_spec_is_named(text: str, told: str):
    with pytest.raises(SpecError, match=re.escape(told)):
        codecs.parse(text)


@pytest.mark.parametrize("text", ["full(u8)", "full(f16)"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_logits_are_one_row_of_two_classes_or_more(text: str, shape: tuple[int, ...]):
    with pytest.raises(CodecError, match="two class logits"):
        codecs.parse(text).codec.fields(shape)


# -- rounding --------------------------------------------------------------------------------------------------


@given(arrays(np.float64, 20, elements=st.floats(0, 65504) | st.floats(0, 1e-6)))
def test_half_up_is_the_next_half_that_is_not_below(x: np.ndarray):
    up = half_up(x)
    assert up.dtype == np.float16
    assert (up.astype(np.float64) >= x).all()
    below = np.nextafter(up, np.float16(-np.inf)).astype(np.float64)
    assert (below < x)[x > 0].all()


@given(arrays(np.float64, 20, elements=st.floats(-65504, 65504) | st.floats(-1e-6, 1e-6)))
def test_half_down_is_the_next_half_that_is_not_above(x: np.ndarray):
    down = half_down(x)
    assert (down.astype(np.float64) <= x).all()
    with np.errstate(over="ignore"):
        above = np.nextafter(down, np.float16(np.inf))
    assert (above.astype(np.float64) > x).all()


def test_full_u8_counts_the_last_bits_of_a_float32():
    """Far from zero the decoder rounds too: half a step alone would be a little too small a bound."""
    codec, past_half = codecs.parse("full(u8)").codec, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        base = 2.0 ** rng.integers(0, 14) * rng.uniform(-2, 2)
        values = base + rng.uniform(0, 2.0 ** -rng.integers(1, 12), (1, 2000)) * base
        error, bound = errors(codec, values.astype(np.float32))
        assert (error <= bound).all()
        past_half += error.max() > codec.encode(values.astype(np.float32))["step"][0].astype(np.float64) / 2
    assert past_half > 10


def test_int4_is_what_its_text_says():
    """Two values a byte, the first in the high bits, an odd number of them padded with zeros."""
    values = np.array([[[[0.0, 3.0, 1.5]], [[-1.0, -1.0, -1.0]]]], np.float32)
    codec = codecs.parse("int4").codec
    fields = codec.encode(values)
    step = np.float64(fields["step"][0, 0])
    assert 3 / 15 <= step < 3 / 15 * 1.001
    assert fields["low"].tolist() == [[0, -1]] and fields["value"].tolist() == [[[15, 7 << 4], [0, 0]]]
    assert np.allclose(codec.decode(fields, (2, 1, 3))[0], [[[0, 15 * step, 7 * step]], [[-1, -1, -1]]])


def test_what_a_relu_made_zero_stays_zero():
    values = np.maximum(np.random.default_rng(0).normal(size=(3, 8, 7, 5)), 0).astype(np.float32)
    for text in ("int4", "int8"):
        codec = codecs.parse(text).codec
        assert (codec.decode(codec.encode(values), (8, 7, 5))[values == 0] == 0).all()


@pytest.mark.parametrize("shape", [(3, 5, 7), (9,), (4, 3)])
def test_signs_take_an_eighth_of_a_byte_and_say_what_is_above_zero(shape: tuple[int, ...]):
    values = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    values[0], values[1] = 0.0, -0.0
    values[2] = 1e-45
    codec = codecs.parse("sign").codec
    fields = codec.encode(values)
    assert fields["value"].shape == (6, -(-int(np.prod(shape)) // 8))
    assert np.array_equal(codec.decode(fields, shape), np.where(values > 0, 1.0, -1.0))


def test_int8_keeps_a_scale_for_each_channel():
    """One loud channel must not silence the others."""
    values = np.ones((1, 3, 2, 2), np.float32)
    values[0, 1] = 1000
    fields = codecs.parse("int8").codec.encode(values)
    assert fields["scale"].shape == (1, 3)
    assert np.abs(fields["value"]).min() >= 126


# -- real logits of a real network -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet_logits(shared_data) -> np.ndarray:
    path = shared_data / "logits" / "efficientnet_lite0_imagenet.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as file:
        # they were kept as halves: stretched, or full(f16) would have nothing to lose
        return file["logits"].astype(np.float32) * np.float32(1.01)


def exact_kl(p_logits: np.ndarray, q_logits: np.ndarray, temperature: float) -> np.ndarray:
    """KL(p ‖ q) in float64, written as in a textbook."""
    p = np.exp(p_logits.astype(np.float64) / temperature)
    q = np.exp(q_logits.astype(np.float64) / temperature)
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    return (p * np.log(p / q)).sum(axis=1)


@pytest.mark.parametrize("temperature", [1, 2, 4, 8])
@pytest.mark.parametrize(("text", "most"), [("full(u8)", 1e-4), ("full(f16)", 1e-6)])
def test_the_divergence_on_real_logits_is_what_the_design_asks(imagenet_logits, text, most, temperature):
    codec = codecs.parse(text).codec
    kept = codec.decode(codec.encode(imagenet_logits), (1000,))
    found = exact_kl(imagenet_logits, kept, temperature).mean()
    assert 0 < found <= most
    # what the builder reports is the same number
    assert kl(imagenet_logits, kept, temperature).mean() == pytest.approx(found, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("text", ["full(u8)", "full(f16)"])
def test_real_logits_keep_their_class(imagenet_logits, text):
    codec = codecs.parse(text).codec
    kept = codec.decode(codec.encode(imagenet_logits), (1000,))
    assert (kept.argmax(axis=1) == imagenet_logits.argmax(axis=1)).mean() > 0.995


@pytest.mark.parametrize("text", ["int4", "int8", "f16", "pool(2)|int8"])
@pytest.mark.parametrize("size", [1e-5, 6e-8, 2e-8, 1e-20])
def test_maps_too_small_for_halves_keep_the_bound_and_are_not_told_as_kept(text: str, size: float):
    values = np.random.default_rng(0).uniform(0.2, 1, (2, 3, 4, 4)).astype(np.float32) * np.float32(size)
    codec = codecs.parse(text).codec
    kept = codec.decode(codec.encode(values), values.shape[1:])
    assert isinstance(kept, np.ndarray)
    exact = codec.exact(values) if isinstance(codec, Pooled) else values
    bound = codec.bound(codec.encode(values), values.shape[1:])
    assert (np.abs(kept.astype(np.float64) - exact) <= bound).all()
    told = cosine(exact, kept)
    expected = [
        0.0 if not k.any() else (e.ravel() @ k.ravel()) / np.linalg.norm(e) / np.linalg.norm(k)
        for e, k in zip(exact.astype(np.float64), kept.astype(np.float64), strict=True)
    ]
    assert np.allclose(told, expected, atol=1e-12)
    assert kept.any() == (size > 3e-8)


def test_every_half_is_the_same_number_as_a_float():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    rows = np.zeros(
        (256, 256), [("before", np.uint8), ("value", np.float16)]
    )  # as in a record: neither aligned nor packed
    rows["value"] = halves.reshape(256, 256)
    for values in (halves, rows["value"]):
        with np.errstate(invalid="ignore"):
            assert floats(values).tobytes() == values.astype(np.float32).tobytes()
