"""Builds variants for ``timm.create_model``: stock network, mechanism, weights, folded form."""

import inspect
from functools import partial
from typing import Any

import timm
from timm.models import build_model_with_cfg, get_model_args
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import Tensor, nn

from .. import weights
from ..branches import copied, example_input
from ..compare import above_bound, relative_difference
from .backbones import spec_of, stock_network
from .deployed import folded, fuse_state, has_norms
from .features import feature_maps
from .grafting import (
    GraftError,
    classifier_keys,
    graft_description,
    key_difference,
    load_stock,
    start_constant,
)
from .mechanisms import mechanism, options_of
from .variants import GRAFT, check_graft, parse_name


def create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """What the entry points of the variants return.

    Raises:
        TypeError: An argument does not exist.
        ValueError: An option is out of range, or does not fit the network.
        WeightsError: The pretrained weights cannot be had.
        GraftError: timm's weights of the stock network cannot become those of the variant.
    """
    if "block" in kwargs:
        raise TypeError(f"block={kwargs['block']!r} cannot be set: {variant} has blocks of its own")
    backbone, key = parse_name(variant)
    grafted = pretrained and _tag(variant, kwargs).startswith(GRAFT)
    saved = weights.resolve(variant, kwargs) if pretrained and not grafted else {}
    kwargs = {**kwargs, **saved}
    build: Any = partial(_network, variant)
    if kwargs.pop("folded", False):
        build = partial(folded, build)
        if not mechanism(key).fuses:
            stock = mechanism(key).stock(backbone)[0]
            theirs = [c.name for c in weights.checkpoints() if str(c.folded_from).startswith(f"{variant}.")]
            named = f", whose weights are {' and '.join(theirs)}" if pretrained and theirs else ""
            raise ValueError(f"{variant} has no folded form of its own: folded, it is {stock}{named}")
    by_timm = grafted and _by_timm(variant, kwargs)
    if by_timm:
        check_graft(variant)
        tag = _tag(variant, kwargs).removeprefix(GRAFT)
        build = partial(build, stock_tag=tag, stock_file=_stock_file(variant, tag))
    model: Any = build_model_with_cfg(
        build,
        variant,
        pretrained and not by_timm,
        pretrained_filter_fn=checkpoint_filter,
        feature_cfg=_feature_cfg(variant, kwargs) | kwargs.pop("feature_cfg", {}),
        **kwargs,
    )
    if by_timm:
        # Here and not in the tag's configuration, which timm also gives a model with random weights.
        model.pretrained_cfg["description"] = graft_description(str(model.pretrained_cfg.get("hf_hub_id")))
    model._model_args = saved_options(saved)
    return model


def saved_options(saved: dict[str, Any]) -> dict[str, Any]:
    """The arguments that weights brought, of what ``weights.resolve`` gave.

    timm adds what create_model was given; a folded or exported copy needs these, too.
    """
    return {k: v for k, v in saved.items() if not k.startswith("pretrained_cfg")}


def _network(
    variant: str, stock_tag: str | None = None, stock_file: str | None = None, **kwargs: Any
) -> nn.Module:
    """The stock network with the mechanism; with a tag, of timm's weights, which are grafted."""
    backbone, key = parse_name(variant)
    row = mechanism(key)
    own = row.own(backbone, kwargs)
    name, arguments = row.stock_network(backbone, kwargs)
    if stock_tag is not None:
        arguments["pretrained_cfg"] = stock_tag
    if stock_file is not None:  # not timm's own download; and it holds torch tensors, whatever others do
        arguments["pretrained_cfg_overlay"] = {"file": stock_file, "custom_load": False}
    model: Any = stock_network(name, pretrained=stock_tag is not None, **arguments)
    model.stock_keys = set(model.state_dict())
    if name != backbone:  # what the attention on top adds is no part of the backbone
        plain = {k: v for k, v in kwargs.items() if k not in own and k != "block_args"}
        model.stock_keys &= set(stock_network(backbone, **{**plain, "device": "meta"}).state_dict())
    if not key or (key == "se" and name != backbone):
        return model
    stock = copied(model) if stock_tag is not None else None
    options = options_of(row.put)
    row.put(model, example_input(model, 1), **{k: v for k, v in own.items() if k in options})
    if stock is not None:
        start_constant(model, model.stock_keys)
        images = example_input(model)
        excess = above_bound(relative_difference(stock, model, images), images.dtype)
        if excess:
            raise GraftError(f"{variant} does not compute what timm's {name}.{stock_tag} computes: {excess}")
        model.train()
    return model


def _stock_file(variant: str, tag: str) -> str | None:
    """timm's weights of the stock network, whose sha256 is the Hub's; None if timm reads them its own way.

    Raises:
        WeightsError: They cannot be had, or are damaged.
    """
    backbone = parse_name(variant)[0]
    try:
        file = weights.fetch_timm(f"{backbone}.{tag}")
        return None if file is None else str(file)
    except weights.WeightsError as error:
        raise type(error)(
            f"{variant}.{GRAFT}{tag} is made from timm's weights of {backbone}: {error}. With their file at "
            f"hand: timm_attn.graft({variant!r}, safetensors.torch.load_file(FILE))"
        ) from None


