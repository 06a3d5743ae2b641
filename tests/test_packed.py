"""``packed``: what it keeps of a row, against the row itself in float64, and its bits as a slow reader finds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softcache import codecs
from softcache.codecs import SparseLogits
from softcache.codecs.rice import Layout
from softcache.errors import CodecError, SpecError

LIMIT = 32752.0
AT = (1, 2, 4, 8)


def kept_of(text: str, values: np.ndarray) -> SparseLogits:
    codec = codecs.parse(text).codec
    decoded = codec.decode(codec.encode(values), values.shape[1:])
    assert isinstance(decoded, SparseLogits)
    return decoded


def counts(kept: SparseLogits) -> np.ndarray:
    return (kept.value > -np.inf).sum(axis=-1)


def log_probs(z: np.ndarray, T: float) -> np.ndarray:  # noqa: N803
    z = z.astype(np.float64) / T
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def mean_kl(values: np.ndarray, kept_log_probs: np.ndarray, T: float) -> float:  # noqa: N803
    p = log_probs(values, T)
    return float((np.exp(p) * (p - kept_log_probs)).sum(axis=1).mean())


element = st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 1.0, 5.0, 1e-30, LIMIT, -LIMIT])
classes = st.sampled_from([2, 3, 12, 100])
row_sets = classes.flatmap(lambda c: arrays(np.float32, (3, c), elements=element, fill=element))


@settings(max_examples=200)
@given(values=row_sets, size=st.integers(11, 60))
def test_the_largest_are_kept_within_the_bound_and_the_largest_comes_first(values: np.ndarray, size: int):
    codec = codecs.parse(f"packed({size})").codec
    fields, shape = codec.encode(values), values.shape[1:]
    kept, bound = codec.decode(fields, shape), codec.bound(fields, shape)
    assert isinstance(kept, SparseLogits)
    for i, row in enumerate(values.astype(np.float64)):
        k = int(counts(kept)[i])
        falling = sorted(range(len(row)), key=lambda c: (-row[c], c))
        assert 1 <= k < len(row) and set(kept.index[i, :k]) == set(falling[:k])
        assert kept.index[i, 0] == falling[0] and (kept.index[i, k:] == falling[0]).all()
        assert kept.value[i, 0] == 0 and (np.diff(kept.value[i, :k]) <= 0).all()
        assert (np.abs(row[kept.index[i, :k]] - row.max() - kept.value[i, :k]) <= bound[i, :k]).all()  # type: ignore[index]


@settings(max_examples=100)
@given(values=row_sets, size=st.integers(11, 60))
def test_at_the_stored_temperatures_the_others_odds_are_the_rows_own(values: np.ndarray, size: int):
    kept = kept_of(f"packed({size})", values)
    for T in AT:  # noqa: N806
        p, others = log_probs(values, T), kept.split(T)[1]
        for i, k in enumerate(counts(kept)):
            rest = np.setdiff1d(np.arange(values.shape[1]), kept.index[i])
            with np.errstate(divide="ignore"):
                true = np.log(np.exp(p[i][rest]).sum())
            odds = true - np.log(np.exp(p[i][kept.index[i, :k]]).sum())
            found = others[i] - np.log(-np.expm1(others[i]))
            least = np.log((values.shape[1] - k) / k) - 1023 / 64
            assert found == pytest.approx(max(odds, least), abs=1 / 128 + 1e-3)


def bits_of(data: np.ndarray) -> Iterator[int]:
    for byte in data.tolist():
        yield from (byte >> i & 1 for i in range(7, -1, -1))


def read_slowly(data: np.ndarray, classes: int) -> tuple[dict[int, int], int]:
    """{class: cells below the largest}, and the number of the step: docs/format.md, word for word."""
    stream, bits = bits_of(data), 8 * len(data)

    def number(few: int) -> int:
        value = 0
        for _ in range(few):
            value = 2 * value + next(stream)
        return value

    def unary() -> int:
        zeros = 0
        while not next(stream):
            zeros += 1
        return zeros

    k, step, r = number(min(bits, classes).bit_length()), number(3), number(3)
    low = sum(25 * (2 * classes - k) >= 104 * k * 2**i for i in range(31))
    gaps, levels = [unary() for _ in range(k)], [unary() for _ in range(k)]
    last, found = -1, {}
    for gap, level in zip(gaps, levels, strict=True):
        last += (gap << low) + number(low) + 1
        found[last] = (level << r) + number(r)
    return {c: max(found.values()) - level for c, level in found.items()}, step


def middle(level: int) -> float:
    """Of a cell, in steps."""
    ends = [
        0,
        *(i / 8 for i in range(1, 9)),
        *(1 + i / 4 for i in range(1, 5)),
        *(2 + i / 2 for i in range(1, 5)),
    ]
    ends += range(5, 5 + level)
    return (ends[level - 1] + ends[level]) / 2 if level else 0.0


@settings(max_examples=60)
@given(values=row_sets, size=st.integers(11, 60))
def test_the_bits_are_as_the_format_says(values: np.ndarray, size: int):
    fields = codecs.parse(f"packed({size})").codec.encode(values)
    kept = kept_of(f"packed({size})", values)
    for i, k in enumerate(counts(kept)):
        found, step = read_slowly(fields["row"][i], values.shape[1])
        expected = {c: -(2.0 ** (step - 5)) * middle(level) for c, level in found.items()}
        assert dict(zip(kept.index[i, :k].tolist(), kept.value[i, :k].tolist(), strict=True)) == expected


@given(data=arrays(np.uint8, (2, 12)), tail=arrays(np.uint8, (2, 5)))
def test_bytes_that_nobody_wrote_are_read_without_harm(data: np.ndarray, tail: np.ndarray):
    kept = codecs.parse("packed(17)").codec.decode({"row": data, "tail": tail}, (1000,))
    assert isinstance(kept, SparseLogits)
    assert ((kept.index >= 0) & (kept.index < 1000)).all() and np.isfinite(kept.log_probs(2)).all()


@pytest.mark.parametrize("C", [2, 3, 255, 1000, 100_000])
def test_every_class_has_room(C: int):  # noqa: N803
    """Wherever the largest stands, also in the fewest bytes that are taken."""
    with pytest.raises(CodecError, match=r"say packed\((\d+)\) or more") as refused:
        codecs.parse("packed(6)").codec.fields((C,))
    least = int(str(refused.value).split("packed(")[2].split(")")[0])
    assert least <= 11
    with pytest.raises(CodecError):
        codecs.parse(f"packed({least - 1})").codec.fields((C,))
    values = np.zeros((3, C), np.float32)
    values[0, 0] = values[1, C // 2] = values[2, -1] = 9
    kept = kept_of(f"packed({least})", values)
    assert kept.top1().tolist() == [0, C // 2, C - 1]
    assert codecs.parse(f"packed({least})").codec.fields((C,))[0].shape == (least - 5,)


@pytest.mark.parametrize("value", [0.0, -3.7, LIMIT, -LIMIT, 1e-45])
def test_equal_logits(value: float):
    values = np.full((2, 50), value, np.float32)
    kept = kept_of("packed(24)", values)
    assert kept.index[0, 0] == 0 and counts(kept).min() > 5
    for T in AT:  # noqa: N806
        assert mean_kl(values, kept.log_probs(T), T) < 1e-3


def test_a_saturated_row_keeps_its_class_and_its_certainty():
    values = np.full((1, 1000), -LIMIT, np.float32)
    values[0, 123] = LIMIT
    kept = kept_of("packed(44)", values)
    assert kept.top1() == 123
    assert mean_kl(values, kept.log_probs(1), 1) < 1e-3


def test_few_classes_are_kept_finely_where_there_is_room():
    values = np.random.default_rng(0).normal(0, 3, (50, 10)).astype(np.float32)
    kept = kept_of("packed(20)", values)
    assert (counts(kept) == 9).all()
    assert mean_kl(values, kept.log_probs(1), 1) < 1e-3


@pytest.mark.parametrize("text", ["packed(12)", "packed(30, at=(0.5, 3), tail=spread)"])
def test_rows_are_encoded_one_by_one_into_what_was_announced(text: str):
    codec = codecs.parse(text).codec
    values = np.random.default_rng(0).normal(0, 3, (1030, 90)).astype(np.float32)
    before, together = values.copy(), codec.encode(values)
    assert np.array_equal(values, before)
    announced = {f.name: (np.dtype(f.dtype), (1030, *f.shape)) for f in codec.fields((90,))}
    assert {name: (f.dtype, f.shape) for name, f in together.items()} == announced
    for i in (0, 3, 511, 512, 1029):
        alone = codec.encode(values[i : i + 1])
        assert all(np.array_equal(together[f][i : i + 1], alone[f]) for f in together)
    none = codec.decode(codec.encode(values[:0]), (90,))
    assert isinstance(none, SparseLogits) and len(none.index) == 0
    kept = codec.decode(together, (90,))
    assert isinstance(kept, SparseLogits)
    assert kept[3].arrays()["index"].shape == kept[4].arrays()["index"].shape  # a DataLoader stacks them


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("packed", r"such as packed\(44\)"),
        ("packed(0)", "from 1 to 4096"),
        ("packed(5000)", "from 1 to 4096"),
        ("packed(4.5)", "from 1 to 4096"),
        ("packed(44, at=(2, 1))", "packed: at must be one to eight rising"),
        ("packed(44, tail=flat)", "packed: tail must be bucket or spread"),
    ],
)
def test_a_wrong_spec_is_named(text: str, told: str):
    with pytest.raises(SpecError, match=told):
        codecs.parse(text)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_logits_are_one_row_of_two_classes_or_more(shape: tuple[int, ...]):
    with pytest.raises(CodecError, match="two or more classes"):
        codecs.parse("packed(44)").codec.fields(shape)


@settings(max_examples=60)
@given(data=st.data(), bits=st.integers(60, 300))
def test_classes_and_numbers_come_back(data: st.DataObject, bits: int):
    """The layout alone, with numbers of any size: what fits is written, and read again."""
    from softcache.codecs.rice import Ranked

    layout = Layout(bits, 200)
    picked = data.draw(st.permutations(range(200)))[: layout.most]
    numbers = np.cumsum([0, *data.draw(st.lists(st.integers(0, 9), min_size=300, max_size=300))])[
        : layout.most
    ]
    ranked, number = Ranked(np.array([picked])), numbers[None]
    k = layout.fill(ranked, number)
    row = layout.write(ranked, number, k, np.array([5]))
    found, levels, count, said = layout.read(row)
    assert (count.tolist(), said.tolist(), row.shape) == (k.tolist(), [5], (1, -(-bits // 8)))
    expected = sorted(zip(numbers[: k[0]].tolist(), picked, strict=False))
    assert list(zip(levels[0, : k[0]].tolist(), found[0, : k[0]].tolist(), strict=True)) == expected


# -- real logits of a real network, of photographs that nothing was chosen on -------------------------------------------


@pytest.fixture(scope="module")
def imagenet(shared_data) -> np.ndarray:
    path = shared_data / "logits" / "efficientnet_lite0_imagenet.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as file:
        return file["logits"][file["image"] % 10 >= 7].astype(np.float32)


def top_k(values: np.ndarray, k: int, T: float) -> np.ndarray:  # noqa: N803
    """Log-probabilities of fp16 top-k, the tail's mass exact and flat."""
    p = log_probs(values, T)
    index = np.argsort(-values, axis=1, kind="stable")[:, :k]
    left = p.copy()
    np.put_along_axis(left, index, -np.inf, 1)
    rest = np.log(np.exp(left).sum(axis=1, keepdims=True))
    kept = np.take_along_axis(values, index, 1).astype(np.float16).astype(np.float64)
    kept = log_probs(kept, T) + np.log(-np.expm1(rest))
    out = np.broadcast_to(rest - np.log(values.shape[1] - k), p.shape).copy()
    np.put_along_axis(out, index, kept, 1)
    return out


