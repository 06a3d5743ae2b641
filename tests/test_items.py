"""Targets of many items: layouts, ``all`` and ``top``, and what comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcache import codecs
from softcache.codecs.items import All
from softcache.errors import CodecError, MismatchError, SpecError, TeacherError
from softcache.targets import KINDS, Items, Layout, Target, request
from softcache.targets.items import ITEMS

# Every column there is, an anchor grid, a background in the middle.
EVERYTHING = Layout(
    {
        "embedding": 6,
        "logits": 7,
        "objectness": 1,
        "boxes": 4,
        "distribution": 20,
        "reference": 4,
        "deltas": 28,
    },
    score="softmax",
    background=2,
    levels=((4, 5), (2, 3), (1, 1)),
    head="test",
)
DENSE = Layout({"logits": 5, "boxes": 4}, levels=((4, 5), (2, 3), (1, 1)))
NARROW = Layout({"boxes": 4, "objectness": 1, "logits": 2}, background=0)
LAYOUTS = [
    pytest.param(layout, id=name)
    for name, layout in (("everything", EVERYTHING), ("dense", DENSE), ("narrow", NARROW))
]
SPECS = [
    "all",
    "all(logits=f16)",
    "top(3)",
    "top(5, background=4)",
    "top(27)",
    "top(1, background=26, logits=f16)",
    "all(logits=score)",
    "top(5, background=4, logits=score)",
]
ITEMS_OF = 27
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_spec = pytest.mark.parametrize("text", SPECS)


def bound_to(text: str, layout: Layout) -> All:
    codec = codecs.parse(text).codec
    assert isinstance(codec, All)
    return codec.laid_out(layout)


def answers(
    layout: Layout, rows: int, seed: int = 0, items: int = ITEMS_OF, scale: float = 3.0
) -> np.ndarray:
    """What a detector might say, boxes a little outside of the view among them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, scale, (rows, items, layout.width)).astype(np.float32)
    for name in ("boxes", "reference"):
        if name in layout.columns:
            layout.part(values, name)[:] = rng.uniform(-0.49, 1.49, (rows, items, 4))
    return values


def best(layout: Layout, row: np.ndarray) -> np.ndarray:
    """The score of each item of a row, item by item in float64, as one would write it down."""
    found = []
    for item in row.astype(np.float64):
        logits = layout.part(item, "logits")
        p = 1 / (1 + np.exp(-logits))
        if layout.score == "softmax":
            p = np.exp(logits - logits.max())
            p = p / p.sum()
        p = [x for i, x in enumerate(p) if i != layout.background]
        there = layout.part(item, "objectness")[0] if "objectness" in layout.columns else np.inf
        found.append(max(p) / (1 + np.exp(-there)))
    return np.array(found)


# -- the contract of a codec of items ------------------------------------------------------------------------


@every_layout
@every_spec
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 30.0, 8000.0]))
def test_every_part_comes_back_within_its_bound(text: str, layout: Layout, seed: int, scale: float):
    codec = bound_to(text, layout)
    values = answers(layout, 3, seed, scale=scale).clip(-codec.limit, codec.limit)
    fields = codec.encode(values)
    kept, bound = codec.decode(fields, values.shape[1:]), codec.bound(fields, values.shape[1:])
    said = codec.exact(values).take(kept.index)
    assert set(kept.parts) == set(bound) == set(layout.columns)
    for name, part in kept.parts.items():
        off = np.abs(part.astype(np.float64) - said.parts[name])
        assert part.dtype == np.float32 and (off <= np.broadcast_to(bound[name], off.shape)).all(), name
    for name in {"boxes", "reference"} & set(layout.columns):
        assert np.abs(kept.parts[name] - said.parts[name]).max() <= 1 / 65535 + 1e-6


def test_bounds_are_no_larger_than_they_must_be():
    codec, values = bound_to("all", EVERYTHING), answers(EVERYTHING, 300)
    fields = codec.encode(values)
    kept, bound = codec.decode(fields, values.shape[1:]), codec.bound(fields, values.shape[1:])
    for name, part in kept.parts.items():
        off = np.abs(part.astype(np.float64) - EVERYTHING.part(values, name))
        worst = np.unravel_index(off.argmax(), off.shape)
        assert off.max() >= 0.5 * np.broadcast_to(bound[name], off.shape)[worst], name
        assert np.median(bound[name]) <= 0.1, name


