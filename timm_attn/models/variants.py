"""The table of variants: the name of a model to its stock network and mechanism."""

from .backbones import BACKBONES
from .grafting import GraftError
from .mechanisms import MECHANISMS, mechanism

#: Prefix of the tags of weights that are grafted from a stock network.
GRAFT = "graft_"


def variant_name(backbone: str, key: str) -> str:
    """The name of the model of a network with a mechanism."""
    name = mechanism(key).name
    return name(backbone) if name else f"{backbone}_{key}"


#: Of those that the import registers and those that ``register`` adds.
VARIANTS = {
    variant_name(backbone, key): (backbone, key)
    for backbone, spec in BACKBONES.items()
    for key, row in MECHANISMS.items()
    if row.on(spec)
}


def model_names() -> list[str]:
    """Names of the architectures that this package registers, in the order of the table."""
    return list(VARIANTS)


def parse_name(architecture: str) -> tuple[str, str]:
    """Backbone and mechanism ('' for a plain network) of an architecture of this package.

    Raises:
        KeyError: The architecture is not one of ``model_names``.
    """
    return VARIANTS[architecture]


def graft_obstacle(architecture: str) -> str:
    """Why stock weights cannot become those of a variant, or ''."""
    return mechanism(parse_name(architecture)[1]).graft


def check_graft(architecture: str) -> None:
    """Raise a ``GraftError`` if stock weights cannot become those of a variant."""
    reason = graft_obstacle(architecture)
    if reason:
        raise GraftError(f"{architecture} cannot be grafted: {reason}")
