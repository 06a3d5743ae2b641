"""The training loop: it learns, it resumes exactly, and it refuses what does not belong together."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from softcache_train import config as configs
from softcache_train import load_student, loop, train, validation
from softcache_train.progress import Progress

from softcache import canary, several
from softcache.errors import MismatchError, SpecError, TeacherError
from softcache.source import Source

ROOT = Path(__file__).parents[2]
OPTIONS = {"student": "toys:plain", "epochs": 3, "global_batch": 25, "lr": 0.01, "workers": 0}


def run(cache, source, out, *, val_source=None, **options):
    config = configs.check({**OPTIONS, "out": str(out), **options})
    return train(config, cache, source, val_source=val_source)


def weights(out):
    (path,) = Path(out).glob("model-*.safetensors")
    return path.read_bytes()


def history(out):
    entries = json.loads((Path(out) / "checkpoint.json").read_text())["history"]
    timing = ("step_ms", "images_per_second")
    return [{k: v for k, v in entry.items() if k not in timing} for entry in entries]


@pytest.fixture
def stop_after(monkeypatch):
    """Presses Ctrl-C when so many steps of the run have been taken."""

    def set_up(steps):
        taken, step = [], Progress.step

        def press(self, number):
            step(self, number)
            taken.append(number)
            if len(taken) == steps:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Progress, "step", press)

    return set_up


@pytest.mark.parametrize("alpha", [0, 0.9, 1])
def test_it_learns(cache, source, images, tmp_path, alpha):
    held = Source(images, split="test")
    result = run(cache, source, tmp_path, val_source=held, epochs=30, alpha=alpha, T=1)
    assert result.top1 > 0.8
    assert result.step_ms > 0 and result.images_per_second > 0
    assert Path(result.model).is_file() and result.epochs == 30

    student = load_student(tmp_path)
    logits = student(torch.zeros(1, 3, 16, 16))
    assert logits.shape == (1, 4)
    assert student.input_spec == cache.identity["teacher"]["input_spec"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 2),
        ({}, 4),  # the last step of an epoch
        ({"student": "toys:dropout"}, 6),
        ({"student": "toys:dropout", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}, 7),
        ({"student": "resnet8", "workers": 2, "warmup_epochs": 1}, 5),
        ({"teacher": "toys:teacher_factory"}, 3),
    ],
)
def test_a_resumed_run_ends_with_the_very_same_weights(cache, source, tmp_path, stop_after, options, steps):
    run(cache, source, tmp_path / "whole", **options)
    stop_after(steps)
    with pytest.raises(KeyboardInterrupt):
        run(cache, source, tmp_path / "stopped", **options)
    stopped = json.loads((tmp_path / "stopped" / "checkpoint.json").read_text())
    assert stopped["epoch"] * 4 + stopped["step"] == steps
    assert weights(tmp_path / "stopped") != weights(tmp_path / "whole")
    run(cache, source, tmp_path / "stopped", **options)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_two_runs_of_one_seed_are_the_same_and_of_two_are_not(cache, source, tmp_path):
    for out, seed, workers in (("a", 0, 0), ("b", 0, 3), ("c", 1, 0)):
        run(cache, source, tmp_path / out, seed=seed, workers=workers)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_killed_run_goes_on_from_its_last_checkpoint(cache, source, tmp_path, monkeypatch):
    taken, step = [], Progress.step

    def die(self, number):
        step(self, number)
        taken.append(number)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Progress, "step", die)
        run(cache, source, tmp_path / "killed", checkpoint_every=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    killed = json.loads((tmp_path / "killed" / "checkpoint.json").read_text())
    assert (killed["epoch"], killed["step"]) == (1, 2)
    run(cache, source, tmp_path / "killed", checkpoint_every=2)
    run(cache, source, tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_finished_run_says_its_result_again(cache, source, tmp_path, capsys):
    first = run(cache, source, tmp_path)
    before = weights(tmp_path)
    capsys.readouterr()
    assert run(cache, source, tmp_path) == first
    assert "holds 3 epochs and 0 steps: finished" in capsys.readouterr().err
    assert weights(tmp_path) == before


def test_another_runs_folder_is_refused(cache, source, tmp_path):
    run(cache, source, tmp_path / "run")
    with pytest.raises(MismatchError, match=r"lr=0\.01, this one lr=0\.1"):
        run(cache, source, tmp_path / "run", lr=0.1)
    other = toys.build(tmp_path / "other", source, views=2)
    with pytest.raises(MismatchError, match="cache="):
        run(other, source, tmp_path / "run")
    run(cache, source, tmp_path / "run", workers=2, val_limit=5)  # these decide no weight


def test_the_default_folder_is_one_for_each_cache_and_set_of_options(cache, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outs = {run(cache, source, "", seed=seed).out for seed in (0, 1, 0)}
    assert len(outs) == 2 and all(out.startswith("runs/toys.plain-") for out in outs)


def test_a_diverged_run_keeps_its_last_checkpoint(cache, source, tmp_path):
    with pytest.raises(loop.TrainingDiverged, match=r"lower lr .*the last checkpoint is kept"):
        run(cache, source, tmp_path, lr=1e12, warmup_epochs=0, checkpoint_every=1)
    assert all(torch.isfinite(p).all() for p in load_student(tmp_path).parameters())


def test_a_run_that_diverged_before_its_first_checkpoint_says_so(cache, source, tmp_path):
    with pytest.raises(loop.TrainingDiverged, match="there is no checkpoint yet"):
        run(cache, source, tmp_path, lr=1e12, warmup_epochs=0)
    assert not (tmp_path / "checkpoint.json").exists()


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    config = configs.check({**OPTIONS, "lr": 0.4, "warmup_epochs": 1, "epochs": 5})
    rates = [loop.learning_rate(config, step, 10) for step in range(50)]
    assert rates[:10] == pytest.approx([0.4 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == 0.4 == max(rates)
    assert rates[30] == pytest.approx(0.2) and 0 < rates[49] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_resumes_exactly(cache, source, tmp_path, monkeypatch, stop_after, dtype):
    """As on CUDA, but here; float16 comes with loss scaling."""
    assert loop._autocast_dtype(configs.check(OPTIONS), torch.device("cpu")) is None
    monkeypatch.setattr(loop, "_autocast_dtype", lambda config, device: dtype)
    overflowing = partial(torch.amp.GradScaler, init_scale=2.0**20)  # its first steps are skipped
    monkeypatch.setattr(torch.amp, "GradScaler", overflowing)
    run(cache, source, tmp_path / "whole")
    stop_after(6)
    with pytest.raises(KeyboardInterrupt):
        run(cache, source, tmp_path / "stopped")
    run(cache, source, tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    whole, stopped = (
        json.loads((tmp_path / out / "checkpoint.json").read_text())["scaler"] for out in ("whole", "stopped")
    )
    assert whole == stopped and bool(whole) == (dtype is torch.float16)


def test_online_and_cached_training_agree(cache, source, tmp_path):
    run(cache, source, tmp_path / "cached", epochs=4)
    run(cache, source, tmp_path / "live", epochs=4, teacher="toys:teacher_factory")
    for a, b in zip(history(tmp_path / "cached"), history(tmp_path / "live"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_a_live_teacher_that_cannot_be_loaded(cache, source, tmp_path):
    with pytest.raises(TeacherError):
        run(cache, source, tmp_path, teacher="toys:no_such_teacher")
    with pytest.raises(SpecError, match="leave --teacher out"):
        run(cache, source, tmp_path, teacher="toys:teacher_factory", objectives=["ce"])


# -- validation ------------------------------------------------------------------------------------


def split(cache, source, val_source, limit):
    return validation.split(cache, source, canary.pair(cache, source), val_source, limit)


def test_images_outside_the_cache_are_validated_on(images, source, tmp_path):
    part = toys.build(tmp_path / "c", Source(images, split="train", limit=20))
    divided = split(part, source, None, limit=2000)
    assert len(divided.train) == 20 and len(divided.val) == 100
    assert not {source.ids[i] for i in divided.val} & set(part.ids)
    assert len(split(part, source, None, limit=30).val) == 30


def test_else_a_tenth_of_the_cache_is_held_out(cache, source):
    divided = split(cache, source, None, limit=2000)
    assert len(divided.train) == 108 and len(divided.val) == 12
    trained = {cache.ids[i] for i in divided.train}
    assert not trained & {source.ids[i] for i in divided.val}
    assert split(cache, source, None, limit=5).train.tolist() == divided.train.tolist()


def test_an_id_of_another_split_is_another_image(cache, source, images):
    test = Source(images, split="test")
    divided = split(cache, source, test, limit=2000)
    held = validation.load(cache, source, divided, (16, 16))
    assert len(divided.train) == 120 and len(held) == 60 and "split 'test'" in held.message


def test_an_image_of_the_cache_is_left_out_of_a_given_split(cache, source, images, tmp_path):
    with pytest.raises(MismatchError, match="none is left to validate on"):
        same = Source(images, split="train")
        divided = split(cache, source, same, limit=2000)
        validation.load(cache, source, divided, (16, 16))
    part = toys.build(tmp_path / "c", Source(images, split="train", limit=20))
    divided = split(part, source, Source(images, split="train"), limit=2000)
    held = validation.load(part, source, divided, (16, 16))
    assert len(held) == 100 and "20 left out" in held.message


def test_unreadable_images_are_left_out_of_validation(tmp_path):
    folder = toys.write_imagefolder(tmp_path / "images", "train", 30, seed=0)
    source = Source(folder, split="train")
    cache = toys.build(tmp_path / "c", Source(folder, split="train", limit=10))
    divided = split(cache, source, None, limit=2000)
    path = folder / "train" / source.ids[divided.val[0]]
    path.write_bytes(b"not an image")
    held = validation.load(cache, source, divided, (16, 16))
    assert len(held) == 109 and "1 left out" in held.message


class Unlabelled(toys.Dataset):
    def __getitem__(self, i):
        return self.items[i][0]


def test_without_labels_only_the_teacher_is_learnt_from(tmp_path):
    source = Source(Unlabelled(15))
    cache = toys.build(tmp_path / "c", source)
    with pytest.raises(SpecError, match="--set alpha=1"):
        run(cache, source, tmp_path / "run")
    result = run(cache, source, tmp_path / "run", alpha=1)
    assert result.top1 is None
    assert np.isfinite([entry["loss"] for entry in history(tmp_path / "run")]).all()


def test_a_target_that_is_not_there(cache, source, tmp_path):
    with pytest.raises(SpecError, match="did you mean 'logits'"):
        run(cache, source, tmp_path, target="logit")


# -- several processes -----------------------------------------------------------------------------

RANKS = """
import os, sys, softcache
import torch; torch.set_num_threads(1)
from softcache_train import config, progress, train
cache, images, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
steps, step = [], progress.Progress.step
progress.Progress.step = lambda self, number: (steps.append(number), step(self, number))
train(config.check(options), softcache.open(cache), softcache.Source(images, split="train"))
with open(options["out"] + "/steps-" + os.environ["RANK"], "w") as file:
    print(steps, file=file)
