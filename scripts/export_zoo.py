"""Export the finished runs of scripts/train_zoo.py, measure and draw them.

    python scripts/export_zoo.py --data uoft-cs/cifar10 --dataset uoft-cs/cifar10 --tag cpu_c10

Of every network the run with the median top-1 goes into the hub folder, in the place of older weights of
that name, when all could be exported; accuracies are over all of its seeds. `zoo.json` (see --name) gets what
only this script measures, the time per image of every form over that of the plain network, in turn in one
process; `zoo.png` shows accuracy against it and against the number of parameters. --only-measure does no more
than that, for weights that are in the hub folder already.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from bench_timing import ratios, rounds, surroundings
from readme_tables import DOCUMENTS, tables
from rich.console import Console
from rich.progress import track
from rich.table import Table
from table_parts import ratio

from timm_attn.compare import FoldError
from timm_attn.errors import UserError
from timm_attn.models.deployed import fuse_conv_norms
from timm_attn.publish import export
from timm_attn.publish.folders import link, locked
from timm_attn.publish.render import render
from timm_attn.training.processes import keep_freed_memory
from timm_attn.training.seeds import gather_seeds
from timm_attn.weights import INDEX, WEIGHTS, Checkpoint, WeightsError, read_index, write_index

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import fixed_images

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "resnet20"
FUSED = f"{PLAIN}, norms fused"
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140


def trained(checkpoint: Checkpoint) -> str:
    """Name of the network as it was trained."""
    return checkpoint.derived_from or checkpoint.name


def replace(hub: Path, exported: Path) -> None:
    """Move checkpoints from one hub folder to another, in the place of older ones of these networks."""
    new = read_index(exported)
    names = {trained(c) for c in new}
    with locked(hub):
        known = read_index(hub) if (hub / INDEX).is_file() else []
        write_index(hub, link(c for c in known if trained(c) not in names))  # never of weights that are gone
        for checkpoint in known:
            if trained(checkpoint) in names:
                shutil.rmtree(checkpoint.folder, ignore_errors=True)
        for checkpoint in new:
            checkpoint.folder.rename(hub / checkpoint.name)
        moved = [dataclasses.replace(c, folder=hub / c.name) for c in new]
        write_index(hub, link([*(c for c in known if trained(c) not in names), *moved]))


def cost(
    checkpoints: list[Checkpoint], n: int, batch_size: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Time in eval mode (fp32) over that of the plain network as it was trained.

    Returns:
        That of every checkpoint by name, and that of the plain network with its norms fused into the
        convolutions, as those of all folded forms are here.
    """
    keep_freed_memory()  # else the time of a network depends on what was freed before it
    models = {c.name: timm.create_model(f"local-dir:{c.folder}", pretrained=True).eval() for c in checkpoints}
    for checkpoint in checkpoints:
        if checkpoint.folded_from:
            fuse_conv_norms(models[checkpoint.name])
    (plain,) = (c.name for c in checkpoints if c.architecture == PLAIN and not c.derived_from)
    models[FUSED] = copy.deepcopy(models[plain])
    fuse_conv_norms(models[FUSED])
    images = torch.randn(batch_size, *models[plain].pretrained_cfg["input_size"])
    with torch.inference_mode():
        calls = {name: partial(model, images) for name, model in models.items()}
        times = rounds(calls, n, repeats=2, device=torch.device("cpu"))
    return {c.name: ratios(times, c.name, plain) for c in checkpoints}, ratios(times, FUSED, plain)


