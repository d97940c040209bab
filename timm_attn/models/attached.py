"""timm entry points for all combinations of mechanisms and backbones.

DIA     https://arxiv.org/abs/1905.10671   ``<backbone>_dia``    ``reduction``, ``dia_light``, ``norm``
ASR     https://arxiv.org/abs/2304.06345   ``<backbone>_asr``    ``delta``, ``generator``, ``reduction``,
                                                               ``where``, ``attention`` (of ResNets);
                                                               ``_asr_se`` has SE on top
SSIA    https://arxiv.org/abs/2206.07434   ``<backbone>_ssia``   ``target``, ``aux_weight``
SEM     https://arxiv.org/abs/2209.05680   ``<backbone>_sem``    ``reduction``
SPEM    https://arxiv.org/abs/2208.10322   ``<backbone>_spem``   ``aux_weight``
ConAM   https://arxiv.org/abs/2110.14369   ``<backbone>_conam``  ``grid``, ``patch_size``, ``reduction``,
                                                               ``temperature``; ResNets only
FMMNet  https://arxiv.org/abs/2106.15067   ``fmmnet<depth>``     ``mode``, ``pin_bias``; ResNets only
SE      https://arxiv.org/abs/1709.01507   ``<backbone>_se``     CIFAR backbones; timm has the others

The classes of the layers document the options. timm lists a model under the last part of its module's name.
"""

import warnings
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import Tensor, nn

from .. import weights
from ..branches import copied, example_input
from ..compare import above_bound, relative_difference
from .backbones import BACKBONES, spec_of, stock_network
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
from .mechanisms import MECHANISMS, mechanism, options_of
from .resnet_only import residual_blocks

#: Prefix of the tags of weights that are grafted from a stock network.
GRAFT = "graft_"
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def _name(backbone: str, key: str) -> str:
    name = mechanism(key).name
    return name(backbone) if name else f"{backbone}_{key}"


#: Tags of timm's weights that were asked for, besides the default, by variant.
_OTHER_TAGS: dict[str, set[str]] = {}
_VARIANTS = {
    _name(backbone, key): (backbone, key)
    for backbone, spec in BACKBONES.items()
    for key, row in MECHANISMS.items()
    if row.on(spec)
}


def model_names() -> list[str]:
    """Names of the architectures that this package registers, in the order of the table."""
    return list(_VARIANTS)


def graft_tags(architecture: str) -> list[str]:
    """Tags under which timm's own weights of the stock network are grafted into an architecture."""
    tags = default_cfgs[architecture].tags if architecture in default_cfgs else []
    return [tag for tag in tags if tag.startswith(GRAFT)]


def parse_name(architecture: str) -> tuple[str, str]:
    """Backbone and mechanism ('' for a plain network) of an architecture of this package.

    Raises:
        KeyError: The architecture is not one of ``model_names``.
    """
    return _VARIANTS[architecture]


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


def graft_obstacle(architecture: str) -> str:
    """Why stock weights cannot become those of a variant, or ''."""
    return mechanism(parse_name(architecture)[1]).graft


def check_graft(architecture: str) -> None:
    """Raise a ``GraftError`` if stock weights cannot become those of a variant."""
    reason = graft_obstacle(architecture)
    if reason:
        raise GraftError(f"{architecture} cannot be grafted: {reason}")


def _architecture(checkpoint: str | None) -> str:
    return (checkpoint or "").partition(".")[0]


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if "block" in kwargs:
        raise TypeError(f"block={kwargs['block']!r} cannot be set: {variant} has blocks of its own")
    backbone, key = _VARIANTS[variant]
    grafted = pretrained and _tag(variant, kwargs).startswith(GRAFT)
    saved = weights.resolve(variant, kwargs) if pretrained and not grafted else {}
    kwargs = {**kwargs, **saved}
    build: Any = partial(_network, variant)
    if kwargs.pop("folded", False):
        build = partial(folded, build)
        if not mechanism(key).fuses:
            stock = mechanism(key).stock(backbone)[0]
            theirs = [c.name for c in weights.checkpoints() if _architecture(c.folded_from) == variant]
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
        feature_cfg=feature_cfg(backbone, kwargs) | kwargs.pop("feature_cfg", {}),
        **kwargs,
    )
    if by_timm:
        # Here and not in the tag's configuration, which timm also gives a model with random weights.
        model.pretrained_cfg["description"] = graft_description(str(model.pretrained_cfg.get("hf_hub_id")))
    # timm adds what create_model was given; a folded or exported copy needs what the weights brought, too.
    model._model_args = {k: v for k, v in saved.items() if not k.startswith("pretrained_cfg")}
    return model


