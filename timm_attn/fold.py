"""Trained form to deployed form: fold what folds, and prove it on the spot."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import reparameterize_model, unwrap_model  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .models import MECHANISMS, model_names, parse_name
from .models.deployed import fuse_conv_norms, separate_norms

#: Greatest max|Δlogit| ÷ max|logit| that a fold may cause, by dtype. The half-precision bounds are a few
#: roundings of the network's own arithmetic: folding moves the rounding of γ · v from run time to fold time.
#: FMMNets multiply roundings: random ones of 50 layers differ from themselves in float64 by up to 4e-5 in
#: float32, and from their fused form as much (3e-12 in float64). `fold` refuses those, in float32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class FoldError(RuntimeError):
    """A folded model does not compute what the model it was made from computes."""


class NothingToFold(ValueError):
    """The model has nothing that folds."""


@dataclass(frozen=True)
class FoldReport:
    """What folding did. Pairs are before and after.

    Attributes:
        max_absolute: max|Δlogit|.
        max_relative: max|Δlogit| ÷ max|logit|.
        top1_agreement: Share of the images to which both give the same class, in %.
        images: Number of images compared.
        parameters: Number of parameters.
        multiply_adds: Of convolutions and matrix products, for one image.
        bytes: Of parameters and persistent buffers.
        separate_norms: Paths of batch norms that stay, as no convolution can take them in.
    """

    max_absolute: float
    max_relative: float
    top1_agreement: float
    images: int
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    bytes: tuple[int, int]
    separate_norms: tuple[str, ...]


def fold(model: nn.Module, inputs: Tensor | None = None) -> nn.Module:
    """Make the deployed form of a model of this package, and compare the two.

    Gates that do not depend on the image go into the norm layer before them (ASR), and what acts in
    training only goes (SSIA): the stock network is left. Where the mechanism depends on the image (DIA,
    ConAM, FMM, SE) it stays, and batch norms are fused into the convolutions before them; that form is
    built by ``timm.create_model(..., folded=True)``.

    Works on a copy, in eval mode. Compares the two on fixed random images and on ``inputs``.

    Args:
        model: Left as it is.
        inputs: Images B × C × H × W in the model's dtype, compared besides two fixed random images of the
            size in ``model.pretrained_cfg``.

    Returns:
        The folded model in eval mode.

    Raises:
        NothingToFold: The model is a plain network, or folded already.
        ValueError: ``inputs`` are no images, or of another dtype than the model.
        FoldError: max|Δlogit| ÷ max|logit| is above :data:`BOUNDS`, or logits are not finite.
    """
    original, folded = _fold(model)
    if inputs is not None:
        _check_images(model, inputs)
    for images in (example_input(original), inputs):
        if images is None:
            continue
        error = relative_difference(original, folded, images.cpu())
        excess = above_bound(error, images.dtype)
        if excess:
            hint = "" if images.dtype == torch.float64 else " (fold model.double() if it is rounding)"
            raise FoldError(f"folding changed the output: {excess}{hint}")
    return folded.to(next(model.parameters()).device)


def above_bound(error: float, dtype: torch.dtype) -> str:
    """What to say of a max|Δlogit| ÷ max|logit| that is above :data:`BOUNDS` or NaN, or ''."""
    if error <= BOUNDS[dtype]:
        return ""
    return f"max|Δlogit| / max|logit| = {error:.3g}, allowed {BOUNDS[dtype]:g}"


def _fold(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of a model in eval mode, as it is and folded.

    On the CPU: Apple's GPUs have no float64, and others round fp32 convolutions to TF32, by more than the
    bound.
    """
    model = unwrap_model(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("a model on the meta device has no weights to fold")
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    gates = _foldable(model)
    original: Any = deepcopy(model).cpu().eval()
    if gates:
        folded: Any = reparameterize_model(original)
        left = _foldable(folded)
        if left:
            raise FoldError(f"{left} of {gates} gates stand where no block folds them")
        if name in model_names() and hasattr(original, "_model_args"):  # saved, it is the stock network
            backbone, key = parse_name(name)
            stock, folded._model_args = MECHANISMS[key].stock_network(backbone, original._model_args)
            cfg = {**original.pretrained_cfg, "architecture": stock, "tag": None}
            folded.pretrained_cfg = folded.default_cfg = cfg
        return original, folded
    folded = deepcopy(original)
    if name in model_names() and MECHANISMS[parse_name(name)[1]].fuses and fuse_conv_norms(folded):
        if hasattr(folded, "_model_args"):
            folded._model_args = {**folded._model_args, "folded": True}
        return original, folded
    raise NothingToFold(
        f"nothing to fold in {name}: it has no gate that is independent of the image, nothing that acts in "
        "training only, and no attention whose network has norms left to fuse"
    )


def _foldable(model: nn.Module) -> int:
    """Number of modules that are gone after folding."""
    return sum(hasattr(module, "fold_into") or hasattr(module, "fuse") for module in model.modules())


@torch.no_grad()
def verify_fold(model: nn.Module, folded: nn.Module, inputs: Tensor) -> FoldReport:
    """Compare a model and its folded form in eval mode.

    Args:
        model: The model before folding.
        folded: After.
        inputs: Images B × C × H × W in the models' dtype and on their device.

    Raises:
        ValueError: ``inputs`` are no images, or of another dtype than the models.
        FoldError: The logits of ``model`` are not finite.
    """
    model, folded = unwrap_model(model), unwrap_model(folded)
    for m in (model, folded):
        _check_images(m, inputs)
    modes = {module: module.training for m in (model, folded) for module in m.modules()}
    try:
        a, b = _finite(_logits(model, inputs)), _logits(folded, inputs)
        costs = [_costs(m, inputs[:1]) for m in (model, folded)]
    finally:
        for module, mode in modes.items():
            module.training = mode
    parameters, multiply_adds, size = zip(*costs, strict=True)
    difference = (a - b).abs().max().item()
    return FoldReport(
        max_absolute=difference,
        max_relative=difference / a.abs().max().item() if difference else 0.0,
        top1_agreement=100 * (a.argmax(1) == b.argmax(1)).double().mean().item(),
        images=len(inputs),
        parameters=parameters,
        multiply_adds=multiply_adds,
        bytes=size,
        separate_norms=tuple(separate_norms(folded)),
    )


def _check_images(model: nn.Module, images: Any) -> None:
    dtype = next(model.parameters()).dtype
    if not torch.is_tensor(images) or images.dtype != dtype or images.ndim != 4 or not len(images):
        shape = (
            f"{tuple(images.shape)} of {images.dtype}" if torch.is_tensor(images) else type(images).__name__
        )
        raise ValueError(f"inputs must be one image or more, B × C × H × W of {dtype}, got {shape}")


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    logits = model.eval()(inputs)
    if not torch.is_tensor(logits):
        raise ValueError(f"the output must be one tensor, got {type(logits).__name__}: give the model itself")
    return logits.cpu().double()


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise FoldError(
            "the model's own output is not finite: its weights or the images hold NaN or infinity"
        )
    return logits


def _costs(model: nn.Module, image: Tensor) -> tuple[int, int, int]:
    """Parameters, multiply-adds for one image, bytes."""
    with FlopCounterMode(display=False) as counter:
        model(image)
    tensors: Any = model.state_dict().values()
    return (
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() // 2,
        sum(t.numel() * t.element_size() for t in tensors),
    )


def example_input(model: nn.Module, batch_size: int = 2) -> Tensor:
    """Fixed standard normal images for a timm model, on its device and in its dtype."""
    parameter = next(model.parameters())
    channels, height, width = getattr(model, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)
    channels = getattr(model, "in_chans", channels)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, channels, height, width, generator=generator)
    return images.to(parameter.device, parameter.dtype)


@torch.no_grad()
def relative_difference(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """max|Δlogit| ÷ max|logit| of two models, which are put in eval mode, on the same images.

    Raises:
        FoldError: The first model's logits are not finite.
    """
    a, b = _finite(_logits(model, inputs)), _logits(other, inputs)
    difference = (a - b).abs().max().item()
    return difference / a.abs().max().item() if difference else 0.0
