"""Runs on the digits: what they leave behind, resuming, several processes, and bad input."""

import json
import math
import os
import platform
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from forked import run_code, started
from helpers import ONE_IMAGE, Stopped, flip_last_bit, found, same, stop_at, timeless
from safetensors.torch import load_file
from torch import nn

from timm_attn.compare import relative_difference
from timm_attn.errors import UserError
from timm_attn.load import load_model
from timm_attn.models.cifar import CifarResNet
from timm_attn.training import Recipe, processes, resume, seeds, train, validate
from timm_attn.training import checkpoint as checkpoints
from timm_attn.training import trainer as trainers
from timm_attn.training.average import Average
from timm_attn.training.data import load_split
from timm_attn.training.evaluation import evaluate
from timm_attn.training.network import build
from timm_attn.training.recipe_file import load_recipe, save_recipe
from timm_attn.training.run import METRICS, machines, read_metrics, read_results, save_model
from timm_attn.training.validation import evaluated
from timm_attn.weights import WeightsError

TINY = ("channels=[8,8,8]", "layers=[1,1,1]", "drop_path_rate=0.2")
FAST = {
    "data": "digits",
    "img_size": 8,
    "crop_padding": 1,
    "batch_size": 256,
    "lr": 0.1,
    "model_kwargs": TINY,
}


def same_weights(a, b) -> bool:
    return same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    result = train("resnet20_dia", Recipe(**FAST, epochs=2, seed=3), folder)
    return folder, result


#: Of timm, with what makes them small: one has layers in several places, the other infinite bounds as buffers.
UNUSUAL = {
    "coat_lite_tiny": (
        "img_size=32",
        "serial_depths=[1,1,1,1]",
        "embed_dims=[16,16,16,16]",
        "mlp_ratios=[1,1,1,1]",
    ),
    "gemma4_vit_167m": ("depth=1", "embed_dim=64", "num_heads=1", "intermediate_size=128"),
}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_some_networks_of_timm_keep_is_saved_and_read(name, ema_decay, tmp_path):
    size = 48 if name.startswith("gemma") else 32
    fields = {**FAST, "img_size": size, "model_kwargs": UNUSUAL[name], "channels_last": False, "lr": 1e-3}
    recipe = Recipe(**{**fields, "batch_size": 16}, epochs=2, epoch_steps=2, ema_decay=ema_decay)
    whole = train(name, recipe, tmp_path / "a")
    with pytest.raises(Stopped):
        train(name, recipe, tmp_path / "b", on_step=stop_at(3))
    assert resume(tmp_path / "b") == whole and same_weights(tmp_path / "a", tmp_path / "b")
    top1 = validate(load_model(str(tmp_path / "a")), Recipe(data="digits"))["top1"]
    assert top1 == pytest.approx(whole["top1"], abs=ONE_IMAGE)


@pytest.mark.parametrize("persistent", [True, False])
def test_bounds_that_are_infinite_change_nothing_else(persistent, tmp_path, monkeypatch):
    """Of a layer that stands in two places; batch norms are averaged all the same."""

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("high", torch.tensor(torch.inf), persistent=persistent)

    def bounded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.low = self.high = Bound()

    recipe = Recipe(**{**FAST, "epochs": 1}, ema_decay=0.9, epoch_steps=4)
    train("resnet20", recipe, tmp_path / "without")
    init = CifarResNet.__init__
    monkeypatch.setattr(CifarResNet, "__init__", bounded)
    train("resnet20", recipe, tmp_path / "with")
    without, with_ = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    bounds = {key: tensor for key, tensor in with_.items() if key not in without}
    assert all(tensor == torch.inf for tensor in bounds.values()) and bool(bounds) == persistent
    assert same(without, {key: tensor for key, tensor in with_.items() if key not in bounds})
    last = load_file(tmp_path / "with" / "step-4" / "model.safetensors")
    assert not torch.equal(last["bn1.running_mean"], with_["bn1.running_mean"])


