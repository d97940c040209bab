"""timm entry points: one table of backbones × mechanisms.

DIA  https://arxiv.org/abs/1905.10671   ``<backbone>_dia``   options: ``reduction``
ASR  https://arxiv.org/abs/2304.06345   ``<backbone>_asr``   options: ``delta``, ``reduction``
SE   https://arxiv.org/abs/1709.01507   ``<backbone>_se``    CIFAR backbones; timm has the others

Backbones are timm's ResNets by their own names, and the CIFAR ResNets ``resnet20`` to ``resnet164``. timm
files a model under the last part of its module's name, so this file must not be called ``resnet``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SEModule
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .. import weights
from ..layers import ASR
from .blocks import DIABasicBlock, DIABottleneck, FoldableBasicBlock, FoldableBottleneck
from .cifar import CifarResNet
from .dia import DIACifarResNet, DIAResNet

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Backbone:
    """A stock network: its blocks per stage and what it passes to timm's ResNet."""

    layers: tuple[int, ...]
    bottleneck: bool
    cifar: bool = False
    args: dict[str, Any] = field(default_factory=dict)


BACKBONES = {
    "resnet18": Backbone((2, 2, 2, 2), bottleneck=False),
    "resnet34": Backbone((3, 4, 6, 3), bottleneck=False),
    "resnet50": Backbone((3, 4, 6, 3), bottleneck=True),
    "resnet101": Backbone((3, 4, 23, 3), bottleneck=True),
    "resnet152": Backbone((3, 8, 36, 3), bottleneck=True),
    "resnext50_32x4d": Backbone((3, 4, 6, 3), bottleneck=True, args={"cardinality": 32, "base_width": 4}),
    "wide_resnet50_2": Backbone((3, 4, 6, 3), bottleneck=True, args={"base_width": 128}),
    "resnet20": Backbone((3, 3, 3), bottleneck=False, cifar=True),
    "resnet32": Backbone((5, 5, 5), bottleneck=False, cifar=True),
    "resnet44": Backbone((7, 7, 7), bottleneck=False, cifar=True),
    "resnet56": Backbone((9, 9, 9), bottleneck=False, cifar=True),
    "resnet110": Backbone((18, 18, 18), bottleneck=False, cifar=True),
    "resnet164": Backbone((18, 18, 18), bottleneck=True, cifar=True),
}


def _plain(backbone: Backbone, **kwargs) -> tuple[type[ResNet], dict[str, Any]]:
    kwargs["block"] = Bottleneck if backbone.bottleneck else BasicBlock
    return CifarResNet if backbone.cifar else ResNet, kwargs


def _se(backbone: Backbone, **kwargs) -> tuple[type[ResNet], dict[str, Any]]:
    # rd_divisor=1: the paper's C / 16, which timm would round up to a multiple of 8, for 16 to 64 channels.
    attn_layer = partial(SEModule, rd_ratio=1 / 16, rd_divisor=1)
    kwargs["block_args"] = {"attn_layer": attn_layer, **kwargs.get("block_args", {})}
    return _plain(backbone, **kwargs)


def _refuse_attn_layer(kwargs: dict[str, Any]) -> None:
    if "attn_layer" in kwargs.get("block_args", {}):
        raise ValueError(
            f"attn_layer {kwargs['block_args']['attn_layer']!r} has no place beside this mechanism"
        )


def _asr(
    backbone: Backbone, delta: int = 1, reduction: int = 16, **kwargs
) -> tuple[type[ResNet], dict[str, Any]]:
    _refuse_attn_layer(kwargs)
    attn_layer = partial(ASR, delta=delta, reduction=reduction)
    kwargs["block_args"] = {**kwargs.get("block_args", {}), "attn_layer": attn_layer}
    kwargs["block"] = FoldableBottleneck if backbone.bottleneck else FoldableBasicBlock
    return CifarResNet if backbone.cifar else ResNet, kwargs


def _dia(backbone: Backbone, reduction: int | None = None, **kwargs) -> tuple[type[ResNet], dict[str, Any]]:
    _refuse_attn_layer(kwargs)
    kwargs["reduction"] = reduction if reduction is not None else (4 if backbone.cifar else 20)
    kwargs["block"] = DIABottleneck if backbone.bottleneck else DIABasicBlock
    return DIACifarResNet if backbone.cifar else DIAResNet, kwargs


MECHANISMS: dict[str, Callable[..., tuple[type[ResNet], dict[str, Any]]]] = {
    "": _plain,
    "se": _se,
    "dia": _dia,
    "asr": _asr,
}
#: Keyword arguments that belong to a mechanism and that its backbone does not have.
OPTIONS = {"": (), "se": (), "dia": ("reduction",), "asr": ("delta", "reduction")}


def _name(backbone: str, mechanism: str) -> str:
    return f"{backbone}_{mechanism}" if mechanism else backbone


# timm has the plain ImageNet backbones, and its own SE versions of them.
_VARIANTS = {
    _name(backbone, mechanism): (backbone, mechanism)
    for backbone, spec in BACKBONES.items()
    for mechanism in MECHANISMS
    if spec.cifar or mechanism not in ("", "se")
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
    backbone, mechanism = parse_name(cfg["architecture"])
    arguments = {k: v for k, v in model._model_args.items() if k not in OPTIONS[mechanism]}
    stock: Any = timm.create_model(backbone, **{**arguments, "num_classes": model.num_classes})
    stock.to(next(folded.parameters())).load_state_dict(folded.state_dict())
    stock.pretrained_cfg = stock.default_cfg = {**cfg, "architecture": backbone}
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
    model_cls, kwargs = MECHANISMS[mechanism](backbone, **kwargs)
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
    entry.__doc__ = f"{backbone} with {mechanism.upper()}." if mechanism else f"{backbone} for 32×32 images."
    globals()[variant] = register_model(entry)


for _variant in _VARIANTS:
    _register(_variant)
