"""The commands as they are typed: what they print, where, and with which exit status."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import softcache as sc
from softcache import flags
from softcache import manifest as m
from softcache.cli import build_cache, main
from softcache.testing import flip_bit

TOY = ["--teacher", "softcache.testing:toy_teacher", "--no-progress"]
MORE = [
    *("--recipe", "random_resized_crop(8)|flip", "--views", "2", "--batch", "4", "--block-rows", "8"),
    *("--target", "logits=full(u8)", "--target", "map=int8", "--target", "vector=f16"),
]


def run(capsys: pytest.CaptureFixture[str], *arguments: object, command=main) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command."""
    try:
        status = command([str(a) for a in arguments])
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


# -- the flags and the keyword arguments are the same ----------------------------------------------------------


def test_every_keyword_of_build_is_a_flag_and_every_flag_a_keyword():
    keywords = {p.name for p in inspect.signature(sc.build).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords == set(flags.BUILD)


def test_a_flag_left_out_is_the_default_of_the_function(tmp_path: Path, small_folder: Path, capsys):
    assert run(capsys, "build", "--source", small_folder, *TOY, "-o", tmp_path / "a")[0] == 0
    by_hand = sc.build(
        tmp_path / "b", source=small_folder, teacher="softcache.testing:toy_teacher", progress=False
    )
    assert sc.open(tmp_path / "a").digest == by_hand.digest


def test_flags_build_what_the_function_builds(tmp_path: Path, small_folder: Path, small_path: Path, capsys):
    """But for the teacher's name, which is the factory's here."""
    assert (
        run(capsys, "--source", small_folder, *TOY, *MORE, "-o", tmp_path / "a", command=build_cache)[0] == 0
    )
    found = sc.diff(sc.open(tmp_path / "a"), sc.open(small_path))
    assert [field for field, *_ in found["identity"]] == ["teacher.name"]
    assert found["values"]["map"]["relative_l2"] == 0


@pytest.mark.parametrize("command", [["build"], ["plan"], ["show"], ["verify"], ["diff"], []])
def test_help_exits_with_0(capsys, command: list[str]):
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0 and "usage: softcache" in out


def test_help_of_a_build_has_an_example_and_every_flag(capsys):
    status, out, _ = run(capsys, "--help", command=build_cache)
    assert (
        status == 0
        and "example:\n  build-cache --source" in out
        and "run the same command again" in out.lower()
    )
    for name in flags.BUILD:
        assert {"targets": "--target", "licences": "--licence"}.get(
            name, "--" + name.replace("_", "-")
        ) in out


def test_the_example_of_the_help_is_a_command_that_parses(capsys, tmp_path: Path):
    """Its words are flags; only the paths are not here."""
    _, out, _ = run(capsys, "--help", command=build_cache)
    text = out.split("example:\n")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(text)
    assert words[0] == "build-cache"
    status, _, err = run(capsys, *words[1:], command=build_cache)
    assert status == 1 and "there is no data/cifar10" in err


# -- a config file ---------------------------------------------------------------------------------------------


def test_a_config_has_the_flags_names_and_flags_go_over_it(tmp_path: Path, small_folder: Path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"source: {small_folder}\nteacher: softcache.testing:toy_teacher\nprogress: false\nviews: 3\nbatch: 4\n"
        "recipe: random_resized_crop(8)|flip\ntargets: {logits: full(u8), map: int8}\ninput_size: [8, 8]\n"
    )
    assert run(capsys, "build", config, "--views", "2", "-o", tmp_path / "out")[0] == 0
    cache = sc.open(tmp_path / "out")
    assert cache.views == 2 and set(cache.targets) == {"logits", "map"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("view: 2", r"unknown key 'view' (did you mean 'views'?)"),
        ("views: two", r"--views"),
        ("views: 2.5", r"--views: 2.5 is not N"),
        ("views: true", r"--views: True is not N"),
        ("views: 99999999999999", "views is 99,999,999,999,999: from 1 to 1,048,576"),
        ("block_rows: 99999999999999", "block_rows is 99,999,999,999,999: from 1 to 16,777,216"),
        ("mean: [0.5, 0.5]", r"--mean: [0.5, 0.5] is not R,G,B"),
        ("mean: 0.5", r"--mean: 0.5 is not R,G,B"),
        ("targets: 3", r"--target: 3 is not NAME=CODEC"),
        ("- a", "holds no options"),
        ("a: [", "is not YAML"),
        ("1: 2", "unknown key '1'"),
        ("\xff", "is not YAML"),
        (None, "cannot read the config"),
    ],
)
def test_a_config_that_cannot_be_understood_is_one_line(
    tmp_path: Path, small_folder: Path, capsys, text: str | None, told: str
):
    if text is not None:
        (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    status, out, err = run(
        capsys, "build", tmp_path / "c.yaml", "--source", small_folder, *TOY, "-o", tmp_path / "out"
    )
    assert (status, out) == (1, "") and told in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- 1: usage and bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required"),
        (["biuld"], "invalid choice: 'biuld'"),
        (["build"], "--out"),
        (["build", "-o", "x", "--veiws", "2"], "unrecognized arguments: --veiws"),
        (["build", "-o", "x", "--views", "two"], "--views: 'two' is not N"),
        (["build", "-o", "x", "--mean", "a,b,c"], "--mean: 'a,b,c' is not R,G,B"),
        (["build", "-o", "x", "--mean", "1,2"], "--mean: '1,2' is not R,G,B"),
        (["build", "-o", "x", "--input-size", "1,2,3"], "--input-size: '1,2,3' is not N or H,W"),
        (["show"], "required: cache"),
        (["diff", "x"], "required: b"),
        (["verify", "x", "--live", "many"], "--live"),
    ],
)
def test_usage_errors_exit_with_1_for_2_is_damage(capsys, arguments: list[str], told: str):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "") and told in err and "usage:" in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--source", "nowhere", *TOY], "there is no nowhere"),
        (["--teacher", "softcache.testing:toy_teacher"], "--source is missing"),
        (["--source", "IMAGES"], "--teacher is missing"),
        (["--source", "IMAGES", "--teacher", "softcache.testing:toy_techer"], "did you mean 'toy_teacher'"),
        (["--source", "IMAGES", *TOY, "--recipe", "crap(8)"], "did you mean 'crop'"),
        (["--source", "IMAGES", *TOY, "--target", "logits=ful(u8)"], "did you mean 'full'"),
        (["--source", "IMAGES", *TOY, "--target", "logit=full(u8)"], "did you mean 'logits'"),
        (["--source", "IMAGES", *TOY, "--target", "logits"], "name=codec"),
        (["--source", "IMAGES", *TOY, "--recipe", "crop(999)"], "crop(999)"),
        (["--source", "IMAGES", *TOY, "--views", "0"], "views is 0: from 1"),
        (["--source", "IMAGES", *TOY, "--color", "rgb"], "RGB or BGR"),
        (["--source", "IMAGES", *TOY, "--input-size", "0"], "an input spec is"),
        (["--source", "IMAGES", *TOY, "--split", "test"], "no split 'test'"),
        (["--source", "IMAGES", *TOY, "--rank", "1"], "rank 1 of world 1"),
        (["--source", "IMAGES", *TOY, "--limit", "0"], "limit"),
        (["--source", "IMAGES", *TOY, "--layout", "imgfolder"], "did you mean 'imagefolder'"),
    ],
    ids=lambda v: " ".join(v[2:]) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, small_folder: Path, capsys, options, told: str
):
    options = [str(small_folder) if o == "IMAGES" else o for o in options]
    status, out, err = run(capsys, "build", *options, "-o", tmp_path / "out")
    assert (status, out) == (1, "") and told in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "out").exists()


