"""The maths of folding: pure functions on tensors, without modules or state."""

from torch import Tensor


def scale_affine(weight: Tensor, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a constant channel gate into the affine end of a norm layer.

    gate · (weight · x̂ + bias) = (gate · weight) · x̂ + gate · bias, so running statistics stay as they are.
    Computed in float64 and rounded once to the dtype of ``weight``.

    Args:
        weight: γ of the norm layer, shape (C,).
        bias: β of the norm layer, shape (C,).
        gate: Gate values, shape (C,).
    """
    v = gate.double()
    return (weight.double() * v).to(weight.dtype), (bias.double() * v).to(bias.dtype)
