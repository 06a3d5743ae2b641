"""``anchored``: what it keeps of a view and of an image, against the rows themselves in float64, and read bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softcache import codecs
from softcache.codecs.anchored import Anchored, AnchoredLogits
from softcache.codecs.fields import Fields
from softcache.errors import CodecError, DamageError, SpecError

AT = (1, 2, 4, 8)
SMALL = Anchored(listed=3, bits=3, extra=2, views=2)


def log_probs(z: np.ndarray, T: float) -> np.ndarray:  # noqa: N803
    z = z.astype(np.float64) / T
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kept_of(codec: Anchored, values: np.ndarray) -> tuple[Fields, AnchoredLogits]:
    """The last of some views ``(views, n, C)``, against the base of the first."""
    shared = codec.anchor(values[: codec.views])
    fields = codec.encode(values[-1], shared) | shared
    return fields, codec.decode(fields, values.shape[2:])


def views(n: int, classes: int, seed: int = 0, spread: float = 4, off: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = rng.normal(0, spread, (1, n, classes))
    return (images + rng.normal(0, off, (3, n, classes))).astype(np.float32)


# -- against the row -------------------------------------------------------------------------------------------

element = st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 1.0, 5.0, 1e-30, 16000.0, -16000.0])
some = st.sampled_from([6, 7, 40, 300]).flatmap(
    lambda c: arrays(np.float32, (3, 4, c), elements=element, fill=element)
)


@settings(max_examples=150)
@given(values=some)
def test_what_is_kept_of_a_view_is_within_the_bound(values: np.ndarray):
    with np.errstate(all="raise", under="ignore"):
        fields, kept = kept_of(SMALL, values)
        bound = SMALL.bound(fields, values.shape[2:])
    said = values[-1].astype(np.float64)
    said -= said.mean(axis=1, keepdims=True)
    assert np.isfinite(kept.value).all() and (np.abs(kept.value - said) <= bound).all()
    assert np.isinf(bound[kept.rest]).all()


@settings(max_examples=150)
@given(values=some)
def test_at_the_stored_temperatures_the_others_odds_are_the_views_own(values: np.ndarray):
    """To half a step of an eighth nat, where the correction is within its range."""
    _, kept = kept_of(SMALL, values)
    for i, T in enumerate(AT):  # noqa: N806
        found = [odds(log_probs(z, T), kept.rest) for z in (values[-1], kept.value)]
        inside = np.abs(kept.shift[:, i] + 1 / 16) < 3.9
        off = found[0] - found[1] - kept.shift[:, i]
        assert (np.abs(off[inside]) <= 1 / 16 + 1e-3).all()
        p = kept.log_probs(T)
        near = np.abs(found[0]) < 300
        assert np.allclose(odds(p, kept.rest)[near & inside], found[0][near & inside], atol=1 / 16 + 1e-3)


def odds(p: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Log of how many times what is kept the rest weighs, float64 (n,)."""
    one, other = (np.where(where, p, -np.inf) for where in (rest, ~rest))
    return np.logaddexp.reduce(one, axis=1) - np.logaddexp.reduce(other, axis=1)


@pytest.mark.parametrize("T", [1, 1.5, 3, 8])
def test_probabilities_are_one_in_all_and_dense_is_the_same_in_float32(T: float):  # noqa: N803
    _, kept = kept_of(SMALL, views(20, 40))
    assert np.allclose(np.exp(kept.log_probs(T)).sum(axis=1), 1)
    assert kept.dense(T).dtype == np.float32 and np.allclose(kept.dense(T), kept.log_probs(T), atol=1e-5)
    assert np.array_equal(kept[3].log_probs(T), kept.log_probs(T)[3])


def test_between_the_temperatures_it_is_near():
    values = views(50, 300)
    codec = Anchored(listed=40, extra=8, views=2)
    kept = kept_of(codec, values)[1]
    for T in (1.3, 3, 6):  # noqa: N806
        p = log_probs(values[-1], T)
        assert (np.exp(p) * (p - kept.log_probs(T))).sum(axis=1).mean() < 0.2


@pytest.mark.parametrize("T", [0.5, 0.99, 8.01, np.inf, np.nan])
def test_other_temperatures_are_refused(T: float):  # noqa: N803
    kept = kept_of(SMALL, views(2, 40))[1]
    assert not kept.holds(T)
    with pytest.raises(SpecError, match="outside 1 to 8"):
        kept.log_probs(T)


# -- bit by bit ------------------------------------------------------------------------------------------------


