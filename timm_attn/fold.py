"""Folds trained networks for inference, and compares the result with the original."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .branches import branches, copied, evaluating, example_input
from .compare import FoldError, Inputs, above_bound, call, compared, relative, relative_difference, unwrapped
from .ends import scale, tensor_at, without_mixin
from .layers import SSIA, ConstantGate
from .merging import fuse_ends
from .models import mechanism as row_of
from .models import model_names, parse_name
from .models.deployed import conv_norm_pairs, fuse_conv_norms, separate_norms
from .models.ssia import SSIANetwork


class NothingToFold(ValueError):
    """The model has nothing to fold."""


@dataclass(frozen=True)
class FoldReport:
    """Differences and costs of a model before and after folding; pairs are (before, after).

    With several outputs, the largest differences are reported.

    Attributes:
        max_absolute: max|Δlogit|.
        max_relative: max|Δlogit| ÷ max|logit|.
        top1_agreement: Images with the same predicted class, in %; NaN if the output is not logits,
            B × classes.
        images: Number of images compared.
        parameters: Number of parameters.
        multiply_adds: Multiply-adds of convolutions and matrix products, for one image.
        bytes: Size of parameters and persistent buffers, in bytes.
        separate_norms: Paths of batch norms that stay, as there is no convolution to fuse them into.
    """

    max_absolute: float
    max_relative: float
    top1_agreement: float
    images: int
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    bytes: tuple[int, int]
    separate_norms: tuple[str, ...]


def fold(model: nn.Module, inputs: Inputs | None = None, layer_scale: bool = False) -> nn.Module:
    """Fold a model of this package, or one that contains such a model, and compare it with the original.

    Gates that do not depend on the image (ASR) are multiplied into the layer before them, and mechanisms that
    act in training only (SSIA) are removed: the result is the stock network. A mechanism that depends on the
    image (DIA, ConAM, FMM, SE) stays; in ResNets made by a name with it, batch norms are fused into the
    convolutions before them. ``timm.create_model(..., folded=True)`` builds that form.

    Folding works on a copy, in eval mode. All outputs of the copy and the original (also in lists of feature
    maps, dictionaries and dataclasses) are compared, on fixed random images and on ``inputs``.

    Args:
        model: Left unchanged. Networks of this package may be anywhere in it.
        inputs: Images B × C × H × W in the model's dtype, or a tuple or dictionary of the model's arguments;
            the outputs are compared on them, too. Needed only if the model does not take the two fixed random
            images, which have the size in ``pretrained_cfg``.
        layer_scale: Also multiply LayerScales (https://arxiv.org/abs/2103.17239), of ConvNeXt and DeiT-3 for
            example, into the layers before them. The result is the network that timm makes with
            ``ls_init_value=None`` or ``init_values=None``.

    Returns:
        The folded model in eval mode.

    Raises:
        NothingToFold: The model has nothing to fold, or is already folded.
        ValueError: ``inputs`` are not images, differ from the model in dtype, or are missing; the output
            contains no tensor; or the model cannot be copied, as it is pruned by hooks.
        FoldError: max|Δlogit| ÷ max|logit| is above ``timm_attn.compare.BOUNDS``, or an output is not finite.
    """
    if inputs is not None:
        _check_inputs(model, inputs)
    original, folded = _fold(model, layer_scale, inputs)
    inputs = tree_map_only(Tensor, Tensor.cpu, inputs)
    dtype = _dtype(original)
    for given in (_example_that_runs(original, inputs is None), inputs):
        if given is None:
            continue
        error = relative_difference(original, folded, given)
        excess = above_bound(error, dtype)
        if excess:
            hint = "" if dtype == torch.float64 else " (fold model.double() if it is rounding)"
            raise FoldError(f"folding changed the output: {excess}{hint}")
    return folded.to(next(model.parameters()).device)


def _fold(
    model: nn.Module, layer_scale: bool = False, inputs: Inputs | None = None
) -> tuple[nn.Module, nn.Module]:
    """Copies of a model in eval mode, as it is and folded.

    On the CPU: Apple's GPUs have no float64, and others round fp32 convolutions to TF32, by more than the
    bound.
    """
    model = unwrapped(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("a model on the meta device has no weights to fold")
    gates = foldable(model)
    original: Any = copied(model).cpu().eval()
    folded: Any = fuse_gates(deepcopy(original))
    left = foldable(folded)
    if left:
        raise FoldError(f"{left} of {gates} gates stand where no branch takes them in")
    changed = gates
    if layer_scale:
        given = _example_that_runs(folded, needed=True) if inputs is None else inputs
        device = _device(folded)
        changed += fuse_layer_scales(folded, tree_map_only(Tensor, lambda t: t.to(device), given))
    for path, network in _networks(folded).items():
        backbone, key = parse_name(network.pretrained_cfg["architecture"])
        mechanism, was = row_of(key), original.get_submodule(path)
        if mechanism.folds and foldable(was):  # saved, it is the stock network
            stock, arguments = mechanism.stock_network(backbone, getattr(was, "_model_args", {}))
            cfg = {**was.pretrained_cfg, "architecture": stock, "tag": None}
            network.pretrained_cfg = network.default_cfg = cfg
        elif mechanism.fuses and conv_norm_pairs(was):
            changed += fuse_conv_norms(network)  # of networks in one another, the outer has fused them
            arguments = {**getattr(was, "_model_args", {}), "folded": True}
        else:
            continue
        if hasattr(was, "_model_args"):
            network._model_args = arguments
    if not changed:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        raise NothingToFold(
            f"nothing to fold in {cfg.get('architecture') or type(model).__name__}: it has no gate that is "
            "independent of the image and nothing that acts in training only. Norms are fused in ResNets "
            "made by a name with attention, as by timm_attn.create_model('resnet50', attention='dia')"
        )
    return original, folded


def fuse_layer_scales(model: nn.Module, images: Inputs) -> int:
    """Multiply every LayerScale that ends a residual branch into the layer before it, in place.

    Returns the number of those.
    """
    count = 0
    for branch in branches(model, images):
        if branch.calls > 1:
            continue
        block: Any = model.get_submodule(branch.block)
        path, _, name = branch.affine[0].rpartition(".") if len(branch.affine) == 1 else ("", "", "")
        if not branch.scaled or name not in _LAYER_SCALES:
            continue
        scale(block, branch.scaled, tensor_at(block, branch.affine[0]), branch.channels)
        if path:
            parent, _, child = path.rpartition(".")
            setattr(block.get_submodule(parent), child, nn.Identity())
        else:
            setattr(block, name, None)
        count += 1
    return count


#: What timm calls a LayerScale: a module's gamma, or a parameter of the block, which may be None.
_LAYER_SCALES = ("gamma", "gamma_1", "gamma_2")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _networks(model: nn.Module) -> dict[str, Any]:
    """The networks of this package in a model, by path; of those in one another, each."""
    networks = {}
    for path, module in model.named_modules():
        cfg = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg, dict) and cfg.get("architecture") in model_names():
            networks[path] = module
    return networks


def foldable(model: nn.Module) -> int:
    """Number of modules that folding removes."""
    return sum(isinstance(module, ConstantGate | SSIA) for module in model.modules())


def fuse_gates(model: nn.Module) -> nn.Module:
    """Multiply every gate that does not depend on the image into the parameters before it, in place.

    Mechanisms that act in training only are removed. Returns the model, which may be another module.

    Raises:
        FoldError: There are no parameters to multiply one of the gates into.
    """
    for module in list(model.modules()):
        if isinstance(module, SSIANetwork):
            del module.ssia  # pyright: ignore[reportAttributeAccessIssue]
            without_mixin(module)
    try:
        fuse_ends(model)
    except ValueError as error:
        raise FoldError(str(error)) from None
    return model


@torch.no_grad()
def verify_fold(model: nn.Module, folded: nn.Module, inputs: Inputs) -> FoldReport:
    """Compare a model and its folded form in eval mode.

    Args:
        model: The model before folding.
        folded: The model after folding.
        inputs: Images B × C × H × W in the models' dtype and on their device, or a tuple or dictionary of
            the models' arguments, whose tensors all have B rows.

    Raises:
        ValueError: ``inputs`` are not images, or differ from the models in dtype; or the output contains no
            tensor.
        FoldError: An output of ``model`` is not finite, or the outputs of ``folded`` have other shapes.
    """
    model, folded = unwrapped(model), unwrapped(folded)
    for m in (model, folded):
        _check_inputs(m, inputs)
    with evaluating(model), evaluating(folded):
        pairs = compared(model, folded, inputs)
        costs = [_costs(m, tree_map_only(Tensor, lambda t: t[:1], inputs)) for m in (model, folded)]
    parameters, multiply_adds, size = zip(*costs, strict=True)
    (a, b), *others = pairs
    same = (a.argmax(1) == b.argmax(1)).double().mean().item() if a.ndim == 2 and not others else torch.nan
    return FoldReport(
        max_absolute=max((a - b).abs().max().item() for a, b in pairs),
        max_relative=max(relative(a, b) for a, b in pairs),
        top1_agreement=100 * same,
        images=len(next(leaf for leaf in tree_leaves(inputs) if torch.is_tensor(leaf))),
        parameters=parameters,
        multiply_adds=multiply_adds,
        bytes=size,
        separate_norms=tuple(separate_norms(folded)),
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _check_inputs(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, tuple | dict) and any(map(torch.is_tensor, tree_leaves(inputs))):
        return
    dtype = _dtype(model)
    if not torch.is_tensor(inputs) or inputs.dtype != dtype or inputs.ndim != 4 or not len(inputs):
        shape = (
            f"{tuple(inputs.shape)} of {inputs.dtype}" if torch.is_tensor(inputs) else type(inputs).__name__
        )
        raise ValueError(
            f"inputs must be one image or more, B × C × H × W of {dtype}, or a tuple or dictionary of the "
            f"model's arguments, got {shape}"
        )


def _costs(model: nn.Module, image: Inputs) -> tuple[int, int, int]:
    """Parameters, multiply-adds for one image, bytes."""
    with FlopCounterMode(display=False) as counter:
        call(model, image)
    tensors: Any = model.state_dict().values()
    return (
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() // 2,
        sum(t.numel() * t.element_size() for t in tensors),
    )


@torch.no_grad()
def _example_that_runs(model: nn.Module, needed: bool) -> Tensor | None:
    """Example images, or None if the model does not take them and they are not needed.

    Raises:
        ValueError: They are needed.
    """
    images = example_input(model)
    try:
        model(images)
    except Exception as error:  # whatever a model raises on images that it was not made for
        if needed:
            raise ValueError(
                f"{type(model).__name__} does not take images {tuple(images.shape)} "
                f"({type(error).__name__}: {error}): give what it takes as inputs=, a tensor, a tuple or a "
                "dictionary of arguments"
            ) from error
        return None
    return images
