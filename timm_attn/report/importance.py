"""Whether gates are large where their channels matter for the loss.

Paper: "Towards Understanding the Effectiveness of Attention Mechanism", Ye et al.
https://arxiv.org/abs/2106.15067
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, extra
from ..gates import Gate
from ..style import new_figure
from .observation import Observation, Sample, recorded, round_to, spaced


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's ρ of each row, N, without the entries where a is NaN; NaN for a row without variation."""
    with extra("train"):
        from scipy.stats import rankdata
    found = []
    for row, other in zip(a.double(), b.double(), strict=True):
        known = ~row.isnan()
        ranks = [torch.from_numpy(rankdata(t[known].numpy())) for t in (row, other)]
        x, y = (r - r.mean() for r in ranks)
        found.append((x * y).sum() / (x.norm() * y.norm()))
    return torch.stack(found)


@torch.no_grad()
def importances(model: nn.Module, gate: Gate, channels: list[int], sample: Sample) -> Tensor:
    """|Change of the cross-entropy| of each image with one channel set to 0 after the gate, N × channels."""
    off: list[int | None] = [None]

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if off[0] is None:
            return y
        y = y.clone()
        y.select(gate.axis, off[0]).zero_()
        return y

    handle = model.get_submodule(gate.path).register_forward_hook(hook)
    try:
        parts = []
        for x, labels in sample.batches(model):
            columns = []
            for off[0] in (None, *channels):
                columns.append(F.cross_entropy(model(x).float(), labels, reduction="none").cpu())
            parts.append(torch.stack([(c - columns[0]).abs() for c in columns[1:]], 1))
    finally:
        handle.remove()
    return torch.cat(parts)


def importance(
    models: dict[str, Any], sample: Sample, gates: Sequence[str] = (), images: int = 64, most: int = 32
) -> Observation:
    """Spearman's ρ between the gates of an image and the change of its loss when their channels are removed.

    Args:
        models: One network with gates, by its name.
        sample: Images, of which the first ``images`` are used.
        gates: Shell patterns of paths of gates; by default, all.
        images: Number of images.
        most: Largest number of channels to remove for each gate, evenly spaced.

    Raises:
        UserError: The network has no gates.
    """
    ((name, model),) = models.items()
    sample = sample.first(images)
    found = recorded(name, model, sample, gates, keep=len(sample))
    rows, points = [], {}
    for gate in found.gates:
        channels = spaced(list(range(gate.channels)), most)
        weight = found.kept[gate.path][:, channels]
        change = importances(model, gate, channels, sample)
        rho = rank_correlation(weight, change)
        rho = rho[rho.isfinite()]
        points[gate.path] = rho, weight.nanmean(0), change.mean(0)
        rows.append(
            {
                "model": name,
                "gate": gate.path,
                "channels": len(channels),
                "spearman": round_to(rho.mean().item()) if len(rho) else math.nan,
                "std_over_images": round_to(rho.std().item()) if len(rho) > 1 else math.nan,
                "images": len(rho),
            }
        )
    known = [row for row in rows if row["images"]]
    if not known:
        raise UserError(f"no gate of {name} differs between channels: there is nothing to rank")

    def draw() -> Any:
        figure, axes = new_figure(
            f"Gates of {name} and the importance of their channels, up to {len(sample)} images",
            3.4,
            1,
            2,
            width_ratios=(3, 2),
        )
        axis = axes[0, 0]
        for i, row in enumerate(rows):
            axis.errorbar(i + 1, row["spearman"], row["std_over_images"], fmt="o", color="C0", capsize=2)
        axis.axhline(0, color="0.5", linewidth=1)
        axis.set(xlabel="gate, from input to output", ylabel="Spearman's ρ, mean ± std", ylim=(-1, 1))
        if len(rows) <= 12:
            axis.set_xticks(range(1, len(rows) + 1), [row["gate"] for row in rows], rotation=30, ha="right")
        middle = sorted(known, key=lambda row: row["spearman"])[len(known) // 2]["gate"]
        _, weight, change = points[middle]
        axes[0, 1].scatter(weight, change, s=12)
        axes[0, 1].set(xlabel=f"gate of {middle}, mean", ylabel="|Δ loss|, mean (nats)")
        axes[0, 1].ticklabel_format(useOffset=False)
        axes[0, 1].tick_params(axis="x", rotation=30)
        return figure

    values = [row["spearman"] for row in known]
    summary = [
        (
            f"Spearman's ρ, mean over images and {len(values)} gates",
            f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})",
            "weak (no readable figure)",
        )
    ]
    return Observation("importance", rows, summary, draw, len(sample))
