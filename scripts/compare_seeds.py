"""Networks against a plain one by paired seeds: differences of top-1 with intervals, drawn too.

    python scripts/compare_seeds.py hub/results/zoo --baseline resnet20 \\
        --out hub/results/zoo_differences.csv --picture hub/results/zoo_differences.png

Reads ``<folder>/<network>/seed-<seed>``, as scripts/train_zoo.py writes them. A difference is taken between
runs of the same seed, which saw the same images in the same order; intervals are Student's t, 95 %, and
cover what another seed would change, not what another recipe or data set would. ``needed`` is the number of
seeds at which half a point would stand outside the interval, at the deviation found here.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from timm_attn.files import write_csv
from timm_attn.style import new_figure, style, write_png
from timm_attn.weights import WEIGHTS

#: Points of top-1 that a reader would care about.
WORTH = 0.5
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140


def top1_by_seed(network: Path) -> dict[int, float]:
    """Top-1 of the last epoch of a network's finished runs, by seed."""
    runs = [run for run in network.glob("seed-*") if (run / WEIGHTS).is_file()]
    return {
        int(run.name.removeprefix("seed-")): json.loads((run / "results.json").read_text())["top1"]
        for run in runs
    }


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of a mean; infinite for one value."""
    n = len(values)
    if n < 2:
        return math.inf
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def seeds_needed(std: float) -> int:
    """Number of pairs at which a difference of ``WORTH`` is as wide as its interval's half."""
    n = 2
    while student.ppf(0.975, n - 1) * std / math.sqrt(n) > WORTH:
        n += 1
    return n


def verdict(mean: float, half: float) -> str:
    """What the interval says, in words."""
    if mean - half > 0:
        return "above"
    return "below" if mean + half < 0 else "not told apart"


def compare(folder: Path, baseline: str) -> list[dict[str, Any]]:
    """A row for each network, the best difference first.

    Raises:
        ValueError: The baseline has no finished run.
    """
    plain = top1_by_seed(folder / baseline)
    if not plain:
        raise ValueError(f"{folder / baseline} has no finished run")
    rows = []
    for network in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != baseline):
        found = top1_by_seed(network)
        seeds = sorted(found.keys() & plain.keys())
        if not seeds:
            continue
        differences = [found[seed] - plain[seed] for seed in seeds]
        mean, half = statistics.mean(differences), interval(differences)
        std = statistics.stdev(differences) if len(seeds) > 1 else math.nan
        rows.append(
            {
                "network": network.name,
                "baseline": baseline,
                "n": len(seeds),
                "top1": round(statistics.mean(found[seed] for seed in seeds), 3),
                "baseline_top1": round(statistics.mean(plain[seed] for seed in seeds), 3),
                "difference": round(mean, 3),
                "low": round(mean - half, 3),
                "high": round(mean + half, 3),
                "std": round(std, 3),
                "verdict": verdict(mean, half),
                "needed": seeds_needed(std) if len(seeds) > 1 else "",
                "seeds": " ".join(map(str, seeds)),
            }
        )
    return sorted(rows, key=lambda row: -row["difference"])


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Differences with their intervals, a line a network."""
    with style():
        figure, axes = new_figure(title, 1.2 + 0.32 * len(rows))
        axis = axes[0, 0]
        for y, row in enumerate(reversed(rows)):
            half = row["high"] - row["difference"]
            axis.errorbar(
                row["difference"],
                y,
                xerr=half if math.isfinite(half) else None,
                fmt="o",
                color="C0" if row["verdict"] == "not told apart" else "C3",
                capsize=3,
            )
        axis.axvline(0, color="0.5", linewidth=1)
        names = [f"{row['network']} (n = {row['n']})" for row in reversed(rows)]
        axis.set_yticks(range(len(rows)), names)
        axis.set_xlabel(f"points of top-1 over {rows[0]['baseline']}, paired by seed, 95 % interval")
        write_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default="resnet20")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--picture", type=Path, help="PNG file")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    rows = compare(arguments.folder, arguments.baseline)
    table = Table("network", "n", "top-1", "difference", "95 % interval", "", "seeds for half a point")
    for row in rows:
        table.add_row(
            row["network"],
            str(row["n"]),
            f"{row['top1']:.2f}",
            f"{row['difference']:+.2f}",
            f"{row['low']:+.2f} to {row['high']:+.2f}",
            row["verdict"],
            str(row["needed"]),
        )
    console.print(table)
    if arguments.out:
        write_csv(arguments.out, rows)
    if arguments.picture:
        title = arguments.title or f"{arguments.folder.name}: difference from {arguments.baseline}"
        draw(rows, title, arguments.picture)


if __name__ == "__main__":
    main()
