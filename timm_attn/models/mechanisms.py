"""The table of mechanisms: how each is put into a network.

Attaching, registration, the command line, cards and tests read the table; see CONTRIBUTING.md for how to add
a row.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import EcaModule, SEModule, get_attn
from torch import nn

from ..branches import Branch, copied, runs
from ..dia_end import DIAEnd, DIARun, NormEnd
from ..ends import BranchEnd, GatedNorm, GateEnd, mixed
from ..layers import ASR, SEM, SPEM, ConAM, ConstantGate, DIACell
from ..layers.options import check_choice, check_flag, check_whole
from ..merging import gates_first
from ..papers import PAPERS, Paper, paper_of
from ..tokens import map_size, reads_neighbours
from .backbones import Backbone, network_arguments, paper_se, spec_of, takes_attention
from .cifar import CifarResNetV2
from .placing import (
    branches_taking_gates,
    branches_with_own_slots,
    free_name,
    like,
    norm_layers,
    stand,
)
from .resnet_only import put_conam, put_fmm, residual_blocks
from .ssia import put_ssia

#: A network, images that it takes, and the mechanism's options as keyword-only parameters; changes the
#: network or, if it raises, leaves it as it is.
Put = Callable[..., None]


@dataclass(frozen=True)
class Mechanism:
    """A row of the table.

    Attributes:
        put: Puts it into a network.
        paper: Its source.
        stock: Name and further arguments of the network that it is put into, from the backbone's name and
            options as keyword-only parameters.
        name: A backbone's name to the model's; by default ``<backbone>_<key of the row>``.
        graft: Why no parameters of it make it compute what the stock network computes, or ''.
        folds: Nothing of it is left after ``timm_attn.fold``, another attention on top aside.
        fuses: It depends on the image; on ResNets its folded form (``folded=True``) is the same network with
            norms fused into convolutions.
        resnets: It can be put into ResNets of timm's or this package's blocks only.
        of_timm: It is an attention layer of timm's.
        on: On which rows of the table of backbones it is registered.
    """

    put: Put
    paper: Paper
    stock: Callable[..., tuple[str, dict[str, Any]]] = lambda backbone: (backbone, {})
    name: Callable[[str], str] | None = None
    graft: str = ""
    folds: bool = False
    fuses: bool = False
    resnets: bool = False
    of_timm: bool = False
    on: Callable[[Backbone], bool] = lambda backbone: True

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``create_model`` that belong to the mechanism, with their defaults."""
        return {**options_of(self.put), **options_of(self.stock)}

    def own(self, backbone: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options among arguments of ``create_model``.

        Of names that timm's attention layers share with a network, such as ``act_layer``, the network has
        the argument.
        """
        shared = network_arguments(backbone) if self.of_timm else frozenset()
        return {k: v for k, v in kwargs.items() if k in self.options and k not in shared}

    def stock_network(self, backbone: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and all arguments of the stock network of a variant that was created with ``kwargs``."""
        name, extra = self.stock(backbone, **{k: v for k, v in kwargs.items() if k in options_of(self.stock)})
        own = self.own(backbone, kwargs)
        arguments = {k: v for k, v in kwargs.items() if k not in own and k != "folded"}
        if "block_args" in extra:
            extra = {"block_args": (arguments.get("block_args") or {}) | extra["block_args"]}
        return name, arguments | extra

    def graft_source(self, backbone: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The same of the network that weights are grafted from: for SE, the plain one.

        SE variants are built from timm's SE networks, but here SE is what is new.
        """
        name, arguments = self.stock_network(backbone, kwargs)
        return backbone if self.put is _se else name, arguments


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Its keyword-only parameters, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def on_branches(key: str, layer: Callable[..., nn.Module]) -> Put:
    """Put a module at the end of every residual branch, before the shortcut is added.

    Args:
        key: Name of the mechanism.
        layer: Called as ``layer(channels, device=, dtype=, **options)``; takes and returns B × C × H × W. A
            ``timm_attn.layers.ConstantGate`` folds.
    """
    options = [p for n, p in inspect.signature(layer).parameters.items() if n not in ("device", "dtype")][1:]
    options = [p for p in options if p.kind is not p.VAR_KEYWORD]

    def put(model: nn.Module, images: Any, **given: Any) -> None:
        constant = isinstance(layer, type) and issubclass(layer, ConstantGate)
        found = branches_taking_gates(model, images) if constant else branches_with_own_slots(model, images)
        try:
            ends = [(b, key, layer(b.channels, **given, **like(model))) for b in found]
        except (AssertionError, TypeError) as error:
            if key in MECHANISMS:
                raise
            raise ValueError(f"{key} cannot stand at the ends of branches: {error}") from None
        if key not in MECHANISMS:
            _check_maps(model, ends, images)
        stand(model, ends, GateEnd if constant else BranchEnd)

    keyword_only = [p.replace(kind=p.KEYWORD_ONLY) for p in options]
    put.__signature__ = inspect.Signature(keyword_only)  # pyright: ignore[reportFunctionMemberAccess]
    return put


def _check_maps(model: nn.Module, ends: Sequence[tuple[Branch, str, nn.Module]], images: Any) -> None:
    """Refuse layers of timm's that need other maps, which they would say when they run, or not at all."""
    dtype = like(model)["dtype"]
    tried = set()
    for branch, key, module in ends:
        size = map_size(branch.grid, branch.pixels - branch.prefix)
        kind = branch.channels, branch.pixels - branch.prefix, size
        if kind in tried:
            continue
        tried.add(kind)
        if size is None and reads_neighbours(module):
            raise ValueError(
                f"{key} reads neighbouring pixels, and the tokens of {type(model).__name__} are no map in "
                f"{branch.block}: choose another mechanism"
            )
        height, width = size or (branch.pixels - branch.prefix, 1)
        try:
            with torch.no_grad():
                x = torch.empty(1, branch.channels, height, width, device="meta", dtype=dtype)
                copied(module).to("meta").eval()(x)
        except Exception as error:
            raise ValueError(
                f"{key} does not take the maps of {type(model).__name__}, {height} × {width} in "
                f"{branch.block} with images {tuple(images.shape)} ({str(error) or type(error).__name__}): "
                "choose another mechanism, or attach it with images= of the size that you will use"
            ) from error


def _asr(
    model: nn.Module,
    images: Any,
    *,
    delta: int = 1,
    generator: str = "se",
    reduction: int | None = None,
    where: str = "branches",
) -> None:
    check_choice("ASR where", where, ("branches", "norms"))
    make = partial(ASR, delta=delta, generator=generator, reduction=reduction, **like(model))
    if where == "branches":
        ends = [(b, "asr", make(b.channels)) for b in branches_taking_gates(model, images)]
        return stand(model, ends, GateEnd)
    norms = norm_layers(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no norm layer with a weight for each channel")
    gates = [make(norm.weight.shape[0]) for norm in norms]
    for norm, gate in zip(norms, gates, strict=True):
        norm.asr, norm.gated_by = gate.train(norm.training), "asr"  # pyright: ignore
        norm.__class__ = mixed(GatedNorm, type(norm))


def _asr_stock(backbone: str, *, attention: Any = None) -> tuple[str, dict[str, Any]]:
    """The network with the attention on top, which stays when the gate is folded."""
    if attention is None:
        return backbone, {}
    spec = spec_of(backbone)
    if not takes_attention(backbone):
        raise ValueError(
            f"ASR has attention={attention!r} on top in blocks of timm's ResNet only, where there is no other"
        )
    if attention == "se":
        name = f"{backbone}_se" if spec.cifar else backbone.replace("resne", "seresne")
        if spec.cifar or timm.is_model(name):
            return name, {}
    return backbone, {"block_args": {"attn_layer": attention}}


def _asr_se_stock(backbone: str) -> tuple[str, dict[str, Any]]:
    return _asr_stock(backbone, attention="se")


def _dia(
    model: nn.Module,
    images: Any,
    *,
    reduction: int | None = None,
    dia_light: bool = False,
    norm: bool | None = None,
) -> None:
    check_flag("dia_light", dia_light)
    if dia_light and reduction is not None:
        raise ValueError(f"dia_light is a reduction of its own: leave out reduction={reduction}")
    if reduction is None:
        # The paper's 4 on CIFAR and 20 on ImageNet. "Light" is defined nowhere; 16 and 64 are this package's.
        light, full = (16, 4) if hasattr(model, "cifar_stem") else (64, 20)
        reduction = light if dia_light else full
    check_whole("DIA reduction", reduction)
    if norm is None:
        norm = isinstance(model, CifarResNetV2)  # where the authors' branches would end in a convolution
    check_flag("DIA norm", norm)
    found = branches_with_own_slots(model, images)
    if norm and any(branch.axis != 1 for branch in found):
        raise ValueError(f"DIA norm=True needs maps B × C × H × W, and {type(model).__name__} has others")
    made = [(run, DIACell(run[0].channels, reduction, **like(model))) for run in runs(found)]
    for run, cell in made:
        first = model.get_submodule(run[0].block)
        cell.train(first.training)
        key = free_name(first, "dia" + run[0].suffix)
        shared, home = DIARun(len(run)), None
        for step, branch in enumerate(run):
            block = model.get_submodule(branch.block)
            if norm:
                name = free_name(block, "dia_norm" + branch.suffix)
                setattr(
                    block,
                    name,
                    nn.BatchNorm2d(branch.channels, **like(model)).train(block.training),
                )
                branch = replace(branch, affine=(f"{name}.weight", f"{name}.bias"), attention="")
            end = DIAEnd(block, branch, key, None if home else cell, home, shared, step, norm)
            home = end.home
            place = nn.Sequential(NormEnd(block, end.norm), end) if norm else end
            setattr(block, branch.slot, place.train(block.training))
    gates_first(model)


def _conam(
    model: nn.Module,
    images: Any,
    *,
    grid: int | None = None,
    patch_size: int | Sequence[int] | None = None,
    reduction: int = 16,
    temperature: float | str = 1.0,
) -> None:
    stages = residual_blocks(model, "conam")
    sizes: dict[int, Any]
    if isinstance(patch_size, str) or not isinstance(patch_size, Sequence):
        sizes = dict.fromkeys(range(3), patch_size)  # stage 4 has none, as in the paper
    elif len(patch_size) == len(stages):
        for size in patch_size:
            check_whole("ConAM patch_size", size, least=0)
        if grid is not None:
            raise ValueError(f"ConAM takes grid or patch_size, got {grid=} and {patch_size=}")
        sizes = {stage: size for stage, size in enumerate(patch_size) if size}
    else:
        raise ValueError(f"patch_size needs one entry for each of {len(stages)} stages, got {patch_size}")
    places = []
    for stage, size in sizes.items():
        block = stages[stage][0]
        width = block.conv1.in_channels
        places.append((block, ConAM(width, grid, size, reduction, temperature, **like(model))))
    put_conam(model, places)


def _fmm(model: nn.Module, images: Any, *, mode: str = "bn", pin_bias: bool = False) -> None:
    put_fmm([block for stage in residual_blocks(model, "fmm") for block in stage], mode, pin_bias)


def _ssia(model: nn.Module, images: Any, *, target: str = "channel", aux_weight: float = 1.0) -> None:
    put_ssia(model, target, aux_weight)


def _plain(model: nn.Module, images: Any) -> None:
    """Nothing."""


def _se_stock(backbone: str) -> tuple[str, dict[str, Any]]:
    spec = spec_of(backbone)
    return f"{backbone}_se" if spec.cifar and spec.takes_attention else backbone, {}


def _se(model: nn.Module, images: Any) -> None:
    on_branches("se", paper_se if hasattr(model, "cifar_stem") else SEModule)(model, images)


def _fmm_name(backbone: str) -> str:
    return backbone.replace("resn", "fmmn") if "resn" in backbone else f"{backbone}_fmm"


def _cifar(backbone: Backbone) -> bool:  # timm has the others
    return backbone.cifar


def _resnet(backbone: Backbone) -> bool:
    return bool(backbone.layers)


MECHANISMS = {
    "": Mechanism(_plain, PAPERS["resnet"], name=str, graft="it is the stock network", on=_cifar),
    "se": Mechanism(_se, PAPERS["se"], stock=_se_stock, fuses=True, on=_cifar),
    "dia": Mechanism(_dia, PAPERS["dia"], fuses=True),
    "asr": Mechanism(_asr, PAPERS["asr"], stock=_asr_stock, folds=True),
    "asr_se": Mechanism(
        _asr, PAPERS["asr_se"], stock=_asr_se_stock, folds=True, on=lambda b: b.takes_attention
    ),
    "conam": Mechanism(_conam, PAPERS["conam"], fuses=True, resnets=True, on=_resnet),
    "fmm": Mechanism(
        _fmm,
        PAPERS["fmm"],
        name=_fmm_name,
        graft="a product of feature maps cannot represent the sum x + F(x)",
        fuses=True,
        resnets=True,
        on=_resnet,
    ),
    "ssia": Mechanism(_ssia, PAPERS["ssia"], folds=True),
    "sem": Mechanism(on_branches("sem", SEM), PAPERS["sem"], fuses=True),
    "spem": Mechanism(on_branches("spem", SPEM), PAPERS["spem"], fuses=True),
}


def mechanism(name: str) -> Mechanism:
    """A row of the table, or one for an attention layer that timm's ``create_attn`` knows by name.

    Raises:
        ValueError: There is none of this name.
    """
    if name in MECHANISMS:
        return MECHANISMS[name]
    try:
        layer = get_attn(name)
    except AssertionError:  # of timm
        layer = None
    if layer is None or not isinstance(name, str):
        known = ", ".join(filter(None, MECHANISMS))
        raise ValueError(
            f"no mechanism {name!r}: name one of {known}, or of timm's create_attn (eca, cbam …)"
        )
    constant = layer in (SEModule, EcaModule)
    reason = "" if constant else f"nobody has said how timm's {name} starts as a constant gate"
    return Mechanism(on_branches(name, layer), paper_of(name), graft=reason, of_timm=True)
