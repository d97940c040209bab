"""The two tables that every model comes from: backbones and mechanisms.

A row of :data:`MECHANISMS` says how to put a mechanism into a backbone, what its models are called and where
it was published. Registration, the command line, cards and tests read the table; see CONTRIBUTING.md for how
to add a row.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..layers import ASR
from ..layers.options import check_flag
from ..papers import PAPERS, Paper
from . import blocks, grafting
from .cifar import CifarResNet
from .conam import ConAMCifarResNet, ConAMResNet
from .dia import DIABasicBlock, DIABottleneck, DIACifarResNet, DIAResNet
from .ssia import SSIACifarResNet, SSIAResNet


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

#: A backbone and keyword arguments of ``create_model`` to the model's class and its arguments. The
#: mechanism's own options are keyword-only parameters of the function.
Build = Callable[..., tuple[type[ResNet], dict[str, Any]]]


def _same(backbone: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return backbone, {}


@dataclass(frozen=True)
class Mechanism:
    """A row of the table.

    Attributes:
        build: Makes the model's class and arguments.
        paper: Its source.
        name: A backbone's name to the model's; by default ``<backbone>_<key of the row>``.
        stock: Name and further arguments of the network that a folded model is, from the backbone's name and
            the options of this mechanism.
        graft: Gives stock weights the mechanism without changing what they compute, or the reason why that
            cannot be.
        folds: Nothing of it is left after :func:`timm_attn.fold`, another attention on top aside.
        fuses: It depends on the image; its folded form (``folded=True``) is the same network with norms fused
            into convolutions.
        control: It exists on the CIFAR backbones only, since timm has the others.
    """

    build: Build
    paper: Paper
    name: Callable[[str], str] | None = None
    stock: Callable[[str, dict[str, Any]], tuple[str, dict[str, Any]]] = _same
    graft: grafting.Graft | str = "nobody has said how"
    folds: bool = False
    fuses: bool = False
    control: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``create_model`` that belong to the mechanism, with their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def stock_network(self, backbone: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and all arguments of the stock network of a model that was created with ``kwargs``."""
        name, extra = self.stock(backbone, {k: v for k, v in kwargs.items() if k in self.options})
        arguments = {k: v for k, v in kwargs.items() if k not in self.options and k != "folded"}
        if "block_args" in extra:
            extra = {**extra, "block_args": (arguments.get("block_args") or {}) | extra["block_args"]}
        return name, arguments | extra


def in_attention_slot(layer: Callable[..., Any]) -> Build:
    """Put a module after the last norm layer of every block, before the shortcut is added.

    Args:
        layer: Called as ``layer(channels, device=, dtype=, **options)``; takes and returns B × C × H × W. If
            its gate does not depend on the input, a method ``fold_into(norm)`` folds it into the norm layer
            before it.
    """
    options = [p for n, p in inspect.signature(layer).parameters.items() if n not in ("device", "dtype")][1:]

    def build(backbone: Backbone, **kwargs) -> tuple[type[ResNet], dict[str, Any]]:
        given = {p.name: kwargs.pop(p.name) for p in options if p.name in kwargs}
        kwargs["block_args"] = _block_args(kwargs, attn_layer=partial(layer, **given))
        kwargs["block"] = blocks.FoldableBottleneck if backbone.bottleneck else blocks.FoldableBasicBlock
        return CifarResNet if backbone.cifar else ResNet, kwargs

    keyword_only = [p.replace(kind=p.KEYWORD_ONLY) for p in options]
    build.__signature__ = inspect.Signature(keyword_only)  # pyright: ignore[reportFunctionMemberAccess]
    return build


