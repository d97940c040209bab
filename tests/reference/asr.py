"""Reference for ASR, attention from a learned constant (arXiv 2304.06345), one scalar at a time."""

import torch
from torch import Tensor


def se_generator(psi: Tensor, params: dict[str, Tensor]) -> Tensor:
    """v = sigmoid(W2 ReLU(W1 psi + b1) + b2) (arXiv 2304.06345) with values in (0, 1).

    psi is (1, C); ``params`` holds ``fc1.{weight,bias}`` (m x C, m) and ``fc2.{weight,bias}``
    (C x m, C). The result is (C,).
    """
    (x,) = psi  # exactly one row: psi belongs to the layer, not to the images of a batch

    hidden = []
    for row, bias in zip(params["fc1.weight"].to(x.dtype), params["fc1.bias"].to(x.dtype), strict=True):
        z = torch.dot(row, x) + bias
        hidden.append(z if z > 0 else torch.zeros_like(z))
    hidden = torch.stack(hidden)

    v = []
    for row, bias in zip(params["fc2.weight"].to(x.dtype), params["fc2.bias"].to(x.dtype), strict=True):
        z = torch.dot(row, hidden) + bias
        v.append(1 / (1 + torch.exp(-z)))
    return torch.stack(v)


def asr_gate(generators: list[dict[str, Tensor]]) -> Tensor:
    """The product of delta >= 1 generators on one layer (arXiv 2304.06345); the result is (C,).

    Every item holds its own ``psi`` (1, C) next to the keys that :func:`se_generator` reads.
    """
    if not generators:
        raise ValueError("no generators")
    gate = se_generator(generators[0]["psi"], generators[0])
    for params in generators[1:]:
        v = se_generator(params["psi"], params)
        gate = torch.stack([gate[k] * v[k] for k in range(gate.shape[0])])
    return gate


def fold_batchnorm(weight: Tensor, bias: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The affine (weight', bias'), each (C,), of the plain batch norm that replaces v * BN(x).

    weight, bias and v are (C,); the running statistics do not change (arXiv 2304.06345).
    """
    new_weight, new_bias = [], []
    for gamma, beta, scale in zip(weight, bias, v, strict=True):
        new_weight.append(gamma * scale)
        new_bias.append(beta * scale)
    return torch.stack(new_weight), torch.stack(new_bias)
