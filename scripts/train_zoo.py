"""Train the CIFAR networks of the zoo with one recipe, seed by seed; what is finished is skipped.

    python scripts/train_zoo.py --data uoft-cs/cifar10

Runs lie in ``<runs>/<model>/seed-<seed>``; a finished one is copied to the same place under the results, less
its checkpoints. A run that was stopped goes on where it was, so the script can be run again until nothing is
left; `scripts/export_zoo.py` exports what is finished at any time.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from timm_attn.training.recipe_file import load_recipe
from timm_attn.training.run import CURVES, ENVIRONMENT, METRICS, RECIPE, RESULTS, is_run, read_metrics
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
#: What is kept of a run: all that an export needs, the weights last, so a kept run that has them is whole.
TEXTS = (RECIPE, ENVIRONMENT, METRICS, RESULTS)
FILES = (CURVES, CONFIG, WEIGHTS)
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140


def train(model: str, run: Path, options: list[str]) -> None:
    """Start a run, or go on with it."""
    arguments = ["--resume", str(run)] if is_run(run) else [model, *options, "--out", str(run)]
    console.print(f"$ timm-attn train {' '.join(arguments)}", markup=False)
    subprocess.run([sys.executable, "-m", "timm_attn", "train", *arguments], check=True)


def keep(run: Path, data: str, folder: Path) -> None:
    """Copy a finished run, but for its checkpoints and where the data lay."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = load_recipe(run / RECIPE).data
    for name in TEXTS:
        text = (run / name).read_text(encoding="utf-8").replace(f"{ROOT}/", "")
        for path in {data, resolved} if Path(resolved).is_dir() else ():
            text = text.replace(path, Path(resolved).name)
        (folder / name).write_text(text)
    for name in FILES:
        shutil.copy(run / name, folder / name)


def show(runs: Path, results: Path, models: list[str], seeds: list[int]) -> None:
    """Print how far every run is, and its last top-1."""
    table = Table("model", *(f"seed {seed}" for seed in seeds), title="top-1 (%) of the last epoch")
    for model in models:
        cells = []
        for seed in seeds:
            kept, run = (folder / model / f"seed-{seed}" for folder in (results, runs))
            done = (kept / WEIGHTS).is_file()
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
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "zoo")
    parser.add_argument("--results", type=Path, default=ROOT / "hub" / "results" / "zoo")
    arguments = parser.parse_args()
    options = ["--recipe", arguments.recipe, "--data", arguments.data, "--checkpoint-every", "100"]
    for seed in arguments.seeds:  # one seed of every network says more than all seeds of one
        for model in arguments.models:
            run = arguments.runs / model / f"seed-{seed}"
            kept = arguments.results / model / f"seed-{seed}"
            if not (kept / WEIGHTS).is_file():
                if not (run / WEIGHTS).is_file():
                    train(model, run, [*options, "--seed", str(seed)])
                keep(run, arguments.data, kept)
            show(arguments.runs, arguments.results, arguments.models, arguments.seeds)


if __name__ == "__main__":
    main()
