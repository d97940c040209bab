"""What a recipe can ask for, and the recipes of the package."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from forked import started
from helpers import ONE_IMAGE, Stopped, flip_last_bit, same, stop_at, timeless
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_data import encode, picture, write

from timm_attn.cli import main
from timm_attn.errors import UserError
from timm_attn.load import load_model
from timm_attn.publish import export
from timm_attn.training import Interrupted, Recipe, batches, resume, train, train_seeds, validate
from timm_attn.training import checkpoint as checkpoints
from timm_attn.training import loop as loops
from timm_attn.training import trainer as trainers
from timm_attn.training.optim import make_optimizer, make_scheduler
from timm_attn.training.recipe_file import load_recipe, recipe_names
from timm_attn.training.run import read_lines, read_metrics, read_results
from timm_attn.training.seeds import gather_seeds, resume_seeds, seed_runs
from timm_attn.weights import WeightsError

TINY = ("channels=[8,8,8]", "layers=[1,1,1]")
FAST = {
    "data": "digits",
    "img_size": 8,
    "crop_padding": 1,
    "batch_size": 256,
    "epochs": 2,
    "lr": 0.05,
    "model_kwargs": TINY,
}


#: PyTorch 2.14.1 writes out of bounds in the backward pass of strided 1×1 convolutions with 8 channels, channels
#: last, on maps of 64 pixels.
WIDER = ("channels=[16,16,16]", "layers=[1,1,1]")


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


OPTIONS = {
    "ema": {"ema_decay": 0.9, "ema_warmup": True},
    "mixup": {"mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1, "mixup_off_epoch": 1},
    "bce": {"loss": "bce", "mixup": 0.2, "opt": "lamb", "lr": 5e-3, "clip_grad": 1.0},
    "smoothing": {"smoothing": 0.1, "accumulation": 4, "drop_path": 0.3},
    "adamw": {"opt": "adamw", "lr": 1e-3, "layer_decay": 0.7, "opt_args": ("betas=[0.9,0.95]",)},
    "lion": {"opt": "lion", "lr": 1e-4, "clip_grad": 0.1, "clip_mode": "agc"},
    "adafactor": {"opt": "adafactorbv", "lr": 1e-3, "sched": "poly"},
    "lookahead": {"opt": "lookahead_sgd", "sched": "tanh"},
    "onecycle": {"sched": "onecycle", "warmup_epochs": 0.5, "clip_grad": 0.5, "clip_mode": "value"},
    "augment": {
        "reprob": 0.5,
        "aa": "rand-m5-mstd0.5",
        "hflip": True,
        "workers": 0,
        "batch_size": 64,
        "epoch_steps": 3,
    },
    "step": {"sched": "step", "decay_epochs": (1,), "decay_rate": 0.5, "warmup_lr": 0.01},
    "held out": {"val_fraction": 0.2, "decay_norms": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "a"
    train("resnet20_ssia", Recipe(**FAST), folder)
    return weights(folder)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_resumes_to_the_same_bits(name, plain, tmp_path):
    recipe = Recipe(**{**FAST, **OPTIONS[name], "checkpoint_every": 2, "log_every": 2})
    whole = train("resnet20_ssia", recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train("resnet20_ssia", recipe, tmp_path / "stopped", on_step=stop_at(3))
    assert resume(tmp_path / "stopped") == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    for lines in ("metrics.jsonl", "steps.jsonl"):
        assert timeless(tmp_path / "whole" / lines) == timeless(tmp_path / "stopped" / lines)
    assert not same(weights(tmp_path / "whole"), plain)  # the option is not without effect


def test_the_average_is_what_is_evaluated_and_saved(tmp_path):
    result = train("resnet20_dia", Recipe(**FAST, ema_decay=0.5), tmp_path / "a")
    state = load_file(tmp_path / "a" / "step-10" / "model.safetensors")
    average = load_file(tmp_path / "a" / "step-10" / "ema.safetensors")
    assert same(weights(tmp_path / "a"), average) and not same(average, state)
    assert result["weights"] == "average"
    top1 = validate(load_model(str(tmp_path / "a")), Recipe(data="digits"))["top1"]
    assert top1 == pytest.approx(result["top1"], abs=ONE_IMAGE)
    # The average of the weights after each step, by hand.
    recipe, states = Recipe(**FAST, checkpoint_every=1, keep_checkpoints=20), []
    train("resnet20_dia", recipe, tmp_path / "b")
    for step in range(1, 11):
        states.append(load_file(tmp_path / "b" / f"step-{step}" / "model.safetensors")["fc.weight"].double())
    mean = states[0]
    for state in states[1:]:
        mean = 0.5 * mean + 0.5 * state
    torch.testing.assert_close(average["fc.weight"].double(), mean, rtol=1e-5, atol=1e-7)


def test_a_part_is_held_out_and_the_test_split_evaluated_once(tmp_path, monkeypatch):
    evaluated = []
    evaluate = trainers.evaluate

    def note(model, batches, accelerator):
        evaluated.append((batches.split.name, len(batches.split)))
        return evaluate(model, batches, accelerator)

    monkeypatch.setattr(trainers, "evaluate", note)
    recipe = Recipe(**FAST, val_fraction=0.25, seed=1)
    result = train("resnet20", recipe, tmp_path / "a")
    held_out = ("train, held out", 359)
    assert evaluated == [held_out, held_out, ("test", 360)]
    assert result["split"] == "test" and result["best_epoch"]["split"] == "train, held out"
    top1 = validate(load_model(str(tmp_path / "a")), Recipe(data="digits"))["top1"]
    assert top1 == pytest.approx(result["top1"], abs=ONE_IMAGE)
    about = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert about["images"] == {"train": 1437 - 359, "train, held out": 359, "test": 360}
    with pytest.raises(UserError, match="holds out 0 of 1437 images"):
        train("resnet20", Recipe(**FAST, val_fraction=1e-5), tmp_path / "b")


def test_the_held_out_part_is_no_part_of_what_is_trained_on():
    from timm_attn.training.processes import make_accelerator
    from timm_attn.training.splits import load_splits

    splits = [
        load_splits(Recipe(**FAST, val_fraction=0.25, seed=seed), make_accelerator("no")) for seed in (0, 1)
    ]
    assert torch.equal(splits[0].eval.pixels, splits[1].eval.pixels)
    whole = load_splits(Recipe(**FAST), make_accelerator("no")).train.pixels.flatten(1)
    parts = torch.cat([splits[0].train.pixels, splits[0].eval.pixels]).flatten(1)
    assert torch.equal(*(p[torch.from_numpy(np.lexsort(p.numpy().T))] for p in (whole, parts)))


def test_reported_is_the_last_epoch_not_the_best(tmp_path):
    result = train("resnet20", Recipe(**{**FAST, "epochs": 4, "lr": 0.3}), tmp_path / "a")
    lines = read_metrics(tmp_path / "a")
    assert result["top1"] == lines[-1]["top1"] and result["epoch"] == 4
    assert result["best_epoch"]["top1"] == max(line["top1"] for line in lines)


# ------------------------------------------------------------------------------------------------- starting


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A plain network of four classes as a hub folder of timm's."""
    folder = tmp_path_factory.mktemp("hub") / "stock"
    torch.manual_seed(0)
    model = timm.create_model("resnet20", num_classes=4, channels=[8, 8, 8], layers=[1, 1, 1])
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 8, 8))
    timm.models.save_for_hf(model, str(folder), safe_serialization="both")
    (folder / "pytorch_model.bin").unlink()
    return folder


