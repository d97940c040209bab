"""How well an architecture is tested."""

from .. import weights
from .backbones import BACKBONES
from .variants import model_names, parse_name

#: Meaning of each status, best first.
STATUSES = {
    "measured": "there are weights, with the mean and standard deviation of at least three seeds",
    "verified": "the mechanism agrees with a second implementation in the tests, and folds where it should",
    "experimental": "the placement is ours, or the paper has no code; trains and exports",
}


def status(architecture: str) -> str:
    """One of ``STATUSES``, of an architecture of this package or of a checkpoint of another."""
    for checkpoint in weights.checkpoints():
        runs = (checkpoint.over_seeds.get("top1") or {}).get("n", 1)
        if checkpoint.architecture == architecture and runs >= 3:
            return "measured"
    if architecture not in model_names():
        return "experimental"
    backbone, key = parse_name(architecture)
    # The papers, and the implementations that the tests compare with, speak of ResNets.
    resnet = backbone in BACKBONES and bool(BACKBONES[backbone].layers)
    return "verified" if resnet and key != "ssia" else "experimental"