def numbers(data: np.ndarray, bits: int) -> Iterator[int]:
    stream = "".join(f"{byte:08b}" for byte in data.tolist())
    while len(stream) >= bits:
        yield int(stream[:bits], 2)
        stream = stream[bits:]


def read_slowly(
    row: dict[str, np.ndarray], codec: Anchored, classes: int
) -> tuple[list[float], set[int], list[float]]:
    """Logits, the classes that were kept, and the shifts: docs/format.md, word for word."""
    middle, step, low, fine, move = map(float, row["grid"])
    levels = numbers(row["base"], codec.base)
    logits = [middle + step * (next(levels) - 2 ** (codec.base - 1) + 0.5) for _ in range(classes)]
    named, corrections = row["list"].tolist(), numbers(row["correction"], codec.bits)
    for c, level in zip(named, row["listed"].tolist(), strict=True):
        logits[c] = low + fine * level
    for c in named:
        logits[c] += move * (next(corrections) - 2 ** (codec.bits - 1) + 0.5)
    index = list(numbers(row["index"], max(1, (classes - 1).bit_length())))[: codec.extra]
    for c, level in zip(index, numbers(row["extra"], 6), strict=False):
        logits[c] += move * (level - 31.5)
    shifts = [(n - 32) / 8 for n in numbers(row["tail"], 6)]
    return logits, {*named, *index}, shifts


@pytest.mark.parametrize(
    "codec", [SMALL, Anchored(views=2), Anchored(5, 2, 1, 1, 2), Anchored(9, 8, 3, 6, 2)]
)
def test_it_is_read_as_the_format_says(codec: Anchored):
    classes, n = 77, 12
    fields, kept = kept_of(codec, views(n, classes))
    for i in range(n):
        row = {name: values[i] for name, values in fields.items()}
        logits, named, shifts = read_slowly(row, codec, classes)
        assert np.allclose(kept.value[i], logits, rtol=1e-6, atol=1e-6)
        assert set(np.flatnonzero(~kept.rest[i]).tolist()) == named
        assert kept.shift[i].tolist() == shifts


# -- the contract of every codec -------------------------------------------------------------------------------


def test_fields_are_what_was_announced_and_rows_are_encoded_one_by_one():
    values = views(5, 40)
    shared = SMALL.anchor(values[:2])
    fields = SMALL.encode(values[2], shared)
    for found, announced in ((fields, SMALL.fields((40,))), (shared, SMALL.shared((40,)))):
        said = {f.name: (np.dtype(f.dtype), (5, *f.shape)) for f in announced}
        assert {name: (f.dtype, f.shape) for name, f in found.items()} == said
    for i in range(5):
        of_one = SMALL.anchor(values[:2, i : i + 1])
        alone = SMALL.encode(values[2, i : i + 1], of_one)
        assert all(np.array_equal(shared[f][i : i + 1], of_one[f]) for f in of_one)
        assert all(np.array_equal(fields[f][i : i + 1], alone[f]) for f in alone)


def test_nothing_that_is_given_is_changed_and_no_rows_are_no_problem():
    values = views(4, 40)
    before = values.copy()
    fields, kept = kept_of(SMALL, values)
    assert np.array_equal(values, before)
    for field in fields.values():
        field.setflags(write=False)
    again = SMALL.decode(fields, (40,))
    assert np.array_equal(again.value, kept.value)
    assert not any(np.shares_memory(again.value, f) for f in fields.values())
    assert kept_of(SMALL, values[:, :0])[1].value.shape == (0, 40)


def test_the_base_of_views_in_any_layout_of_memory_is_the_same():
    values = views(6, 40)
    turned = np.ascontiguousarray(values.transpose(1, 0, 2)).transpose(1, 0, 2)
    a, b = SMALL.anchor(values[:2]), SMALL.anchor(turned[:2])
    assert all(np.array_equal(a[f], b[f]) for f in a)


