"""The picture of a run."""

import io
from typing import Any

from ..files import replace_file


def draw(lines: list[dict[str, Any]], title: str, path) -> None:
    """Loss, top-1 and learning rate by epoch, as a PNG.

    Args:
        lines: A run's metrics, one entry an epoch.
        title: Heading of the figure.
        path: File to write; replaced whole.
    """
    figure, (loss, top1, rate) = _figure(title)
    epochs = [line["epoch"] for line in lines]
    style = {"marker": "o" if len(lines) < 20 else None, "markersize": 3}
    for axis, key, label in (
        (loss, "train_loss", "training"),
        (loss, "loss", "evaluation"),
        (top1, "train_top1", "training, augmented"),
        (top1, "top1", "evaluation"),
    ):
        axis.plot(epochs, [line[key] for line in lines], label=label, **style)
    rate.plot(epochs, [line["lr"] for line in lines], color="C2", **style)
    top1.annotate(f"{lines[-1]['top1']:.2f}", (epochs[-1], lines[-1]["top1"]), ha="right", va="bottom")
    _save(figure, path)


def draw_seeds(runs: list[list[dict[str, Any]]], title: str, path) -> None:
    """The same of several runs: evaluation loss and top-1 of each, and the learning rate, as a PNG."""
    figure, (loss, top1, rate) = _figure(title)
    for i, lines in enumerate(runs):
        epochs = [line["epoch"] for line in lines]
        for axis, key in ((loss, "loss"), (top1, "top1")):
            axis.plot(epochs, [line[key] for line in lines], label=f"evaluation, run {i + 1}", alpha=0.7)
        rate.plot(epochs, [line["lr"] for line in lines], color="C2")
    _save(figure, path)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import, and not needed to train

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, ("loss (nats)", "top-1 (%)", "learning rate"), strict=True):
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure, axes


def _save(figure: Any, path) -> None:
    loss, top1, _ = figure.axes
    loss.legend()
    top1.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())
