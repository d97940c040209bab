"""What networks do, measured and drawn."""

from collections.abc import Callable
from typing import Any

from .correlation import correlation
from .importance import importance
from .landscape import landscape
from .maps import maps
from .observation import Observation, Sample
from .stiffness import stiffness
from .stripes import stripes

#: By name, what makes the observation.
OBSERVATIONS: dict[str, Callable[[dict[str, Any], Sample], Observation]] = {
    "stripes": stripes,
    "correlation": correlation,
    "stiffness": stiffness,
    "landscape": landscape,
    "importance": importance,
    "maps": maps,
}
#: Those that compare several networks.
COMPARING = ("stripes", "stiffness", "landscape")

__all__ = ["COMPARING", "OBSERVATIONS", "Observation", "Sample"]
