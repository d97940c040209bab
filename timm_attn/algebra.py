"""The maths of fusing norms: a pure function on tensors.

Everything is computed in float64 and rounded once to the dtype that came in.
"""

from torch import Tensor


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
