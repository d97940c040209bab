"""Measurements of what networks do, with plots."""

from collections.abc import Callable

from .correlation import correlation
from .importance import importance
from .landscape import landscape
from .maps import maps
from .observation import Observation, Sample
from .stiffness import stiffness
from .stripes import stripes

#: Functions that make an observation, by its name.
OBSERVATIONS: dict[str, Callable[..., Observation]] = {
    "stripes": stripes,
    "correlation": correlation,
    "stiffness": stiffness,
    "landscape": landscape,
    "importance": importance,
    "maps": maps,
}
#: Observations of gates, and observations that compare several networks.
OF_GATES = ("stripes", "correlation", "importance")
COMPARING = ("stripes", "stiffness", "landscape")

__all__ = ["COMPARING", "OBSERVATIONS", "OF_GATES", "Observation", "Sample"]
