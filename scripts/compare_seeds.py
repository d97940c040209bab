"""Networks against a plain one by paired seeds: differences of top-1 with intervals, drawn too.

    python scripts/compare_seeds.py hub/results/tiny --baseline resnet20 \\
        --cost hub/results/tiny_resnet20_cost.csv --out hub/results/tiny_differences.csv \\
        --picture hub/results/tiny_differences.png

Reads ``<folder>/<network>/seed-<seed>``, as scripts/train_zoo.py writes them, of the networks whose backbone
is the plain one. Accuracy is that of the last epoch, on the test split and on images held out of the training
split, where the recipe held some out. A difference is taken between runs of the same seed, which saw the same
images in the same order; intervals are Student's t, 95 %, and cover what another seed would change, not what
another recipe or data set would. Corrected ones are wider, for as many comparisons as there are networks with
an interval (Bonferroni).
``needed`` is the number of seeds with which half a point would be found four times out of five, at the
deviation seen here. --cost is a table of scripts/bench_deployed.py, drawn beside the differences.
"""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

from paired import FEWEST, difference
from rich.console import Console
from rich.table import Table

from timm_attn.files import read_csv, write_csv
from timm_attn.models import known_architecture, parse_name
from timm_attn.style import new_figure, style, write_png
from timm_attn.training.run import RESULTS, read_metrics, read_results
from timm_attn.training.splits import HELD_OUT

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 170


def top1_by_seed(network: Path) -> dict[str, dict[int, float]]:
    """Top-1 of the last epoch of a network's finished runs, by split (the reported one first) and seed."""
    found: dict[str, dict[int, float]] = {}
    for run in network.glob("seed-*"):
        if not (run / RESULTS).is_file():
            continue
        seed = int(run.name.removeprefix("seed-"))
        results = read_results(run)
        top1 = {
            results["split"]: results["top1"],  # reported
            results["best_epoch"]["split"]: read_metrics(run)[-1]["top1"],  # evaluated after each epoch
        }
        for split, value in top1.items():
            found.setdefault(HELD_OUT if split.endswith(HELD_OUT) else split, {})[seed] = value
    return found


def family(folder: Path, baseline: str) -> list[Path]:
    """Folders of the runs of a plain network and of those that it is the backbone of, the plain one first."""
    others = [path for path in sorted(folder.iterdir()) if path.is_dir() and _backbone(path) == baseline]
    return [folder / baseline, *(path for path in others if path.name != baseline)]


def _backbone(network: Path) -> str:
    architecture = network.name.partition("-")[0]  # after which are its options
    return parse_name(architecture)[0] if known_architecture(architecture) else architecture


def compare(folder: Path, baseline: str) -> list[dict[str, Any]]:
    """A row for each split and network, by split, the best difference first.

    Raises:
        ValueError: The baseline, or every other network, has no finished run.
    """
    first, *others = family(folder, baseline)
    plain = top1_by_seed(first)
    if not plain:
        raise ValueError(f"{first} has no finished run")
    runs = {network.name: top1_by_seed(network) for network in others}
    comparisons = Counter(
        split
        for splits in runs.values()
        for split, found in splits.items()
        if len(found.keys() & plain.get(split, {}).keys()) >= FEWEST
    )
    rows = []
    for network, splits in runs.items():
        for split, found in splits.items():
            told = difference(found, plain.get(split, {}), comparisons[split])
            if told:
                rows.append({"split": split, "network": network, "baseline": baseline, **told})
    if not rows:
        raise ValueError(f"{folder} has no finished run beside those of {baseline}")
    return sorted(rows, key=lambda row: (row["split"], -row["difference"]))


def draw(rows: list[dict[str, Any]], costs: dict[str, dict[str, str]], title: str, path: Path) -> None:
    """Differences with intervals of one comparison each, a panel a split and a line a network; then costs."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    names = list(dict.fromkeys(row["network"] for row in reversed(rows)))
    counts = {row["network"]: row["n"] for row in rows}
    columns = len(splits) + bool(costs)
    ends = [abs(end) for row in rows for end in (row["difference"], row["low"], row["high"])]
    reach = 1.1 * max(1.0, *(end for end in ends if math.isfinite(end)))
    with style():
        figure, grid = new_figure(title, 1.3 + 0.32 * len(names), columns=columns, sharey=True)
        axes = grid[0]
        for axis, split in zip(axes, splits, strict=False):
            for row in (row for row in rows if row["split"] == split):
                half = row["high"] - row["difference"]
                axis.errorbar(
                    row["difference"],
                    names.index(row["network"]),
                    xerr=half if math.isfinite(half) else None,
                    fmt="o",
                    color="C0",
                    capsize=3,
                )
            axis.axvline(0, color="0.5", linewidth=1)
            axis.set_xlim(-reach, reach)
            axis.set(title=f"{split} images", xlabel=f"points of top-1 over {rows[0]['baseline']}")
        for name, cost in costs.items():
            if name in names:
                low, middle, high = (float(cost[f"ratio_{key}"]) for key in ("min", "median", "max"))
                axes[-1].plot([low, high], [names.index(name)] * 2, color="C2", alpha=0.5)
                axes[-1].plot(middle, names.index(name), "s", color="C2")
        if costs:
            axes[-1].axvline(1, color="0.5", linewidth=1)
            axes[-1].set(title="cost at inference", xlabel=f"time, fused, over {rows[0]['baseline']}'s")
        axes[0].set_yticks(range(len(names)), [f"{name} (n = {counts[name]})" for name in names])
        write_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default="resnet20")
    parser.add_argument("--cost", type=Path, help="CSV file of scripts/bench_deployed.py")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--picture", type=Path, help="PNG file")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    rows = compare(arguments.folder, arguments.baseline)
    table = Table(
        *("images", "network", "n", "top-1", "difference", "95 % interval", "by itself"),
        *("corrected", "seeds for half a point"),
    )
    for row in rows:
        table.add_row(
            row["split"],
            row["network"],
            str(row["n"]),
            f"{row['top1']:.2f}",
            f"{row['difference']:+.2f}",
            f"{row['low']:+.2f} to {row['high']:+.2f}" if row["n"] >= FEWEST else "",
            row["verdict"],
            f"{row['corrected_low']:+.2f} to {row['corrected_high']:+.2f}" if row["n"] >= FEWEST else "",
            str(row["needed"]),
        )
    console.print(table)
    if arguments.out:
        write_csv(arguments.out, rows)
    if arguments.picture:
        costs = {row["network"]: row for row in read_csv(arguments.cost)} if arguments.cost else {}
        title = (
            arguments.title or f"{arguments.folder.name}: difference from {arguments.baseline}, 95 % interval"
        )
        draw(rows, costs, title, arguments.picture)


if __name__ == "__main__":
    main()
