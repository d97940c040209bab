"""Stripes: how little gates depend on the image.

Paper: "Stripe Observation Guided Inference Cost-free Attention Mechanism", Zhong et al., ECCV 2024
https://arxiv.org/abs/2304.06345
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..style import new_figure, shades
from .observation import Observation, Sample, recorded, round_to, spaced


def stripes(
    models: dict[str, Any], sample: Sample, gates: Sequence[str] = (), images: int = 32, panels: int = 9
) -> Observation:
    """Gates as maps of image × channel, and the stripe index: 1 − share of the variance due to the image.

    Args:
        models: Networks with gates, by name, such as the checkpoints of a run, oldest first. The maps show
            the last one.
        sample: Images.
        gates: Shell patterns of paths of gates; by default, all.
        images: Number of images in the maps.
        panels: Number of maps.

    Raises:
        UserError: A network has no gates.
    """
    records = {name: recorded(name, model, sample, gates, keep=images) for name, model in models.items()}
    rows, before = [], None
    for name, found in records.items():
        for gate in found.gates:
            statistics = found[gate.path]
            std = statistics.variance.sqrt()[statistics.known]
            was = before.statistics.get(gate.path) if before else None
            moved = None
            if was is not None and was.mean.shape == statistics.mean.shape:
                both = statistics.known & was.known
                moved = (statistics.mean - was.mean)[both].abs().mean().item() if both.any() else None
            rows.append(
                {
                    "model": name,
                    "gate": gate.path,
                    "kind": gate.kind,
                    "channels": gate.channels,
                    "dead_channels": int((~statistics.known).sum()),
                    "mean": round_to(statistics.mean[statistics.known].mean().item()),
                    "std_over_images": round_to(std.mean().item()),
                    "std_over_images_max": round_to(std.max().item()),
                    "stripe_index": round_to(1 - statistics.image_share),
                    "class_share": round_to(statistics.class_share),
                    "moved": "" if moved is None else round_to(moved),
                }
            )
        before = found
    *_, (last, newest) = records.items()
    of_last = [row for row in rows if row["model"] == last]

    def draw() -> Any:
        shown = spaced(newest.gates, panels)
        columns = min(3, len(shown))
        lines = -(-len(shown) // columns)
        few = min(images, len(sample))
        figure, axes = new_figure(
            f"Gates of {last} on {few} images; stripe index of {len(sample):,}",
            2.4 + 1.5 * lines,
            lines + 1,
            columns,
        )
        values = [newest.kept[gate.path] for gate in shown]
        known = torch.cat([v[~v.isnan()] for v in values])
        low, high = (known.min().item(), known.max().item()) if len(known) else (0, 1)
        pictures = axes[:-1].flatten()
        mappable = None
        for axis, gate, value in zip(pictures, shown, values, strict=False):
            mappable = axis.imshow(value.numpy(), aspect="auto", vmin=low, vmax=high, interpolation="nearest")
            axis.set_facecolor("0.6")  # where the gate is unknown, as the feature map is 0
            index = 1 - newest[gate.path].image_share
            axis.set(title=f"{gate.path}: {index:.2f}", xlabel="channel", ylabel="image")
            axis.grid(False)
        for axis in pictures[len(shown) :]:
            axis.remove()
        dead = bool(torch.cat([v.isnan().flatten() for v in values]).any())
        label = "gate (grey: the feature map is 0)" if dead else "gate"
        figure.colorbar(mappable, ax=list(pictures[: len(shown)]), label=label)
        grid = axes[-1, 0].get_gridspec()
        for axis in axes[-1]:
            axis.remove()
        axis = figure.add_subplot(grid[-1, :])
        colours = shades(len(records))
        for colour, (name, found) in zip(colours, records.items(), strict=True):
            index = [1 - found[gate.path].image_share for gate in found.gates]
            axis.plot(range(1, len(index) + 1), index, marker="o", markersize=3, label=name, color=colour)
        axis.set(xlabel="gate, from input to output", ylabel="stripe index", ylim=(-0.03, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(records) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1.05), fontsize=8)
        return figure

    indices = [row["stripe_index"] for row in of_last]
    stds = [row["std_over_images"] for row in of_last]
    summary = [
        (
            f"stripe index, mean over {len(indices)} gates (1: no gate depends on the image)",
            f"{sum(indices) / len(indices):.2f} ({min(indices):.2f} to {max(indices):.2f})",
            "near 1 (pictures, no figure)",
        ),
        (
            "standard deviation over images, mean over channels and gates",
            f"{sum(stds) / len(stds):.3f} ({min(stds):.3f} to {max(stds):.3f})",
            "small (histograms)",
        ),
    ]
    if len(records) > 1:
        for name in list(records)[1:]:
            moved = [row["moved"] for row in rows if row["model"] == name and row["moved"] != ""]
            if not moved:
                continue
            summary.append(
                (
                    f"mean change of the gates' means, from the previous model to {name}",
                    f"{sum(moved) / len(moved):.4f}",
                    "soon nearly constant",
                )
            )
    return Observation("stripes", rows, summary, draw, len(sample))
