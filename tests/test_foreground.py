"""``foreground``: which cells of a map are kept finely, against a choice written out; and what comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import softcache as sc
from softcache import codecs
from softcache.codecs import NOTHING, Objects
from softcache.errors import CodecError, SpecError
from softcache.testing import toy_detector


def shown(*boxes: tuple[float, float, float, float]) -> Objects:
    return Objects(np.array(boxes, float).reshape(-1, 4), np.zeros(len(boxes), np.int64))


def chosen(values: np.ndarray, objects: Objects, cells: int) -> tuple[list[int], int]:
    """The places of one map (C, H, W), one after another, and how many of them are under boxes."""
    _, height, width = values.shape
    lists = []
    for x1, y1, x2, y2 in objects.boxes:
        found = []
        for y in range(height):
            for x in range(width):
                over = min(x2 * width, x + 1) - max(x1 * width, x) > 0
                if over and min(y2 * height, y + 1) - max(y1 * height, y) > 0:
                    far = ((x + 0.5) / width - (x1 + x2) / 2) ** 2 + ((y + 0.5) / height - (y1 + y2) / 2) ** 2
                    found.append((far, y * width + x))
        lists.append([cell for _, cell in sorted(found)])
    taken: list[int] = []
    for rank in range(height * width):
        for one in lists:
            if rank < len(one) and one[rank] not in taken and len(taken) < cells:
                taken.append(one[rank])
    norm = (values.astype(np.float64) ** 2).sum(axis=0).ravel()
    others = [i for i in sorted(range(height * width), key=lambda i: (-norm[i], i)) if i not in taken]
    return taken + others[: cells - len(taken)], len(taken)


side = st.floats(0, 1).map(lambda x: round(x, 3))
box = st.tuples(side, side, side, side).filter(lambda b: b[0] + 0.01 < b[2] and b[1] + 0.01 < b[3])


@settings(max_examples=80)
@given(boxes=st.lists(box, max_size=5), cells=st.integers(1, 35), seed=st.integers(0, 99))
def test_the_cells_are_those_of_the_boxes_turn_by_turn(boxes: list, cells: int, seed: int):
    values = np.random.default_rng(seed).normal(size=(1, 3, 5, 7)).astype(np.float32)
    fields = codecs.parse(f"foreground({cells})").codec.encode(values, [shown(*boxes)])  # type: ignore[call-arg]
    expected, under = chosen(values[0], shown(*boxes), cells)
    assert fields["under"].tolist() == [under]
    assert set(fields["cell"][0, :under].tolist()) == set(expected[:under])
    assert fields["cell"][0, under:].tolist() == expected[under:]


@pytest.mark.parametrize("pool", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 8, 8), (16, 1, 9)])
def test_fine_cells_are_within_a_bytes_bound_and_the_rest_is_as_of_int4(shape: tuple[int, ...], pool: int):
    codec, values = (
        codecs.parse(f"foreground(6, pool={pool})").codec,
        np.random.default_rng(0).normal(0, 3, (4, *shape)),
    )
    values, objects = (
        values.astype(np.float32),
        [shown((0.1, 0, 0.5, 0.6)), NOTHING, shown((0, 0, 1, 1)), NOTHING],
    )
    before = values.copy()
    fields = codec.encode(values, objects)  # type: ignore[call-arg]
    announced = {f.name: (np.dtype(f.dtype), (4, *f.shape)) for f in codec.fields(shape)}
    assert {name: (f.dtype, f.shape) for name, f in fields.items()} == announced
    for f in fields.values():
        f.setflags(write=False)
    kept, bound = codec.decode(fields, shape), codec.bound(fields, shape)
    assert isinstance(kept, np.ndarray) and isinstance(bound, np.ndarray)
    assert (kept.shape, kept.dtype) == (values.shape, np.float32) and np.array_equal(values, before)
    assert (np.abs(kept.astype(np.float64) - values) <= bound).all()
    coarse = codecs.parse(f"pool({pool})|int4" if pool > 1 else "int4").codec
    rest = coarse.decode(coarse.encode(values), shape)
    assert isinstance(rest, np.ndarray)
    for row in range(4):
        for place in range(shape[1] * shape[2]):
            y, x = divmod(place, shape[2])
            if place in fields["cell"][row]:
                largest = np.abs(values[row, :, y, x]).max()
                assert (bound[row, :, y, x] <= largest / 127 * 0.51).all()
            else:
                assert np.array_equal(kept[row, :, y, x], rest[row, :, y // pool, x // pool])
        alone = codec.encode(values[row : row + 1], objects[row : row + 1])  # type: ignore[call-arg]
        assert all(np.array_equal(alone[f][0], fields[f][row]) for f in fields)
    none = codec.decode(codec.encode(values[:0]), shape)
    assert isinstance(none, np.ndarray) and none.shape == (0, *shape)


def test_a_map_of_zeros_and_boxes_without_size():
    codec, zeros = codecs.parse("foreground(3)").codec, np.zeros((1, 2, 4, 4), np.float32)
    fields = codec.encode(zeros, [shown((1, 1, 1, 1), (0.5, 0.2, 0.5, 0.2))])  # type: ignore[call-arg]
    assert fields["under"] == 2 and fields["cell"][0, :2].tolist() == [15, 2]
    assert (codec.decode(fields, (2, 4, 4)) == 0).all()


def test_what_it_cannot_keep_is_refused():
    for wrong in ("0", "2.5", "4, pool=0"):
        with pytest.raises(SpecError, match="must be a whole number of at least 1"):
            codecs.parse(f"foreground({wrong})")
    with pytest.raises(CodecError, match=r"keeps 17 cells .* gives \(2, 4, 4\)"):
        codecs.parse("foreground(17)").codec.fields((2, 4, 4))
    with pytest.raises(CodecError, match="gives \\(300,\\)"):
        codecs.parse("foreground(17)").codec.fields((300,))
    with pytest.raises(CodecError, match="of 1 rows, 0 are told"):
        codecs.parse("foreground(3)").codec.encode(np.zeros((1, 2, 4, 4), np.float32))


def test_a_cache_holds_what_is_under_its_boxes(shared_data: Path, tmp_path: Path):
    source = sc.Source(shared_data / "coco356", split="val2017", limit=6)
    options = {
        "recipe": "letterbox(16)|flip",
        "views": 2,
        "batch": 4,
        "progress": False,
        "ignore_labels": True,
    }
    targets = {"p3": "foreground(9, pool=2)", "p3.attention": "attention"}
    cache = sc.build(tmp_path / "c", source=source, teacher=toy_detector(), targets=targets, **options)  # type: ignore[arg-type]
    plain = sc.build(tmp_path / "f", source=source, teacher=toy_detector(), targets={"p3": "f16"}, **options)  # type: ignore[arg-type]
    samples = np.arange(6)
    kept, own = (one.read(1, samples)["p3"].values for one in (cache, plain))
    assert kept.shape == own.shape == (6, 6, 5, 7)
    assert sc.verify(cache, read_data=True) == []
    near = (np.abs(kept - own) <= np.abs(own).max() / 127).all(axis=1).sum(axis=(1, 2))
    assert (near >= 9).all() and (near < 35).any()
