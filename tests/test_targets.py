from __future__ import annotations

import numpy as np
import pytest

from softcache.errors import CodecError, MismatchError, SpecError, TeacherError
from softcache.targets import KINDS, Logits, Target, request, requests

SHAPES = {"logits": (10,), "feature_map": (4, 3, 2), "embedding": (6,), "attribution": (1, 3, 2)}
CODEC = {"logits": "full(u8)", "feature_map": "int8", "embedding": "f16", "attribution": "int8"}
# test_items.py and test_map_codecs.py have their contract
IN_PARTS = {"detections", "proposals", "queries", "probes", "attention_map"}
every_kind = pytest.mark.parametrize("kind", sorted(set(KINDS) - IN_PARTS))


# -- the contract of a kind ------------------------------------------------------------------------------------


def test_every_kind_is_under_contract():
    assert set(KINDS) - IN_PARTS == set(SHAPES) == set(CODEC)


@every_kind
def test_a_kind_states_its_geometry_law(kind: str):
    assert KINDS[kind].name == kind
    assert KINDS[kind].law in ("invariant", "box", "spatial", "view-locked")


@every_kind
def test_wrapped_values_give_a_batch_and_a_row(kind: str):
    values = np.random.default_rng(0).normal(size=(3, *SHAPES[kind])).astype(np.float32)
    batch = KINDS[kind].wrap(values)
    row = batch[1]
    assert np.array_equal(batch.values, values)
    assert (row.dense().shape, row.dense().dtype) == (SHAPES[kind], np.float32)
    assert np.array_equal(batch.dense()[1], row.dense())


@every_kind
def test_identity_describes_a_target_whole(kind: str):
    target = request(f"x:{kind}={CODEC[kind]}").resolve(SHAPES[kind])
    assert Target.from_identity("x", target.identity()) == target


@every_kind
def test_decode_is_the_codec_and_the_meaning(kind: str):
    target = request(f"x:{kind}={CODEC[kind]}").resolve(SHAPES[kind])
    values = np.random.default_rng(0).normal(size=(3, *SHAPES[kind])).astype(np.float32)
    assert np.allclose(target.decode(target.codec.encode(values)).values, values, atol=0.05)


# -- logits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_dense_logits_are_log_probabilities(T: float):  # noqa: N803
    values = np.random.default_rng(0).normal(0, 5, (4, 7)).astype(np.float32)
    z = np.exp(values.astype(np.float64) / T)
    expected = np.log(z / z.sum(axis=1, keepdims=True))
    found = Logits(values).dense(T)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-6)


def test_dense_logits_do_not_overflow():
    found = Logits(np.array([32752.0, 0.0, -32752.0], np.float32)).dense(0.01)
    assert found[0] == 0 and np.isfinite(found).all()


def test_dense_leaves_the_logits_alone():
    values = np.array([1.0, 2.0], np.float32)
    Logits(values).dense(2)
    assert values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("T", [0, -1, float("nan")])
def test_a_temperature_is_positive(T: float):  # noqa: N803
    with pytest.raises(SpecError, match="not finite and above 0"):
        Logits(np.zeros(3, np.float32)).dense(T)


# -- what a user asks for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "kind"),
    [
        ("logits=full(u8)", (10,), "logits"),
        ("layer3=int8", (64, 8, 8), "feature_map"),
        ("avgpool=f16", (512,), "embedding"),
        ("queries=f16", (300, 256), "embedding"),
        ("head:logits=full(f16)", (10,), "logits"),
    ],
)
def test_the_kind_follows_from_the_shape_unless_stated(text: str, shape: tuple[int, ...], kind: str):
    assert request(text).resolve(shape).kind == kind


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("logits", "name=codec"),
        ("logits=", "name=codec"),
        ("=int8", "target name"),
        ("a/b=int8", "target name"),
        ("../x=int8", "target name"),
        (".hidden=int8", "target name"),
        ("a b=int8", "target name"),
        ("a\nb=int8", "target name"),
        ("é=int8", "target name"),
        ("x" * 129 + "=int8", "target name"),
        ("x:logit=full(u8)", "did you mean 'logits'"),
        ("x=int9", "did you mean 'int8'"),
    ],
)
def test_a_target_that_cannot_be_understood_is_refused(text: str, told: str):
    with pytest.raises(SpecError, match=told):
        request(text)


def test_requests_are_the_same_from_a_mapping_and_from_flags():
    assert requests({"z": "int8", "a": "f16"}) == requests(["a=f16", "z=int8"])
    assert [r.name for r in requests(["z=int8", "a=f16"])] == ["a", "z"]


@pytest.mark.parametrize(
    ("texts", "told"), [([], "no target"), (["a=f16", "a=int8"], "'a' is asked for twice")]
)
def test_none_or_one_twice_is_refused(texts: list[str], told: str):
    with pytest.raises(SpecError, match=told):
        requests(texts)


@pytest.mark.parametrize(
    ("text", "shape", "told"),
    [
        ("logits=int8", (10,), r"codecs for it: anchored, argmax, full, head, packed, sample, topk"),
        ("map=full(u8)", (4, 3, 2), r"codecs for it: f16, foreground, int4, int8, sign"),
    ],
)
def test_a_codec_that_does_not_fit_names_those_that_do(text: str, shape: tuple[int, ...], told: str):
    with pytest.raises(CodecError, match=told):
        request(text).resolve(shape)


@pytest.mark.parametrize(
    ("text", "shape"), [("logits=full(u8)", (4, 3)), ("x:feature_map=int8", (7,)), ("x=int8", (1, 2, 3, 4))]
)
def test_a_shape_no_kind_holds_is_refused(text: str, shape: tuple[int, ...]):
    with pytest.raises(TeacherError, match="shape"):
        request(text).resolve(shape)


# -- what a manifest says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"codec_version": 99},
        {"codec": "topk(16)"},
        {"codec": "topk(0)"},
        {"codec": "int8"},
        {"codec": "__import__('os')"},
        {"kind": "boxes"},
        {"shape": [1]},
        {"shape": [2, 2]},
    ],
    ids=str,
)
def test_a_target_of_another_version_is_a_mismatch(change: dict):
    stored = request("logits=full(u8)").resolve((10,)).identity() | change
    with pytest.raises(MismatchError, match="logits"):
        Target.from_identity("logits", stored)