def test_a_run_leaves_what_it_says(run):
    folder, result = run
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["seed"] == 3 and recipe["hflip"] is False and len(recipe["mean"]) == 3
    assert load_recipe(folder / "recipe.yaml").model_kwargs == TINY
    about = json.loads((folder / "environment.json").read_text())
    assert about["model"] == "resnet20_dia" and about["images"] == {"train": 1437, "test": 360}
    lines = read_metrics(folder)
    assert [line["epoch"] for line in lines] == [1, 2] and read_results(folder) == result
    assert {k: lines[-1][k] for k in ("top1", "top5", "loss")}.items() <= result.items()
    assert lines[-1]["images"] == 360 and lines[-1]["step"] == 10
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-10", "step-5"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet20_dia" and "num_classes" not in config["model_args"]
    assert config["model_args"]["layers"] == [1, 1, 1] and config["label_names"] == list("0123456789")
    assert not [p for p in folder.rglob("*") if "partial" in p.name]


def test_training_learns(tmp_path):
    small = ("channels=[16,16,16]", "layers=[1,1,1]")
    recipe = Recipe(
        data="digits", img_size=8, crop_padding=1, batch_size=64, epochs=4, lr=0.2, model_kwargs=small
    )
    metrics = train("resnet20_asr", recipe, tmp_path / "a")
    assert metrics["top1"] > 50, metrics
    first, *_, last = read_metrics(tmp_path / "a")
    assert last["train_loss"] < 0.7 * first["train_loss"]


def test_a_finished_run_is_a_model(run):
    folder, result = run
    model = load_model(str(folder))
    figures = validate(model, Recipe(data="digits"))
    assert figures["top1"] == pytest.approx(result["top1"], abs=ONE_IMAGE) and figures["images"] == 360
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(by_timm(x), model(x))


def test_float32_is_what_is_computed_in_whatever_the_user_has_chosen(run, monkeypatch):
    backends: Any = torch.backends
    switches, seen = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.matmul), []
    for switch in (*switches, backends.mkldnn.conv):  # what they are set to, they do not inherit afterwards
        monkeypatch.setattr(switch, "fp32_precision", "tf32")
    monkeypatch.setattr(backends, "fp32_precision", "tf32")
    monkeypatch.setattr(backends.cudnn.rnn, "fp32_precision", "ieee")
    with pytest.raises(RuntimeError):
        assert backends.cudnn.allow_tf32  # the older switch, which some still read
    model = load_model(str(run[0]))
    model.register_forward_hook(lambda *_: seen.append((backends.cudnn.allow_tf32, *chosen())))

    def chosen():
        return [switch.fp32_precision for switch in switches]

    for evaluation in (validate, evaluated):
        evaluation(model, Recipe(data="digits"))
        assert set(seen) == {(False, "ieee", "ieee", "ieee")} and chosen() == ["tf32"] * 3
        del seen[:]
    relative_difference(model, model, torch.randn(1, 3, 8, 8))  # by which folds and grafts are judged
    assert set(seen) == {(False, "ieee", "ieee", "ieee")} and chosen() == ["tf32"] * 3


def test_resuming_a_finished_run_changes_nothing(run):
    folder, result = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert resume(folder) == result
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stopped_run_ends_in_the_same_bits(precision, tmp_path):
    recipe = Recipe(**FAST, epochs=2, seed=1, precision=precision, checkpoint_every=2)
    train("resnet20_dia", recipe, tmp_path / "whole")
    for stopped in (3, 7):
        run, steps = tmp_path / str(stopped), []
        with pytest.raises(Stopped):
            train("resnet20_dia", recipe, run, on_step=stop_at(stopped))
        resume(run, on_step=steps.append)
        assert stopped - steps[0] < 2  # no more than one checkpoint interval is replayed
        assert same_weights(tmp_path / "whole", run)
        assert timeless(tmp_path / "whole" / METRICS) == timeless(run / METRICS)


