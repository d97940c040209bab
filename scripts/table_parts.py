"""What the modules of tables share."""

import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "hub" / "results"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def read(name: str) -> dict:
    """A JSON file of results."""
    return json.loads((RESULTS / name).read_text())


def ratio(
    measured: dict, low: str = "ratio_min", middle: str = "ratio_median", high: str = "ratio_max"
) -> str:
    """A median with the least and the greatest of the rounds."""
    return f"{float(measured[middle]):.2f} ({float(measured[low]):.2f} to {float(measured[high]):.2f})"