def _block_args(kwargs: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The block_args that the user gave with those of a mechanism; what would be overwritten is refused."""
    given = kwargs.get("block_args") or {}
    for name in own:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} {given[name]!r} has no place in block_args beside this mechanism (give its options "
                "as keyword arguments; ASR takes another attention as attention=…)"
            )
    return {**given, **own}


# timm would round the SE paper's hidden width C / 16 up to a multiple of 8: too wide for 16 to 64 channels.
_cifar_se = partial(SEModule, rd_ratio=1 / 16, rd_divisor=1)


def _plain(backbone: Backbone, **kwargs) -> tuple[type[ResNet], dict[str, Any]]:
    kwargs["block"] = Bottleneck if backbone.bottleneck else BasicBlock
    return CifarResNet if backbone.cifar else ResNet, kwargs


def _se(backbone: Backbone, **kwargs) -> tuple[type[ResNet], dict[str, Any]]:
    kwargs["block_args"] = _block_args(kwargs, attn_layer=_cifar_se)
    return _plain(backbone, **kwargs)


_in_slot_asr = in_attention_slot(ASR)


def _asr(
    backbone: Backbone,
    *,
    delta: int = 1,
    generator: str = "se",
    reduction: int | None = None,
    attention: str | None = None,
    **kwargs,
) -> tuple[type[ResNet], dict[str, Any]]:
    on_top = _cifar_se if backbone.cifar and attention == "se" else attention
    own = {"delta": delta, "generator": generator, "reduction": reduction, "attention": on_top}
    return _in_slot_asr(backbone, **own, **kwargs)


def _asr_se(
    backbone: Backbone, *, delta: int = 1, generator: str = "se", reduction: int | None = None, **kwargs
) -> tuple[type[ResNet], dict[str, Any]]:
    if "attention" in kwargs:
        raise ValueError(
            f"attention={kwargs['attention']!r} has no place here: the attention on top is SE. Take the "
            "architecture without _se"
        )
    return _asr(backbone, delta=delta, generator=generator, reduction=reduction, attention="se", **kwargs)


def _asr_stock(backbone: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    attention = options.get("attention")
    if attention is None:
        return backbone, {}
    if attention == "se":
        name = f"{backbone}_se" if BACKBONES[backbone].cifar else backbone.replace("resne", "seresne")
        if BACKBONES[backbone].cifar or timm.is_model(name):
            return name, {}
    return backbone, {"block_args": {"attn_layer": attention}}


def _dia(
    backbone: Backbone, *, reduction: int | None = None, dia_light: bool = False, **kwargs
) -> tuple[type[ResNet], dict[str, Any]]:
    check_flag("dia_light", dia_light)
    block_args = _block_args(kwargs, attn_layer=None)
    if dia_light and reduction is not None:
        raise ValueError(f"dia_light is a reduction of its own: leave out reduction={reduction}")
    if reduction is None:
        # The paper's 4 on CIFAR and 20 on ImageNet. "Light" is defined nowhere; 16 and 64 are this package's.
        reduction = (16 if backbone.cifar else 64) if dia_light else (4 if backbone.cifar else 20)
    kwargs |= {"reduction": reduction, "block_args": block_args}
    kwargs["block"] = DIABottleneck if backbone.bottleneck else DIABasicBlock
    return DIACifarResNet if backbone.cifar else DIAResNet, kwargs


def _conam(
    backbone: Backbone,
    *,
    grid: int | None = None,
    patch_size: int | tuple[int, ...] | None = None,
    reduction: int = 16,
    temperature: float | str = 1.0,
    **kwargs,
) -> tuple[type[ResNet], dict[str, Any]]:
    kwargs |= {"grid": grid, "patch_size": patch_size, "reduction": reduction, "temperature": temperature}
    kwargs["block"] = blocks.ConAMBottleneck if backbone.bottleneck else blocks.ConAMBasicBlock
    return ConAMCifarResNet if backbone.cifar else ConAMResNet, kwargs


def _fmm(
    backbone: Backbone, *, mode: str = "bn", pin_bias: bool = False, **kwargs
) -> tuple[type[ResNet], dict[str, Any]]:
    kwargs["block_args"] = _block_args(kwargs, mode=mode, pin_bias=pin_bias)
    kwargs["block"] = blocks.FMMBottleneck if backbone.bottleneck else blocks.FMMBasicBlock
    return CifarResNet if backbone.cifar else ResNet, kwargs


def _ssia(
    backbone: Backbone, *, target: str = "channel", aux_weight: float = 1.0, **kwargs
) -> tuple[type[ResNet], dict[str, Any]]:
    _, kwargs = _plain(backbone, target=target, aux_weight=aux_weight, **kwargs)
    return SSIACifarResNet if backbone.cifar else SSIAResNet, kwargs


MECHANISMS = {
    "": Mechanism(_plain, PAPERS["resnet"], name=str, graft="it is the stock network", control=True),
    "se": Mechanism(
        _se,
        PAPERS["se"],
        graft="its gate would have to be undone, for a control that is trained from the start",
        fuses=True,
        control=True,
    ),
    "dia": Mechanism(_dia, PAPERS["dia"], graft=grafting.dia, fuses=True),
    "asr": Mechanism(_asr, PAPERS["asr"], stock=_asr_stock, graft=grafting.asr, folds=True),
    "asr_se": Mechanism(
        _asr_se,
        PAPERS["asr_se"],
        stock=lambda backbone, options: _asr_stock(backbone, {"attention": "se"}),
        graft=grafting.asr,
        folds=True,
    ),
    "conam": Mechanism(_conam, PAPERS["conam"], graft=grafting.conam, fuses=True),
    "fmm": Mechanism(
        _fmm,
        PAPERS["fmm"],
        name=lambda backbone: backbone.replace("resn", "fmmn"),
        graft="a product of feature maps cannot represent the sum x + F(x)",
        fuses=True,
    ),
    "ssia": Mechanism(_ssia, PAPERS["ssia"], graft=grafting.nothing_to_scale, folds=True),
}
