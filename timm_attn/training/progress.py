"""The progress bar of a run: loss, accuracy, images per second, time left."""

import time
from collections.abc import Iterable
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

REFRESH_SECONDS = 0.5  # reading a sum waits for a GPU, so it is not done at every step


class PipedConsole(Console):
    """Raises BrokenPipeError where rich would end the program with the status of a failure."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def track(items: Iterable, total: int, show: bool, title: str = "evaluating") -> Iterable:
    """Iterate with a progress bar where the output is a terminal, or without one."""
    console = PipedConsole()
    return (
        rich.progress.track(items, title, total, console=console) if show and console.is_terminal else items
    )


class Bar:
    """A bar over the steps of a run and one printed line an epoch; silent on a quiet console."""

    def __init__(self, title: str, total: int, done: int, batch_size: int, console: Console) -> None:
        self.batch_size = batch_size
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or console.quiet,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, figures="")
        self.pending, self.shown = 0, time.perf_counter()

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush(None)
        self.progress.stop()

    def step(self, sums: Tensor) -> None:
        """One training step more; ``sums`` begins with loss, correct predictions and images of the epoch."""
        self.pending += 1
        if not self.progress.disable and time.perf_counter() - self.shown > REFRESH_SECONDS:
            self._flush(sums)

    def epoch(self, line: dict[str, Any]) -> None:
        """Print the metrics of an epoch."""
        skipped = line.get("skipped_images", 0) + line.get("skipped", 0)
        rate = line["images_per_second"]  # None if it was trained before
        self.console.print(
            f"epoch {line['epoch']:3d}  loss {line['train_loss']:.4f}  top-1 {line['train_top1']:6.2f}"
            f" | eval loss {line['loss']:.4f}  top-1 {line['top1']:6.2f}  top-5 {line['top5']:6.2f}"
            f" | {'–' if rate is None else f'{rate:.0f}'} images/s  {line['seconds']:.1f} s"
            + (f" | corrupt images left out: {skipped}" if skipped else ""),
            highlight=False,
            soft_wrap=True,
        )

    def _flush(self, sums: Tensor | None) -> None:
        now = time.perf_counter()
        figures = {}
        if sums is not None:
            loss, correct, images = sums[:3].tolist()
            rate = self.pending * self.batch_size / (now - self.shown)
            top1 = 100 * correct / images
            figures["figures"] = f"loss {loss / images:.3f}  top-1 {top1:.1f}  {rate:.0f} images/s"
        self.progress.update(self.task, advance=self.pending, **figures)
        self.pending, self.shown = 0, now
