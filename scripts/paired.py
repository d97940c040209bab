"""Differences paired by seed, with Student's t intervals of 95 %."""

import math
import statistics
from typing import Any

from scipy.stats import t as student

#: Points of top-1 that a reader would care about.
WORTH = 0.5


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of a mean; infinite for one value."""
    n = len(values)
    if n < 2:
        return math.inf
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def seeds_needed(std: float) -> int:
    """Smallest number of pairs for which the 95 % interval is at most ± ``WORTH``."""
    n = 2
    while student.ppf(0.975, n - 1) * std / math.sqrt(n) > WORTH:
        n += 1
    return n


def verdict(mean: float, half: float) -> str:
    """What the interval says, in words."""
    if mean - half > 0:
        return "above"
    return "below" if mean + half < 0 else "not told apart"


def difference(found: dict[int, float], plain: dict[int, float]) -> dict[str, Any]:
    """What tells values from a baseline's, by the seeds that both have; {} if there are none."""
    seeds = sorted(found.keys() & plain.keys())
    if not seeds:
        return {}
    differences = [found[seed] - plain[seed] for seed in seeds]
    mean, half = statistics.mean(differences), interval(differences)
    std = statistics.stdev(differences) if len(seeds) > 1 else math.nan
    return {
        "n": len(seeds),
        "top1": round(statistics.mean(found[seed] for seed in seeds), 3),
        "baseline_top1": round(statistics.mean(plain[seed] for seed in seeds), 3),
        "difference": round(mean, 3),
        "low": round(mean - half, 3),
        "high": round(mean + half, 3),
        "std": round(std, 3),
        "verdict": verdict(mean, half),
        "needed": seeds_needed(std) if len(seeds) > 1 else "",
        "seeds": " ".join(map(str, seeds)),
    }
