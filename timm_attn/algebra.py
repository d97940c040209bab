"""The maths of folding and grafting: pure functions on tensors and state dicts, without modules.

Everything is computed in float64 and rounded once to the dtype that came in.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def scale_affine(weight: Tensor, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a constant channel gate into the affine end of a norm layer.

    gate · (weight · x̂ + bias) = (gate · weight) · x̂ + gate · bias, so running statistics stay as they are.

    Args:
        weight: γ of the norm layer, shape (C,).
        bias: β of the norm layer, shape (C,).
        gate: Gate values, shape (C,).
    """
    v = gate.to(weight.device).double()
    return (weight.double() * v).to(weight.dtype), (bias.double() * v).to(bias.dtype)


def fuse_conv_norm(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes a convolution and the batch norm after it (eval mode).

    γ (w ∗ x + b − μ) / √(σ² + ε) + β = (s w) ∗ x + β + s (b − μ) with s = γ / √(σ² + ε).

    Args:
        conv_weight: Shape (C, C_in / groups, K, K).
        conv_bias: Shape (C,), or None.
        mean: Running mean μ, shape (C,).
        var: Running variance σ², shape (C,).
        eps: ε of the batch norm.
        weight: γ, shape (C,).
        bias: β, shape (C,).
    """
    scale = weight.double() / (var.double() + eps).sqrt()
    shift = -mean.double() if conv_bias is None else conv_bias.double() - mean.double()
    fused = conv_weight.double() * scale[:, None, None, None]
    return fused.to(conv_weight.dtype), (bias.double() + scale * shift).to(conv_weight.dtype)


def graft_gate(state: dict[str, Tensor], norm: str, gate: Tensor) -> dict[str, Tensor]:
    """Divide the affine of a norm layer by the gate that will stand after it.

    Args:
        state: A state dict; left as it is.
        norm: Path of the norm layer.
        gate: Constant gate, shape (C,) or a scalar, nowhere 0.
    """
    weight, bias = state[f"{norm}.weight"], state[f"{norm}.bias"]
    scaled = scale_affine(weight, bias, 1 / gate.double())
    return {**state, f"{norm}.weight": scaled[0], f"{norm}.bias": scaled[1]}


def graft_dia(state: dict[str, Tensor], cell: str, norms: Iterable[str]) -> dict[str, Tensor]:
    """A DIA cell whose gate is ¼ everywhere: its last layers are 0, so i = f = o = ½, u = 0 and c stays 0.

    Args:
        state: A state dict with the cell's values; left as it is.
        cell: Path of the cell.
        norms: Paths of the last norm layers of the stage's blocks, which are multiplied by 4.
    """
    last = [f"{cell}.{layer}.{name}" for layer in ("x_expand", "h_expand") for name in ("weight", "bias")]
    state = {**state, **{key: torch.zeros_like(state[key]) for key in last}}
    for norm in norms:
        state = graft_gate(state, norm, torch.tensor(0.25))
    return state


def graft_conam(state: dict[str, Tensor], layer: str, conv: str, patches: int) -> dict[str, Tensor]:
    """A ConAM whose patches all look alike, so that each has confidence 1 / patches.

    fc2 gives the same vector c · 1 whatever comes in, with c = 1 / √C above zero so that gradients pass the
    ReLU. The convolution after it is divided by 1 + 1 / patches.

    Args:
        state: A state dict with the layer's values; left as it is.
        layer: Path of the ConAM.
        conv: Path of the first convolution of the branch.
        patches: Number of patches.
    """
    weight, bias = f"{layer}.fc2.weight", f"{layer}.fc2.bias"
    kernel = state[f"{conv}.weight"]
    return {
        **state,
        weight: torch.zeros_like(state[weight]),
        bias: torch.full_like(state[bias], state[bias].shape[0] ** -0.5),
        f"{conv}.weight": (kernel.double() / (1 + 1 / patches)).to(kernel.dtype),
    }
