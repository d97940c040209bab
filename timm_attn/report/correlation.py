"""Correlation between the gates of a stage.

Paper: "DIANet: Dense-and-Implicit Attention Network", Huang et al., AAAI 2020
https://arxiv.org/abs/1905.10671
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UserError
from ..style import DIVERGING, new_figure
from .observation import Observation, Sample, recorded, round_to


def correlation(
    models: dict[str, Any], sample: Sample, gates: Sequence[str] = (), panels: int = 4
) -> Observation:
    """Pearson's r, over images and channels, between the gates of neighbouring blocks of equal width.

    A stage is a run of such blocks.

    Args:
        models: One network with gates, by its name.
        sample: Images.
        gates: Shell patterns of paths of gates; by default, all.
        panels: Largest number of matrices to draw.

    Raises:
        UserError: No two neighbouring gates have the same width.
    """
    ((name, model),) = models.items()
    recorded_gates = recorded(name, model, sample, gates, correlation=True)
    seen = {gate.path for gate in recorded_gates.gates}
    found = [c for c in recorded_gates.correlations() if seen & set(c.paths)]
    if not found:
        raise UserError(f"{name} has no two neighbouring gates of one width to correlate")
    rows = [
        {
            "model": name,
            "run": number + 1,
            "gate": group.paths[i],
            "other": group.paths[j],
            "pearson": round_to(group.pearson[i, j].item()),
            "pearson_images": round_to(group.images[i, j].item()),
        }
        for number, group in enumerate(found)
        for i, j in torch.triu_indices(len(group.paths), len(group.paths), 1).T.tolist()
    ]

    def draw() -> Any:
        shown = sorted(sorted(found, key=lambda c: -len(c.paths))[:panels], key=found.index)
        title = f"Correlation between gates of {name}, {len(sample):,} images"
        if len(shown) < len(found):
            title += f" ({len(shown)} of {len(found)} runs)"
        figure, axes = new_figure(title, 3.4, 1, len(shown))
        picture = None
        for axis, group in zip(axes[0], shown, strict=True):
            picture = axis.imshow(group.pearson.numpy(), vmin=-1, vmax=1, cmap=DIVERGING)
            axis.set_facecolor("0.6")  # for gates that do not vary
            count = len(group.paths)
            head, labels = _labels(group.paths)
            step = -(-count * len(shown) // 16)
            ticks = range(0, count, step)
            axis.set_xticks(ticks, labels[::step], rotation=45 if max(map(len, labels)) > 2 else 0)
            axis.set_yticks(ticks, labels[::step])
            axis.set(title=f"{head}: mean {group.mean:.2f}", xlabel="block", ylabel="block")
            axis.grid(False)
            for i in range(count if count * len(shown) <= 18 else 0):
                for j in range(count):
                    value = group.pearson[i, j].item()
                    ink = "white" if abs(value) > 0.6 else "black"
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        figure.colorbar(picture, ax=list(axes[0]), label="Pearson's r", shrink=0.8)
        return figure

    means = [group.mean for group in found if group.mean == group.mean]
    pairs = [row["pearson_images"] for row in rows if row["pearson_images"] == row["pearson_images"]]
    summary = [
        (
            f"Pearson's r, mean over pairs of gates, then over {len(means)} runs of blocks of equal width",
            f"{sum(means) / len(means):.2f} ({', '.join(f'{m:.2f}' for m in means)})"
            if means
            else "no gate varies",
            "up to 0.85",
        ),
        (
            "the same after subtracting each channel's mean over images",
            f"{sum(pairs) / len(pairs):.2f}" if pairs else "no gate depends on the image",
            "–",
        ),
    ]
    return Observation("correlation", rows, summary, draw, len(sample))


def _labels(paths: tuple[str, ...]) -> tuple[str, list[str]]:
    """What the paths of a run have in common, or its first and last; and each path's number."""
    parts = [path.split(".") for path in paths]
    differ = [i for i in range(len(parts[0])) if len({tuple(p[i : i + 1]) for p in parts}) > 1]
    labels = [".".join(p[i] for i in differ if i < len(p)) for p in parts]
    if len(differ) == 1 and differ[0]:
        return ".".join(parts[0][: differ[0]]), labels
    return f"{labels[0]} … {labels[-1]}", labels
