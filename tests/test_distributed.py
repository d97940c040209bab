"""Two processes on gloo: exact resume, the same maths as one process, every image counted once."""

import json

import pytest
from helpers import ROOT, python, timeless
from safetensors.torch import load_file

from timm_attn.training import Recipe, train
from timm_attn.training.run import open_run, read_metrics
from timm_attn.training.seeds import seed_runs

EXACT = {
    "data": "digits",
    "img_size": 8,
    "crop_padding": 1,
    "batch_size": 256,
    "lr": 0.05,
    "epochs": 2,
    "checkpoint_every": 2,
    "log_every": 3,
    "ema_decay": 0.9,
    "reprob": 0.3,
    "accumulation": 2,
    "model_kwargs": ["channels=[8,8,8]", "layers=[1,1,1]", "drop_path_rate=0.2"],
}
#: No batch norm, whose statistics are those of one process's part of a batch.
SAME = {
    **EXACT,
    "accumulation": 1,
    "ema_decay": None,
    "model_kwargs": ["channels=[8,8,8]", "layers=[1,1,1]", "norm_layer=groupnorm1"],
}


def launch(*runs: dict, fails: bool = False) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = python(
        *command, str(ROOT / "tests" / "distributed_runs.py"), json.dumps(runs), env={"OMP_NUM_THREADS": "1"}
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole runs and killed ones in fp32 and bf16, and one without batch norm."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, recipe: dict, kill: int | None = None, model: str = "resnet20_ssia") -> dict:
        return {"out": str(folder / name), "model": model, "recipe": recipe, "kill": kill}

    half = {**EXACT, "precision": "bf16"}
    launch(
        run("same", SAME),
        run("whole", EXACT),
        run("whole_bf16", half),
        run("killed", EXACT, kill=7),
        fails=True,
    )
    launch(run("killed", EXACT), run("killed_bf16", half, kill=4), fails=True)
    launch(run("killed_bf16", half))
    return folder


@pytest.mark.parametrize("precision", ["", "_bf16"])
def test_a_killed_run_of_two_processes_ends_in_the_same_bits(precision, runs):
    whole, killed = runs / f"whole{precision}", runs / f"killed{precision}"
    for name in ("model.safetensors", "step-10/model.safetensors", "step-10/ema.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert timeless(whole / name) == timeless(killed / name)


def test_a_resume_replays_no_more_than_a_checkpoint_interval(runs):
    for name, killed in (("killed", 7), ("killed_bf16", 4)):
        lines = (runs / f"{name}.steps").read_text().split("\n")[:-1]
        done = [int(line.split()[1]) for line in lines if line.startswith("0 ")]
        replayed = len(done) - len(set(done))
        assert set(done) == set(range(1, 11)) and replayed <= EXACT["checkpoint_every"], (killed, done)


def test_every_image_is_counted_once(runs):
    assert open_run(runs / "whole", finished=True)["processes"] == 2
    assert [line["images"] for line in read_metrics(runs / "whole")] == [360, 360]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_and_accumulation_compute_what_one_batch_computes(accumulation, runs, tmp_path):
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in SAME.items()}
    recipe = Recipe(**{**fields, "accumulation": accumulation})
    train("resnet20_ssia", recipe, tmp_path / "one")
    two, one = (load_file(run / "model.safetensors") for run in (runs / "same", tmp_path / "one"))
    # After ten steps in float32, up to the order of sums: relative to the largest weight of each tensor.
    error = max(((one[k] - two[k]).abs().max() / one[k].abs().max().clamp(min=1e-3)).item() for k in one)
    assert error < 1e-4, error
    a, b = read_metrics(runs / "same")[-1], read_metrics(tmp_path / "one")[-1]
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_the_command_line_by_accelerate_launch(tmp_path):
    # --multi_gpu is what makes it start several processes; on a machine without GPUs they are CPU processes.
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    options = [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "timm_attn",
        "train",
        "resnet20_dia",
    ]
    recipe = ["--data", "digits", "--img-size", "8", "--epochs", "1", "--out", str(tmp_path / "a")]
    several = ["--seeds", "0", "1", "--track", "tensorboard"]
    result = python(*launch, *options, *recipe, *several, "--model-kwargs", "channels=[8,8,8]", cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("epoch   1") == 2
    for run in seed_runs(tmp_path / "a"):
        assert open_run(run, finished=True)["processes"] == 2
        assert read_metrics(run)[0]["images"] == 360 and list(run.rglob("events.out.tfevents.*"))