@pytest.mark.parametrize(("value", "kept"), [(-7.0, -0.5), (1.6, 1.5), (1e4, 1.5), (-0.5, -0.5), (1.5, 1.5)])
def test_boxes_are_clipped_and_the_bound_says_so(value: float, kept: float):
    codec, values = bound_to("all", DENSE), answers(DENSE, 1)
    DENSE.part(values, "boxes")[0, 3, 1] = value
    fields = codec.encode(values)
    assert codec.decode(fields, values.shape[1:]).parts["boxes"][0, 3, 1] == pytest.approx(kept, abs=1e-6)
    infinite = np.isinf(codec.bound(fields, values.shape[1:])["boxes"])
    assert infinite[0, 3, 1] and infinite.sum() == 1


@every_spec
def test_one_class_and_nothing_else(text: str):
    codec, values = bound_to(text, Layout({"logits": 1, "boxes": 4})), answers(Layout({"boxes": 4}), 2)
    logits = np.random.default_rng(3).normal(-3, 2, (2, ITEMS_OF, 1)).astype(np.float32)
    values = np.concatenate([logits, values], axis=2)
    kept = codec.decode(codec.encode(values), values.shape[1:])
    said = codec.exact(values).take(kept.index)
    assert np.abs(kept.scores() - said.scores()).max() < 0.004


@every_layout
@every_spec
def test_fields_are_what_was_announced(text: str, layout: Layout):
    codec, values = bound_to(text, layout), answers(layout, 5)
    fields = codec.encode(values)
    announced = {f.name: (np.dtype(f.dtype), (5, *f.shape)) for f in codec.fields(values.shape[1:])}
    assert {name: (f.dtype, f.shape) for name, f in fields.items()} == announced


@every_layout
@every_spec
def test_rows_are_encoded_one_by_one_and_memory_is_not_shared(text: str, layout: Layout):
    codec, values = bound_to(text, layout), answers(layout, 20)
    before = values.copy()
    together = codec.encode(values)
    for i in (0, 7, 8, 19):
        alone = codec.encode(values[i : i + 1])
        assert all(np.array_equal(together[f][i : i + 1], alone[f]) for f in together)
    assert np.array_equal(values, before)
    for field in together.values():
        field.setflags(write=False)
    decoded = codec.decode(together, values.shape[1:]).arrays()
    assert not any(np.shares_memory(a, f) for a in decoded.values() for f in together.values())


@every_layout
@every_spec
def test_no_rows_are_no_problem(text: str, layout: Layout):
    codec = bound_to(text, layout)
    none = np.empty((0, ITEMS_OF, layout.width), np.float32)
    assert codec.decode(codec.encode(none), none.shape[1:]).dense().shape[0] == 0


@every_layout
@pytest.mark.parametrize("value", ["limit", "-limit", 0.0, 1e-45])
def test_constant_rows_and_the_limit(layout: Layout, value: Any):
    codec = bound_to("all", layout)
    number = {"limit": codec.limit, "-limit": -codec.limit}.get(value, value)
    values = np.full((2, ITEMS_OF, layout.width), number, np.float32)
    with np.errstate(all="raise", under="ignore"):
        fields = codec.encode(values)
        kept, bound = codec.decode(fields, values.shape[1:]), codec.bound(fields, values.shape[1:])
    for name, part in kept.parts.items():
        assert (np.abs(part - layout.part(values, name)) <= bound[name]).all() and np.isfinite(part).all()


# -- which items ---------------------------------------------------------------------------------------------


@every_layout
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(1, ITEMS_OF), coarse=st.booleans())
def test_top_keeps_what_a_sort_finds(layout: Layout, seed: int, n: int, coarse: bool):
    values = answers(layout, 2, seed)
    values = values.round() if coarse else values  # with ties
    kept = bound_to(f"top({n})", layout).decode(
        bound_to(f"top({n})", layout).encode(values), values.shape[1:]
    )
    scores = layout.scores(dict(layout.parts(values))).max(axis=-1)
    for row in range(2):
        assert np.allclose(scores[row], best(layout, values[row]), rtol=1e-4, atol=1e-12)
        order = sorted(range(ITEMS_OF), key=lambda i: (-scores[row, i], i))
        assert kept.index[row].tolist() == order[:n]
    assert (kept.weight == 1).all()


