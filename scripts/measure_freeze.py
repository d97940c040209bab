"""Accuracy of networks with their channel gates frozen within budgets, with and without recovery.

    python scripts/measure_freeze.py hub/results/freeze_accuracy.csv --data cifar10 \\
        hub/results/zoo/resnet20_se/seed-0 hub/results/zoo/resnet20_se/seed-1 ...

Each argument is a run, or what scripts/train_zoo.py kept of one. Means come from the training split. One half
of the test split, or of what the run held out of the training split, decides, the other gives the figures.
What is in the table is not measured again, and recoveries are resumed.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timm_attn.files import read_csv, write_csv
from timm_attn.gates import find_gates, gate_modules
from timm_attn.load import RECIPE, load_model
from timm_attn.passes import Figures
from timm_attn.search import GateSearch
from timm_attn.training import Recipe
from timm_attn.training.freezing import read_images, recovery
from timm_attn.training.recipe_file import load_recipe
from timm_attn.training.run import hardware
from timm_attn.training.splits import HELD_OUT

BUDGETS = (0.0, 0.1, 0.25, 0.5, math.inf)
FIELDS = (
    *("network", "data", "run", "budget", "recover", "recovered", "gates", "frozen", "kept"),
    *("top1_before", "top1", "agreement", "kl", "images", "machine"),
)


def measure(
    source: Path, budgets: list[float], recovered: list[float], recipe: Recipe, steps: int, out: Path
) -> Iterator[dict[str, Any]]:
    """A row for every budget, and one with recovery for some."""
    model = load_model(str(source))
    val_fraction = load_recipe(source / RECIPE).val_fraction
    if val_fraction:
        recipe = dataclasses.replace(recipe, val_fraction=val_fraction, eval_split=HELD_OUT)
    images, labels, means, classes, names, _ = read_images(model, recipe, 10_000, False, source)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    halves = [(images[rows], labels[rows]) for rows in order.chunk(2)]
    gates, _ = find_gates(model, images[:8])
    search = GateSearch(model, gates, [(means, classes), *halves], recipe.batch_size, note=print)
    train = recovery(str(source), recipe, steps, out, names)
    about = {"network": model.pretrained_cfg["architecture"], "data": Path(recipe.data).name}
    about |= {"run": source.name, "gates": len(gates), "images": len(halves[1][0]), "machine": hardware()}
    known: dict[tuple[frozenset, bool], Figures] = {}
    before = search.work.figures(search.original, math.nan)
    for budget in budgets:
        choice = search.choose(budget)
        for n in (0, steps) if budget in recovered else (0,):
            chosen = choice.chosen
            network, found = search.network(chosen).model, None
            if n:
                found = search.recovered(train, choice, budget)
                network, chosen = (found[0].model, found[1]) if found else (network, chosen)
            key = frozenset(chosen), found is not None
            known[key] = known.get(key) or search.work.figures(network, math.nan)
            gone = {gate.path for gate in chosen}
            kept = [i for i, path in enumerate(gate_modules(search.original)) if path not in gone]
            yield about | {
                "budget": budget,
                "recover": n,
                "recovered": int(found is not None),
                "frozen": len(chosen),
                "kept": " ".join(map(str, kept)),
                "top1_before": round(before.top1, 4),
                "top1": round(known[key].top1, 4),
                "agreement": round(known[key].agreement, 4),
                "kl": round(known[key].kl, 6),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--recovered", type=float, nargs="*", default=BUDGETS, help="budgets with recovery")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/freeze"))
    arguments = parser.parse_args()
    recipe = Recipe(data=arguments.data, batch_size=128, lr=0.01, weight_decay=0.0, warmup_epochs=0.0)
    rows = []
    if arguments.table.exists():
        rows = read_csv(arguments.table)
    for run in arguments.runs:
        network = load_model(str(run)).pretrained_cfg["architecture"]
        key = (network, Path(arguments.data).name, run.name)
        if any((row["network"], row["data"], row["run"]) == key for row in rows):
            continue
        new = []
        out = arguments.out / network / run.name
        for row in measure(run, arguments.budgets, arguments.recovered, recipe, arguments.steps, out):
            print(row, flush=True)
            new.append(row)
        rows += new
        write_csv(arguments.table, [{name: row[name] for name in FIELDS} for row in rows])


if __name__ == "__main__":
    main()
