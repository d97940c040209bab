"""The picture of a run."""

import io
from typing import Any

from .run import replace_file


def draw(lines: list[dict[str, Any]], title: str, path) -> None:
    """Loss, top-1 and learning rate by epoch, as a PNG.

    Args:
        lines: A run's metrics, one entry an epoch.
        title: Heading of the figure.
        path: File to write; replaced whole.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed to train

    epochs = [line["epoch"] for line in lines]
    marker = "o" if len(lines) < 20 else None
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, top1, rate = figure.subplots(1, 3)
    for axis, key, label in (
        (loss, "train_loss", "training"),
        (loss, "loss", "evaluation"),
        (top1, "train_top1", "training, augmented"),
        (top1, "top1", "evaluation"),
    ):
        axis.plot(epochs, [line[key] for line in lines], label=label, marker=marker, markersize=3)
    rate.plot(epochs, [line["lr"] for line in lines], color="C2", marker=marker, markersize=3)
    top1.annotate(f"{lines[-1]['top1']:.2f}", (epochs[-1], lines[-1]["top1"]), ha="right", va="bottom")
    for axis, name in ((loss, "loss (nats)"), (top1, "top-1 (%)"), (rate, "learning rate")):
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    loss.legend()
    top1.legend(loc="lower right")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())