def _given(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a model is created with; at least its tag."""
    cfg: Any = kwargs.get("pretrained_cfg") or timm.models.get_pretrained_cfg(variant)
    return {"tag": cfg} if isinstance(cfg, str) else cfg if isinstance(cfg, dict) else cfg.to_dict()


def _tag(variant: str, kwargs: dict[str, Any]) -> str:
    return str(_given(variant, kwargs).get("tag"))


def _by_timm(variant: str, kwargs: dict[str, Any]) -> bool:
    """Whether a graft is from timm's weights of the stock network, and not from another file."""
    if any((kwargs.get("pretrained_cfg_overlay") or {}).get(source) for source in weights.SOURCES):
        return False
    given = _given(variant, kwargs)
    registered = timm.models.get_arch_pretrained_cfgs(variant).get(f"{variant}.{given['tag']}")
    if registered is None or len(given) == 1:
        return registered is not None
    return all(given.get(source) == getattr(registered, source) for source in (*weights.SOURCES, "source"))


def checkpoint_filter(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Pass on a checkpoint whose keys are the model's, the classifier's aside; graft stock weights.

    Trained weights of a model that is built with ``folded=True`` are folded.

    timm loads in part, in silence, when the head is adapted or ``features_only`` is asked for; this does not.

    Raises:
        RuntimeError: A key outside the classifier is missing or unexpected, or a tensor has another shape.
        GraftError: The tag asks for a graft, and the weights are not those of the stock network.
    """
    # In the first releases, ASR was in the place where a ResNet has SE.
    old = ".se.generators."
    state_dict = {key.replace(old, ".asr.generators."): tensor for key, tensor in state_dict.items()}
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    adapted = classifier_keys(cfg)
    misfit = key_difference(state_dict, model.state_dict(), adapted)
    if misfit and str(cfg.get("tag")).startswith(GRAFT):
        check_graft(cfg["architecture"])
        if isinstance(getattr(model, "fused_pairs", None), list):
            raise GraftError(
                f"{cfg['architecture']} has its norms fused: graft without folded=True, then fold"
            )
        load_stock(model, state_dict, model.stock_keys)
        start_constant(model, model.stock_keys)
        # Here and not in the tag's configuration, which timm also gives a model with random weights.
        cfg["description"] = graft_description(str(cfg.get("hf_hub_id")))
        ends = classifier_keys(cfg, "first_conv")
        return model.state_dict() | {k: v for k, v in state_dict.items() if k.startswith(ends)}
    if misfit and has_norms(state_dict, getattr(model, "fused_pairs", [])):
        state_dict = fuse_state(state_dict, model.fused_pairs)
        misfit = key_difference(state_dict, model.state_dict(), adapted)
    # Of another number of channels or classes, timm adapts these.
    adapted = classifier_keys(cfg, "first_conv")
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if not key.startswith(adapted)}
    wrong = [key for key, shape in shapes.items() if key in state_dict and state_dict[key].shape != shape]
    if not misfit and wrong:
        was, is_ = (tuple(shape) for shape in (state_dict[wrong[0]].shape, shapes[wrong[0]]))
        misfit = f"{wrong[0]} has the shape {was}, not {is_} ({len(wrong)} such in all)"
    if misfit:
        raise RuntimeError(f"the checkpoint does not fit {type(model).__name__}: {misfit}")
    return state_dict


#: Arguments that timm takes beside those of a network.
_OF_TIMM = {
    *inspect.signature(build_model_with_cfg).parameters,
    "features_only",
    "feature_cls",
    "device",
    "dtype",
}


def _feature_cfg(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not kwargs.get("features_only"):
        return {}
    backbone, key = parse_name(variant)
    return feature_cfg(backbone, mechanism(key).stock_network(backbone, kwargs)[1])


def feature_cfg(backbone: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """How timm takes feature maps from a stock network, so that their keys are the same.

    Args:
        arguments: That it is created with.
    """
    spec = spec_of(backbone)
    if spec.cifar:
        return {"out_indices": tuple(range(len(spec.layers) + 1)), "flatten_sequential": spec.preact}
    if spec.layers:
        return {}
    arguments = {name: value for name, value in arguments.items() if name not in _OF_TIMM}
    stock: Any = timm.create_model(backbone, features_only=True, device="meta", **arguments)
    cfg = {"out_indices": tuple(stock.feature_info.out_indices), "feature_cls": type(stock)}
    if isinstance(stock, FeatureDictNet | FeatureHookNet):
        arguments.pop("out_indices", None)
        whole = stock_network(backbone, device="meta", **arguments)
        parts, flat = ({name for name, _ in net.named_children()} for net in (whole, stock))
        return {**cfg, "flatten_sequential": flat != {"body"} and not flat <= parts}
    return cfg if isinstance(stock, FeatureGetterNet) else {**cfg, "feature_cls": feature_maps}


def stock_model(model: Any, folded: nn.Module) -> Any:
    """A folded model, built by name with ``timm.create_model``: the stock network where there is one.

    Args:
        model: The model before folding, made by ``timm.create_model``.
        folded: The result of ``timm_attn.fold``.
    """
    cfg = model.pretrained_cfg
    backbone, key = parse_name(cfg["architecture"])
    name, arguments = mechanism(key).stock_network(backbone, model._model_args)
    if mechanism(key).fuses:
        name, arguments = cfg["architecture"], {**model._model_args, "folded": True}
    arguments["num_classes"] = model.num_classes
    # Both may have changed since the model was made.
    pool = get_model_args(model).get("global_pool")
    if pool is not None and pool != arguments.get("global_pool", "avg"):
        arguments["global_pool"] = pool
    stock: Any = timm.create_model(name, **arguments)
    stock.to(next(folded.parameters())).load_state_dict(folded.state_dict())
    stock.pretrained_cfg = stock.default_cfg = {**cfg, "architecture": name}
    return stock.eval()