def _stock_file(variant: str, tag: str) -> str | None:
    """timm's weights of the stock network, whose sha256 is the Hub's; None if timm reads them its own way.

    Raises:
        WeightsError: They cannot be had, or are damaged.
    """
    backbone = _VARIANTS[variant][0]
    try:
        file = weights.fetch_timm(f"{backbone}.{tag}")
        return None if file is None else str(file)
    except weights.WeightsError as error:
        raise type(error)(
            f"{variant}.{GRAFT}{tag} is made from timm's weights of {backbone}: {error}. With their file at "
            f"hand: timm_attn.graft({variant!r}, safetensors.torch.load_file(FILE))"
        ) from None


def _network(
    variant: str, stock_tag: str | None = None, stock_file: str | None = None, **kwargs: Any
) -> nn.Module:
    """The stock network with the mechanism; with a tag, of timm's weights, which are grafted."""
    backbone, key = _VARIANTS[variant]
    row = mechanism(key)
    name, arguments = row.stock_network(backbone, kwargs)
    if stock_tag is not None:
        arguments["pretrained_cfg"] = stock_tag
    if stock_file is not None:  # not timm's own download; and it holds torch tensors, whatever others do
        arguments["pretrained_cfg_overlay"] = {"file": stock_file, "custom_load": False}
    model: Any = stock_network(name, pretrained=stock_tag is not None, **arguments)
    model.stock_keys = set(model.state_dict())
    if name != backbone:  # what the attention on top adds is no part of the backbone
        plain = {k: v for k, v in kwargs.items() if k not in row.options and k != "block_args"}
        model.stock_keys &= set(stock_network(backbone, **{**plain, "device": "meta"}).state_dict())
    if not key or (key == "se" and name != backbone):
        return model
    stock = copied(model) if stock_tag is not None else None
    row.put(model, example_input(model, 1), **{k: v for k, v in kwargs.items() if k in options_of(row.put)})
    if stock is not None:
        start_constant(model, model.stock_keys)
        images = example_input(model)
        excess = above_bound(relative_difference(stock, model, images), images.dtype)
        if excess:
            raise GraftError(f"{variant} does not compute what timm's {name}.{stock_tag} computes: {excess}")
        model.train()
    return model


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
    registered = default_cfgs[variant].cfgs.get(str(given["tag"]))
    if registered is None or len(given) == 1:
        return registered is not None
    return all(given.get(source) == getattr(registered, source) for source in (*weights.SOURCES, "source"))


