"""Differences paired by seed, with Student's t intervals of 95 %."""

import math
import statistics
from typing import Any

from scipy.stats import t as student

from timm_attn.publish.card import FEWEST

#: Points of top-1 that a reader would care about.
WORTH = 0.5


def interval(values: list[float], comparisons: int = 1) -> float:
    """Half the width of the 95 % interval of a mean; infinite for few values.

    Args:
        comparisons: Of so many intervals, all hold at once with 95 % (Bonferroni).
    """
    n = len(values)
    if n < FEWEST:
        return math.inf
    return float(student.ppf(1 - 0.025 / comparisons, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def seeds_needed(std: float) -> int:
    """Smallest number of pairs with which a difference of ``WORTH`` is found four times out of five."""
    n = 3
    while (student.ppf(0.975, n - 1) + student.ppf(0.8, n - 1)) * std / math.sqrt(n) > WORTH:
        n += 1
    return n


def verdict(mean: float, half: float) -> str:
    """What the interval says, in words."""
    if mean - half > 0:
        return "above"
    return "below" if mean + half < 0 else "not distinguishable"


def difference(found: dict[int, float], plain: dict[int, float], comparisons: int = 1) -> dict[str, Any]:
    """What tells values from a baseline's, by the seeds that both have; {} if there are none.

    Args:
        comparisons: For how many of them ``corrected_low`` and ``corrected_high`` are widened.
    """
    seeds = sorted(found.keys() & plain.keys())
    if not seeds:
        return {}
    differences = [found[seed] - plain[seed] for seed in seeds]
    mean, half = statistics.mean(differences), interval(differences)
    corrected = interval(differences, comparisons)
    few = len(seeds) < FEWEST
    std = math.nan if few else statistics.stdev(differences)
    return {
        "n": len(seeds),
        "top1": statistics.mean(found[seed] for seed in seeds),
        "baseline_top1": statistics.mean(plain[seed] for seed in seeds),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "corrected_low": mean - corrected,
        "corrected_high": mean + corrected,
        "std": std,
        "verdict": verdict(mean, half),
        "needed": "" if few else seeds_needed(std),
        "seeds": " ".join(map(str, seeds)),
    }
