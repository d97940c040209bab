r"""Train small networks with one recipe, seed by seed; what is finished is skipped.

    python scripts/train_zoo.py --data uoft-cs/cifar10
    python scripts/train_zoo.py --data tinyimagenet32 --recipe tinyimagenet_cpu --runs runs/tiny \
        --results hub/results/tiny --models resnet20 resnet20_asr resnet20_asr:generator=scale

A network may have arguments, after colons; they are a part of its name here. Runs lie in
``<runs>/<model>/seed-<seed>``; a finished one is copied to the same place under the results, less its
checkpoints, and with --records-only less its weights and curves. A run that was stopped goes on where it was,
so the script can be run again until nothing is left; `scripts/export_zoo.py` exports what is finished at any
time. A run that breaks off (it diverges, say) does not keep the others from being made; the script then ends
with status 1.

    python scripts/train_zoo.py --device cuda --recipe cifar_gpu --seconds 540 --data uoft-cs/cifar10

stops in time, with a checkpoint, and the same command goes on: for machines that are lent for a while. No
file of a run has more than 16 MiB with the networks of 20 layers.
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from timm_attn.errors import UserError
from timm_attn.files import replace_file, sha256, write_json
from timm_attn.load import check_model
from timm_attn.training import Recipe
from timm_attn.training.recipe_file import load_recipe, save_recipe
from timm_attn.training.run import (
    CURVES,
    ENVIRONMENT,
    METRICS,
    RECIPE,
    RESULTS,
    is_run,
    open_run,
    read_metrics,
)
from timm_attn.weights import CONFIG, WEIGHTS

ROOT = Path(__file__).parents[1]
MODELS = (
    "resnet20",
    "resnet20_se",
    "resnet20_dia",
    "resnet20_conam",
    "resnet20_asr",
    "resnet20_ssia",
    "fmmnet20",
)
#: Steps between two checkpoints of a run.
CHECKPOINT_EVERY = 100
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140


def refuse_another_recipe(run: Path, asked: Recipe) -> None:
    """Raise a UserError if a run was made with another recipe.

    Where the data lay may differ, and what the recipe left open was filled in when the run began.
    """
    made, wanted = ({**vars(r), "data": Path(r.data).name} for r in (load_recipe(run / RECIPE), asked))
    differing = [
        f"{name} {made[name]!r}, not {value!r}"
        for name, value in wanted.items()
        if name != "seed" and value is not None and made[name] != value
    ]
    if differing:
        raise UserError(f"{run} has {'; '.join(differing)}: name other folders with --runs and --results")


def train(arm: str, run: Path, options: list[str], seconds: float | None = None) -> bool:
    """Start a run, or go on with it; whether it came to its end. After so many seconds it is stopped."""
    model, *model_kwargs = arm.split(":")
    if model_kwargs:
        options = [*options, "--model-kwargs", *model_kwargs]
    arguments = ["--resume", str(run)] if is_run(run) else [model, *options, "--out", str(run)]
    console.print(f"$ timm-attn train {' '.join(arguments)}", markup=False)
    command = [sys.executable, "-m", "timm_attn", "train", *arguments]
    status = subprocess.run(command).returncode if seconds is None else _within(command, seconds)
    if status in (0, 1, 2) and is_run(run):
        return status == 0
    sys.exit(status)  # stopped by the user or by a signal, or wrong input, which all runs would have


def _within(command: list[str], seconds: float) -> int:
    """Exit status of a command; after so many seconds it is told to stop, and so is this script."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it writes a checkpoint
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                process.kill()
    console.print("time is up: the same command goes on")
    sys.exit(0)


def is_kept(folder: Path) -> bool:
    """Whether a finished run has been copied here."""
    return (folder / RESULTS).is_file()


def keep(run: Path, data: str, folder: Path, records_only: bool) -> None:
    """Copy a finished run, but for its checkpoints and where the data lay.

    The results come last: a kept run that has them is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe, environment = load_recipe(run / RECIPE), open_run(run)
    name = Path(recipe.data).name if Path(recipe.data).is_dir() else recipe.data
    save_recipe(dataclasses.replace(recipe, data=name), folder / RECIPE)
    # Neither where the data lay nor where the runs did: of that, the last folders.
    shown = {data: name, recipe.data: name, str(run): str(Path(*run.parts[-4:]))}
    words = [shown.get(word, word) for word in shlex.split(environment["command"])]
    environment["command"] = shlex.join(word.removeprefix(f"{ROOT}/") for word in words)
    write_json(folder / ENVIRONMENT, {**environment, "recipe_sha256": sha256(folder / RECIPE)})
    for file in (METRICS,) if records_only else (METRICS, CURVES, CONFIG, WEIGHTS):
        shutil.copy(run / file, folder / file)
    replace_file(folder / RESULTS, (run / RESULTS).read_bytes())


def folder_name(arm: str) -> str:
    """Folder of a network's runs."""
    return arm.replace(":", "-")


def show(runs: Path, results: Path, models: list[str], seeds: list[int]) -> None:
    """Print how far every run is, and its last top-1."""
    table = Table("model", *(f"seed {seed}" for seed in seeds), title="top-1 (%) of the last epoch")
    for model in models:
        cells = []
        for seed in seeds:
            kept, run = (folder / folder_name(model) / f"seed-{seed}" for folder in (results, runs))
            done = is_kept(kept)
            epochs = read_metrics(kept if done else run)
            cells.append(f"{epochs[-1]['top1']:.2f}" if done else f"epoch {len(epochs)}" if epochs else "")
        table.add_row(model, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a Hub id, or a folder of parquet files")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="cifar_cpu")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], help="another than the recipe's")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "zoo")
    parser.add_argument("--results", type=Path, default=ROOT / "hub" / "results" / "zoo")
    parser.add_argument("--records-only", action="store_true", help="keep no weights and no curves")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="refuse to train on anything else")
    parser.add_argument("--seconds", type=float, help="stop after these, with a checkpoint")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    if arguments.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    options = ["--recipe", arguments.recipe, "--data", arguments.data]
    options += ["--checkpoint-every", str(CHECKPOINT_EVERY)]
    asked = dataclasses.replace(
        load_recipe(arguments.recipe), data=arguments.data, checkpoint_every=CHECKPOINT_EVERY
    )
    if arguments.precision:
        options += ["--precision", arguments.precision]
        asked = dataclasses.replace(asked, precision=arguments.precision)
    for model in arguments.models:  # at once, not when its turn comes
        check_model(model.partition(":")[0])
    for seed in arguments.seeds:
        dataclasses.replace(asked, seed=seed)  # a recipe checks its own fields
    broken = []
    for seed in arguments.seeds:  # one seed of every network says more than all seeds of one
        for model in arguments.models:
            run = arguments.runs / folder_name(model) / f"seed-{seed}"
            kept = arguments.results / folder_name(model) / f"seed-{seed}"
            model_kwargs = tuple(model.split(":")[1:]) or asked.model_kwargs
            for folder in filter(is_run, (kept, run)):
                refuse_another_recipe(folder, dataclasses.replace(asked, model_kwargs=model_kwargs))
            if not is_kept(kept):
                if (run / WEIGHTS).is_file() or train(
                    model,
                    run,
                    [*options, "--seed", str(seed)],
                    arguments.seconds and max(1.0, arguments.seconds - (time.monotonic() - started)),
                ):
                    keep(run, arguments.data, kept, arguments.records_only)
                else:
                    broken.append(str(run))
            show(arguments.runs, arguments.results, arguments.models, arguments.seeds)
    if broken:
        sys.exit(f"not finished: {', '.join(broken)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(2)