def feature_cfg(backbone: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """How timm takes feature maps from the stock network, so that their keys are the same."""
    if not kwargs.get("features_only"):
        return {}
    spec = spec_of(backbone)
    if spec.cifar:
        return {"out_indices": tuple(range(len(spec.layers) + 1)), "flatten_sequential": spec.preact}
    if spec.layers:
        return {}
    stock: Any = timm.create_model(backbone, features_only=True, device="meta")
    cfg = {"out_indices": tuple(stock.feature_info.out_indices), "feature_cls": type(stock)}
    if isinstance(stock, FeatureDictNet | FeatureHookNet):
        whole = stock_network(backbone, device="meta")
        parts, flat = ({name for name, _ in net.named_children()} for net in (whole, stock))
        return {**cfg, "flatten_sequential": flat != {"body"} and not flat <= parts}
    return cfg if isinstance(stock, FeatureGetterNet) else {**cfg, "feature_cls": feature_maps}


def _graft_cfgs(variant: str) -> dict[str, dict[str, Any]]:
    """timm's checkpoints of the stock backbone, the default and those that were asked for, as grafts."""
    backbone, key = _VARIANTS[variant]
    row = mechanism(key)
    # Of SE networks, which ASR with SE on top grows from, timm has too few checkpoints.
    if spec_of(backbone).cifar or graft_obstacle(variant) or row.stock(backbone) != (backbone, {}):
        return {}
    found = {}
    for name in (backbone, *(f"{backbone}.{tag}" for tag in sorted(_OTHER_TAGS.get(variant, ())))):
        tag, has_weights, fields = _stock_cfg(name)
        if has_weights:
            fields = {k: v for k, v in fields.items() if k not in ("architecture", "tag", "url")}
            found[f"{variant}.{GRAFT}{tag}"] = fields
    return found


@cache
def _stock_cfg(name: str) -> tuple[str, bool, dict[str, Any]]:
    """Tag of a network of timm, by default the default, whether it has weights, and its configuration."""
    stock: Any = timm.models.get_pretrained_cfg(name)
    return stock.tag, stock.has_weights, stock.to_dict()


def _cfg(backbone: str) -> dict[str, Any]:
    spec = spec_of(backbone)
    if not spec.cifar:
        sources = ("architecture", "tag", "url", "hf_hub_id", "custom_load")
        return {k: v for k, v in _stock_cfg(backbone)[2].items() if k not in sources}
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (32 >> len(spec.layers) - 1,) * 2,
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "stem.conv" if spec.preact else "conv1",
        "classifier": "head.fc" if spec.preact else "fc",
        "license": "apache-2.0",
        "interpolation": "bilinear",
    }


def _cfgs(variant: str) -> dict[str, Any]:
    """All configurations of an architecture by name and tag, the default first."""
    cfgs = weights.pretrained_cfgs(variant) | _graft_cfgs(variant)
    return cfgs or {variant: _cfg(_VARIANTS[variant][0])}


# timm reads this table while it registers an entry point, so it must stand above them.
default_cfgs = generate_default_cfgs(
    {tag: cfg for variant in _VARIANTS for tag, cfg in _cfgs(variant).items()}
)


def _register(variant: str) -> None:
    backbone, key = _VARIANTS[variant]

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = variant
    entry.__doc__ = f"{backbone}: {mechanism(key).paper.summary}"
    globals()[variant] = register_model(entry)