@pytest.mark.parametrize(("size", "better"), [(44, (2.4, 1.6, 1.35, 1.25)), (128, (3, 2.2, 1.9, 1.8))])
def test_a_byte_buys_more_than_of_fp16_top_k(imagenet: np.ndarray, size: int, better: tuple[float, ...]):
    kept = kept_of(f"packed({size})", imagenet)
    for T, times in zip(AT, better, strict=True):  # noqa: N806
        theirs = mean_kl(imagenet, top_k(imagenet, (size - 2) // 4, T), T)
        assert mean_kl(imagenet, kept.log_probs(T), T) * times < theirs


def test_the_gradient_of_a_student_that_is_far_away_is_no_worse(imagenet: np.ndarray):
    """‖p̂ − p‖ / ‖p‖ is its error: of large classes, which need finer steps than KL asks for."""
    kept = kept_of("packed(44)", imagenet)
    for T, times in zip(AT, (0.9, 1.3, 1.2, 1.1), strict=True):  # noqa: N806
        p, ours, theirs = (
            np.exp(x) for x in (log_probs(imagenet, T), kept.log_probs(T), top_k(imagenet, 10, T))
        )
        own, other = (
            (np.linalg.norm(x - p, axis=1) / np.linalg.norm(p, axis=1)).mean() for x in (ours, theirs)
        )
        assert own * times < other


def test_between_the_temperatures_the_others_mass_is_within_the_stated_error(imagenet: np.ndarray):
    """docs/format.md states it."""
    kept = kept_of("packed(44)", imagenet[:300])
    for T in (1.2, 1.5, 3, 5, 6.5):  # noqa: N806
        p, others = log_probs(imagenet[:300], T), kept.split(T)[1]
        np.put_along_axis(p, kept.index, -np.inf, 1)
        assert np.abs(others - np.log(np.exp(p).sum(axis=1))).max() <= 0.15
