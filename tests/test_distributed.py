"""Two processes on gloo: exact resume, the same maths as one process, every image counted once."""

import json

import pytest
from forked import run_code
from helpers import ROOT, timeless
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


#: Gradients of two processes with half of the batch each are those of one with all of it.
GRADIENTS = """
import torch, torch.distributed as dist, torch.nn.functional as F
from functools import partial
from helpers import narrow, randomise
from timm.layers import GroupNorm
dist.init_process_group("gloo")
rank = dist.get_rank()
def make():
    torch.manual_seed(0)
    return randomise(narrow("resnet20_ssia", norm_layer=partial(GroupNorm, num_groups=2)).double()).train()
model = make()
parallel = torch.nn.parallel.DistributedDataParallel(model)
g = torch.Generator().manual_seed(0)
x, y = torch.randn(4, 3, 32, 32, generator=g).double(), torch.randint(0, 10, (4,), generator=g)
part = slice(2 * rank, 2 * rank + 2)
for _ in range(2):  # DDP finds out in the second step that a parameter got no gradient in the first
    model.zero_grad()
    F.cross_entropy(parallel(x[part]), y[part]).backward()
if rank == 0:
    whole = make()
    whole.zero_grad()
    logits = whole(x)
    F.cross_entropy(logits, y).backward()
    for (key, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m: key + ": " + m)
    print("equal over", len(list(model.parameters())), "parameters")
dist.barrier()  # else the other process may end, and abort, in the midst of gloo's farewell
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Whole runs and killed ones in fp32 and bf16, one without batch norm, and a script; what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "gradients.py").write_text(GRADIENTS)

    def run(name: str, recipe: dict, kill: int | None = None, model: str = "resnet20_ssia") -> dict:
        return {"out": str(folder / name), "model": model, "recipe": recipe, "kill": kill}

    half = {**EXACT, "precision": "bf16"}
    launches = [
        [{"script": str(folder / "gradients.py")}],
        [run("same", SAME), run("whole", EXACT), run("whole_bf16", half), run("killed", EXACT, kill=7)],
        [run("killed", EXACT), run("killed_bf16", half, kill=4)],
        [run("killed_bf16", half)],
    ]
    program = str(ROOT / "tests" / "distributed_runs.py")
    result = run_code(f"import runpy\nrunpy.run_path({program!r}, run_name='__main__')", json.dumps(launches))
    # Those with a kill break off.
    assert result.returncode == 0 and json.loads(result.stdout.splitlines()[-1]) == [0, 1, 1, 0], (
        result.stderr
    )
    return folder, result.stdout


@pytest.fixture
def runs(launched):
    return launched[0]


def test_two_processes_have_the_gradients_of_one_with_both_batches(launched):
    assert "equal over" in launched[1]


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
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --main_process_port 0"
    log = ["--log_dir", str(tmp_path / "log")]
    train = "--dynamo_backend no -m timm_attn train resnet20_dia --data digits --img-size 8 --epochs 1"
    options = "--seeds 0 1 --track tensorboard --model-kwargs channels=[8,8,8] layers=[1,1,1]"
    command = [*launch.split(), *log, *train.split(), "--out", str(tmp_path / "a"), *options.split()]
    code = "import runpy\nrunpy.run_module('accelerate.commands.launch', run_name='__main__', alter_sys=True)"
    result = run_code(code, *command, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("epoch   1") == 2
    seeds = seed_runs(tmp_path / "a")
    assert [run.name for run in seeds] == ["seed-0", "seed-1"]
    for run in seeds:
        assert open_run(run, finished=True)["processes"] == 2
        assert read_metrics(run)[0]["images"] == 360 and list(run.rglob("events.out.tfevents.*"))