def _register_again(variant: str) -> None:
    """Let timm know the checkpoints that an architecture has by now."""
    default_cfgs.update(generate_default_cfgs(_cfgs(variant)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting")
        _register(variant)


for _variant in _VARIANTS:
    _register(_variant)
_REGISTERED_BY_IMPORT = frozenset(_VARIANTS)


def did_you_mean(name: str) -> str:
    """A question with the nearest names of models, or ''."""
    near = get_close_matches(name, timm.list_models(), n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def register(backbone: str, key: str) -> str:
    """Register a network of timm with a mechanism as the model ``<backbone>_<mechanism>``.

    Args:
        backbone: Name of an architecture, without tag.
        key: Name of the mechanism, as for ``timm_attn.attach``.

    Returns:
        The name of the model. A model that is already registered is left as it is.

    Raises:
        ValueError: timm has no such network, the mechanism does not exist or is for ResNets only, or another
            network has the name. Whether the network has a place for the mechanism, its creation tells.
    """
    name = _name(backbone, key)
    if _VARIANTS.get(name) == (backbone, key):
        return name
    if "." in backbone:
        raise ValueError(
            f"{backbone!r} has a tag: leave it out, or take "
            f"timm_attn.create_model({backbone!r}, attention={key!r})"
        )
    if not timm.is_model(backbone):
        hint = did_you_mean(backbone) or "timm.list_models() shows those that it has"
        raise ValueError(f"timm has no network {backbone!r}: {hint}")
    now = timm.models.get_deprecated_models().get(backbone)
    if now is not None:
        raise ValueError(f"{backbone} is an old name: timm calls it {now}")
    row, of = mechanism(key), _VARIANTS.get(backbone)
    if of is not None and of[1] not in ("", "se"):
        raise ValueError(f"{backbone} has {of[1]} already: name {of[0]}")
    if name == backbone:
        raise ValueError(f"{backbone} is the stock network: name a mechanism")
    row.stock(backbone)
    if row.resnets:
        residual_blocks(stock_network(backbone, device="meta"), key)
    if timm.is_model(name):
        raise ValueError(f"{name} is a network already: timm.create_model({name!r})")
    _VARIANTS[name] = (backbone, key)
    try:
        default_cfgs.update(generate_default_cfgs(_cfgs(name)))
        _register(name)
    except BaseException:
        del _VARIANTS[name]
        raise
    return name


def register_graft(variant: str, tag: str) -> str:
    """Register a variant with timm's weights of one tag of its stock network.

    Returns:
        ``<variant>.graft_<tag>``, for ``timm.create_model(..., pretrained=True)``.

    Raises:
        GraftError: The mechanism cannot be initialised without changing the outputs.
        ValueError: timm has no such weights.
    """
    backbone, key = _VARIANTS[variant]
    check_graft(variant)
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{backbone}.*")]
    if tag not in tags:
        raise ValueError(f"{backbone} has no weights {tag!r}: choose from {', '.join(tags) or 'none'}")
    stock, _ = mechanism(key).stock(backbone)
    if stock != backbone:
        raise ValueError(
            f"{variant} grows from {stock}, not {backbone}: take timm_attn.graft({variant!r}, ...)"
        )
    if spec_of(backbone).cifar:
        trained = f"{variant}.{tag}" in weights.pretrained_cfgs(variant)
        hint = (
            f"timm.create_model('{variant}.{tag}', pretrained=True) was trained with {key}, "
            if trained
            else ""
        )
        raise ValueError(
            f"{backbone}.{tag} are no weights of timm's own: {hint}timm_attn.graft({variant!r}, "
            f"'{backbone}.{tag}') starts from these"
        )
    if tag not in _OTHER_TAGS.setdefault(variant, set()):
        _OTHER_TAGS[variant].add(tag)
        _register_again(variant)
    return f"{variant}.{GRAFT}{tag}"


def register_name(architecture: str) -> bool:
    """Register ``<backbone>_<mechanism>`` if the name has this form; returns whether timm knows the name."""
    keys = sorted(filter(None, MECHANISMS), key=len, reverse=True)
    for key in (*keys, architecture.rpartition("_")[2]):
        backbone = architecture.removesuffix(f"_{key}")
        if not timm.is_model(architecture) and backbone != architecture and timm.is_model(backbone):
            with suppress(ValueError):  # there is no such mechanism
                register(backbone, key)
    return timm.is_model(architecture)


def known_architecture(architecture: str) -> bool:
    """Whether it is one of this package's; a pair of a network and a mechanism becomes one."""
    return register_name(architecture) and architecture in _VARIANTS


def registering(architecture: str) -> str:
    """The call that registers one of this package's architectures; '' if the import alone does."""
    if not known_architecture(architecture) or architecture in _REGISTERED_BY_IMPORT:
        return ""
    backbone, key = _VARIANTS[architecture]
    return f'timm_attn.register("{backbone}", "{key}")'


def register_folder(folder: str | Path) -> list[str]:
    """Make ``pretrained=True`` search the checkpoints of a hub folder first.

    Args:
        folder: A folder with an ``index.json``, as ``timm-attn export`` writes it.

    Returns:
        The names of its checkpoints for ``timm.create_model``. Folded networks of timm's own architectures
        are not among them: ``timm.create_model("local-dir:FOLDER/NAME", pretrained=True)`` loads them.

    Raises:
        WeightsError: The folder is not a hub folder, or its index is invalid.
    """
    found = [c for c in weights.add_folder(folder) if known_architecture(c.architecture)]
    for variant in {c.architecture for c in found}:
        _register_again(variant)
    return [c.name for c in found]


for _checkpoint in weights.checkpoints():  # a hub folder may hold networks whose names are nobody's yet
    known_architecture(_checkpoint.architecture)