def test_training_starts_from_a_graft(stock, tmp_path):
    recipe = Recipe(**{**FAST, "lr": 1e-9, "epochs": 1}, init=f"graft:{stock}")
    train("resnet20_dia", recipe, tmp_path / "a")
    before, after = weights(stock), weights(tmp_path / "a")
    torch.testing.assert_close(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])
    assert after["fc.weight"].shape == (10, 8) and "layer1.0.dia.x_expand.bias" in after
    assert load_recipe(tmp_path / "a" / "recipe.yaml").mean == (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="cannot build fmmnet20 .*from graft:.*cannot be grafted"):
        train("fmmnet20", recipe, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_training_starts_from_a_folder_with_other_classes(stock, tmp_path):
    recipe = Recipe(**{**FAST, "lr": 1e-9, "epochs": 1}, init=str(stock))
    train("resnet20", recipe, tmp_path / "a")
    before, after = weights(stock), weights(tmp_path / "a")
    torch.testing.assert_close(before["conv1.weight"], after["conv1.weight"])
    assert after["fc.weight"].shape == (10, 8)
    with pytest.raises(UserError, match=f"is a resnet20, not a resnet20_dia: .* with --init graft:{stock}$"):
        train("resnet20_dia", recipe, tmp_path / "b")
    with pytest.raises(UserError, match="is a resnet20, not a resnet32: train resnet20"):
        train("resnet32", recipe, tmp_path / "b")
    with pytest.raises(UserError, match="is not a folder"):
        train("resnet20", dataclasses.replace(recipe, init="./nowhere"), tmp_path / "b")
    with pytest.raises(WeightsError, match="no pretrained weights for fmmnet32"):
        train("fmmnet32", dataclasses.replace(recipe, init="fmmnet32"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_run_that_goes_on_does_not_need_what_it_started_from(stock, tmp_path):
    import shutil

    shutil.copytree(stock, tmp_path / "source")
    recipe = Recipe(**FAST, init=f"graft:{tmp_path / 'source'}")
    whole = train("resnet20_asr", recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train("resnet20_asr", recipe, tmp_path / "a", on_step=stop_at(7))
    shutil.rmtree(tmp_path / "source")
    assert resume(tmp_path / "a") == whole
    assert same(weights(tmp_path / "a"), weights(tmp_path / "whole"))


def test_a_run_that_goes_on_is_built_as_what_it_started_from(tmp_path):
    torch.manual_seed(0)
    sizes = {"channels": [8, 8, 8], "layers": [1, 2, 1], "reduction": 2, "drop_path_rate": 0.5}
    source = timm.create_model("resnet20_dia", num_classes=3, **sizes)
    source.pretrained_cfg.update(input_size=(3, 8, 8), crop_pct=0.9, interpolation="bicubic")
    timm.models.save_for_hf(source, str(tmp_path / "source"), safe_serialization=True)
    recipe = Recipe(**{**FAST, "model_kwargs": ()}, init=str(tmp_path / "source"), freeze="backbone")
    whole = train("resnet20_dia", recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train("resnet20_dia", recipe, tmp_path / "a", on_step=stop_at(7))
    assert resume(tmp_path / "a") == whole
    assert same(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    configs = [(tmp_path / run / "config.json").read_text() for run in ("a", "whole")]
    assert configs[0] == configs[1] and json.loads(configs[0])["model_args"]["layers"] == [1, 2, 1]
    # The second block of the second stage belongs to the backbone, which is frozen.
    before, after = load_file(tmp_path / "source" / "model.safetensors"), weights(tmp_path / "a")
    changed = {key for key in before if key in after and before[key].shape == after[key].shape}
    changed = {key for key in changed if not torch.equal(before[key], after[key])}
    assert changed and all(".dia." in key for key in changed)


@pytest.mark.parametrize("model", ["resnet20_asr", "fmmnet20", "resnet20"])
def test_a_frozen_backbone_stays_as_it_is(model, tmp_path):
    recipe = Recipe(**{**FAST, "checkpoint_every": 1}, freeze="backbone", keep_checkpoints=20)
    train(model, recipe, tmp_path / "a")
    first, last = (load_file(tmp_path / "a" / f"step-{n}" / "model.safetensors") for n in (1, 10))
    changed = {key for key in first if not torch.equal(first[key], last[key])}
    own = {key for key in first if ".se." in key or ".asr." in key or "fmm." in key}
    assert {"fc.weight", "fc.bias"} <= changed <= own | {"fc.weight", "fc.bias"}
    assert bool(changed & own) == (model != "resnet20")


# --------------------------------------------------------------------------------------------- several seeds


def test_several_seeds_are_aggregated(tmp_path, capsys):
    summary = train_seeds("resnet20", Recipe(**{**FAST, "epochs": 1}), tmp_path / "a", (0, 1, 2))
    tops = [read_results(tmp_path / "a" / f"seed-{seed}")["top1"] for seed in (0, 1, 2)]
    mean = sum(tops) / 3
    std = math.sqrt(sum((t - mean) ** 2 for t in tops) / 2)
    assert summary["top1"]["mean"] == pytest.approx(mean) and summary["top1"]["std"] == pytest.approx(std)
    assert summary["top1"]["n"] == 3 and len(set(tops)) > 1
    assert (tmp_path / "a" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    one = train("resnet20", Recipe(**{**FAST, "epochs": 1, "seed": 1}), tmp_path / "b")
    assert one == read_results(tmp_path / "a" / "seed-1")
    # Runs that were made one by one are taken together in the same way.
    (tmp_path / "a" / "seeds.json").unlink()
    (tmp_path / "a" / "results.json").unlink()
    (tmp_path / "a" / "seed-3").mkdir()  # not finished
    recipe = tmp_path / "a" / "seed-1" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("data: digits", "data: elsewhere/digits"))
    assert gather_seeds(tmp_path / "a") == summary == read_results(tmp_path / "a")
    assert [run.name for run in seed_runs(tmp_path / "a")] == ["seed-0", "seed-1", "seed-2"]
    train("resnet20", Recipe(**{**FAST, "epochs": 1, "lr": 0.1, "seed": 4}), tmp_path / "a" / "seed-4")
    with pytest.raises(UserError, match="seed-4 and .*seed-0 differ in more than the seed"):
        gather_seeds(tmp_path / "a")
    with pytest.raises(UserError, match="has no finished run"):
        gather_seeds(tmp_path / "b")
    with pytest.raises(UserError, match="seeds must be different numbers, got 1 1"):
        train_seeds("resnet20", Recipe(**FAST), tmp_path / "c", (1, 1))


def test_several_seeds_go_on_as_a_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast = ["--img-size", "8", "--batch-size", "256", "--epochs", "1", "--model-kwargs", *TINY]
    main(["train", "resnet20", "--data", "digits", "--out", "whole", "--seeds", "0", "1", *fast])
    assert "± " in capsys.readouterr().out
    steps = []

    def interrupt(trainer, epoch, *arguments):
        steps.append(epoch)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return epoch_of(trainer, epoch, *arguments)

    epoch_of = trainers.Trainer._epoch
    monkeypatch.setattr(trainers.Trainer, "_epoch", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["train", "resnet20", "--data", "digits", "--out", "a", "--seeds", "0", "1", *fast])
    assert stop.value.code == 130
    assert "timm-attn train --resume a" in capsys.readouterr().err
    main(["train", "--resume", "a"])
    assert read_results(tmp_path / "a") == read_results(tmp_path / "whole")


def two_classes(folder):
    for split, n in (("train", 4), ("test", 2)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                picture(i + 9 * n).save(folder / split / name / f"{i}.png")


def test_several_seeds_remember_where_their_data_has_gone(tmp_path, monkeypatch):
    two_classes(tmp_path / "old")
    recipe = Recipe(**{**FAST, "data": str(tmp_path / "old"), "batch_size": 4, "epochs": 1})
    with pytest.raises(UserError, match="seed must be finite and not negative"):
        train_seeds("resnet20", recipe, tmp_path / "a", [0, -1])
    assert not (tmp_path / "a").exists()

    def stop_in(seed: int):
        def epoch(trainer, *arguments):
            if trainer.recipe.seed == seed:
                raise Stopped
            return epoch_of(trainer, *arguments)

        monkeypatch.setattr(trainers.Trainer, "_epoch", epoch)

    epoch_of = trainers.Trainer._epoch
    stop_in(1)
    with pytest.raises(Stopped):
        train_seeds("resnet20", recipe, tmp_path / "a", [0, 1, 2])
    (tmp_path / "old").rename(tmp_path / "new")
    stop_in(2)
    with pytest.raises(Stopped):
        resume_seeds(tmp_path / "a", str(tmp_path / "new"))
    stop_in(-1)
    assert resume_seeds(tmp_path / "a")["top1"]["n"] == 3


def test_a_run_whose_data_is_where_it_was_does_not_follow_another(tmp_path, monkeypatch):
    """One of the runs may have gone on with a copy that is gone, or elsewhere."""
    two_classes(tmp_path / "d")
    recipe = Recipe(**{**FAST, "data": str(tmp_path / "d"), "batch_size": 4, "epochs": 1})
    train_seeds("resnet20", recipe, tmp_path / "a", [0, 1, 2])
    for seed in (0, 1):
        (tmp_path / "a" / f"seed-{seed}" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "a" / "seed-2")
    shutil.copytree(tmp_path / "d", tmp_path / "copy")
    resume(tmp_path / "a" / "seed-1", data=str(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy")
    assert resume_seeds(tmp_path / "a")["top1"]["n"] == 3
    for seed in (0, 2):
        run = tmp_path / "a" / f"seed-{seed}"
        assert load_recipe(run / "recipe.yaml").data == str(tmp_path / "d")
        assert "moved_to" not in json.loads((run / "environment.json").read_text())


@pytest.mark.parametrize("seeds", [(), ("--seeds", "0", "1")])
def test_no_data_is_not_the_current_folder(seeds, tmp_path, monkeypatch, capsys):
    two_classes(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "resnet20", "--out", "run", "--epochs", "1", *seeds])
    assert "no data: give --data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ while it runs


def raise_at(signals: dict[int, int], step: int) -> None:
    if step in signals:
        os.kill(os.getpid(), signals[step])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint(number, tmp_path):
    recipe = Recipe(**FAST, keep_checkpoints=9)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"{number.name} after step 3"):
        train("resnet20", recipe, tmp_path / "a", partial(raise_at, {3: number}))
    assert [p.name for p in (tmp_path / "a").glob("step-*")] == ["step-3"]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    whole = train("resnet20", recipe, tmp_path / "whole")
    # At the end of an epoch the checkpoint comes before the evaluation, which may take long.
    ends = [("b", 5), ("c", 10)] if number == signal.SIGINT else []
    for run, last in ends:
        with pytest.raises(Interrupted, match=f"after step {last}"):
            train("resnet20", recipe, tmp_path / run, partial(raise_at, {last: number}))
        assert len(read_metrics(tmp_path / run)) == last // 5 - 1
    for run in ("a", *(run for run, _ in ends)):
        assert resume(tmp_path / run) == whole
        assert timeless(tmp_path / run / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


def test_a_signal_to_all_processes_leaves_the_workers_alone(tmp_path):
    images = [encode(picture(i, (80, 80))) for i in range(12)]
    data = write(tmp_path / "d", images=images)
    write(tmp_path / "d", split="test", images=images)
    command = ["train", "resnet20", "--data", data, "--img-size", "72", "--batch-size", "4", "--workers", "2"]
    command += ["--epochs", "500", "--checkpoint-every", "1", "--out", "a", "--model-kwargs", *WIDER]
    code = "import os, sys; os.setsid(); from timm_attn.cli import main; main(sys.argv[1:])"
    with started(code, *command, cwd=tmp_path) as process:
        deadline = time.time() + 120
        while not list(tmp_path.glob("a/step-*")) and time.time() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)  # as torchrun, `timeout` and schedulers do
    result = process.result
    assert result.returncode == 130 and "a checkpoint is written" in result.stderr, result.stderr


def _a_signal_while_it_starts(worker):
    os.kill(os.getpid(), signal.SIGTERM)
    ignoring_signals(worker)


ignoring_signals = batches._init_worker


def test_a_worker_that_starts_does_not_get_signals(tmp_path, monkeypatch):
    images = [encode(picture(i, (80, 80))) for i in range(8)]
    data = write(tmp_path / "d", images=images)
    write(tmp_path / "d", split="test", images=images)
    monkeypatch.setattr(batches, "_init_worker", _a_signal_while_it_starts)
    recipe = Recipe(
        **{
            **FAST,
            "data": data,
            "batch_size": 4,
            "workers": 1,
            "img_size": 72,
            "epochs": 1,
            "model_kwargs": WIDER,
        }
    )
    train("resnet20", recipe, tmp_path / "a")


def test_an_infinite_evaluation_stops_a_run_whose_training_is_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "evaluate", lambda *_: {"loss": math.nan})
    with pytest.raises(UserError, match="evaluation loss after step 5 is nan, though the training loss is 2"):
        train("resnet20", Recipe(**FAST), tmp_path / "a")


def test_an_evaluation_that_fails_does_not_lose_the_epoch(tmp_path, monkeypatch):
    whole = train("resnet20", Recipe(**FAST), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("resnet20", Recipe(**FAST), tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").glob("step-*")] == ["step-5"]
    written = (tmp_path / "a" / "step-5").stat().st_ino
    steps = []
    with monkeypatch.context() as patch:
        epoch_of = trainers.Trainer._epoch
        patch.setattr(trainers.Trainer, "_epoch", lambda *a: (steps.append(a[0].step), epoch_of(*a))[1])
        assert resume(tmp_path / "a") == whole
    assert steps == [5, 5]  # the evaluation alone, then the second epoch
    assert not (tmp_path / "a" / "step-5").exists() or (tmp_path / "a" / "step-5").stat().st_ino == written


def test_adaptive_clipping_leaves_the_classifier_alone(tmp_path, monkeypatch):
    clipped = []
    monkeypatch.setattr(trainers, "dispatch_clip_grad", lambda p, *_, **__: clipped.append([*p]))
    recipe = Recipe(**{**FAST, "epochs": 1}, clip_grad=0.1, clip_mode="agc")
    train("resnet20_ssia", recipe, tmp_path / "a")
    network = load_model(str(tmp_path / "a"))
    sizes = sorted(p.numel() for key, p in network.named_parameters() if not key.startswith("fc."))
    assert sorted(p.numel() for p in clipped[0]) == sizes and any(
        key.startswith("ssia") for key in weights(tmp_path / "a")
    )


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    """The second is started while the first reads its data."""
    first = Recipe(**FAST)

    def read(*arguments, original=loops.load_splits):
        with monkeypatch.context() as patch:
            patch.setattr(loops, "load_splits", original)
            train("resnet20", first, tmp_path / "a")
        return original(*arguments)

    monkeypatch.setattr(loops, "load_splits", read)
    with pytest.raises(
        UserError, match="another run has been started in .*a meanwhile: choose another --out"
    ):
        train("resnet20", dataclasses.replace(first, lr=0.2), tmp_path / "a")
    assert load_recipe(tmp_path / "a" / "recipe.yaml").lr == first.lr


def test_folders_are_remembered_by_their_whole_paths(tmp_path, monkeypatch):
    train("resnet20", Recipe(**FAST), tmp_path / "our:plain")  # as a drive is told on Windows
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(**FAST, init="graft:local-dir:our:plain", teacher="our:plain")
    with pytest.raises(Stopped):
        train("resnet20_asr", recipe, "a", on_step=stop_at(2))
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume("../a")
    made = load_recipe(tmp_path / "a" / "recipe.yaml")
    plain = str(tmp_path / "our:plain")
    assert (made.init, made.teacher) == (f"graft:local-dir:{plain}", plain)
    monkeypatch.chdir(tmp_path)
    (exported, _) = export(Path("a"), "t", Path("hub"), dataset_license="mit")
    assert (exported.recipe["init"], exported.recipe["teacher"]) == ("graft:local-dir:our:plain", "our:plain")
    assert str(tmp_path) not in (exported.folder / "recipe.yaml").read_text()
    assert str(tmp_path) not in (exported.folder / "README.md").read_text()


def test_settings_of_accelerate_that_would_break_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    gradients = GradientState()
    gradients.sync_gradients = False  # as in the middle of an accumulation
    try:
        train("resnet20", Recipe(**FAST), tmp_path / "a")
        assert not gradients.sync_gradients
    finally:
        gradients.sync_gradients = True
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    train("resnet20", Recipe(**FAST), tmp_path / "b")
    states = [load_file(tmp_path / run / "model.safetensors") for run in ("a", "b")]
    assert same(*states)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="Accelerate is configured for FSDP, where no process has the whole"):
        train("resnet20", Recipe(**FAST), tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("model", "losses"), [("resnet20_ssia", 1), ("resnet20_spem", 3)])
def test_a_loss_in_the_network_counts_once_in_several_parts_of_a_batch(model, losses, tmp_path, monkeypatch):
    seen = []

    def update(self, batches, original=trainers.Trainer._update):
        done = original(self, batches)
        seen.append([b.item() for key, b in self.network.named_buffers() if key.endswith("aux_scale")])
        return done

    monkeypatch.setattr(trainers.Trainer, "_update", update)
    with pytest.raises(Stopped):
        train(model, Recipe(**FAST, accumulation=4), tmp_path / "a", on_step=stop_at(1))
    assert seen == [[0.25] * losses]


@pytest.mark.parametrize(("generator", "decay"), [("scale", 0.0), ("se", 0.1)])
def test_a_scale_has_no_weight_decay_as_norms_have_none(generator, decay):
    model = timm.create_model("resnet20_asr", generator=generator, layers=[1, 1, 1])
    optimizer = make_optimizer(model, Recipe(data="x", weight_decay=0.1))
    constants = {id(p) for key, p in model.named_parameters() if key.endswith(".psi")}
    groups = [g for g in optimizer.param_groups for p in g["params"] if id(p) in constants]
    assert [group["weight_decay"] for group in groups] == [decay] * 3


def test_lines_at_chosen_steps(tmp_path):
    train("resnet20", Recipe(**FAST, log_every=4), tmp_path / "a")
    lines = read_lines(tmp_path / "a" / "steps.jsonl")
    assert [line["step"] for line in lines] == [4, 8] and [line["epoch"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 and line["train_loss"] > 0 and line["lr"] > 0 for line in lines)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("resnet20", Recipe(**FAST, track=("tensorboard",)), tmp_path / "a")
    read = EventAccumulator(str(tmp_path / "a" / "resnet20")).Reload()
    top1 = {event.step: event.value for event in read.Scalars("top1")}
    assert top1 == {n["step"]: pytest.approx(n["top1"], rel=1e-6) for n in read_metrics(tmp_path / "a")}
    with pytest.raises(UserError, match="track"):
        train("resnet20", Recipe(**FAST, track=("nonsense",)), tmp_path / "b")


def test_compiled_training_is_training(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, f=torch.compile: f(model, backend="aot_eager"))
    result = train("resnet20_dia", Recipe(**FAST, compile=True, ema_decay=0.5), tmp_path / "a")
    plain = train("resnet20_dia", Recipe(**FAST, ema_decay=0.5), tmp_path / "b")
    assert result["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "b").keys()


def test_skipped_images_are_counted_in_a_run(tmp_path, capsys):
    images = [encode(picture(i, (80, 80))) for i in range(12)]
    images[5] = {"bytes": images[5]["bytes"][:70], "path": None}
    data = write(tmp_path / "d", images=images)
    write(tmp_path / "d", split="test", images=[encode(picture(i, (80, 80))) for i in range(3)])
    fields = {"data": data, "batch_size": 4, "epochs": 2, "img_size": 72, "workers": 0, "model_kwargs": WIDER}
    result = train("resnet20", Recipe(**fields, on_corrupt="skip"), tmp_path / "a")
    assert [line["skipped_images"] for line in read_metrics(tmp_path / "a")] == [1, 1]
    assert capsys.readouterr().out.count("corrupt images left out: 1") == 2
    assert result["images"] == 3
    with pytest.raises(UserError, match="row 5 of .*--on-corrupt skip"):
        train("resnet20", Recipe(**fields), tmp_path / "b")


def test_memory_and_disk_errors_are_one_line(tmp_path, capsys, monkeypatch):
    def fail(error):
        def raises(*_, **__):
            raise error

        return raises

    command = ["train", "resnet20", "--data", "digits", "--img-size", "8", "--out", str(tmp_path / "a")]
    for error, hint in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"), "lower --batch-size"),
        (OSError(28, "No space left on device"), "make room on the disk, then resume with"),
    ):
        monkeypatch.setattr(trainers.Trainer, "_update", fail(error))
        with pytest.raises(SystemExit) as stop:
            main([*command[:-1], str(tmp_path / type(error).__name__)])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and hint in printed and len(printed.splitlines()) == 1


def test_corrupt_small_images_are_counted(tmp_path, capsys):
    images = [encode(picture(i, (8, 8))) for i in range(9)]
    images[4] = {"bytes": b"broken", "path": None}
    data = write(tmp_path / "d", images=images)
    write(tmp_path / "d", split="test", images=[encode(picture(i, (8, 8))) for i in range(3)])
    recipe = Recipe(data=data, batch_size=4, epochs=1, model_kwargs=TINY, on_corrupt="skip")
    train("resnet20", recipe, tmp_path / "a")
    assert [line["skipped_images"] for line in read_metrics(tmp_path / "a")] == [1]
    assert "1 corrupt images of train are left out" in capsys.readouterr().out


def test_a_full_disk_is_one_error_wherever_it_is_met(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="step-5") as error:
        train("resnet20", Recipe(**FAST), tmp_path / "a")
    assert error.value.errno == errno.ENOSPC and not list((tmp_path / "a").glob(".step*"))


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adamw", "lamb", "lion", "adafactorbv", "muon", "nadamw"])
def test_an_optimiser_comes_back_from_its_file(opt, tmp_path):
    recipe = Recipe(data="x", opt=opt, lr=0.01, clip_grad=1.0)

    def step(model, optimizer, n):
        g = torch.Generator().manual_seed(n)
        model(torch.randn(4, 3, 8, 8, generator=g)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = timm.create_model("resnet20", channels=[8, 8, 8], layers=[1, 1, 1]).train()
        model.to(memory_format=torch.channels_last)
        return model, make_optimizer(model, recipe)

    model, optimizer = fresh()
    for n in range(3):
        step(model, optimizer, n)
    state = checkpoints.State(3, model.state_dict(), optimizer.state_dict())
    checkpoints.save(tmp_path, state, keep=1)
    other, restored = fresh()
    state, damaged = checkpoints.load_last(tmp_path)
    assert not damaged
    other.load_state_dict(state.model)
    checkpoints.restore_optimizer(restored, state.optimizer)
    for n in range(3, 6):
        step(model, optimizer, n)
        step(other, restored, n)
    assert same(model.state_dict(), other.state_dict())


def test_a_damaged_average_is_noticed(tmp_path):
    with pytest.raises(Stopped):
        train(
            "resnet20",
            Recipe(**FAST, ema_decay=0.9, checkpoint_every=2),
            tmp_path / "a",
            on_step=stop_at(5),
        )
    file = tmp_path / "a" / "step-4" / "ema.safetensors"
    file.write_bytes(flip_last_bit(file.read_bytes()))
    state, damaged = checkpoints.load_last(tmp_path / "a")
    assert state.step == 2 and list(damaged.values()) == ["ema.safetensors has the wrong sha256"]


# --------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step", "multistep", "onecycle"])
def test_the_rate_rises_and_falls(sched):
    decay = {"step": (4,), "multistep": (4, 8)}.get(sched, ())
    rate = 1.0 if sched == "poly" else 0.1
    recipe = Recipe(
        data="x", epochs=10, sched=sched, decay_epochs=decay, decay_rate=rate, warmup_epochs=2, lr=0.4
    )
    layers = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [layers.weight], "lr_scale": 0.5}, {"params": [layers.bias]}], lr=0.4
    )
    if sched == "onecycle":
        scheduler = make_scheduler(optimizer, recipe, 7)
        rates = []
        for step in range(70):
            scheduler.step_update(step)
            rates.append([group["lr"] for group in optimizer.param_groups])
        torch_one = torch.optim.SGD(layers.parameters(), lr=0.4)
        theirs = torch.optim.lr_scheduler.OneCycleLR(torch_one, 0.4, 70, pct_start=0.2)
        expected = []
        for _ in range(70):
            expected.append(torch_one.param_groups[0]["lr"])
            torch_one.step()
            theirs.step()
        assert [r[1] for r in rates] == pytest.approx(expected)
        scheduler.step_update(20)  # a function of the step, in any order
        assert optimizer.param_groups[0]["lr"] == rates[20][0]
    else:
        scheduler = make_scheduler(optimizer, recipe, 7)
        rates = []
        for step in range(70):
            scheduler.step_update(step)
            rates.append([group["lr"] for group in optimizer.param_groups])
    assert all(a == pytest.approx(b / 2) for a, b in rates)
    fast = [b for _, b in rates]
    assert fast[0] < 0.05 and max(fast) == pytest.approx(0.4) and fast[-1] < 0.05
    assert fast.index(max(fast)) in range(12, 16)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_takes_a_step(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.data or name in ("imagenette", "imagenette_cpu", "photos", "tinyimagenet_cpu")
    small = "cifar" in name or "tiny" in name
    size = 8 if small else 72  # the way of small images, and that of larger ones
    data = write(tmp_path / "d", images=[picture(i, (size, size)) for i in range(8)])
    write(tmp_path / "d", split="test", images=[picture(i, (size, size)) for i in range(2)])
    write(tmp_path / "d", split="validation", images=[picture(i, (size, size)) for i in range(2)])
    model = {"dia": "resnet20_dia", "asr": "resnet20_asr", "conam": "resnet20_conam"}
    model |= {"fmm": "fmmnet20", "ssia": "resnet20_ssia"}
    fields = {
        "data": data,
        "batch_size": 4,
        "img_size": None if small else 64 + 8,
        "workers": 0,
        "model_kwargs": (*recipe.model_kwargs, *WIDER),
        "compile": False,
    }
    recipe = dataclasses.replace(recipe, **fields)
    with pytest.raises(Stopped):
        train(model.get(name.partition("_")[0], "resnet20"), recipe, tmp_path / "a", on_step=stop_at(1))


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(UserError, match="nonsense is no file, and not one of asr_cifar100, .*imagenette"):
        load_recipe("nonsense")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulation": 3}, "accumulation 3 does not divide batch_size 128"),
        ({"mixup": 0.2, "batch_size": 9}, "even number of images"),
        ({"clip_mode": "agc"}, "clip_mode agc needs a clip_grad"),
        ({"aa": "original", "color_jitter": 0.4}, "color_jitter does nothing beside aa"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\)"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be two rising shares"),
        ({"lr": math.inf}, "lr must be positive, got inf"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and not negative"),
        ({"opt_args": ("lr=1",)}, "opt_args cannot set lr: it follows from --lr"),
        ({"sched": "step", "decay_epochs": (0,)}, "decay_epochs must be positive"),
        ({"teacher": "resnet20", "loss": "bce"}, "loss and smoothing do nothing beside a teacher"),
        ({"teacher": "resnet20", "smoothing": 0.1}, "loss and smoothing do nothing beside a teacher"),
        ({"sched": "step", "decay_epochs": (1, 2)}, "decay_epochs are one number for sched step"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opt": "nonsense"}, "cannot make optimiser nonsense"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive, got "),
        ({"opt": "kron"}, "optimiser kron cannot be used, since checkpoints do not hold"),
        ({"opt": "adahessian"}, "optimiser adahessian cannot be used, since the trainer takes no second"),
        ({"opt_args": ("nonsense=1",)}, "cannot make optimiser sgd with {'nonsense': 1}"),
        ({"sync_bn": True}, "--sync-bn needs GPUs"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"aa": "nonsense"}, "aa"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train("resnet20", Recipe(**{**FAST, **fields}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("written", "value"), [
    ("1e-2", 0.01), ("[0.9,1e-2]", [0.9, 0.01]), ("(1, 2)", (1, 2)), ("None", None), ("null", None),
    ("True", True), ("true", True), ("last", "last"), ("'3'", "3"), ("{a: 1}", {"a": 1}), ("-1", -1),
])  # fmt: skip
def test_arguments_are_python_or_yaml(written, value):
    item = (f"key={written}",)
    assert Recipe(data="x", model_kwargs=item, opt_args=item).parsed_model_kwargs() == {"key": value}
    assert Recipe(data="x", opt_args=item).parsed_opt_args() == {"key": value}
