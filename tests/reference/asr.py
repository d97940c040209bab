"""Reference for ASR, attention from a learned constant (arXiv 2304.06345), one scalar at a time."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


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


def spa_generator(psi: Tensor, params: dict[str, Tensor]) -> Tensor:
    """SE's formula on a pyramid of means: over the image, its quarters and its sixteenths.

    psi (1, C) is seen as an image of 4 x 4 equal pixels; ``fc1.weight`` is (m x 21 C).
    """
    image = psi[:, :, None, None].expand(-1, -1, 4, 4)
    return se_generator(torch.cat([adaptive_avg_pool2d(image, k).flatten(1) for k in (1, 2, 4)], 1), params)


def ie_generator(psi: Tensor, params: dict[str, Tensor]) -> Tensor:
    """v = sigmoid(weight psi + bias) channel by channel: psi (1, C), weight and bias (C,); v is (C,)."""
    (x,) = psi
    v = []
    for k, (w, b) in enumerate(zip(params["weight"].to(x.dtype), params["bias"].to(x.dtype), strict=True)):
        v.append(1 / (1 + torch.exp(-(w * x[k] + b))))
    assert len(v) == len(x)
    return torch.stack(v)


def eca_generator(psi: Tensor, params: dict[str, Tensor]) -> Tensor:
    """v = sigmoid(convolution of psi along its channels): psi (1, C), conv.weight (1, 1, k); v is (C,).

    k is odd; the convolution is a cross-correlation, without bias, with zeros beyond both ends.
    """
    (x,) = psi
    ((kernel,),) = params["conv.weight"].to(x.dtype)
    assert len(kernel) % 2 == 1
    v = []
    for k in range(len(x)):
        z = torch.zeros_like(x[0])
        for j, w in enumerate(kernel):
            neighbour = k + j - (len(kernel) - 1) // 2
            if 0 <= neighbour < len(x):
                z = z + w * x[neighbour]
        v.append(1 / (1 + torch.exp(-z)))
    return torch.stack(v)


def srm_generator(psi: Tensor, params: dict[str, Tensor]) -> Tensor:
    """v = sigmoid(weight_0 psi_0 + weight_1 psi_1): psi (1, C, 2), weight (C, 2); v is (C,)."""
    (x,) = psi
    v = []
    for (x0, x1), (w0, w1) in zip(x, params["weight"].to(x.dtype), strict=True):
        v.append(1 / (1 + torch.exp(-(w0 * x0 + w1 * x1))))
    return torch.stack(v)


def _generate(params: dict[str, Tensor]) -> Tensor:
    """v (C,) of the generator that the keys of ``params`` belong to."""
    if "fc1.weight" in params:
        pyramid = params["fc1.weight"].shape[1] == 21 * params["psi"].shape[1]
        return (spa_generator if pyramid else se_generator)(params["psi"], params)
    if "conv.weight" in params:
        return eca_generator(params["psi"], params)
    if "bias" in params:
        return ie_generator(params["psi"], params)
    if "weight" in params:
        return srm_generator(params["psi"], params)
    return params["psi"]  # a scale


def asr_gate(generators: list[dict[str, Tensor]]) -> Tensor:
    """The product of delta >= 1 generators on one layer (arXiv 2304.06345); the result is (C,).

    Every item holds its own ``psi`` next to the keys of its generator: ``fc1.weight`` marks SE or SPA,
    ``conv.weight`` ECA, ``weight`` with ``bias`` IE ``weight`` alone SRM, and nothing else a scale.
    """
    if not generators:
        raise ValueError("no generators")
    gate = _generate(generators[0])
    for params in generators[1:]:
        v = _generate(params)
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
