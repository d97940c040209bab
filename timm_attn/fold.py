"""Trained form to deployed form: fold what folds, and prove it on the spot."""

from copy import deepcopy

import torch
from timm.utils import reparameterize_model  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

#: Greatest max|Δlogit| ÷ max|logit| that a fold may cause, by dtype. The half-precision bounds are a few
#: roundings of the network's own arithmetic: folding moves the rounding of γ · v from run time to fold time.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class FoldError(RuntimeError):
    """A folded model does not compute what the model it was made from computes."""


class NothingToFold(ValueError):
    """The model has no gate that folds."""


def _foldable(model: nn.Module) -> int:
    """Number of modules that are gone after folding."""
    return sum(hasattr(module, "fold_into") or hasattr(module, "fuse") for module in model.modules())


def fold(model: nn.Module, inputs: Tensor | None = None) -> nn.Module:
    """Fold every gate that does not depend on the input, and drop what acts in training only.

    Works on a copy, in eval mode, and compares the two on ``inputs``. timm's ``reparameterize_model``
    gives the same weights without the comparison.

    Args:
        model: A model with ASR gates (https://arxiv.org/abs/2304.06345) or SSIA heads
            (https://arxiv.org/abs/2206.07434). Left as it is.
        inputs: Images B × C × H × W in the model's dtype, for the comparison; by default two fixed random
            images of the size in ``model.pretrained_cfg``.

    Returns:
        The folded model in eval mode. Its state dict has the stock backbone's keys.

    Raises:
        NothingToFold: The model has no gate that folds.
        FoldError: max|Δlogit| ÷ max|logit| is above :data:`BOUNDS` or not finite.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("a model on the meta device has no weights to fold")
    gates = _foldable(model)
    if not gates:
        name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        raise NothingToFold(
            f"nothing to fold in {name}: it has no gate that is independent of the image, and nothing that "
            "acts in training only. ASR and SSIA fold; what DIA, ConAM, FMM and SE do depends on the image"
        )
    original = deepcopy(model).eval()
    folded = reparameterize_model(original)
    left = _foldable(folded)
    if left:
        raise FoldError(f"{left} of {gates} gates stand where no block folds them")
    inputs = example_input(model) if inputs is None else inputs
    # On the CPU: GPUs round fp32 convolutions to TF32, by more than the bound.
    error = relative_difference(original.cpu(), deepcopy(folded).cpu(), inputs.cpu())
    bound = BOUNDS[next(model.parameters()).dtype]
    if not error <= bound:  # also true of NaN
        raise FoldError(
            f"folding changed the output: max|Δlogit| / max|logit| = {error:.3g}, allowed {bound:g}"
        )
    return folded


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
    """max|Δlogit| ÷ max|logit| of two models in eval mode on the same images."""
    a, b = model.eval()(inputs), other.eval()(inputs)
    if not torch.is_tensor(a):
        raise ValueError(f"the output must be one tensor, got {type(a).__name__}: give the model itself")
    difference = (a.double() - b.double()).abs().max().item()
    return difference / a.double().abs().max().item() if difference else 0.0
