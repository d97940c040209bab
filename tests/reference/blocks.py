"""Reference for the stock parts of a residual block, from a flat state dict."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def batchnorm(state: dict[str, Tensor], name: str, x: Tensor, train: bool = False) -> Tensor:
    """Batch norm on (B, C, H, W) with the running statistics, or with the batch's own if ``train``."""
    if train:
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)  # biased
    else:
        mean = state[f"{name}.running_mean"][None, :, None, None]
        var = state[f"{name}.running_var"][None, :, None, None]
    weight = state[f"{name}.weight"][None, :, None, None]
    bias = state[f"{name}.bias"][None, :, None, None]
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def branch(
    state: dict[str, Tensor],
    name: str,
    x: Tensor,
    block: str,
    stride: int,
    groups: int,
    train: bool = False,
    last_norm: bool = True,
) -> Tensor:
    """The residual branch of the block ``name``, with or without its last batch norm: (B, C, H, W)."""
    if block == "basic":
        x = conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        x = relu(batchnorm(state, f"{name}.bn1", x, train))
        x = conv2d(x, state[f"{name}.conv2.weight"], padding=1)
        return batchnorm(state, f"{name}.bn2", x, train) if last_norm else x
    if block == "bottleneck":
        x = conv2d(x, state[f"{name}.conv1.weight"])
        x = relu(batchnorm(state, f"{name}.bn1", x, train))
        x = conv2d(x, state[f"{name}.conv2.weight"], stride=stride, padding=1, groups=groups)
        x = relu(batchnorm(state, f"{name}.bn2", x, train))
        x = conv2d(x, state[f"{name}.conv3.weight"])
        return batchnorm(state, f"{name}.bn3", x, train) if last_norm else x
    raise ValueError(f"unknown block {block!r}")


def shortcut(state: dict[str, Tensor], name: str, x: Tensor, stride: int, train: bool = False) -> Tensor:
    """x itself, or its 1x1 convolution and batch norm where the block has a downsample."""
    if f"{name}.downsample.0.weight" not in state:
        return x
    x = conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
    return batchnorm(state, f"{name}.downsample.1", x, train)


def se_gate(state: dict[str, Tensor], name: str, f: Tensor) -> Tensor:
    """sigmoid(fc2 ReLU(fc1 GAP(f))) with 1x1 convolutions: (B, C, H, W) to (B, C)."""
    z = f.mean(dim=(2, 3), keepdim=True)
    z = relu(conv2d(z, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    z = conv2d(z, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])
    return (1 / (1 + torch.exp(-z)))[:, :, 0, 0]