"""


def environment():
    paths = [str(Path(__file__).parent), str(ROOT), str(ROOT / "train")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_two_processes_train_as_one(cache, source, images, tmp_path, stop_after):
    """Two go on, in mid-epoch, with what one began, and end where one alone does.

    25 rows a step are 12 and 13. Without batch norm the mean over a batch is that over its ranks.
    """
    run(cache, source, tmp_path / "one", epochs=2)
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        run(cache, source, tmp_path / "two", epochs=2)
    options = {**OPTIONS, "epochs": 2, "checkpoint_every": 3, "out": str(tmp_path / "two")}
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "--standalone", str(script), str(cache.path), str(images), repr(options)]
    done = subprocess.run(command, env=environment(), timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [(tmp_path / "two" / f"steps-{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1] == "[3, 4, 1, 2, 3, 4]\n"
    for a, b in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    two, one = (load_student(tmp_path / out).state_dict() for out in ("two", "one"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("codec", ["topk(2)", "topk(1, tail=spread)", "argmax"])
def test_what_is_kept_in_part_teaches_too(source, tmp_path, codec):
    cache = toys.build(tmp_path / "c", source, targets={"logits": codec})
    result = run(cache, source, tmp_path / "run", alpha=1.0)
    losses = [entry["kd"] for entry in history(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert result.top1 is not None
    if codec != "argmax":
        with pytest.raises(SpecError, match="outside the 1 to 8"):
            run(cache, source, tmp_path / "hot", alpha=1.0, T=20)
        run(cache, source, tmp_path / "labels", alpha=0, epochs=1, T=20)  # reads no target


@pytest.mark.parametrize("combine", ["arithmetic", "geometric"])
@pytest.mark.parametrize("codec", ["topk(2)", "argmax"])
def test_what_the_objective_would_refuse_is_refused_before_the_images_are_read(
    source, tmp_path, monkeypatch, codec, combine
):
    paths = [toys.build(tmp_path / name, source, targets={"logits": codec}).path for name in ("a", "b")]
    both = several.open(paths)
    monkeypatch.setattr(canary, "pair", None)
    two = {"target": ["0.logits", "1.logits"], "combine": combine}
    with pytest.raises(
        SpecError, match=r"'0\.logits' holds .* several targets are combined from whole logits"
    ):
        run(both, source, tmp_path / "run", **two)
    if codec != "argmax":
        with pytest.raises(SpecError, match="outside the 1 to 8"):
            run(several.open(paths[0]), source, tmp_path / "run", T=20)


def test_with_several_caches_all_targets_of_a_name_are_suggested(cache, source, tmp_path):
    both = several.open([cache.path, cache.path])
    with pytest.raises(SpecError, match=r"no target 'logits' .did you mean target=.0\.logits, 1\.logits.\?"):
        run(both, source, tmp_path)


def test_the_first_views_alone(cache, source, tmp_path):
    one = run(cache, source, tmp_path / "one", views=1)
    assert one.epochs
    with pytest.raises(SpecError, match="views=9, and the cache"):
        run(cache, source, tmp_path / "nine", views=9)