def draw(
    checkpoints: list[Checkpoint], relative_time: dict[str, dict[str, Any]], fused: float, path: Path
) -> None:
    """Accuracy against parameters and time (band: all rounds): full as trained, hollow as deployed.

    Networks are moved apart by a hundredth of an axis each, since some are at the same place.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    networks = sorted({trained(c) for c in checkpoints}, key=lambda name: (name.split(".")[0] != PLAIN, name))
    places = (
        lambda c: [c.metrics["parameters"] / 1e3] * 3,
        lambda c: [relative_time[c.name][f"ratio_{key}"] for key in ("min", "median", "max")],
    )
    for axis, place in zip(axes, places, strict=True):
        ends = [place(c)[1] for c in checkpoints]
        step = (max(ends) - min(ends)) / 100
        for i, name in enumerate(networks):
            shift = step * (i - len(networks) // 2)
            forms = sorted((c for c in checkpoints if trained(c) == name), key=lambda c: bool(c.folded_from))
            top1 = [c.over_seeds["top1"] for c in forms]
            axis.plot([place(c)[1] + shift for c in forms], [t["mean"] for t in top1], color=f"C{i}", lw=0.8)
            for c, t in zip(forms, top1, strict=True):
                least, median, greatest = (x + shift for x in place(c))
                axis.hlines(t["mean"], least, greatest, color=f"C{i}", lw=3, alpha=0.15)
                axis.errorbar(
                    median,
                    t["mean"],
                    yerr=t["std"],
                    fmt="o",
                    capsize=3,
                    color=f"C{i}",
                    mfc="white" if c.folded_from else None,
                    label=None if c.folded_from else f"{c.architecture} (n = {t['n']})",
                )
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="parameters (thousands)", ylabel="top-1 on the test split (%), last epoch")
    line = axes[1].axvline(fused, color="C0", ls=":", label=FUSED)
    axes[1].set(xlabel=f"time per image at inference (median), {PLAIN} with its norms = 1")
    axes[0].legend(fontsize=8)
    axes[1].legend(handles=[line], fontsize=8)
    figure.suptitle(
        "mean ± standard deviation over seeds; full: as trained, hollow: as deployed\n"
        "bands: all rounds; networks are moved apart, by up to 3 % of an axis",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def write_logits(checkpoints: list[Checkpoint], path: Path) -> None:
    """Write what every shipped network computes of fixed images, for a test to compare."""
    logits = {}
    with torch.no_grad():
        for c in checkpoints:
            model = timm.create_model(f"local-dir:{c.folder}", pretrained=True).eval()
            rows = model(fixed_images(model.pretrained_cfg["input_size"])).tolist()
            logits[c.name] = [[round(logit, 5) for logit in row] for row in rows]
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in logits.items())
    path.write_text(f"{{\n{lines}\n}}\n")


def export_all(finished: list[Path], hub: Path, arguments: argparse.Namespace) -> None:
    """Put the run with the median top-1 of each network into the hub folder, and render what names it."""
    exported = hub / ".exported"  # on the same disk, since folders are moved from it
    shutil.rmtree(exported, ignore_errors=True)
    try:
        for runs in track(finished, "exporting", console=console):
            gather_seeds(runs)
            export(
                runs,
                arguments.tag,
                exported,
                arguments.dataset,
                arguments.data,
                dataset_license=arguments.dataset_license,
            )
        replace(hub, exported)
    finally:
        shutil.rmtree(exported, ignore_errors=True)
    shipped = hub.resolve() == ROOT / "hub"
    render(hub, DOCUMENTS if shipped else (), tables=tables() if shipped else None)
    if shipped:
        write_logits(read_index(hub), ROOT / "tests" / "shipped_logits.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a Hub id, or a folder of parquet files")
    parser.add_argument("--dataset", required=True, help="what cards call the data set")
    parser.add_argument("--tag", required=True)
    parser.add_argument("--runs", type=Path, default=ROOT / "hub" / "results" / "zoo")
    parser.add_argument("--models", nargs="+", help=f"those to export, {PLAIN} among them; all by default")
    parser.add_argument("--hub", type=Path, default=ROOT / "hub")
    parser.add_argument("--name", default="zoo", help="of the files in the hub folder's results")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dataset-license", help="licence of the images, where it is not known here")
    parser.add_argument("--only-measure", action="store_true")
    arguments = parser.parse_args()
    for option in ("rounds", "batch_size"):
        given = getattr(arguments, option)
        if given < 1:
            parser.error(f"--{option.replace('_', '-')} is {given}: it must be at least 1")
    hub = arguments.hub
    hub.mkdir(parents=True, exist_ok=True)

    finished = sorted({path.parents[1] for path in arguments.runs.glob(f"*/seed-*/{WEIGHTS}")})
    for model in arguments.models or [PLAIN]:
        if arguments.runs / model not in finished:
            sys.exit(f"{arguments.runs} has no finished {model}: run scripts/train_zoo.py first")
    finished = [
        runs for runs in finished if "=" not in runs.name
    ]  # a network with options has no name to ship
    if arguments.models:
        finished = [runs for runs in finished if runs.name in {PLAIN, *arguments.models}]
    if not arguments.only_measure:
        export_all(finished, hub, arguments)

    names = {f"{runs.name}.{arguments.tag}" for runs in finished}
    checkpoints = [c for c in read_index(hub) if trained(c) in names]
    relative_time, fused = cost(checkpoints, arguments.rounds, arguments.batch_size)
    results = hub / "results"
    results.mkdir(exist_ok=True)
    about = {
        "command": (
            f"export_zoo.py --data DATA --dataset {arguments.dataset} --tag {arguments.tag} "
            f"--runs {arguments.runs.name} --name {arguments.name} --rounds {arguments.rounds}"
        ),
        "relative_time": f"fp32, batch {arguments.batch_size}, {PLAIN} as trained = 1",
        **surroundings(torch.device("cpu")),
    }
    measured = {**about, "checkpoints": relative_time, FUSED: fused}
    (results / f"{arguments.name}.json").write_text(json.dumps(measured, indent=1) + "\n")
    draw(checkpoints, relative_time, fused["ratio_median"], results / f"{arguments.name}.png")
    table = Table("weights", "parameters", "top-1 (%)", "mean", "std", "n", "time over plain")
    for c in checkpoints:
        top1 = c.over_seeds["top1"]
        table.add_row(
            c.name,
            f"{c.metrics['parameters']:,}",
            f"{c.metrics['top1']:.2f}",
            f"{top1['mean']:.2f}",
            "" if top1["std"] is None else f"{top1['std']:.2f}",
            str(top1["n"]),
            ratio(relative_time[c.name]),
        )
    console.print(table)
    console.print(f"{FUSED}: {ratio(fused)}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, WeightsError, FoldError) as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(2)