# -- show, verify, diff ----------------------------------------------------------------------------------------


def test_show_tells_a_person_and_a_program(small_path: Path, capsys):
    status, out, err = run(capsys, "show", small_path)
    assert (status, err) == (0, "") and sc.open(small_path).digest in out
    for word in (
        "random_resized_crop(8)|flip",
        "full(u8)",
        "2 views",
        "top-1",
        "4 classes",
        "map",
        "softcache.testing",
    ):
        assert word in out
    status, out, err = run(capsys, "show", small_path, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and found["digest"] == sc.open(small_path).digest and found["complete"]
    assert (found["samples"], found["views"], found["blocks"]) == (20, 2, {"built": 6, "total": 6})


def test_show_of_a_build_that_is_not_finished(small_copy: Path, capsys):
    (small_copy / m.MANIFEST).unlink()
    (small_copy / "receipts" / "v0001-b000000.json").unlink()
    status, out, _ = run(capsys, "show", small_copy)
    assert status == 0 and "unfinished: 5 of 6 blocks" in out
    status, out, _ = run(capsys, "show", small_copy, "--json")
    assert status == 0 and json.loads(out)["digest"] is None


def test_verify_is_silent_on_stdout_when_all_is_well(small_path: Path, capsys):
    for more in ([], ["--read-data"]):
        status, out, err = run(capsys, "verify", small_path, *more)
        assert (status, out) == (0, "") and f"{sc.open(small_path).digest} is whole" in err
    assert json.loads(run(capsys, "verify", small_path, "--json")[1]) == []


def test_verify_names_the_damaged_file_and_exits_with_2(small_copy: Path, capsys):
    flip_bit(small_copy / "targets" / "map" / "scale" / "c.1.2.0")
    assert run(capsys, "verify", small_copy)[0] == 0  # names and sizes only
    status, out, err = run(capsys, "verify", small_copy, "--read-data")
    assert status == 2 and out.startswith("targets/map/scale/c.1.2.0 (target map, scale, view 1, shard 2): ")
    assert "1 damaged file" in err
    status, out, _ = run(capsys, "verify", small_copy, "--read-data", "--json")
    (damage,) = json.loads(out)
    assert status == 2
    assert [damage[k] for k in ("target", "field", "view", "shard")] == ["map", "scale", 1, 2]


def test_verify_tells_foreign_files_from_damaged_ones(small_copy: Path, capsys):
    (small_copy / "notes.txt").write_text("mine")
    status, out, err = run(capsys, "verify", small_copy)
    assert status == 2 and out == "notes.txt: is no file of this cache\n"
    assert "1 file not of this cache" in err and "damaged" not in err and "delete" not in err
    (small_copy / "targets" / "map" / "scale" / "c.1.2.0").unlink()
    err = run(capsys, "verify", small_copy)[2]
    assert "1 damaged file: delete what is damaged and run the same build-cache" in err
    assert "; 1 file not of this cache" in err


@pytest.mark.parametrize("command", [["show"], ["verify"], ["verify", "--read-data"], ["diff", "SAME"]])
def test_a_damaged_manifest_exits_with_2_and_a_newer_one_with_3(
    small_copy: Path, small_path: Path, capsys, command
):
    file = small_copy / m.MANIFEST
    raw = file.read_bytes()
    arguments = [str(small_path) if a == "SAME" else a for a in command]
    for changed, expected in ((raw[:-50], 2), (raw.replace(b'"version":[1,', b'"version":[7,'), 3)):
        file.write_bytes(changed)
        status, out, err = run(capsys, arguments[0], small_copy, *arguments[1:])
        assert (status, out) == (expected, "") and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_cache_exits_with_1(tmp_path: Path, capsys, command: str):
    status, _, err = run(capsys, command, tmp_path / "nowhere")
    assert status == 1 and "is no cache: it does not exist" in err


def test_diff_exits_with_3_where_there_is_one(
    small_path: Path, small_copy: Path, tmp_path: Path, small_folder, capsys
):
    assert run(capsys, "diff", small_path, small_copy)[:2] == (
        0,
        f"the same cache, {sc.open(small_path).digest}\n",
    )
    run(capsys, "build", "--source", small_folder, *TOY, *MORE, "--seed", "1", "-o", tmp_path / "other")
    status, out, _ = run(capsys, "diff", small_path, tmp_path / "other")
    assert status == 3 and "recipe.seed: 0 | 1" in out and "ids: 20 in both" in out
    status, out, _ = run(capsys, "diff", small_path, tmp_path / "other", "--json")
    assert status == 3 and not json.loads(out)["same"]


def test_a_build_of_other_settings_exits_with_3(small_copy: Path, small_folder: Path, capsys):
    status, _, err = run(
        capsys, "build", "--source", small_folder, *TOY, *MORE, "--seed", "5", "-o", small_copy
    )
    assert status == 3 and "recipe.seed is 0 there and 5 here" in err


def test_verify_live_beside_a_control(tmp_path: Path, small_folder: Path, capsys):
    run(capsys, "build", "--source", small_folder, *TOY, *MORE, "-o", tmp_path / "c")
    live = ["--live", "8", "--source", small_folder, "--teacher", "softcache.testing:toy_teacher"]
    status, out, _ = run(capsys, "verify", tmp_path / "c", *live)
    assert status == 0 and "cache and live" in out and "kl_T1" in out and "cosine" in out
    status, out, _ = run(capsys, "verify", tmp_path / "c", *live, "--json")
    found = json.loads(out)
    assert status == 0 and set(found) == {"logits", "map", "vector"}
    assert found["map"]["control"]["relative_l2"] == 0 < found["map"]["cache"]["relative_l2"] < 0.01


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--live", "3"], "--live needs --source"), (["--live", "0"], "--live")]
)
def test_verify_live_needs_a_source_and_a_teacher(small_path: Path, capsys, arguments: list[str], told: str):
    status, _, err = run(capsys, "verify", small_path, *arguments)
    assert status == 1 and told in err


