"""Arrays that somebody has become a cache: the same numbers, on the right images; what cannot be right is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.cli import main
from softcache.errors import DamageError, InvalidRow, MismatchError, SoftcacheError, SourceError, SpecError
from softcache.exchange import hdf5, webdataset
from softcache.testing import ToyImages, toy_teacher

N, CLASSES = 20, 4
FIXED = "resize(8)|center_crop(8)"


@pytest.fixture
def source(small_folder: Path) -> sc.Source:
    return sc.Source(small_folder)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (N, CLASSES)).astype(np.float32)


def bring(tmp_path: Path, source: Any, held: dict[str, np.ndarray], **said: Any) -> sc.Cache:
    np.savez(tmp_path / "old.npz", **held)
    said = {"arrays": {"logits": "logits"}, "ids": "order", "recipe": FIXED, "progress": False} | said
    return sc.import_arrays(tmp_path / "cache", tmp_path / "old.npz", source=source, **said)


def shuffled(source: sc.Source, values: np.ndarray) -> dict[str, np.ndarray]:
    order = np.random.default_rng(1).permutation(N)
    return {"logits": values[order], "names": np.array(source.ids)[order]}


# -- what comes in -------------------------------------------------------------------------------------------


def test_rows_find_their_images_by_id(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    cache = bring(tmp_path, source, shuffled(source, logits), ids="names", block_rows=8)
    np.testing.assert_array_equal(
        cache.read(0, np.arange(N))["logits"].values, logits.astype(np.float16).astype(np.float32)
    )
    assert sc.verify(cache, read_data=True) == []
    assert (
        cache.identity["teacher"]["name"].startswith("import:")
        and cache.identity["teacher"]["weights"] is None
    )
    report = cache.manifest.report if cache.manifest else None
    assert report and report.top1 == (logits.argmax(1) == source.labels).mean()


def test_a_known_recipe_is_replayed(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    """The views are those that a build of that recipe would make, and their pixels are checked."""
    cache = bring(tmp_path, source, {"logits": logits})
    recipe = sc.Recipe(FIXED, 0)
    for i, view in enumerate(cache.read_views(0, np.arange(N))):
        height, width = source.image(i).shape[:2]
        assert view == recipe.view(source.ids[i], 0, width, height)
    assert cache.replayable and "pixels equal" in sc.pair(cache, source).message
    assert len(sc.with_targets(source, cache)) == N


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_kind_of_file_changes_nothing(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    h5py = pytest.importorskip("h5py")
    found = shuffled(source, logits)
    bring(tmp_path, source, found, ids="names")
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.create_dataset("train/logits", data=found["logits"], chunks=(7, 3), compression="gzip")
        file["train/names"] = found["names"].tolist()  # of varying length, as h5py writes lists
        file["train/raw"] = np.char.encode(found["names"])
    np.save(tmp_path / "logits.npy", logits)
    np.savez_compressed(tmp_path / "small.npz", **found)
    said: dict[str, Any] = {"source": source, "recipe": FIXED, "progress": False}
    for i, (name, array, ids) in enumerate(
        [
            ("old.h5", "/train/logits", "/train/names"),
            ("old.h5", "train/logits", "train/raw"),
            ("small.npz", "logits", "names"),
        ]
    ):
        sc.import_arrays(tmp_path / str(i), tmp_path / name, arrays={"logits": array}, ids=ids, **said)
        assert files(tmp_path / str(i)) == files(tmp_path / "cache")
    plain = sc.import_arrays(
        tmp_path / "npy", tmp_path / "logits.npy", arrays={"logits": "logits"}, ids="order", **said
    )
    np.testing.assert_array_equal(
        plain.read(0, np.arange(N))["logits"].values,
        sc.open(tmp_path / "cache").read(0, np.arange(N))["logits"].values,
    )


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i4"])
def test_any_numbers_do(dtype: str, source: sc.Source, tmp_path: Path):
    values = np.random.default_rng(2).integers(-50, 50, (N, CLASSES)).astype(dtype)
    cache = bring(tmp_path, source, {"logits": values})
    np.testing.assert_array_equal(cache.read(0, np.arange(N))["logits"].values, values.astype(np.float32))


def test_many_pieces_are_as_one(
    source: sc.Source, logits: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bring(tmp_path, source, shuffled(source, logits), ids="names")
    before = files(tmp_path / "cache")
    monkeypatch.setattr("softcache.exchange.h5file.PIECE", 3 * 16)
    monkeypatch.setattr("softcache.exchange.foreign._BATCH", 1024)
    np.savez(tmp_path / "old.npz", **shuffled(source, logits))
    said: dict[str, Any] = {
        "arrays": {"logits": "logits"},
        "ids": "names",
        "recipe": FIXED,
        "progress": False,
    }
    sc.import_arrays(tmp_path / "again", tmp_path / "old.npz", source=source, **said)
    assert files(tmp_path / "again") == before


def test_it_goes_on_after_a_stop(
    source: sc.Source, logits: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from softcache.exchange import foreign

    calls = []

    def stops(*args: Any) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    real = foreign.keep
    monkeypatch.setattr(foreign, "keep", stops)
    with pytest.raises(KeyboardInterrupt):
        bring(tmp_path, source, {"logits": logits}, block_rows=8)
    monkeypatch.setattr(foreign, "keep", real)
    cache = bring(tmp_path, source, {"logits": logits}, block_rows=8)
    assert sc.verify(cache, read_data=True) == []
    with pytest.raises(MismatchError, match=r"teacher\.name"):  # other numbers are another teacher
        bring(tmp_path, source, {"logits": logits + 1}, block_rows=8)


def test_classes_are_put_into_the_sources_order(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    assert source.classes == ToyImages.classes
    cache = bring(tmp_path, source, {"logits": logits}, classes=["dog", "ant", "cow", "bee"])
    expected = logits[:, [1, 3, 2, 0]].astype(np.float16)
    np.testing.assert_array_equal(cache.read(0, np.arange(N))["logits"].values, expected)
    assert cache.identity["teacher"]["columns"] == [1, 3, 2, 0]
    with pytest.raises(MismatchError, match="emu"):
        sc.import_arrays(
            tmp_path / "other", tmp_path / "old.npz", source=source, arrays={"logits": "logits"}, ids="order",
            recipe=FIXED, classes=["dog", "ant", "cow", "emu"], progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("recipe", [FIXED, "unknown"])
def test_its_card_names_no_command_that_would_build_it(
    recipe: str, source: sc.Source, logits: np.ndarray, tmp_path: Path
):
    from softcache.card import markdown

    card = markdown(bring(tmp_path, source, {"logits": logits}, recipe=recipe, input_size=8))
    assert "cannot be rebuilt without" in card and "build-cache" not in card
    assert ("not replayable" in card) == (recipe == "unknown")


# -- unknown recipes -----------------------------------------------------------------------------------------


@pytest.fixture
def unknown(source: sc.Source, tmp_path: Path) -> tuple[sc.Cache, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    arrays = {
        "logits": rng.normal(0, 3, (N, 3, CLASSES)).astype(np.float16),
        "maps": rng.normal(size=(N, 3, 8, 4, 4)).astype(np.float32),
    }
    cache = bring(
        tmp_path, source, arrays, arrays={"logits": "logits", "layer3": "maps"}, targets=["logits=full(f16)", "layer3=f16"],
        recipe="unknown", views=3, input_size=8, block_rows=8,
    )  # fmt: skip
    return cache, arrays


def test_views_of_an_unknown_recipe_are_kept_and_said_to_be_unknown(
    unknown: tuple[sc.Cache, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]
):
    cache, arrays = unknown
    for view in range(3):
        said = cache.read(view, np.arange(N))
        np.testing.assert_array_equal(said["logits"].values, arrays["logits"][:, view])
        np.testing.assert_array_equal(said["layer3"].values, arrays["maps"][:, view].astype(np.float16))
    assert cache[cache.ids[3], 1]["logits"].values.tolist() == arrays["logits"][3, 1].tolist()
    assert not cache.replayable and cache.identity["recipe"]["spec"] == "unknown"
    assert sc.verify(cache, read_data=True) == []
    assert cache.equivariance == {}  # nobody was asked
    assert main(["show", str(cache.path)]) == 0
    assert "NOT REPLAYABLE" in capsys.readouterr().out


def test_what_would_show_its_views_refuses(
    unknown: tuple[sc.Cache, dict[str, np.ndarray]], source: sc.Source, tmp_path: Path
):
    cache, _ = unknown
    for ask in (
        lambda: sc.with_targets(source, cache),
        lambda: sc.overlay(cache, source, tmp_path / "pictures"),
        lambda: sc.open([cache.path, cache.path]),
        lambda: cache[cache.ids[0], 0].view,
        lambda: sc.verify_live(cache, source, None, 4),  # type: ignore[arg-type]
    ):
        with pytest.raises(MismatchError, match="unknown recipe"):
            ask()


def test_nobody_has_the_teacher_of_imported_targets(
    source: sc.Source,
    small_folder: Path,
    logits: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    cache = bring(tmp_path, source, {"logits": logits})
    options: dict[str, Any] = {"source": source, "teacher": toy_teacher(), "progress": False}
    for asked in ({"targets": ["vector=f16"]}, {"targets": ["logits=full(f16)"]}):
        with pytest.raises(MismatchError, match="imported from arrays, and nobody has the teacher"):
            sc.extend(cache.path, **asked, **options)
    with pytest.raises(MismatchError, match="imported from arrays, and nobody has the teacher"):
        sc.verify_live(cache, source, toy_teacher(), 4)
    words = ["--source", str(small_folder), "--teacher", "softcache.testing:toy_teacher"]
    for command in (["extend", str(cache.path), "--views", "2"], ["verify", str(cache.path), "--live", "4"]):
        assert main([*command, *words]) == 3
        assert "nobody has the teacher that said them" in capsys.readouterr().err


def test_an_array_of_nearly_that_name_is_named(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    refused(tmp_path, source, {"logits": logits}, r"did you mean 'logits'\?", arrays={"logits": "/logits"})


@pytest.mark.parametrize("embed", ["images", "views"])
def test_no_pixels_are_put_beside_what_nobody_saw(
    embed: Any,
    unknown: tuple[sc.Cache, dict[str, np.ndarray]],
    source: sc.Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    cache, _ = unknown
    with pytest.raises(MismatchError, match=f"unknown recipe.* --embed-{embed} shows"):
        webdataset.export(cache, tmp_path / "tars", embed=embed, source=source)
    assert not (tmp_path / "tars").exists()
    webdataset.export(cache, tmp_path / "plain")
    pytest.importorskip("torch")
    import softcache_train as st

    with monkeypatch.context() as before:  # one that was made when that was not refused
        before.setattr(sc.Cache, "require_replayable", lambda *_: None)
        webdataset.export(cache, tmp_path / "tars", embed=embed, source=source)
    with pytest.raises(MismatchError, match="unknown recipe"):
        st.TarLoader(tmp_path / "tars", global_batch=5)


def test_the_trainer_takes_it_frozen_only(
    unknown: tuple[sc.Cache, dict[str, np.ndarray]], source: sc.Source, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("torch")
    import softcache_train as st

    cache, arrays = unknown
    for said in ({}, {"policy": "warp", "recipe": "flip"}):
        with pytest.raises(MismatchError, match="unknown recipe"):
            st.Loader(cache, source, global_batch=5, workers=0, **said)
    loader = st.Loader(
        cache, source, global_batch=5, workers=0, policy="frozen", recipe="random_resized_crop(8)|flip"
    )
    assert "frozen" in caplog.text
    for batch in loader:
        assert batch.images.shape == (5, 3, 8, 8)
        np.testing.assert_array_equal(batch["logits"].values, arrays["logits"][batch.index, 0])


# -- what cannot be right ------------------------------------------------------------------------------------


def refused(tmp_path: Path, source: Any, held: dict[str, np.ndarray], match: str, **said: Any) -> None:
    with pytest.raises(SoftcacheError, match=match):
        bring(tmp_path, source, held, **said)
    assert not (tmp_path / "cache").exists()


def test_ids_that_are_missing_extra_or_twice(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    found = shuffled(source, logits)
    lost = str(found["names"][-1])
    few = {name: values[:-1] for name, values in found.items()}
    refused(tmp_path, source, few, f"1 ids of the source are not in 'names': '{lost}'", ids="names")
    found["names"][0] = "zoo/x.png"
    refused(tmp_path, source, found, r"1 ids are not in the source: 'zoo/x\.png'.*like 'ant/", ids="names")
    found["names"][0] = found["names"][1]
    refused(tmp_path, source, found, "more than once", ids="names")
    few = {name: values[:-1] for name, values in shuffled(source, logits).items()}
    refused(tmp_path, source, few, "20 samples", ids="order")
    refused(tmp_path, source, few | {"names": found["names"]}, "first axis is samples", ids="names")

    cache = bring(tmp_path, source, few, ids="names", ignore_missing=True)
    assert [cache.ids[i] for i in cache.invalid] == [lost]
    with pytest.raises(InvalidRow, match="no row"):
        _ = cache[lost, 0]
    order = np.array([few["names"].tolist().index(i) for i in cache.ids if i != lost])
    kept = cache.read(0, np.setdiff1d(np.arange(N), cache.invalid))["logits"].values
    np.testing.assert_array_equal(kept, few["logits"][order].astype(np.float16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_numbers_that_are_none_are_named(bad: float, source: sc.Source, logits: np.ndarray, tmp_path: Path):
    wrong = logits.astype(np.float64)
    wrong[7, 2] = bad
    refused(tmp_path, source, {"logits": wrong}, rf"row 7 \('{source.ids[7]}'\) holds NaN")


def test_numbers_beyond_the_codec_are_named(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    with pytest.raises(SoftcacheError, match=source.ids[7]):
        bring(tmp_path, source, {"logits": np.where(np.arange(N)[:, None] == 7, 1e6, logits)})


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_probabilities_are_seen_and_taken_when_they_are_announced(
    dtype: str, source: sc.Source, logits: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    p = softmax(logits * 4).astype(dtype)
    refused(tmp_path, source, {"logits": p}, "holds probabilities.*--from probabilities")
    refused(tmp_path, source, {"logits": logits}, "row 0.*no row of probabilities", form="probabilities")
    refused(tmp_path, source, {"logits": logits}, "row 0.*log-probability", form="log_probabilities")
    cache = bring(tmp_path, source, {"logits": p}, form="probabilities", progress=True)
    said = cache.read(0, np.arange(N))["logits"]
    floor = 6e-8 if dtype == "f2" else 1e-12
    expected = np.log(np.maximum(p.astype(np.float64), floor))
    np.testing.assert_allclose(said.values, expected, rtol=2e-3)
    told = capsys.readouterr().err
    assert ("probabilities (" in told and "are 0" in told) == (dtype == "f2"), told
    if dtype == "f4":
        np.testing.assert_allclose(np.exp(said.dense(1.0)), p, atol=2e-3)


def test_log_probabilities_are_logits(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    logs = np.log(softmax(logits)).astype(np.float32)
    cache = bring(tmp_path, source, {"logits": logs}, form="log_probabilities")
    np.testing.assert_allclose(cache.read(0, np.arange(N))["logits"].dense(1.0), logs, atol=5e-3)


def test_recipes_that_cannot_be_replayed(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    found = {"logits": logits}
    refused(
        tmp_path,
        source,
        found,
        "what 'random_resized_crop' drew.*--recipe unknown",
        recipe="random_resized_crop(8)",
    )
    refused(tmp_path, source, found, "--input-size", recipe="unknown")
    views = {"logits": np.stack([logits, logits], axis=1)}
    refused(tmp_path, source, views, "in one way", views=2)
    refused(tmp_path, source, views, "--views V", recipe="unknown", input_size=8)
    turned = {"logits": np.stack([logits, logits])}
    refused(tmp_path, source, turned, r"the source has 20 samples", recipe="unknown", input_size=8, views=2)


def test_mappings_that_do_not_fit(source: sc.Source, logits: np.ndarray, tmp_path: Path):
    found = {"logits": logits, "names": np.array(source.ids), "flags": np.ones((N, 4), bool)}
    refused(
        tmp_path, source, found, "no array 'loggits'.*there are logits, names", arrays={"logits": "loggits"}
    )
    refused(tmp_path, source, found, "holds text", arrays={"logits": "names"})
    refused(tmp_path, source, found, "holds bool", arrays={"logits": "flags"})
    refused(tmp_path, source, found, "ids are text", ids="logits")
    refused(tmp_path, source, found, "--map vector=ARRAY", targets=["logits=full(f16)", "vector=f16"])
    refused(tmp_path, source, found, "no --target keeps", arrays={"logits": "logits", "vector": "logits"})
    refused(tmp_path, source, found, "unknown|logitss", form="logitss")
    refused(tmp_path, source, {"logits": logits[:, :3]}, "3 classes and the source names 4")
    refused(tmp_path, source, {"logits": np.asfortranarray(logits)}, "Fortran order")


def test_a_file_that_is_none(source: sc.Source, tmp_path: Path):
    for name, content, error in (
        ("a.pt", b"\x80\x04K\x01.", SpecError),
        ("a.npz", b"PK\x03\x04 and then nothing", DamageError),
        ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr'", DamageError),
        ("none", None, SourceError),
    ):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(error):
            sc.import_arrays(
                tmp_path / "cache",
                tmp_path / name,
                source=source,
                arrays={"logits": "a"},
                ids="order",
                recipe=FIXED,
            )


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(source: sc.Source, small_folder: Path, logits: np.ndarray, tmp_path: Path, capsys: Any):
    np.savez(tmp_path / "old.npz", **shuffled(source, logits))
    (tmp_path / "names.txt").write_text("\n".join(ToyImages.classes))
    file, out = str(tmp_path / "old.npz"), str(tmp_path / "cache")
    assert main(["import", file, "-o", out]) == 1
    assert "--source is missing" in (told := capsys.readouterr().err) and "logits, names" in told
    command = [
        "import",
        file,
        "-o",
        out,
        "--source",
        str(small_folder),
        "--map",
        "logits=logits",
        "--ids",
        "names",
    ]
    assert main(command) == 1
    assert "--recipe is missing" in capsys.readouterr().err
    command += ["--recipe", FIXED, "--target", "logits=full(u8)", "--classes", str(tmp_path / "names.txt")]
    assert main([*command, "--no-progress"]) == 0
    assert capsys.readouterr().err.strip() == f"{out}: {sc.open(out).digest}"
    assert main(["import", file, "-o", out, *command[4:], "--map", "logits"]) == 1
    assert "TARGET=ARRAY" in capsys.readouterr().err


# -- a real network's ----------------------------------------------------------------------------------------


def test_logits_of_a_real_network_come_in_and_teach(shared_data: Path, tmp_path: Path):
    """What plain torch says of CIFAR images, saved with numpy, imported by id, read, exported, and trained on."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("pyarrow")
    h5py = pytest.importorskip("h5py")
    import softcache_train as st
    from safetensors.torch import load_file
    from softcache_train.students import resnet20

    source = sc.Source(shared_data / "cifar10", split="test", limit=60)
    network = resnet20(10).eval()
    network.load_state_dict(load_file(shared_data / "weights" / "cifar10_resnet20.safetensors"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = np.stack([source.image(i) for i in range(60)]).astype(np.float32) / 255
    with torch.no_grad():
        pixels = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2).float()
        logits = network(pixels).numpy()
    order = np.random.default_rng(0).permutation(60)
    np.savez(tmp_path / "old.npz", z=logits[order], names=np.array(source.ids)[order])

    cache = sc.import_arrays(
        tmp_path / "cache", tmp_path / "old.npz", source=source, arrays={"logits": "z"}, ids="names", recipe="identity",
        targets={"logits": "full(u8)"}, input_size=32, mean=mean, std=std, progress=False,
    )  # fmt: skip
    kept = cache.read(0, np.arange(60))["logits"]
    np.testing.assert_allclose(kept.values, logits, atol=np.ptp(logits, axis=1).max() / 255)
    report = cache.manifest.report if cache.manifest else None
    assert report and report.top1 and report.top1 > 0.8  # these are the images

    student = st.students.make("resnet8", 10)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = []
    for batch in st.Loader(cache, source, global_batch=20, workers=0):
        row = int(batch.index[0])
        np.testing.assert_allclose(batch.images[0], pixels[row], atol=1e-5)  # the very pixels
        loss = st.kd(student(batch.images), batch["logits"], T=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()

    hdf5.export(cache, tmp_path / "a.h5", decoded=True)
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["decoded/logits"][0], kept.values)
    assert hdf5.restore(tmp_path / "a.h5", tmp_path / "back").digest == cache.digest