@settings(max_examples=60)
@given(data=st.data(), items=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_background_is_the_middle_of_each_stratum_and_weights_are_all_items(data: Any, items: int, seed: int):
    n = data.draw(st.integers(1, items - 1))
    background = data.draw(st.integers(1, items - n))
    layout = replace(DENSE, levels=())
    codec, values = bound_to(f"top({n}, background={background})", layout), answers(layout, 1, seed, items)
    kept = codec.decode(codec.encode(values), values.shape[1:])[0]
    scores = layout.scores(dict(layout.parts(values)))[0].max(axis=-1)
    order = sorted(range(items), key=lambda i: (-scores[i], i))
    assert kept.index[:n].tolist() == order[:n] and (kept.weight[:n] == 1).all()
    assert kept.weight.sum() == items and np.ptp(kept.weight[n:]) <= 1
    start = n
    for place, size in zip(kept.index[n:].tolist(), kept.weight[n:].astype(int).tolist(), strict=True):
        assert order.index(place) == start + size // 2
        start += size
    assert start == items


@every_layout
def test_all_keeps_the_teachers_order(layout: Layout):
    codec, values = bound_to("all(logits=f16)", layout), answers(layout, 2)
    fields = codec.encode(values)
    kept = codec.decode(fields, values.shape[1:])
    assert "index" not in fields and (kept.weight == 1).all()
    assert np.array_equal(kept.index, np.tile(np.arange(ITEMS_OF), (2, 1)))
    assert np.allclose(kept.dense(), values, atol=0.2)


@pytest.mark.parametrize(
    ("text", "layout", "told"),
    [
        ("top(28)", DENSE, "keeps 28 items, and the teacher gives 27: at most 27 together, or keep all"),
        ("top(20, background=8)", DENSE, "keeps 20 items and 8 of the background.*gives 27"),
        ("top(3)", Layout({"embedding": 9}), "these have none: keep all of them"),
        ("top(3)", Layout({"logits": 5, "boxes": 4}, layers=3), "those of several layers are the same ones"),
        ("all", Layout({"embedding": 8}), r"items are \(items, 8\) by their layout"),
    ],
)
def test_what_cannot_be_chosen_is_refused(text: str, layout: Layout, told: str):
    with pytest.raises(CodecError, match=told):
        bound_to(text, layout).fields((27, 9))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("top", "missing a required argument: 'n'"),
        (
            "top",
            r"written top\(n, background=0, inside=0, logits=u8\), such as top\(1000, background=200, inside=100\)$",
        ),
        ("top(0)", "n must be a whole number of at least 1"),
        ("top(2.5)", "n must be"),
        ("top(5, background=-1)", "background must be a whole number of at least 0"),
        ("top(5, logits=u9)", "logits=u9: unknown .did you mean 'u8'"),
        ("all(u8)", "too many positional"),
        ("top(5, layout=3)", "unexpected keyword"),
    ],
)
def test_a_wrong_spec_is_named(text: str, told: str):
    with pytest.raises(SpecError, match=told):
        codecs.parse(text)


# -- what comes back -----------------------------------------------------------------------------------------


def test_places_follow_from_the_levels():
    items = Items.whole(DENSE, answers(DENSE, 2))
    expected = [
        (level, y, x) for level, (h, w) in enumerate(DENSE.levels) for y in range(h) for x in range(w)
    ]
    found = np.concatenate([items.level()[..., None], items.cell()], axis=-1)
    assert found.tolist() == [[list(e) for e in expected]] * 2
    assert items[1].cell().tolist() == [list(e[1:]) for e in expected]
    with pytest.raises(SpecError, match="no cells"):
        Items.whole(NARROW, answers(NARROW, 1)).level()


def test_layers_are_equal_groups_the_last_last():
    layout = Layout({"logits": 3, "boxes": 4}, layers=3)
    values = answers(layout, 2)
    items = Items.whole(layout, values)
    assert np.array_equal(items.layer(-1).dense(), values[:, 18:])
    assert np.array_equal(items[0].layer(1).dense(), values[0, 9:18])
    for none in (3, -4):
        with pytest.raises(IndexError, match=f"layer {none} of 3: they are 0 to 2, and -1 is the last"):
            items.layer(none)


@every_layout
def test_a_row_of_a_batch_is_what_it_is_alone(layout: Layout):
    values = answers(layout, 3)
    batch = Items.whole(layout, values)
    assert np.array_equal(batch[1].dense(), values[1]) and np.array_equal(batch.dense(), values)
    assert np.array_equal(batch[1].scores(), batch.scores()[1])
    assert batch.scores().shape == (3, ITEMS_OF, layout.classes)
    assert set(batch[0].arrays()) == {"index", "weight", *layout.columns}


