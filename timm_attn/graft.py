"""Stock backbone to variant: the same function, with new parameters that learn from the first step."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from .fold import above_bound, example_input, relative_difference
from .models import MECHANISMS, parse_name
from .models.grafting import GraftError, graft_state
from .models.mechanisms import Mechanism

#: Fields of a configuration that say how images are prepared and what the classes are.
_PREPROCESSING = (
    "input_size",
    "pool_size",
    "test_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "label_names",
    "label_descriptions",
)


def graft(
    architecture: str,
    source: str | nn.Module | Mapping[str, Tensor],
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant from the weights of its stock backbone, so that it computes what the backbone computes.

    The mechanism starts as a constant that the neighbour's scale undoes: DIA's gate is ¼ everywhere,
    ASR's does not depend on the image anyway, ConAM has equal confidence in all patches, SSIA acts in
    training only. The two networks are compared on fixed random images before the variant is returned.

    Args:
        architecture: One of :func:`timm_attn.model_names`.
        source: A name of timm's or this package's with or without tag, ``hf-hub:ORG/NAME`` or
            ``local-dir:FOLDER`` (weights are loaded); or a network; or its state dict.
        num_classes: Another number of classes than the source's gets a new classifier, made after the
            comparison.
        kwargs: Options of the mechanism and the network, as for ``timm.create_model``.

    Returns:
        The variant, with the source's preprocessing in ``pretrained_cfg``, in training mode if the source is.

    Raises:
        GraftError: The mechanism cannot be grafted (FMM: a product cannot represent a sum; ConAM with literal
            patches), the weights are not those of its backbone, or the two networks differ by more than
            :data:`timm_attn.fold.BOUNDS`.
    """
    backbone, key = parse_name(architecture)
    mechanism = MECHANISMS[key]
    if isinstance(mechanism.graft, str):
        raise GraftError(f"{architecture} cannot be grafted: {mechanism.graft}")
    stock = _stock(source, backbone, mechanism, kwargs)
    state = stock.state_dict()
    classes, channels = state["fc.weight"].shape[0], state["conv1.weight"].shape[1]
    variant: Any = timm.create_model(architecture, num_classes=classes, in_chans=channels, **kwargs)
    variant.to(state["conv1.weight"])
    try:
        variant.load_state_dict(graft_state(state, variant, mechanism.graft))
    except (GraftError, RuntimeError) as error:
        raise GraftError(f"{architecture} cannot take these weights: {error}") from None
    training = stock.training
    error = relative_difference(stock, variant, example_input(variant))
    stock.train(training)
    excess = above_bound(error, state["conv1.weight"].dtype)
    if excess:
        raise GraftError(f"{architecture} does not compute what its source computes: {excess}")
    cfg = getattr(stock, "pretrained_cfg", None) or {}
    taken = {name: cfg[name] for name in _PREPROCESSING if cfg.get(name) is not None}
    variant.pretrained_cfg = variant.default_cfg = {**variant.pretrained_cfg, **taken, "num_classes": classes}
    if num_classes is not None and num_classes != classes:
        variant.reset_classifier(num_classes)
    return variant.train(training)


def _stock(source: Any, backbone: str, mechanism: Mechanism, kwargs: dict[str, Any]) -> Any:
    """The source as a network."""
    if isinstance(source, str):
        return timm.create_model(source, pretrained=True)
    if isinstance(source, nn.Module):
        return getattr(source, "_orig_mod", source)  # of a compiled network
    for name in ("fc.weight", "conv1.weight"):
        if name not in source:
            raise GraftError(f"the state dict has no {name}: give that of a whole {backbone}")
    name, arguments = mechanism.stock_network(backbone, kwargs)
    classes, channels = source["fc.weight"].shape[0], source["conv1.weight"].shape[1]
    stock = timm.create_model(name, num_classes=classes, in_chans=channels, **arguments)
    stock.to(source["conv1.weight"])
    try:
        stock.load_state_dict(source)
    except RuntimeError as error:
        raise GraftError(f"the state dict is not that of {name}: {error}") from None
    return stock