@pytest.mark.parametrize(
    "row",
    [np.zeros(40), np.full(40, 7.5), np.arange(40) % 3, np.eye(40)[4] * 16000, np.eye(40)[4] * -16000,
     np.where(np.arange(40) < 20, 16000, -16000)],
    ids=["zeros", "constant", "ties", "one above all", "one below all", "two heights"],
)  # fmt: skip
def test_odd_rows(row: np.ndarray):
    """Ties, constants and saturation, also of a view whose image looks otherwise."""
    usual = views(1, 40)[0]
    for first, last in ((row[None], row[None]), (usual, row[None]), (row[None], usual)):
        values = np.stack([first, first, last]).astype(np.float32)
        with np.errstate(all="raise", under="ignore"):
            _, kept = kept_of(SMALL, values)
            for T in AT:  # noqa: N806
                assert np.isfinite(kept.log_probs(T)).all()
        if np.array_equal(first, last) and not np.ptp(row):
            assert np.allclose(kept.log_probs(1), -np.log(40), atol=1 / 16)


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_too_few_classes_are_refused(classes: int):
    with pytest.raises(CodecError, match=r"3 \+ 2 of more classes than that.*full\(u8\)"):
        SMALL.fields((classes,))
    with pytest.raises(CodecError):
        SMALL.shared((3, 40))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("anchored(0)", "listed is a whole number from 1"),
        ("anchored(bits=9)", "bits is"),
        ("anchored(extra=0)", "extra is"),
        ("anchored(base=7)", "base is"),
        ("anchored(views=1)", "views is a whole number from 2"),
        ("anchored(views=True)", "views is"),
        ("anchored(listed=2.0)", "listed is"),
    ],
)
def test_a_wrong_spec_is_named(text: str, told: str):
    with pytest.raises(SpecError, match=told):
        codecs.parse(text)


def test_bytes_that_nobody_wrote_do_no_harm():
    rng, fields = np.random.default_rng(0), {}
    for f in (*SMALL.fields((40,)), *SMALL.shared((40,))):
        raw = rng.integers(0, 256, (50, *f.shape, np.dtype(f.dtype).itemsize), np.uint8)
        fields[f.name] = raw.view(f.dtype)[..., 0]
    fields["grid"] = np.nan_to_num(fields["grid"], nan=1)
    fields["list"] %= 40
    assert SMALL.decode(fields, (40,)).value.shape == (50, 40)
    fields["list"][7, 1] = 40
    with pytest.raises(DamageError, match="class 40 is kept of 40"):
        SMALL.decode(fields, (40,))


# -- real views of a real network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data) -> np.ndarray:
    """(24, images, 1000), of photographs that nothing was chosen on."""
    path = shared_data / "logits" / "efficientnet_lite0_imagenet_24views.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as file:
        image, values = file["image"], file["logits"].astype(np.float32)
    return np.stack([values[image == one] for one in np.unique(image[image % 10 >= 7])], axis=1)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("anchored", 44),
        ("anchored(listed=48, bits=3, extra=8)", 64),
        ("anchored(listed=128, base=4, extra=8)", 128),
    ],
)
def test_at_so_many_bytes_the_divergence_is_a_third_of_half_precision_top_k(
    real: np.ndarray, text: str, most: int
):
    """Design, section 7: everything counted, from 20 views an image, against an exact but flat tail."""
    codec = codecs.parse(text).codec
    assert isinstance(codec, Anchored)
    shared, rows = codec.anchor(real[: codec.views]), real[4:]
    size = sum(f.nbytes for f in shared.values()) / 20 / real.shape[1]
    found: dict[int, list[float]] = {T: [] for T in (1, 2, 4)}
    peer: dict[int, list[float]] = {T: [] for T in (1, 2, 4)}
    for view in rows[::4]:
        fields = codec.encode(view, shared)
        kept = codec.decode(fields | shared, (1000,))
        for T in found:  # noqa: N806
            p = log_probs(view, T)
            found[T].append((np.exp(p) * (p - kept.log_probs(T))).sum(axis=1).mean())
            peer[T].append((np.exp(p) * (p - top_k(view, (most - 2) // 4, T))).sum(axis=1).mean())
    assert size + sum(f.nbytes for f in fields.values()) / real.shape[1] <= most
    for T in found:  # noqa: N806
        assert 3 * np.mean(found[T]) <= np.mean(peer[T]), (T, np.mean(found[T]), np.mean(peer[T]))


def top_k(values: np.ndarray, k: int, T: float) -> np.ndarray:  # noqa: N803
    """k logits as halves; the others' mass, which is exact, spread evenly."""
    index = np.argsort(-values, axis=1)[:, :k]
    p = np.exp(log_probs(values, T))
    kept = np.take_along_axis(values, index, 1).astype(np.float16)
    mass = np.take_along_axis(p, index, 1).sum(axis=1, keepdims=True)
    out = np.repeat(np.log((1 - mass) / (p.shape[1] - k)), p.shape[1], axis=1)
    np.put_along_axis(out, index, log_probs(kept, T) + np.log(mass), 1)
    return out
