"""The options: the config files we ship, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from softcache_train import config

from softcache.errors import SpecError

CONFIGS = sorted((Path(__file__).parents[2] / "train" / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid_and_open_with_their_command(path):
    config.load(path)
    assert path.read_text(encoding="utf-8").startswith("# softcache-train ")
    assert path.name in path.read_text(encoding="utf-8").splitlines()[0]


def write(folder, text):
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_are_yaml(tmp_path):
    path = write(tmp_path, "student: resnet8\nepochs: 30\nlr: 0.1\n")
    c = config.load(path, ["lr=1e-2", "nesterov=false", "amp=off", "val_split=null"])
    assert (c.lr, c.nesterov, c.amp, c.val_split, c.epochs) == (0.01, False, False, None, 30)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("student: resnet8\nepoch: 3", [], "unknown option 'epoch' .did you mean 'epochs'"),
        ("student: resnet8\nepochs: 3", ["temperature=3"], "unknown option 'temperature'"),
        ("student: resnet8\nepochs: 3", ["lr"], "key=value"),
        ("student: resnet8\nepochs: 3", ["lr=-1"], "lr: "),
        ("student: resnet8\nepochs: 3", ["lr=["], "not YAML"),
        ("student: resnet8\nepochs: 3", ["lr=.inf"], "lr: Input should be a finite number"),
        ("student: resnet8\nepochs: 3", ["T=.inf"], "T: Input should be a finite number"),
        ("student: resnet8\nepochs: 3", ["weight_decay=.nan"], "weight_decay: Input should be a finite"),
        ("student: resnet8\nepochs: 3", ["alpha=.nan"], "alpha: "),
        ("student: resnet8\nepochs: 3", ["alpha=1.5"], "alpha: "),
        ("student: resnet8\nepochs: 3", ["momentum=0"], "nesterov"),
        ("student: resnet8\nepochs: 3", ["warmup_epochs=3"], "warmup_epochs"),
        ("student: resnet8\nepochs: 3", ["weights=w.safetensors"], "set teacher too"),
        ("epochs: 3", [], "student: Field required"),
        ("- a list", [], "holds no options"),
        ("a: [", [], "is not YAML"),
    ],
)
def test_errors_name_file_and_key(tmp_path, text, overrides, says):
    with pytest.raises(SpecError, match=says) as e:
        config.load(write(tmp_path, text), overrides)
    assert "\n" not in str(e.value)


def test_missing_file(tmp_path):
    with pytest.raises(SpecError, match="No such file"):
        config.load(tmp_path / "none.yaml")


def test_identity_leaves_out_what_has_no_effect_on_the_weights():
    a = config.check({"student": "resnet8", "epochs": 3})
    b = config.check({"student": "resnet8", "epochs": 3, "workers": 0, "processes": True, "out": "x"})
    assert a.identity() == b.identity()
    for other in ({"seed": 1}, {"views_per_image": 2}, {"shuffle": "blocks"}):
        assert config.check({"student": "resnet8", "epochs": 3, **other}).identity() != a.identity()


def test_runs_begun_before_an_option_was_there_go_on():
    known = config.check({"student": "resnet8", "epochs": 3}).identity()
    assert not {"objectives", "clip_norm", "views_per_image", "shuffle"} & known.keys()
