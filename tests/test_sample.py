"""``sample``: draws whose mean is the teacher's softmax at one temperature, and none at any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import softcache as sc
from softcache import codecs
from softcache.codecs import SampledLogits
from softcache.errors import CodecError, MismatchError, SpecError
from softcache.testing import ToyImages, toy_teacher

element = st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 1e4, -1e4, 3e37])
row_sets = arrays(np.float32, (3, 12), elements=element, fill=element)


def drawn(text: str, values: np.ndarray) -> SampledLogits:
    codec = codecs.parse(text).codec
    found = codec.decode(codec.encode(values), values.shape[1:])
    assert isinstance(found, SampledLogits)
    return found


def softmax(z: np.ndarray, T: float) -> np.ndarray:  # noqa: N803
    z = z.astype(np.float64) / T
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@settings(max_examples=150)
@given(values=row_sets, n=st.integers(1, 60), T=st.sampled_from([0.5, 1, 3.0]))
def test_a_class_is_drawn_as_often_as_its_share_but_for_one(values: np.ndarray, n: int, T: float):  # noqa: N803
    kept = drawn(f"sample({n}, T={T})", values)
    count, expected = kept.probs(T) * n, softmax(values, T) * n
    assert np.allclose(count.sum(axis=1), n)
    assert (np.abs(count - expected) < 1 + 1e-6).all()
    assert (count[softmax(values, T) == 0] == 0).all()
    assert (np.diff(kept.index, axis=1) >= 0).all()
    p = softmax(values, T)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(axis=1)
    np.testing.assert_allclose(kept.entropy, entropy, rtol=1e-3, atol=1e-4)


def test_over_many_seeds_the_mean_is_the_softmax():
    """Five standard errors of the mean, of draws that are independent from seed to seed."""
    values = np.random.default_rng(0).normal(0, 2, (2, 30)).astype(np.float32)
    for T in (1, 2):  # noqa: N806
        many = np.stack([drawn(f"sample(7, T={T}, seed={seed})", values).probs(T) for seed in range(3000)])
        error = many.std(axis=0) / np.sqrt(3000) + 1e-6
        assert (np.abs(many.mean(axis=0) - softmax(values, T)) < 5 * error).all()


def test_over_many_rows_that_hardly_differ_the_mean_is_the_softmax():
    """The number that decides follows from the row: the last bits of its logits are enough."""
    base = np.random.default_rng(1).normal(0, 2, 30)
    values = (base + np.random.default_rng(2).normal(0, 1e-5, (3000, 30))).astype(np.float32)
    many = drawn("sample(7)", values).probs(1)
    assert (np.abs(many.mean(axis=0) - softmax(base[None], 1)) < 5 * many.std(axis=0) / 54 + 1e-4).all()


def test_systematic_draws_scatter_less_than_independent_ones():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (400, 1000)).astype(np.float32)
    p = softmax(values, 1)
    ours = drawn("sample(50)", values).probs(1)
    theirs = np.stack([rng.multinomial(50, row) for row in p / p.sum(axis=1, keepdims=True)]) / 50
    ours, theirs = (np.linalg.norm(x - p, axis=1).mean() for x in (ours, theirs))
    assert ours < 0.95 * theirs


def test_rows_are_encoded_one_by_one_into_what_was_announced():
    codec = codecs.parse("sample(20)").codec
    values = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
    before, together = values.copy(), codec.encode(values)
    assert np.array_equal(values, before)
    announced = {f.name: (np.dtype(f.dtype), (4, *f.shape)) for f in codec.fields((300,))}
    assert {name: (f.dtype, f.shape) for name, f in together.items()} == announced
    assert together["index"].dtype == np.uint16
    for i in range(4):
        alone = codec.encode(values[i : i + 1])
        assert all(np.array_equal(together[f][i : i + 1], alone[f]) for f in together)
    assert len(drawn("sample(20)", values[:0]).index) == 0
    again = codecs.parse("sample(20, seed=1)").codec.encode(values)
    assert not np.array_equal(again["index"], together["index"])


def test_it_holds_one_temperature():
    kept = drawn("sample(4, T=2)", np.eye(3, dtype=np.float32))
    assert kept.holds(2) and not kept.holds(1)
    with pytest.raises(SpecError, match=r"drew classes at T=2, which say nothing of T=1"):
        kept.dense(1.0)
    assert kept[1].dense(2.0).shape == (3,)
    assert drawn("sample(9)", np.array([[0, 5, 0]], np.float32)).top1().tolist() == [1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sample", "such as sample\\(50\\)"),
        ("sample(0)", "n must be"),
        ("sample(2.5)", "n must be"),
        ("sample(5, T=0)", "T must be"),
        ("sample(5, T=-1)", "T must be"),
        ("sample(5, seed=0.5)", "seed must be"),
    ],
)
def test_a_wrong_spec_is_named(text: str, told: str):
    with pytest.raises(SpecError, match=told):
        codecs.parse(text)


def test_one_class_is_refused():
    with pytest.raises(CodecError, match="two or more classes"):
        codecs.parse("sample(5)").codec.fields((1,))


# -- the loss ----------------------------------------------------------------------------------------------


def test_kd_is_the_formula_and_its_gradient_is_unbiased():
    torch = pytest.importorskip("torch")
    from softcache_train.objectives import kd
    from softcache_train.targets import to_tensors

    rng = np.random.default_rng(0)
    teacher, z, T = rng.normal(0, 2, (4, 12)).astype(np.float32), rng.normal(0, 2, (4, 12)), 2.0  # noqa: N806
    p, q, found, losses = softmax(teacher, T), softmax(z, T), [], []
    for seed in range(1500):
        kept = drawn(f"sample(5, T=2, seed={seed})", teacher)
        student = torch.from_numpy(z).requires_grad_()
        loss = kd(student, to_tensors(kept), T)
        loss.backward()
        assert student.grad is not None
        expected = T * (q - kept.probs(T)) / 4  # as of a dense target
        np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-12)
        found.append(student.grad.numpy())
        losses.append(loss.item())
    many = np.stack(found)
    assert (np.abs(many.mean(axis=0) - T * (q - p) / 4) < 5 * many.std(axis=0) / np.sqrt(1500) + 1e-9).all()
    kl = T**2 * (p * np.log(p / q)).sum(axis=1).mean()
    assert np.mean(losses) == pytest.approx(kl, abs=5 * np.std(losses) / np.sqrt(1500) + 2e-3)


def test_kd_of_draws_that_do_not_fit_is_refused():
    torch = pytest.importorskip("torch")
    from softcache_train.objectives import kd
    from softcache_train.targets import to_tensors

    values = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    one, two = drawn("sample(5)", values), drawn("sample(5, T=2)", values)
    student = torch.zeros(4, 9)
    collate = torch.utils.data.default_collate
    batch = collate([one[i].arrays() for i in range(4)])
    assert kd(student, batch, 1.0).item() == pytest.approx(kd(student, to_tensors(one), 1.0).item())
    with pytest.raises(SpecError, match="say nothing of T=4"):
        kd(student, to_tensors(one), 4.0)
    with pytest.raises(MismatchError, match="drawn at T=1 and T=2"):
        kd(student, collate([d[i].arrays() for d in (one, two) for i in range(2)]), 1.0)
    with pytest.raises(MismatchError, match=r"\(4, 8\) and \(4, 9\)"):
        kd(torch.zeros(4, 8), to_tensors(one), 1.0)


def test_a_cache_of_draws(tmp_path: Path):
    options = {"source": ToyImages(9), "teacher": toy_teacher(), "progress": False}
    cache = sc.build(tmp_path / "c", targets={"logits": "sample(20)"}, **options)  # type: ignore[arg-type]
    assert 0 < cache.report.fidelity["logits"]["gradient_T1"] < 0.3
    assert sc.verify(cache, read_data=True) == []
    assert cache.read(0, np.arange(9))["logits"].index.shape == (9, 20)
    assert len(sc.overlay(cache, sc.Source(ToyImages(9)), tmp_path / "out")) == 8  # as many as are drawn


def test_caches_of_draws_are_compared_with_each_other_and_with_logits(tmp_path: Path):
    specs = {"a": "sample(20)", "b": "sample(20, seed=1)", "c": "sample(20, T=2)", "d": "full(u8)"}
    made = {
        name: sc.build(
            tmp_path / name,
            source=ToyImages(9),
            teacher=toy_teacher(),
            targets={"logits": text},
            progress=False,
        )
        for name, text in specs.items()
    }
    for one, two, key in (("a", "b", "gradient_T1"), ("a", "d", "gradient_T1"), ("d", "c", "gradient_T2")):
        assert 0 < sc.diff(made[one], made[two])["values"]["logits"][key] < 0.3
    assert "agreement" in sc.diff(made["a"], made["c"])["values"]["logits"]
