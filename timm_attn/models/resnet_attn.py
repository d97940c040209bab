"""timm entry points: every mechanism on every backbone of the two tables in ``mechanisms``.

DIA     https://arxiv.org/abs/1905.10671   ``<backbone>_dia``    ``reduction``, ``dia_light``
ASR     https://arxiv.org/abs/2304.06345   ``<backbone>_asr``    ``delta``, ``generator``, ``reduction``,
                                                               ``attention``; ``_asr_se`` has SE on top
ConAM   https://arxiv.org/abs/2110.14369   ``<backbone>_conam``  ``grid``, ``patch_size``, ``reduction``,
                                                               ``temperature``
FMMNet  https://arxiv.org/abs/2106.15067   ``fmmnet<depth>``     ``mode``, ``pin_bias``
SSIA    https://arxiv.org/abs/2206.07434   ``<backbone>_ssia``   ``target``, ``aux_weight``
SE      https://arxiv.org/abs/1709.01507   ``<backbone>_se``     CIFAR backbones; timm has the others

Backbones are timm's ResNets by their own names, and the CIFAR ResNets ``resnet20`` to ``resnet164``. The
layers' classes say what the options mean. timm files a model under the last part of its module's name, so
this file must not be called ``resnet``.
"""

from dataclasses import fields
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .. import weights
from .mechanisms import BACKBONES, MECHANISMS

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def _name(backbone: str, mechanism: str) -> str:
    name = MECHANISMS[mechanism].name
    return name(backbone) if name else f"{backbone}_{mechanism}"


_VARIANTS = {
    _name(backbone, key): (backbone, key)
    for backbone, spec in BACKBONES.items()
    for key, mechanism in MECHANISMS.items()
    if spec.cifar or not mechanism.control
}


def model_names() -> list[str]:
    """Names of the architectures that this package registers, in the order of the table."""
    return list(_VARIANTS)


def parse_name(architecture: str) -> tuple[str, str]:
    """Backbone and mechanism ('' for a plain network) of an architecture of this package.

    Raises:
        KeyError: It is not one of :func:`model_names`.
    """
    return _VARIANTS[architecture]


def stock_model(model: Any, folded: nn.Module) -> Any:
    """The stock backbone with the weights of a folded model, built from its name as anybody would.

    Args:
        model: The model before folding, made by ``timm.create_model``.
        folded: What :func:`timm_attn.fold` made of it.
    """
    cfg = model.pretrained_cfg
    backbone, key = parse_name(cfg["architecture"])
    mechanism = MECHANISMS[key]
    options = {k: v for k, v in model._model_args.items() if k in mechanism.options}
    arguments = {k: v for k, v in model._model_args.items() if k not in options}
    name, extra = mechanism.stock(backbone, options)
    block_args = {**arguments.get("block_args", {}), **extra.get("block_args", {})}
    arguments |= {"block_args": block_args} if block_args else {}
    stock: Any = timm.create_model(name, **{**arguments, "num_classes": model.num_classes})
    stock.to(next(folded.parameters())).load_state_dict(folded.state_dict())
    stock.pretrained_cfg = stock.default_cfg = {**cfg, "architecture": name}
    return stock.eval()


def checkpoint_filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Pass a checkpoint on unchanged if its keys are the model's, the classifier's aside.

    timm loads in part, in silence, when the head is adapted or ``features_only`` is asked for; this does not.

    Raises:
        RuntimeError: A key outside the classifier is missing or unexpected.
    """

    def keys(names) -> set[str]:
        return {name for name in names if not name.startswith("fc.")}

    have, want = keys(state_dict), keys(model.state_dict())
    if have != want:
        missing, unexpected = sorted(want - have), sorted(have - want)
        raise RuntimeError(
            f"the checkpoint does not fit {type(model).__name__}: missing {missing[:5]} "
            f"({len(missing)} in all), unexpected {unexpected[:5]} ({len(unexpected)} in all)"
        )
    return state_dict


def _create(variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
    backbone_name, mechanism = _VARIANTS[variant]
    backbone = BACKBONES[backbone_name]
    saved = weights.resolve(variant, kwargs) if pretrained else {}
    kwargs = {"layers": backbone.layers, **backbone.args, **kwargs, **saved}
    model_cls, kwargs = MECHANISMS[mechanism].build(backbone, **kwargs)
    if backbone.cifar:
        kwargs["feature_cfg"] = {"out_indices": (0, 1, 2, 3)}
    model: Any = build_model_with_cfg(
        model_cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter, **kwargs
    )
    # timm adds what create_model was given; a folded or exported copy needs what the weights brought, too.
    model._model_args = {name: value for name, value in saved.items() if name != "pretrained_cfg_overlay"}
    return model


def _cfg(cifar: bool) -> dict[str, Any]:
    common = {"first_conv": "conv1", "classifier": "fc", "license": "apache-2.0", "interpolation": "bilinear"}
    if cifar:
        return {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "mean": CIFAR_MEAN,
            "std": CIFAR_STD,
            **common,
        }
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **common,
    }


# timm reads this table while it registers an entry point, so it must stand above them.
_FIELDS = {field.name for field in fields(PretrainedCfg)}
default_cfgs = generate_default_cfgs(
    {
        # An index written with another version of timm may have fields that this one does not know.
        tag: {name: value for name, value in cfg.items() if name in _FIELDS}
        for variant, (backbone, _) in _VARIANTS.items()
        for tag, cfg in (
            weights.pretrained_cfgs(variant) or {variant: _cfg(BACKBONES[backbone].cifar)}
        ).items()
    }
)


def _register(variant: str) -> None:
    backbone, mechanism = _VARIANTS[variant]

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = variant
    entry.__doc__ = f"{backbone}: {MECHANISMS[mechanism].paper.summary}"
    globals()[variant] = register_model(entry)


for _variant in _VARIANTS:
    _register(_variant)
