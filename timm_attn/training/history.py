"""What a run writes down as it goes: a line an epoch, a line every few steps, and the epochs' curves."""

import time
from pathlib import Path
from typing import Any

from . import curves
from .run import CURVES, METRICS, STEPS, append_line, read_lines, write_lines

DRAW_SECONDS = 15.0  # drawing takes about half a second


class History:
    """metrics.jsonl, steps.jsonl and curves.png of a run.

    Args:
        run: The run folder.
        title: Of the curves.
        writes: Whether this process writes the files; the others keep the epochs' lines in memory.
    """

    def __init__(self, run: Path, title: str, writes: bool) -> None:
        self.run = run
        self.title = title
        self.writes = writes
        self.epochs: list[dict[str, Any]] = []
        self.drawn = time.perf_counter()

    def start(self, step: int) -> None:
        """Go on after so many steps; lines of later ones, whose weights were lost, go too."""
        self.epochs = _until(step, self.run / METRICS)
        if self.writes:
            write_lines(self.run / STEPS, _until(step, self.run / STEPS))

    def add_step(self, line: dict[str, Any]) -> None:
        """Write a line of steps.jsonl."""
        if self.writes:
            append_line(self.run / STEPS, line)

    def add_epoch(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, and draw the curves unless that was done a moment ago."""
        self.epochs.append(line)
        if self.writes:
            write_lines(self.run / METRICS, self.epochs)
            if time.perf_counter() - self.drawn > DRAW_SECONDS:
                self.draw()

    def draw(self) -> None:
        """Draw the epochs' curves."""
        title = f"{self.title}, epoch {self.epochs[-1]['epoch']}"
        curves.draw(self.epochs, title, self.run / CURVES)
        self.drawn = time.perf_counter()


def _until(step: int, path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["step"] <= step]
