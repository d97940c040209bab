"""Builds a model with attention from stock weights, with unchanged outputs and trainable new parameters."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import timm
from torch import Tensor, nn

from .branches import copied, example_input
from .compare import FoldError, above_bound, relative_difference, unwrapped
from .load import create_pretrained, source_name
from .models import mechanism as row_of
from .models import model_names, parse_name
from .models.backbones import stock_network
from .models.grafting import GraftError, classifier_keys, graft_description, load_stock, start_constant
from .models.mechanisms import Mechanism
from .models.variants import check_graft

#: Fields of a configuration about preprocessing, classes and licence.
_TAKEN = (
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
    "license",
)
#: Arguments of timm.create_model that the source decides.
_SOURCE = (
    "in_chans",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "device",
    "dtype",
)
#: Fields that are true of the network, whatever its weights are.
_OWN = ("architecture", "first_conv", "classifier", "custom_load", "fixed_input_size")


def graft(
    architecture: str,
    source: str | nn.Module | Mapping[str, Tensor],
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model from the weights of its stock network, so that both give the same outputs at first.

    The mechanism is initialised to a constant, and the inverse is multiplied into a neighbouring layer: DIA's
    gate is ¼ everywhere, ASR's does not depend on the image anyway, ConAM has equal confidence in all
    patches, SSIA acts in training only. The two networks are compared on fixed random images before the model
    is returned.

    Args:
        architecture: One of ``timm_attn.model_names``.
        source: A model name of timm or this package, with or without tag, ``hf-hub:ORG/NAME`` or
            ``local-dir:FOLDER`` (weights are loaded); or a network; or its state dict.
        num_classes: If it differs from that of the source, a new classifier is created after the comparison.
        kwargs: Options of the mechanism and the network, as for ``timm.create_model``.

    Returns:
        The model. Its ``pretrained_cfg`` has the preprocessing of the source, and names the source. It is in
        training mode if the source is.

    Raises:
        GraftError: The architecture is not one of this package, or its mechanism cannot be grafted (FMM,
            as a product cannot represent a sum; ConAM with ``patch_size``); the weights are not those of its
            backbone; or the outputs differ by more than ``timm_attn.compare.BOUNDS``.
        TypeError: The source is none of these, or an argument is given that the source determines:
            ``in_chans``, ``pretrained``, ``pretrained_cfg``, ``pretrained_cfg_overlay``, ``checkpoint_path``,
            ``device`` or ``dtype``.
    """
    if architecture not in model_names():
        raise GraftError(f"{architecture} is no model of this package: name one of timm_attn.model_names()")
    backbone, key = parse_name(architecture)
    mechanism = row_of(key)
    check_graft(architecture)
    for name in _SOURCE:
        if name in kwargs:
            raise TypeError(f"graft takes no {name}={kwargs[name]!r}: it is the source's")
    if kwargs.get("folded"):
        raise GraftError(f"{architecture} has its norms fused: graft without folded=True, then fold")
    stock = _stock(source, architecture, backbone, mechanism, kwargs)
    state = stock.state_dict()
    classes, stem = _ends(state, architecture, backbone)
    variant: Any = timm.create_model(architecture, num_classes=classes, in_chans=stem.shape[1], **kwargs)
    # On the CPU: Apple's GPUs have no float64, and others round fp32 convolutions to TF32.
    variant.to(stem.dtype)
    name, arguments = mechanism.graft_source(backbone, kwargs)
    plain = stock_network(name, num_classes=classes, in_chans=stem.shape[1], device="meta", **arguments)
    try:
        load_stock(variant, {key: tensor.cpu() for key, tensor in state.items()}, plain.state_dict())
        start_constant(variant, plain.state_dict())
        error = relative_difference(copied(stock).cpu(), deepcopy(variant), example_input(variant))
    except GraftError as problem:
        given = (getattr(stock, "pretrained_cfg", None) or {}).get("architecture", name)
        reason = problem if given == name else f"they are those of a {given}, and it is made from a {name}"
        raise GraftError(f"{architecture} cannot take these weights: {reason}") from None
    except FoldError as problem:
        raise GraftError(f"{architecture} cannot be grafted: {problem}") from None
    excess = above_bound(error, stem.dtype)
    if excess:
        raise GraftError(f"{architecture} does not compute what its source computes: {excess}")
    # What else is in the variant's own configuration speaks of its default weights, and not of these.
    architectural = {name: variant.pretrained_cfg[name] for name in _OWN}
    cfg = getattr(stock, "pretrained_cfg", None) or variant.pretrained_cfg
    taken = {name: cfg[name] for name in _TAKEN if cfg.get(name) is not None}
    variant.pretrained_cfg = variant.default_cfg = {
        **architectural,
        **taken,
        "tag": None,
        "num_classes": classes,
        "description": graft_description(source if isinstance(source, str) else f"a {backbone}"),
    }
    if num_classes is not None and num_classes != classes:
        variant.reset_classifier(num_classes)
    return variant.to(stem.device).train(stock.training)


def _ends(state: Mapping[str, Tensor], architecture: str, backbone: str) -> tuple[int, Tensor]:
    """Number of classes, and the kernel that sees the image."""
    cfg: Any = timm.models.get_pretrained_cfg(architecture)
    for field in ("first_conv", "classifier"):
        # Of ResNets with a deep stem, it is the first layer of what the configuration names.
        names = [
            f"{prefix}{i}weight"
            for prefix in classifier_keys({"classifier": getattr(cfg, field)})
            for i in ("", "0.")
        ]
        found = [state[name] for name in names if name in state]
        if not found:
            raise GraftError(f"the source has no {names[0]}: give a whole {backbone}, with its classifier")
        if field == "first_conv":
            stem = found[0]
    if stem.is_meta:
        raise GraftError(
            f"the source is on the meta device and has no weights: give a {backbone} with weights"
        )
    return found[0].shape[0], stem


def _stock(
    source: Any, architecture: str, backbone: str, mechanism: Mechanism, kwargs: dict[str, Any]
) -> Any:
    """The source as a network."""
    if isinstance(source, str):
        return create_pretrained(source_name(source) if ":" in source else source)
    if isinstance(source, nn.Module):
        return unwrapped(source)
    if not isinstance(source, Mapping):
        raise TypeError(f"source must be a name, a network or a state dict, got {source!r}")
    classes, stem = _ends(source, architecture, backbone)
    name, arguments = mechanism.graft_source(backbone, kwargs)
    stock = stock_network(name, num_classes=classes, in_chans=stem.shape[1], **arguments).to(stem)
    try:
        stock.load_state_dict(source)
    except RuntimeError as error:
        raise GraftError(f"the state dict is not that of {name}: {error}") from None
    return stock
