"""The picture of a run."""

from typing import Any

from ..style import new_figure, style, write_png


def draw(lines: list[dict[str, Any]], title: str, path) -> None:
    """Loss, top-1 and learning rate by epoch, as a PNG.

    Args:
        lines: A run's metrics, one entry an epoch.
        title: Heading of the figure.
        path: File to write; replaced whole.
    """
    with style():
        write_png(curves_figure(lines, title), path)


def curves_figure(lines: list[dict[str, Any]], title: str) -> Any:
    """The same as a figure."""
    figure, (loss, top1, rate) = _figure(title)
    epochs = [line["epoch"] for line in lines]
    marks = {"marker": "o" if len(lines) < 20 else None, "markersize": 3}
    for axis, key, label in (
        (loss, "train_loss", "training"),
        (loss, "loss", "evaluation"),
        (top1, "train_top1", "training, augmented"),
        (top1, "top1", "evaluation"),
    ):
        axis.plot(epochs, [line[key] for line in lines], label=label, **marks)
    rate.plot(epochs, [line["lr"] for line in lines], color="C2", **marks)
    top1.annotate(
        f"{lines[-1]['top1']:.2f}", (epochs[-1], lines[-1]["top1"]), ha="right", va="bottom", fontsize=8
    )
    _legends(figure)
    return figure


def draw_seeds(runs: list[list[dict[str, Any]]], title: str, path) -> None:
    """The same of several runs: evaluation loss and top-1 of each, and the learning rate, as a PNG."""
    with style():
        figure, (loss, top1, rate) = _figure(title)
        for i, lines in enumerate(runs):
            epochs = [line["epoch"] for line in lines]
            for axis, key in ((loss, "loss"), (top1, "top1")):
                axis.plot(epochs, [line[key] for line in lines], label=f"evaluation, run {i + 1}", alpha=0.7)
            rate.plot(epochs, [line["lr"] for line in lines], color="C2")
        _legends(figure)
        write_png(figure, path)


def _figure(title: str) -> tuple[Any, Any]:
    figure, axes = new_figure(title, 2.8, 1, 3)
    for axis, name in zip(axes[0], ("loss (nats)", "top-1 (%)", "learning rate"), strict=True):
        axis.set(xlabel="epoch", ylabel=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes[0]


def _legends(figure: Any) -> None:
    loss, top1, _ = figure.axes
    for axis in (loss, top1):
        axis.margins(y=0.12)
        axis.legend(loc="best", fontsize=8)
