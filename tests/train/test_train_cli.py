"""``softcache-train``: the issue's command, exit codes, one-line errors, nothing of the teacher's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import layouts
import pytest
from softcache_train import cli, load_student

from softcache.cli import build_cache
from softcache.source import LAYOUTS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train" / "configs"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("student: toys:plain\nepochs: 2\nglobal_batch: 25\nlr: 0.05\nworkers: 0\n")
    return str(path)


@pytest.fixture
def arguments(config, cache, images, tmp_path):
    out = str(tmp_path / "out")
    return [config, "--cache", str(cache.path), "--source", str(images), "-o", out]


def test_result_on_stdout(arguments, capsys):
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    top1, speed, student = out.splitlines()
    assert top1.startswith("top-1 ") and "ms a step" in speed and "model-0002-000000" in student
    assert "120 ids found" in err and "epoch   2/2" in err


def test_json(arguments, capsys, tmp_path):
    assert cli.main([*arguments, "--json", "--set", "epochs=1", "lr=0.01"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["epochs"] == 1 and 0 <= result["top1"] <= 1
    assert Path(result["model"]).is_file() and result["out"] == str(tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_source(layout, config, tmp_path, capsys):
    """Built by the command, trained by the command, from the path alone."""
    layouts.write(layout, tmp_path / "data", count=24)
    images = ["--source", str(tmp_path / "data")]
    out = str(tmp_path / "cache")
    teacher = ["--teacher", "softcache.testing:toy_teacher", "--ignore-labels"]
    assert build_cache([*images, *teacher, "--recipe", "resize(8)", "-o", out]) == 0
    sets = ["--set", "student=resnet8", "epochs=1", "global_batch=8", "alpha=1"]
    assert cli.main([config, "--cache", out, *images, "-o", str(tmp_path / "run"), *sets]) == 0
    err = capsys.readouterr().err
    assert "24 ids found" in err and "pixels equal" in err


def test_val_split(arguments, capsys):
    assert cli.main([*arguments, "--set", "val_split=test", "val_limit=40"]) == 0
    assert "validation on 40 images: split 'test'" in capsys.readouterr().err


def test_a_live_teacher(arguments, capsys, tmp_path):
    assert cli.main([*arguments, "--teacher", "toys:teacher_factory"]) == 0


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (["--set", "learning_rate=1"], 1, "unknown option 'learning_rate'"),
        (["--set", "student=resnet9"], 1, "unknown student 'resnet9'"),
        (["--set", "global_batch=1000"], 1, "global_batch=1000 does not fit"),
        (["--set", "val_split=dev"], 1, "no split 'dev'"),
        (["--split", "dev"], 1, "no split 'dev'"),
        (["--split", "test"], 3, "ids are not in"),
        (["--cache", "nowhere"], 1, "is no cache"),
        (["--source", "nowhere"], 1, "nowhere"),
        (["--weights", "w.safetensors"], 1, "set teacher too"),
        (["--colour"], 1, "--colour"),
    ],
)
def test_errors_are_one_line_and_their_exit_code(arguments, capsys, change, code, says):
    assert cli.main([*arguments, *change]) == code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("softcache-train: ") and says in last


@pytest.mark.parametrize("argv", [[], ["x.yaml"], ["x.yaml", "--cache", "c"]])
def test_missing_arguments(argv, capsys):
    assert cli.main(argv) == 1
    assert "required" in capsys.readouterr().err


def test_missing_config(arguments, capsys):
    assert cli.main(["nowhere.yaml", *arguments[1:]]) == 1
    assert "cannot read the config nowhere.yaml" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "example:" in out and "softcache-train demo" in out


def environment():
    paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / "train")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_saves_and_exits_130(arguments, tmp_path):
    arguments += ["--set", "epochs=2000"]
    command = [sys.executable, "-m", "softcache_train.cli", *arguments]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("epoch   2"):
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "run the same command again" in said.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "checkpoint.json").read_text())["epoch"] >= 2
    load_student(tmp_path / "out")


WITHOUT_THE_TEACHERS_SIDE = """
import sys
class Gone:
    def find_spec(self, name, *_):
        if name.startswith(("softcache.teachers", "softcache.builder")):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Gone())
from softcache_train.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_teacher_is_nowhere_on_the_machine(arguments, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for name in ("timm", "torchvision", "ultralytics", "transformers", "onnxruntime"):
        (gone / f"{name}.py").write_text("raise ImportError('not on this machine')")
    paths = environment()
    paths["PYTHONPATH"] = f"{gone}{os.pathsep}{paths['PYTHONPATH']}"
    command = [sys.executable, "-c", WITHOUT_THE_TEACHERS_SIDE, *arguments]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cifar10_with_the_real_teacher(shared_data, tmp_path, capsys):
    """The issue's commands, on fewer images."""
    import softcache

    cifar10 = shared_data / "cifar10"
    softcache.build(
        tmp_path / "cache",
        source=cifar10,
        split="test",
        limit=128,
        teacher="softcache_train.students:resnet56",
        weights=shared_data / "weights" / "cifar10_resnet56.safetensors",
        recipe="crop(32, pad=4)|flip",
        views=2,
        targets=["logits=full(f16)", "layer3=int8"],
        block_rows=64,
        progress=False,
    )
    arguments = [str(CONFIGS / "cifar10_resnet8_kd.yaml"), "--cache", str(tmp_path / "cache")]
    arguments += ["--source", str(cifar10), "-o", str(tmp_path / "out"), "--json"]
    settings = ["epochs=4", "val_limit=200", "alpha=1", "lr=0.02"]
    assert cli.main([*arguments, "--set", *settings]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["top1"] > 0.1
    assert "pixels equal" in err and "200 images: images outside the cache" in err
    losses = [e["kd"] for e in json.loads((tmp_path / "out/checkpoint.json").read_text())["history"]]
    assert losses[-1] < losses[0]