# -- layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "told"),
    [
        ({}, {}, "no columns"),
        ({"logit": 3}, {}, "did you mean 'logits'"),
        ({"logits": 0}, {}, "0 columns of logits"),
        ({"logits": 2.0}, {}, "2.0 columns of logits"),
        ({"logits": 1 << 20}, {}, "columns of logits"),
        ({"boxes": 5}, {}, "5 columns of boxes"),
        ({"distribution": 7}, {}, "7 columns of distribution"),
        ({"logits": 3}, {"score": "relu"}, "'relu'"),
        ({"logits": 3}, {"background": 3}, "background 3"),
        ({"logits": 3}, {"background": -1}, "background -1"),
        ({"logits": 1}, {"background": 0}, "background 0"),
        ({"boxes": 4}, {"background": 0}, "background 0"),
        ({"logits": 3}, {"levels": ((0, 4),)}, "levels"),
        ({"logits": 3}, {"levels": ((4, 4),) * 100}, "levels"),
        ({"logits": 3}, {"layers": 0}, "0 layers"),
        ({"logits": 3}, {"head": "x" * 300}, "300 characters"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(columns: Any, options: Any, told: str):
    with pytest.raises(TeacherError, match=told):
        Layout(columns, **options)


@every_layout
def test_a_layout_is_what_its_identity_says(layout: Layout):
    assert Layout.from_identity(layout.identity()) == layout


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_probabilities_of_the_classes(seed: int):
    for layout in (EVERYTHING, DENSE, NARROW):
        values = answers(layout, 1, seed, scale=30)
        scores = layout.scores(dict(layout.parts(values)))
        assert np.allclose(scores[0].max(axis=-1), best(layout, values[0]), rtol=1e-4, atol=1e-12)
        assert scores.min() >= 0 and scores.max() <= 1


# -- kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detections", "one2one.detections", "0.queries", "a.b.probes", "proposals"])
def test_the_kind_follows_from_the_names_last_part(name: str):
    target = request(f"{name}=all").resolve((27, DENSE.width), DENSE)
    assert target.kind == name.rpartition(".")[2] and target.layout == DENSE
    assert Target.from_identity(name, target.identity()) == target
    values = answers(DENSE, 2)
    assert np.allclose(target.decode(target.codec.encode(values)).dense(), values, atol=0.1)
    assert np.array_equal(target.wrap(values).dense(), values)


def test_every_kind_of_items_is_one_of_the_kinds():
    assert {k.name for k in ITEMS} == set(All.kinds) < set(KINDS)
    assert {k.name: k.law for k in ITEMS} == {
        "detections": "box", "proposals": "box", "queries": "view-locked", "probes": "view-locked"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "layout", "kind", "told"),
    [
        ("neck=all", DENSE, TeacherError, "say of which kind, such as neck:detections=all"),
        ("neck=top(5)", None, TeacherError, "say of which kind"),
        ("detections=all", None, TeacherError, "does not say what the columns of 'detections'"),
        ("detections=f16", DENSE, CodecError, "codecs for it: all, top"),
        (
            "x:detections=all",
            replace(DENSE, levels=((2, 2),)),
            TeacherError,
            "levels of its layout have 4 cells",
        ),
        ("x:detections=all", Layout({"embedding": 9}), TeacherError, "have logits and boxes.*has no logits"),
        ("queries=all", Layout({"embedding": 8}), TeacherError, "layout names 8 columns"),
        ("queries=all", Layout({"embedding": 9}, layers=2), TeacherError, "2 layers"),
    ],
)
def test_what_is_no_target_of_items_is_refused(text: str, layout: Layout | None, kind: type, told: str):
    with pytest.raises(kind, match=told):
        request(text).resolve((27, 9), layout)


def test_a_stated_kind_of_another_sort_needs_no_layout():
    target = request("queries:embedding=f16").resolve((27, 9), DENSE)
    assert target.kind == "embedding" and target.layout is None


@pytest.mark.parametrize(
    "change",
    [
        {"layout": None},
        {"shape": [27, 10]},
        {"shape": [26, 9]},
        {"shape": [9]},
        {"codec": "top(28)"},
        {"codec": "f16"},
        {"codec_version": 9},
        {"kind": "proposal"},
    ],
    ids=str,
)
def test_a_stored_target_of_items_this_version_cannot_read_is_a_mismatch(change: dict[str, Any]):
    stored = request("detections=top(3)").resolve((27, 9), DENSE).identity() | change
    with pytest.raises(MismatchError, match="detections"):
        Target.from_identity("detections", stored)
