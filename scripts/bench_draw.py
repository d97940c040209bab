"""Draw the CSV file of `bench.py infer`."""

import csv
from pathlib import Path

from matplotlib.figure import Figure


def draw(path: Path, order: list[str]) -> None:
    """Ratios over the plain network, median with minimum and maximum, as a PNG beside the CSV."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["baseline"] == "resnet50" != row["model"]]
    keys = ("infer_batch_size", "precision", "memory_format", "compiled")
    by_condition: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        by_condition.setdefault(tuple(row[key] for key in keys), {})[row["model"]] = row
    if not by_condition:
        return
    conditions = list(by_condition.items())
    slowest = max(float(row["ratio_max"]) for row in rows)
    lines = [conditions[i : i + 4] for i in range(0, len(conditions), 4)]
    names = [[name for name in order if any(name in found for _, found in line)] for line in lines]
    heights = [len(line) + 3 for line in names]
    figure = Figure(figsize=(11, 0.2 * sum(heights) + 0.5), layout="constrained")
    grid = {"height_ratios": heights}
    axes = figure.subplots(len(lines), 4, sharey="row", sharex=True, squeeze=False, gridspec_kw=grid)
    for line, names_of_line, axes_of_line in zip(lines, names, axes, strict=True):
        for (condition, found), axis in zip(line, axes_of_line, strict=False):
            for i, row in enumerate(found[name] for name in names_of_line):
                low, median, high = (float(row[f"ratio_{key}"]) for key in ("min", "median", "max"))
                axis.plot([low, high], [i, i], color="C0", alpha=0.5)
                axis.plot(median, i, "o", color="C0", markersize=4)
            size, precision, layout, compiled = condition
            layout = layout.replace("channels_last", "channels last")
            axis.set_title(
                f"batch {size}, {precision}\n{layout}{', compiled' if compiled == '1' else ''}", fontsize=8
            )
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xlim(0.75, max(1.8, slowest + 0.05))
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
            axis.set_yticks(range(len(names_of_line)), names_of_line)
        axes_of_line[0].invert_yaxis()
    figure.supxlabel(
        "time over that of timm's resnet50 (median, minimum and maximum of the rounds)", fontsize=8
    )
    figure.savefig(path.with_suffix(".png"), dpi=110)