def test_the_summary_of_a_build_is_json_on_stdout(tmp_path: Path, small_folder: Path, capsys):
    status, out, _ = run(capsys, "build", "--source", small_folder, *TOY, "--json", "-o", tmp_path / "c")
    assert status == 0 and json.loads(out)["digest"] == sc.open(tmp_path / "c").digest


def test_your_own_code_is_found_where_you_are(tmp_path: Path, small_folder: Path):
    """As its own process, from another folder, with output that is closed early."""
    (tmp_path / "my_own_teacher.py").write_text("from softcache.testing import toy_teacher as make\n")
    command = [sys.executable, "-m", "softcache.cli", "build", "--source", str(small_folder), "--json"]
    command += ["--teacher", "my_own_teacher:make", "-o", "out"]
    root = Path(inspect.getfile(sc)).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["identity"]["teacher"]["name"] == "my_own_teacher:make"


# -- the documentation -----------------------------------------------------------------------------------------


def test_every_command_is_in_the_readme():
    readme = Path(__file__).resolve().parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md yet")
    text = readme.read_text()
    for command in ("build-cache", "softcache plan", "softcache show", "softcache verify", "softcache diff"):
        assert command in text, f"README.md does not tell of {command!r}"


# -- the issue's commands on real data -------------------------------------------------------------------------


