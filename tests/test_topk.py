"""``topk`` and ``argmax``: what they keep of a row, against the row itself in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softcache import codecs
from softcache.codecs import HardLabels, SparseLogits
from softcache.codecs.topk import Tail
from softcache.errors import CodecError, SpecError
from softcache.targets import Logits, Target

LIMIT = 32752.0


def kept_of(text: str, values: np.ndarray) -> SparseLogits:
    codec = codecs.parse(text).codec
    decoded = codec.decode(codec.encode(values), values.shape[1:])
    assert isinstance(decoded, SparseLogits)
    return decoded


def true_split(row: np.ndarray, index: np.ndarray, T: float) -> tuple[np.ndarray, float]:  # noqa: N803
    """Log-probabilities of some classes of a row, and of the rest, as in a textbook."""
    z = row.astype(np.float64) / T
    z -= z.max()
    p = np.exp(z) / np.exp(z).sum()
    rest = np.setdiff1d(np.arange(len(row)), index)
    return np.log(p[index]), float(np.log(p[rest].sum()))


element = st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 1.0, 5.0, 1e-30, LIMIT, -LIMIT])
row_sets = arrays(np.float32, (3, 12), elements=element, fill=element)


@settings(max_examples=150)
@given(values=row_sets, k=st.integers(1, 11))
def test_the_largest_are_kept_in_falling_order_and_the_lower_class_first(values: np.ndarray, k: int):
    kept = kept_of(f"topk({k})", values)
    for row, index in zip(values, kept.index, strict=True):
        assert index.tolist() == sorted(range(12), key=lambda c: (-float(row[c]), c))[:k]


@settings(max_examples=150)
@given(values=row_sets, k=st.integers(1, 11))
def test_distances_are_within_the_bound(values: np.ndarray, k: int):
    codec = codecs.parse(f"topk({k})").codec
    fields = codec.encode(values)
    kept, bound = codec.decode(fields, (12,)), codec.bound(fields, (12,))[:, 0]
    assert isinstance(kept, SparseLogits) and (bound >= 0).all()
    for row, index, value, mean, most in zip(
        values.astype(np.float64), kept.index, kept.value, kept.soft_mean, bound, strict=True
    ):
        assert np.abs(row[index] - row.max() - value).max() <= most
        rest = np.delete(row, index) - row.max()
        for T, m in zip((1, 2, 4, 8), mean, strict=True):  # noqa: N806
            top = rest.max()
            assert abs(top + T * np.log(np.exp((rest - top) / T).mean()) - m) <= most + 1e-9


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("T", [1, 2, 4, 8])
def test_at_the_stored_temperatures_the_masses_are_the_rows_own(imagenet: np.ndarray, k: int, T: float):  # noqa: N803
    kept = kept_of(f"topk({k})", imagenet)
    found, rest = kept.split(T)
    for i in range(0, len(imagenet), 7):
        true, true_rest = true_split(imagenet[i], kept.index[i], T)
        np.testing.assert_allclose(found[i], true, atol=2e-3)
        assert rest[i] == pytest.approx(true_rest, abs=2e-3)


@pytest.mark.parametrize(("k", "most"), [(10, 0.02), (50, 0.002)])
def test_between_them_the_tails_mass_is_interpolated_within_the_stated_error(imagenet, k: int, most: float):
    """docs/format.md states these errors, on the logits of a real ImageNet network."""
    kept = kept_of(f"topk({k})", imagenet)
    for T in (1.2, 1.5, 3, 5, 6.5):  # noqa: N806
        found = kept.split(T)[1]
        true = [true_split(row, index, T)[1] for row, index in zip(imagenet, kept.index, strict=True)]
        assert np.abs(found - true).max() <= most


def test_ordinary_top_k_is_wrong_above_its_temperature(imagenet):
    """What topk(k) is for: at T = 4 ten classes of a thousand hold little, and the rest is known to hold the rest."""
    true = np.array([true_split(row, np.argsort(-row)[:10], 4)[1] for row in imagenet])
    assert np.median(np.exp(true)) > 0.5
    np.testing.assert_allclose(np.exp(kept_of("topk(10)", imagenet).split(4)[1]), np.exp(true), atol=1e-3)


def test_dense_spreads_the_rest_evenly():
    row = np.log(np.array([[0.5, 0.1, 0.3, 0.06, 0.04]], np.float32))
    np.testing.assert_allclose(
        np.exp(kept_of("topk(2)", row).dense()), [[0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3]], atol=1e-4
    )
    assert kept_of("topk(2)", row)[0].dense(2.0).shape == (5,)


def test_of_equal_logits_the_lower_class_is_the_decision():
    values = np.array([[1, 5, 5, 2], [0, 0, 0, 0], [-9, -3, -7, -3]], np.float32)
    for text in ("argmax", "topk(2)", "full(u8)", "full(f16)", "packed(11)"):
        codec = codecs.parse(text).codec
        target = Target("logits", "logits", (4,), text, codec)
        assert target.decode(codec.encode(values)).top1().tolist() == [1, 0, 1], text


def test_argmax_has_no_probabilities():
    with pytest.raises(SpecError, match=r"argmax kept the teacher's class \(.index\) and no probabilities"):
        HardLabels(np.array([1]), 3)[0].dense(2.0)


@pytest.mark.parametrize("T", [0, -1, float("nan"), float("inf")])
def test_logits_have_every_finite_temperature_above_0(T: float):  # noqa: N803
    with pytest.raises(SpecError, match="not finite and above 0"):
        Logits(np.eye(3, dtype=np.float32)).dense(T)


@pytest.mark.parametrize("T", [0.99, 8.01, 0, -1, float("nan"), float("inf")])
def test_other_temperatures_are_refused(T: float):  # noqa: N803
    kept = kept_of("topk(1)", np.eye(3, dtype=np.float32))
    with pytest.raises(SpecError, match="outside the 1 to 8"):
        kept.dense(T)
    assert not kept.holds(T)


@pytest.mark.parametrize("at", [(1,), (1, 3), (0.5, 1, 2, 4, 8, 16)])
def test_weights_interpolate_every_polynomial_in_one_over_T(at: tuple[float, ...]):  # noqa: N802
    tail, nodes = Tail(10, at, False), 1 / np.array(at)
    for T in np.linspace(at[0], at[-1], 7):  # noqa: N806
        for power in range(len(at)):
            assert tail.weights(T) @ nodes**power == pytest.approx((1 / T) ** power)
    for place, T in enumerate(at):  # noqa: N806
        np.testing.assert_array_equal(tail.weights(T), np.eye(len(at))[place])


@pytest.mark.parametrize("classes", [256, 257, 65536, 65537])
def test_class_ids_are_whole_numbers_wide_enough(classes: int):
    values = np.zeros((1, classes), np.float32)
    values[0, -1] = 9
    assert kept_of("topk(1)", values).index.tolist() == [[classes - 1]]
    hard = codecs.parse("argmax").codec
    assert hard.encode(values)["index"].dtype == np.min_scalar_type(classes - 1)
    assert hard.decode(hard.encode(values), (classes,)).index.tolist() == [classes - 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["topk(3)", "topk(1)", "argmax"])
def test_rows_are_encoded_one_by_one_into_what_was_announced(text: str):
    codec = codecs.parse(text).codec
    values = np.random.default_rng(0).normal(0, 3, (4, 9)).astype(np.float32)
    before, together = values.copy(), codec.encode(values)
    assert np.array_equal(values, before)
    announced = {f.name: (np.dtype(f.dtype), (4, *f.shape)) for f in codec.fields((9,))}
    assert {name: (f.dtype, f.shape) for name, f in together.items()} == announced
    for i in range(4):
        alone = codec.encode(values[i : i + 1])
        assert all(np.array_equal(together[f][i : i + 1], alone[f]) for f in together)
    assert len(codec.encode(values[:0])) == len(announced)


def test_the_row_and_its_arrays():
    values = np.random.default_rng(1).normal(0, 3, (4, 9)).astype(np.float32)
    kept = kept_of("topk(3, tail=spread)", values)
    assert kept.top1().tolist() == values.argmax(1).tolist()
    assert kept[2].top1() == values[2].argmax()
    found = kept.arrays()
    assert {k: v.shape for k, v in found.items()} == {
        "index": (4, 3), "value": (4, 3), "soft_mean": (4, 4), "tail": (4, 5),
    }  # fmt: skip
    assert found["tail"][0].tolist() == [1, 1, 2, 4, 8]
    assert kept[1].arrays()["tail"].shape == (5,)
    assert HardLabels(np.array([1, 2]), 3)[1].top1() == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("topk", "topk\\(k"),
        ("topk(0)", "at least 1"),
        ("topk(-3)", "at least 1"),
        ("topk(2.5)", "at least 1"),
        ("topk(True)", "at least 1"),
        ("topk(3, at=(0, 1))", "above 0"),
        ("topk(3, at=(-1, 1))", "above 0"),
        ("topk(3, at=(2, 1))", "rising"),
        ("topk(3, at=(1, 1))", "rising"),
        ("topk(3, at=4)", "rising"),
        ("topk(3, at=())", "rising"),
        ("topk(3, at=(1, 2, 3, 4, 5, 6, 7, 8, 9))", "one to eight"),
        ("topk(3, tail=flat)", "bucket or spread"),
        ("topkk(3)", "did you mean 'topk'"),
    ],
)
def test_a_wrong_spec_is_named(text: str, told: str):
    with pytest.raises(SpecError, match=told):
        codecs.parse(text)


@pytest.mark.parametrize(
    ("text", "shape"), [("topk(3)", (3,)), ("topk(3)", (2,)), ("topk(1)", (4, 4)), ("argmax", (1,))]
)
def test_as_many_as_there_are_is_refused(text: str, shape: tuple[int, ...]):
    with pytest.raises(CodecError, match="the teacher gives"):
        codecs.parse(text).codec.fields(shape)


@pytest.fixture(scope="module")
def imagenet(shared_data) -> np.ndarray:
    path = shared_data / "logits" / "efficientnet_lite0_imagenet.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as file:
        return file["logits"][:400].astype(np.float32)
