"""A teacher's classes are matched with the source's by name, and its logits cached in the source's order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.errors import MismatchError, SoftcacheError, SpecError
from softcache.teachers import Options
from softcache.teachers.classes import names_in, names_of
from softcache.teachers.ensemble import assemble
from softcache.testing import ToyImages, ToyTeacher

SOURCE = ("ant", "bee", "cow", "dog")
OTHER = ("dog", "ant", "cow", "bee")


class Named(ToyTeacher):
    def __init__(self, classes: Any):
        self.classes = classes


def build(path: Path, **options: Any) -> sc.Cache:
    settings: dict[str, Any] = {
        "source": ToyImages(12),
        "teacher": ToyTeacher(),
        "targets": ["logits=full(f16)"],
    }
    return sc.build(path, **settings | {"batch": 4, "progress": False} | options)


def logits(cache: sc.Cache) -> np.ndarray:
    return cache.read(0, np.arange(12))["logits"].values


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> sc.Cache:
    return build(tmp_path_factory.mktemp("plain") / "c")


@pytest.mark.parametrize("how", ["carried", "said", "lines", "json"])
def test_columns_are_put_into_the_sources_order(plain: sc.Cache, tmp_path: Path, how: str, capsys):
    given: dict[str, Any] = {"said": {"classes": OTHER}, "carried": {"teacher": Named(OTHER)}}.get(how, {})
    if how in ("lines", "json"):
        text = "\n".join(OTHER) + "\n" if how == "lines" else json.dumps(OTHER)
        (tmp_path / "names").write_text(text)
        given = {"classes": str(tmp_path / "names")}
    cache = build(tmp_path / "c", progress=True, **given)
    for number, name in enumerate(SOURCE):
        assert np.array_equal(logits(cache)[:, number], logits(plain)[:, OTHER.index(name)])
    assert cache.identity["teacher"]["columns"] == [1, 3, 2, 0] and cache.classes == SOURCE
    told = "4 classes matched by name, the teacher's → the source's: ant 1→0, bee 3→1, dog 0→3"
    assert told in capsys.readouterr().err


def test_the_same_order_changes_nothing_of_a_cache(plain: sc.Cache, tmp_path: Path, capsys):
    cache = build(tmp_path / "c", classes=SOURCE, progress=True)
    assert cache.digest == plain.digest and "columns" not in cache.identity["teacher"]
    assert "the teacher's names in the source's order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"classes": ("ant", "bee", "cow", "Dog")}, MismatchError, "no class 'dog', which the source has.*'Dog'.*--classes"),
        ({"classes": ("ant", "bee")}, MismatchError, "no class 'cow', 'dog', which the source has.*--ignore-labels"),
        ({"classes": (*SOURCE, "elk")}, MismatchError, "has the class 'elk', which the source has not.*--ignore-labels"),
        ({"teacher": Named((*OTHER, "elk"))}, MismatchError, "has the class 'elk'"),
        ({"classes": ("ant", "bee", "cow", "ant")}, SpecError, "'ant' is named twice"),
        ({"classes": ()}, SpecError, "holds no class names"),
        ({"classes": "no/file"}, SpecError, "cannot read the class names in no/file"),
        ({"classes": OTHER, "ignore_labels": True}, SpecError, "one of them is not here"),
    ],
)  # fmt: skip
def test_what_matches_only_in_part_is_refused(tmp_path: Path, options: dict[str, Any], kind: type, told: str):
    with pytest.raises(kind, match=told) as caught:
        build(tmp_path / "c", **options)
    assert isinstance(caught.value, SoftcacheError) and "\n" not in str(caught.value)
    assert not (tmp_path / "c" / "receipts").exists()


def test_names_for_another_number_of_logits_are_refused(tmp_path: Path):
    source = ToyImages(12)
    source.classes = ("a", "b", "c", "d", "e")
    with pytest.raises(MismatchError, match=r"answers \(4,\) logits and 5 classes are named"):
        build(tmp_path / "c", source=source, classes=("e", "d", "c", "b", "a"))


def test_without_names_on_either_side_it_is_as_ever(plain: sc.Cache, tmp_path: Path):
    for number, odd in enumerate((10, None, [1, 2, 3, 4], ("ant", 2))):  # what people's models call classes
        assert build(tmp_path / str(number), teacher=Named(odd)).identity["teacher"].get("columns") is None
    mapped = build(tmp_path / "map", teacher=Named(("cat", "car")), targets=["map=f16"])  # a detector's, say
    assert set(mapped.targets) == {"map"}
    ignored = build(tmp_path / "ignored", teacher=Named(OTHER), ignore_labels=True)
    assert np.array_equal(logits(ignored), logits(plain))


def test_an_ensemble_and_the_living_teacher_are_put_in_order_too(tmp_path: Path):
    cache = build(
        tmp_path / "c",
        teacher=[Named(OTHER), ToyTeacher()],
        classes=OTHER,
        targets=["logits=full(f16)", "1.logits=full(f16)", "1.map=f16"],
    )
    options = Options.like(cache.identity["teacher"], taps=("1.logits", "1.map"))
    assert options.columns == (1, 3, 2, 0)
    source = sc.Source(ToyImages(12))
    live = assemble([Named(OTHER), ToyTeacher()], None, options)
    found = sc.verify_live(cache, source, live, 6)
    assert found["logits"]["cache"]["kl_T1"] < 1e-5 and found["1.logits"]["cache"]["kl_T1"] < 1e-5
    unordered = assemble([Named(OTHER), ToyTeacher()], None, Options(input_size=(8, 8)))
    with pytest.raises(MismatchError, match="its columns is None"):
        sc.verify_live(cache, source, unordered, 6)


def test_a_member_without_names_is_not_silently_in_anothers_order(tmp_path: Path, capsys):
    told = r"of the teachers 1 \(.*ToyTeacher\) names no classes, and .* another order .*Say so with --classes FILE"
    for flip_tta in (False, True):
        with pytest.raises(MismatchError, match=told):
            build(tmp_path / "c", teacher=[Named(OTHER), ToyTeacher()], flip_tta=flip_tta)
    assert not (tmp_path / "c").exists()
    build(tmp_path / "d", teacher=[Named(ToyImages.classes), ToyTeacher()], progress=True)
    assert "1 (softcache.testing:ToyTeacher) names no classes: taken to be the source's" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a\nb c\n\n", ("a", "b c")),
        ('["a", "b"]', ("a", "b")),
        ('{"0": "a", "1": "b"}', None),
        ("{0: 'a', 1: 'b'}", ("a", "b")),
        ("[]", None),
        ("", None),
        ("5", None),
    ],
)
def test_names_are_read_as_people_write_them(text: str, names: tuple[str, ...] | None):
    assert names_in(text) == names


def test_what_is_no_names_is_none():
    assert names_of({0: "a", 1: "b"}) == ("a", "b") and names_of(["a"]) == ("a",)
    for other in (5, "ab", {"a": 0}, {1: "a", 2: "b"}, [1], [], None):
        assert names_of(other) is None


# -- label smoothing -------------------------------------------------------------------------------------------


def test_label_smoothing_is_recorded_and_shown(plain: sc.Cache, tmp_path: Path, capsys):
    from softcache import cli

    cache = build(tmp_path / "c", label_smoothing=0.1)
    assert cache.identity["teacher"]["label_smoothing"] == 0.1
    assert "label_smoothing" not in plain.identity["teacher"]
    assert cli.main(["show", str(tmp_path / "c")]) == 0
    assert "trained with label smoothing 0.1" in capsys.readouterr().out
    for odd in (-0.1, 1.0):
        with pytest.raises(SpecError, match="label_smoothing"):
            build(tmp_path / "d", label_smoothing=odd)


@pytest.mark.parametrize(("smoothing", "heat", "noted"), [(0.1, 4, True), (0.1, 1, False), (None, 4, False)])
def test_the_trainer_notes_it_where_it_matters(
    tmp_path: Path, smoothing: Any, heat: int, noted: bool, capsys
):
    pytest.importorskip("torch")
    from softcache_train import config
    from softcache_train.loop import train

    cache = build(tmp_path / "c", label_smoothing=smoothing)
    options = {"student": "resnet8", "epochs": 1, "global_batch": 4, "T": heat, "out": str(tmp_path / "run")}
    train(config.check(options), cache, sc.Source(ToyImages(12)))
    told = capsys.readouterr().err
    assert ("label smoothing 0.1" in told and "Müller" in told and "% erased" in told) == noted


# -- detectors -------------------------------------------------------------------------------------------------

HOLES = ("__background__", "dog", "N/A", "ant", "cow", "N/A", "bee", "N/A")


class Detector:
    """Logits and class-wise box deltas that are their own numbers; a head with a background, and one without."""

    input_spec = ToyTeacher.input_spec
    weights_digest = ToyTeacher.weights_digest

    def __init__(self, classes: Any, layouts: dict[str, sc.Layout]):
        self.classes, self.layouts = classes, layouts

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        answers = {}
        for name, layout in self.layouts.items():
            row = np.zeros((len(pixels), 6, layout.width), np.float32)
            layout.part(row, "logits")[:] = np.arange(layout.columns["logits"])
            if "deltas" in layout.columns:
                layout.part(row, "deltas")[:] = np.arange(layout.columns["deltas"])
            answers[name] = row
        return answers


def boxed(logits: int, background: int | None = None) -> sc.Layout:
    return sc.Layout(
        {"embedding": 3, "deltas": 4 * logits, "logits": logits, "boxes": 4}, "softmax", background
    )


@pytest.mark.parametrize(
    ("classes", "layout", "expected", "columns"),
    [
        (HOLES, boxed(8, 0), [3, 6, 4, 1, 0], [2, 5, 3, 0]),  # torchvision's two-stage heads
        (HOLES, boxed(8), [3, 6, 4, 1], [3, 6, 4, 1]),  # and its dense ones
        (HOLES, boxed(9, 8), [3, 6, 4, 1, 8], [3, 6, 4, 1]),  # DETR: one more, that has no name
        (OTHER, boxed(5, 0), [2, 4, 3, 1, 0], [1, 3, 2, 0]),  # the same in front
        (SOURCE, boxed(5, 0), [1, 2, 3, 4, 0], [0, 1, 2, 3]),
    ],
)
def test_a_detectors_holes_are_left_out_and_its_background_comes_last(
    tmp_path: Path, classes: Any, layout: sc.Layout, expected: list[int], columns: list[int], capsys
):
    teacher = Detector(classes, {"detections": layout})
    cache = build(tmp_path / "c", teacher=teacher, targets=["detections=all(logits=f16)"], progress=True)
    told, found = cache.targets["detections"].layout, cache.read(0, np.arange(12))["detections"]
    assert told is not None and told.classes == 4 and told.background == (None if len(expected) == 4 else 4)
    assert found.parts["logits"][3, 2].tolist() == expected
    deltas = found.parts["deltas"][3, 2].reshape(-1, 4)
    assert np.allclose(deltas, 4 * np.array(expected)[:, None] + np.arange(4), atol=0.2)
    assert cache.identity["teacher"]["columns"] == columns and cache.classes == SOURCE
    err = capsys.readouterr().err
    assert "4 classes matched by name" in err and ("the background comes last" in err) == (
        layout.background == 0
    )
    holes = 3 if layout.background == 0 else 4  # where its name was the background's, it is no hole
    assert (f"{holes} that are none are left out" in err) == (len(classes) == 8)
    options = Options.like(cache.identity["teacher"], taps=("detections",))
    live = assemble(teacher, None, options)
    assert sc.verify_live(cache, sc.Source(ToyImages(12)), live, 5)["detections"]["cache"]["kl"] < 1e-6


@pytest.mark.parametrize(
    ("layout", "count", "expected"),
    [
        (None, 4, [1, 3, 2, 0]),
        (boxed(4), 4, [1, 3, 2, 0]),
        (boxed(5, 4), 4, [1, 3, 2, 0]),
        (boxed(5, 4), 5, [1, 3, 2, 0, 4]),
        (boxed(5, 0), 4, [1, 3, 2, 0]),
        (boxed(5, 0), 5, [2, 4, 3, 1, 0]),
    ],
)
def test_constants_of_classes_are_in_the_order_of_the_logits(
    tmp_path: Path, layout: sc.Layout | None, count: int, expected: list[int]
):
    """A prior with the background or without it; whatever has another name stays as it is."""
    teacher: Any = Named(OTHER) if layout is None else Detector(OTHER, {"detections": layout})
    plain, rows = np.arange(count, dtype=np.float32), np.arange(3 * count).reshape(count, 3)
    teacher.constants = lambda: {"class_prior": plain, "class_embedding": rows, "head": plain}
    for members in (teacher, [teacher, teacher]):
        several = isinstance(members, list)
        names = ["0.", "1."] if several else [""]
        last = "logits=full(f16)" if layout is None else "detections=all"
        cache = build(tmp_path / f"c{several}", teacher=members, targets=[name + last for name in names])
        for folder in ("0/", "1/") if several else ("",):
            found = {n: cache.constant(f"constants/{folder}{n}") for n in teacher.constants()}
            assert found["class_prior"].tolist() == expected
            assert np.array_equal(found["class_embedding"], rows[expected])
            assert np.array_equal(found["head"], plain)
        columns = cache.identity["teacher"]["columns"]
        assert [OTHER[i] for i in columns] == list(cache.classes or ())  # as docs/format.md says of a head


def test_holes_are_left_out_of_constants_too(tmp_path: Path):
    teacher: Any = Detector(HOLES, {"detections": boxed(8)})
    teacher.constants = lambda: {"class_prior": np.arange(8)}
    cache = build(tmp_path / "c", teacher=teacher, targets=["detections=all"])
    assert cache.constant("constants/class_prior").tolist() == [3, 6, 4, 1]


def test_constants_of_classes_that_are_not_so_many_are_refused_at_once(tmp_path: Path):
    teacher: Any = Detector(OTHER, {"detections": boxed(5, 0)})
    teacher.constants = lambda: {"class_prior": np.arange(7)}
    with pytest.raises(
        MismatchError, match="'class_prior' is of 7 classes, by its name, and the teacher answers 4"
    ):
        build(tmp_path / "c", teacher=teacher, targets=["detections=all"])
    assert not (tmp_path / "c").exists()


def test_a_teacher_without_names_is_told(tmp_path: Path, capsys):
    teacher = Detector(None, {"a.detections": boxed(4)})
    build(tmp_path / "c", teacher=teacher, targets=["a.detections=all"], progress=True)
    assert "the teacher names no classes: its 4 are taken to be the source's" in capsys.readouterr().err


def test_a_detector_in_order_is_left_alone(tmp_path: Path, capsys):
    teacher = Detector(SOURCE, {"a.detections": boxed(4), "b.detections": boxed(5, 4)})
    cache = build(tmp_path / "c", teacher=teacher, targets=["a.detections=all"], progress=True)
    assert "in the source's order" in capsys.readouterr().err
    assert "columns" not in cache.identity["teacher"]


def test_a_long_table_is_told_in_runs(tmp_path: Path, capsys):
    source = ToyImages(12)
    source.classes = tuple("abcdefghij")
    holes = ("__background__", *"abc", "N/A", *"defg", "N/A", "N/A", *"jih")
    teacher = Detector(holes, {"detections": boxed(14)})
    build(tmp_path / "c", source=source, teacher=teacher, targets=["detections=all"], progress=True)
    told = "a … c 1 … 3→0 … 2, d … g 5 … 8→3 … 6, h 13→7, i 12→8, j 11→9; 4 that are none are left out"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "layouts", "told"),
    [
        (
            (*SOURCE, "elk"),
            {"detections": boxed(5)},
            "has the class 'elk', which the source has not.*--ignore-labels",
        ),
        (HOLES[:-2], {"detections": boxed(6)}, "has no class 'bee', which the source has"),
        (("ant", "bee", "cow", "N/A"), {"detections": boxed(4)}, "has no class 'dog'"),
        (SOURCE, {"detections": boxed(6)}, "answers 6 classes and 4 are named"),
        (
            SOURCE,
            {"detections": boxed(4), "x.detections": boxed(6, 0)},
            "answers 4 and 5 classes and 4 are named",
        ),
        (None, {"detections": boxed(6, 0)}, "answers 5 classes and the source names 4"),
    ],
)
def test_a_detectors_classes_that_match_only_in_part_are_refused(
    tmp_path: Path, classes: Any, layouts: dict[str, sc.Layout], told: str
):
    options: dict[str, Any] = {"teacher": Detector(classes, layouts), "targets": ["detections=all"]}
    with pytest.raises(MismatchError, match=told) as caught:
        build(tmp_path / "c", **options)
    assert "--ignore-labels" in str(caught.value)
    cache = build(tmp_path / "c", **options, ignore_labels=True)
    assert cache.targets["detections"].layout == layouts["detections"] and cache.classes is None