def test_a_killed_run_goes_on(tmp_path):
    command = ["train", "resnet20_asr", "--data", "digits", "--img-size", "8"]
    command += ["--epochs", "50", "--checkpoint-every", "3", "--out", "a", "--model-kwargs", *TINY]
    code = "import sys; from timm_attn.cli import main; main(sys.argv[1:])"
    with started(code, *command, cwd=tmp_path) as process:
        deadline = time.time() + 120
        while not list(tmp_path.glob("a/step-*")) and time.time() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    newest = max(int(p.name.split("-")[1]) for p in tmp_path.glob("a/step-*"))
    steps = []

    def on_step(done: int) -> None:
        steps.append(done)
        if len(steps) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        resume(tmp_path / "a", on_step=on_step)
    assert steps == [newest + 1, newest + 2, newest + 3, newest + 4]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    recipe = Recipe(**FAST, epochs=2, checkpoint_every=2)
    with pytest.raises(Stopped):
        train("resnet20_dia", recipe, tmp_path / "a", on_step=stop_at(7))
    damaged = tmp_path / "a" / "step-6" / "model.safetensors"
    damaged.write_bytes(flip_last_bit(damaged.read_bytes()))
    steps = []
    resume(tmp_path / "a", on_step=steps.append)
    assert steps[0] == 6
    assert (
        "step-6 is damaged (model.safetensors has the wrong sha256): passed over and removed"
        in capsys.readouterr().out
    )
    train("resnet20_dia", recipe, tmp_path / "whole")
    assert same_weights(tmp_path / "whole", tmp_path / "a")


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    recipe = Recipe(**FAST, epochs=2, checkpoint_every=2)
    save = checkpoints.write_json

    def full_disk(path, value):
        if "step-6" in str(path):
            raise OSError(28, "No space left on device")
        save(path, value)

    monkeypatch.setattr(checkpoints, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train("resnet20_dia", recipe, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if "step-" in p.name) == ["step-4", "step-5"]
    monkeypatch.undo()
    steps = []
    resume(tmp_path / "a", on_step=steps.append)
    assert steps[0] == 6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
def test_memory_of_a_step_is_kept_for_the_next():
    code = """
import resource, sys, torch
from timm_attn.training.processes import keep_freed_memory
if sys.argv[1]:
    keep_freed_memory()
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(3, 1024, 1024, 4)  # 48 MB: no allocator keeps so much unless it is told to
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    given_back, kept = (int(run_code(code, told).stdout) for told in ("", "yes"))
    assert kept < 100 < given_back


@pytest.mark.parametrize("most", [32 << 20, 1 << 40, 0])
def test_older_libraries_that_refuse_a_threshold_are_asked_for_less(most, monkeypatch):
    asked = []

    def mallopt(option, size):
        asked.append(option)
        return int(option == -1 or size <= most)

    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(processes.sys, "platform", "linux")
    processes.keep_freed_memory()
    # The trim threshold alone would have the other stay where it is, which is worse than nothing.
    assert asked == {32 << 20: [-3, -3, -1], 1 << 40: [-3, -1], 0: [-3, -3]}[most]


def test_what_stands_in_several_places_is_averaged_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(2)

    model = Twice()
    average = Average(model, 0.5, use_warmup=False, copied=())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.a.weight += 1
        model.norm.running_mean += 2
        model.norm.num_batches_tracked += 3
    average.update(model)
    now = average.module.state_dict()
    torch.testing.assert_close(now["a.weight"], before["a.weight"] + 0.5)
    torch.testing.assert_close(now["norm.running_mean"], torch.ones(2))
    assert now["b.weight"].data_ptr() == now["a.weight"].data_ptr() and now["norm.num_batches_tracked"] == 3


def test_an_epoch_that_was_trained_before_has_no_speed(tmp_path, monkeypatch, capsys):
    def stopped(*args):
        raise Stopped

    recipe = Recipe(**FAST, epochs=1)
    whole = train("resnet20", recipe, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(trainers, "evaluate", stopped)
        train("resnet20", recipe, tmp_path / "a")
    assert resume(tmp_path / "a") == whole
    (line,) = read_metrics(tmp_path / "a")
    assert line["images_per_second"] is None and "| – images/s" in capsys.readouterr().out


def test_gates_on_norms_do_not_go_with_synchronised_norms(tmp_path):
    recipe = Recipe(**{**FAST, "model_kwargs": (*TINY, "where=norms")}, epochs=1, sync_bn=True)
    with pytest.raises(UserError, match="norms that asr with where=norms gates: leave one out"):
        train("resnet20_asr", recipe, tmp_path / "a")


def test_what_is_left_of_a_run_that_never_began_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").touch()
    with pytest.raises(UserError, match="ended before its first step: remove it"):
        train("resnet20", Recipe(**FAST, epochs=1), tmp_path / "a")


def test_evaluation_is_that_of_a_loop(run):
    folder, _ = run
    from accelerate import Accelerator

    from timm_attn.training.batches import Batches, Shard
    from timm_attn.training.data import load_split

    model, split = load_model(str(folder)), load_split("digits", "eval", size=(8, 8))
    config = timm.data.resolve_model_data_config(model)
    recipe = Recipe(data="digits", batch_size=100)
    figures = evaluate(
        model, Batches(split, recipe, config, Shard(torch.device("cpu"))), Accelerator(cpu=True)
    )
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    logits = model((split.pixels.permute(0, 3, 1, 2) / 255 - mean) / std).double()
    top5 = [int(split.labels[i]) in logits[i].argsort(descending=True)[:5].tolist() for i in range(360)]
    top1 = (logits.argmax(1) == split.labels).double().mean().item()
    assert figures["top1"] == pytest.approx(100 * top1, abs=ONE_IMAGE)
    assert figures["top5"] == pytest.approx(100 * sum(top5) / 360, abs=ONE_IMAGE)
    assert figures["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, split.labels).item(), rel=1e-5
    )


# ------------------------------------------------------------------------------------------------ recipes


def test_a_recipe_survives_its_file(tmp_path):
    recipe = Recipe(
        data="x", lr=5e-4, hflip=True, mean=(0.1, 0.2, 0.3), model_kwargs=("delta=2",), channels_last=False
    )
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a_recipe_written_by_hand(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 5e-4\nepochs: 3\nmodel_kwargs: {delta: 2, channels: [8, 8, 8]}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.lr, recipe.epochs) == (5e-4, 3)
    assert recipe.parsed_model_kwargs() == {"delta": 2, "channels": [8, 8, 8]}


def test_values_of_a_recipe_are_read_by_their_types(tmp_path):
    text = "lr: '1e-3'\nepochs: 4.0\ntrack: tensorboard\ndecay_epochs: 3\nsched: step\ntrain_split: 2024\n"
    (tmp_path / "r.yaml").write_text(text + "hflip: no\ncompile: on\nmean: [0, 0.5, 1]\ninit: null\n")
    fields = {"decay_epochs": (3,), "sched": "step", "train_split": "2024", "compile": True, "hflip": False}
    recipe = Recipe(lr=1e-3, epochs=4, track=("tensorboard",), mean=(0.0, 0.5, 1.0), **fields)
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz: 3", "unknown field 'epochz'; the fields are data, "),
        ("1: 3", "unknown field 1"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [", "cannot be read"),
        ("epochs: three", "epochs 'three': Input should be a valid integer"),
        ("epochs: 2.5", "epochs 2.5: "),
        ("epochs: true", "epochs is no switch, got true"),
        ("epochs: null", "epochs None: "),
        ("precision: no", "precision is no switch, got false: put words in quotes"),
        ("precision: fp8", "precision 'fp8': Input should be 'no', 'bf16' or 'fp16'"),
        ("compile: maybe", "compile 'maybe': Input should be a valid boolean"),
        ("mean: [0.5, 0.5]", "mean"),
        ("lr: [0.1]", r"lr \[0.1\]"),
        ("model_kwargs: [[1]]", "model_kwargs.0"),
        ("lr: -1", "lr must be positive, got -1"),
    ],
)
def test_a_bad_recipe_file_is_named(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"r\.yaml.*{message}"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"lr": 0.0},
        {"smoothing": 1.0},
        {"sched": "multistep"},
        {"decay_epochs": (3,)},
        {"model_kwargs": ("delta",)},
        {"model_kwargs": ("num_classes=3",)},
        {"clip_grad": 0.0},
        {"img_size": 4},
    ],
)
def test_a_bad_field_is_named(fields):
    with pytest.raises(UserError, match="|".join(fields)):
        Recipe(**fields)


def test_multistep_lowers_the_rate(tmp_path):
    recipe = Recipe(**FAST, epochs=3, sched="multistep", decay_epochs=(1, 2), warmup_epochs=0)
    train("resnet20", recipe, tmp_path / "a")
    # timm lowers the rate one update before the milestone, so an epoch's last step has the next rate
    assert [line["lr"] for line in read_metrics(tmp_path / "a")] == pytest.approx([0.01, 0.001, 0.001])


# ---------------------------------------------------------------------------------------------- bad input


def test_an_unknown_model_is_named_with_its_neighbours(tmp_path):
    with pytest.raises(UserError, match="unknown model 'resnet20_dai': did you mean resnet20_dia"):
        train("resnet20_dai", Recipe(**FAST), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("argument", ["nonsense=1", "delta=0"])
def test_wrong_model_arguments_leave_nothing(argument, tmp_path):
    with pytest.raises(UserError, match="cannot build resnet20_asr with"):
        train("resnet20_asr", Recipe(data="digits", model_kwargs=(argument,)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_folder_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        train("resnet20", Recipe(**FAST), run[0])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose another --out"):
        train("resnet20", Recipe(**FAST), tmp_path)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size 2000 is larger than the 1437 images"):
        train("resnet20", Recipe(data="digits", batch_size=2000), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        resume(tmp_path)
    with pytest.raises(WeightsError, match=r"has no config.json: name a run folder or a hub folder"):
        load_model(str(tmp_path))


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="the loss became .*lower --lr"):
        train("resnet20", Recipe(**{**FAST, "lr": 1e30}, epochs=3, warmup_epochs=0), tmp_path / "a")
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_data_with_other_classes_is_refused(run, tmp_path):
    from test_data import write

    with pytest.raises(UserError, match="choose data with the same classes"):
        validate(load_model(str(run[0])), Recipe(data=write(tmp_path / "d", split="test")))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "loss",
            "the loss became inf at step 4, with a gradient norm of nan and a learning rate of 0.1: lower",
        ),
        (
            "gradient",
            r"the loss became 2\.\d+ at step 4, with a gradient norm of inf and a learning rate of 0.1",
        ),
        ("running_var", "the weights or running statistics became infinite by step [45]: lower --lr"),
    ],
)
def test_a_diverged_run_keeps_finite_checkpoints(what, message, every, tmp_path, monkeypatch):
    """It says when and how; a rate that diverges by itself does so at another step on another CPU."""

    def update(self, batches, original=trainers.Trainer._update):
        if self.step + 1 != 4:
            return original(self, batches)
        criterion = self.criterion
        if what == "loss":
            self.criterion = lambda *a: criterion(*a) * math.inf
        elif what == "gradient":
            self.trained[0].register_hook(lambda gradient: gradient + math.inf)
        else:
            self.network.bn1.running_var.fill_(math.inf)
        return original(self, batches)

    monkeypatch.setattr(trainers.Trainer, "_update", update)
    recipe = Recipe(
        **FAST, epochs=2, warmup_epochs=0, sched="step", decay_epochs=(2,), checkpoint_every=every
    )
    with pytest.raises(UserError, match=message) as error:
        train("resnet20", recipe, tmp_path / "a")
    kept = sorted((tmp_path / "a").glob("step-*"))
    assert [p.name for p in kept] == {1: ["step-2", "step-3"], 3: ["step-3"]}[every]
    assert str(error.value).endswith(f"The last good checkpoint is {kept[-1]}")
    for checkpoint in kept:
        state = load_file(checkpoint / "model.safetensors").values()
        assert all(t.isfinite().all() for t in state if t.is_floating_point())


def test_new_checkpoints_survive_damaged_later_ones(tmp_path):
    recipe = Recipe(**FAST, epochs=2, checkpoint_every=2)
    with pytest.raises(Stopped):
        train("resnet20_dia", recipe, tmp_path / "a", on_step=stop_at(9))
    for folder in found((tmp_path / "a").glob("step-*")):
        (folder / "manifest.json").unlink()
    with pytest.raises(Stopped):
        resume(tmp_path / "a", on_step=stop_at(5))
    assert sorted(p.name for p in (tmp_path / "a").glob("step-*")) == ["step-2", "step-4"]


def test_a_changed_recipe_is_not_resumed(tmp_path):
    with pytest.raises(Stopped):
        train("resnet20", Recipe(**FAST, epochs=2), tmp_path / "a", on_step=stop_at(6))
    recipe = tmp_path / "a" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 2", "epochs: 3"))
    with pytest.raises(UserError, match=r"recipe\.yaml was changed"):
        resume(tmp_path / "a")


def test_a_network_that_only_its_name_registered_is_resumed_by_another_process(tmp_path):
    with pytest.raises(Stopped):
        train("resnet20_eca", Recipe(**FAST, epochs=2), tmp_path / "a", on_step=stop_at(6))
    code = "import sys; from timm_attn.training import resume; print(resume(sys.argv[1])['epoch'])"
    result = run_code(code, str(tmp_path / "a"))
    assert result.stdout.endswith("2\n"), result.stderr


def test_changed_data_is_not_resumed(tmp_path):
    from test_data import picture, write

    data = write(tmp_path / "d", images=[picture(i) for i in range(12)])
    write(tmp_path / "d", split="test")
    recipe = Recipe(data=data, batch_size=2, epochs=2, model_kwargs=TINY)
    with pytest.raises(Stopped):
        train("resnet20", recipe, tmp_path / "a", on_step=stop_at(7))
    write(tmp_path / "d", images=[picture(i) for i in range(9)])
    with pytest.raises(UserError, match="has changed since"):
        resume(tmp_path / "a")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet20_asr.cpu_c10", "train resnet20_asr with --init resnet20_asr.cpu_c10"),
        ("vit_tiny_patch16_224", "cannot build"),
    ],
)
def test_a_model_that_cannot_train_leaves_nothing(model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(model, Recipe(data="digits"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_numbered_classes_may_be_missing_from_the_evaluated_split(tmp_path):
    import datasets
    from test_data import encode, picture

    (tmp_path / "d").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, labels in (("train", [0, 1, 2, 0]), ("test", [1, 0])):
        columns = {"image": [encode(picture(i)) for i in range(len(labels))], "label": labels}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "d" / f"{split}-0.parquet")
    recipe = Recipe(data=str(tmp_path / "d"), batch_size=2, epochs=1, model_kwargs=TINY)
    train("resnet20", recipe, tmp_path / "a")
    assert validate(load_model(str(tmp_path / "a")), recipe)["images"] == 2


def test_a_seed_that_diverges_does_not_keep_the_others_from_training(tmp_path, monkeypatch):
    done = []

    def train_or_diverge(model, recipe, run, on_start=None, like=None):
        if recipe.seed == 0:
            run.mkdir(parents=True)
            on_start()
            for name in ("recipe.yaml", "environment.json"):
                (run / name).write_text("{}")
            raise UserError("the loss became nan")
        done.append(recipe.seed)
        run.mkdir(exist_ok=True)
        (run / "results.json").write_text('{"split": "test", "epoch": 1, "top1": 1, "top5": 1, "loss": 1}')

    monkeypatch.setattr(seeds, "train", train_or_diverge)
    with pytest.raises(UserError, match="seed-0: the loss became nan$"):
        seeds.train_seeds("resnet20", Recipe(**FAST), tmp_path / "runs", [0, 1, 2])
    assert done == [1, 2]

    def diverge(run, data=None):
        raise UserError("the loss became nan")

    monkeypatch.setattr(seeds, "resume", diverge)
    with pytest.raises(UserError, match="seed-0: the loss became nan$"):
        seeds.resume_seeds(tmp_path / "runs")
    assert done == [1, 2, 1, 2]


def test_fp16_that_never_has_a_finite_gradient_is_stopped(run, monkeypatch):
    """The scaler passes over every step and halves its scale; here is no GPU to do so on."""
    scaler = SimpleNamespace(get_scale=lambda: 65536 * 0.5**40)
    accelerator = SimpleNamespace(scaler=scaler, gather=lambda rows: rows)
    some = SimpleNamespace(
        accelerator=accelerator, trouble=torch.full((4,), math.inf), step=50, _last_checkpoint=lambda: ""
    )
    with pytest.raises(UserError, match="no gradient has been finite for dozens of steps before step 50"):
        trainers.Trainer._check_trouble(some)
    scaler.get_scale = lambda: 1.0
    trainers.Trainer._check_trouble(some)


def test_a_run_says_where_it_was_continued(tmp_path):
    recipe = Recipe(**FAST, epochs=2)
    with pytest.raises(Stopped):
        train("resnet20", recipe, tmp_path / "a", on_step=stop_at(7))
    about = json.loads((tmp_path / "a" / "environment.json").read_text())
    (tmp_path / "a" / "environment.json").write_text(json.dumps({**about, "hardware": "a Cray-1"}))
    resume(tmp_path / "a")
    after = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert machines(after) == ["a Cray-1", about["hardware"]]


def test_new_weights_have_none_of_the_fields_of_others_but_a_licence_that_they_inherit(tmp_path):
    split = load_split("digits", "train", size=(32, 32))
    network, _ = build("resnet18", Recipe(data="digits"), split)
    old = timm.get_pretrained_cfg("resnet18")
    assert old.test_input_size and "test_input_size" not in network.pretrained_cfg
    start = timm.create_model("resnet20", channels=[8, 8, 8], layers=[1, 1, 1])
    start.pretrained_cfg = {**start.pretrained_cfg, "license": "cc-by-nc-4.0"}
    save_model(start, tmp_path, [str(i) for i in range(10)])
    network, _ = build("resnet20", Recipe(data="digits", init=str(tmp_path)), split)
    assert network.pretrained_cfg["license"] == "cc-by-nc-4.0"