def test_the_commands_of_the_issue_on_cifar10(shared_data: Path, tmp_path: Path, capsys):
    for library in ("torch", "pyarrow", "softcache_train"):
        pytest.importorskip(library)
    out = tmp_path / "OUT"
    teacher = ["--teacher", "softcache_train.students:resnet56"]
    teacher += ["--weights", str(shared_data / "weights" / "cifar10_resnet56.safetensors")]
    source = ["--source", str(shared_data / "cifar10"), "--split", "test", "--limit", "64"]
    options = shlex.split(
        "--recipe 'crop(32, pad=4)|flip' --views 2 --seed 0 --target 'logits=full(f16)' --target 'layer3=int8'"
        " --block-rows 64"
    )
    status, _, err = run(capsys, *source, *teacher, *options, "-o", out, command=build_cache)
    assert status == 0 and "parquet, split 'test': 64 of 10,000 samples, 10 classes" in err and "top-1" in err
    found = json.loads(run(capsys, "show", out, "--json")[1])
    assert found["report"]["top1"] > 0.85 and found["identity"]["targets"]["layer3"]["shape"] == [64, 8, 8]
    assert run(capsys, "verify", out, "--read-data")[0] == 0
    status, text, _ = run(capsys, "verify", out, "--live", "16", *source, *teacher, "--json")
    live = json.loads(text)
    assert (
        status == 0 and live["logits"]["cache"]["kl_T1"] < 1e-5 and live["layer3"]["cache"]["cosine"] > 0.999
    )
    cache = sc.open(out)
    dense = cache[cache.ids[0], 1]["logits"].dense(T=1.0)
    assert (dense.shape, dense.dtype) == ((10,), np.float32) and np.exp(dense).sum() == pytest.approx(
        1, abs=1e-5
    )
    assert sc.Source(shared_data / "cifar10", split="test").label(cache.ids[0]) in range(10)
