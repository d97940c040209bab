"""Reference for ConAM, attention to patches by their context (arXiv 2110.14369), one patch at a time."""

import torch
from torch import Tensor

from .blocks import relu


def regions(size: int, parts: int) -> list[tuple[int, int]]:
    """(start, end), end excluded, of ``parts`` regions along ``size`` pixels.

    Equal tiles where ``parts`` divides ``size``; otherwise the regions may overlap.
    """
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def _perceptron(z: Tensor, params: dict[str, Tensor]) -> Tensor:
    """ReLU(W2 ReLU(W1 z + b1) + b2) for one vector: (C,) to (C,)."""
    for layer in ("fc1", "fc2"):
        out = []
        weights, biases = params[f"{layer}.weight"].to(z.dtype), params[f"{layer}.bias"].to(z.dtype)
        for row, bias in zip(weights, biases, strict=True):
            out.append(relu(torch.dot(row, z) + bias))
        z = torch.stack(out)
    return z


def conam_eta(
    x: Tensor, params: dict[str, Tensor], rows: int, cols: int, temperature: float | Tensor = 1.0
) -> Tensor:
    """The weights of the patches (arXiv 2110.14369): (B, C, H, W) to (B, rows * cols), row-major.

    With l_i the mean over patch i, g the mean over the image, and l_i', g' what the perceptron in
    ``params`` (``fc1.{weight,bias}``: h x C, h; ``fc2.{weight,bias}``: C x h, C) makes of them:

        a_i = <l_i', g'> / temperature,    eta = softmax of a over the patches
    """
    _, _, height, width = x.shape
    eta = []
    for image in x:
        g = _perceptron(image.mean(dim=(1, 2)), params)
        a = []
        for top, bottom in regions(height, rows):
            for left, right in regions(width, cols):
                patch = image[:, top:bottom, left:right]
                a.append(torch.dot(_perceptron(patch.mean(dim=(1, 2)), params), g) / temperature)
        largest = max(value.item() for value in a)
        exps = [torch.exp(value - largest) for value in a]
        total = sum(exps[1:], start=exps[0])
        eta.append(torch.stack([value / total for value in exps]))
    return torch.stack(eta)


def conam(
    x: Tensor, params: dict[str, Tensor], rows: int, cols: int, temperature: float | Tensor = 1.0
) -> Tensor:
    """x * (1 + eta of the patch of each pixel) (arXiv 2110.14369): (B, C, H, W) to the same.

    Pixel (y, x) takes the weight of the patch that its centre lies in:
    (floor((y + 1/2) * rows / H), floor((x + 1/2) * cols / W)).
    """
    _, _, height, width = x.shape
    eta = conam_eta(x, params, rows, cols, temperature)
    out = []
    for i in range(height):
        row = (2 * i + 1) * rows // (2 * height)
        weights = [1 + eta[:, row * cols + (2 * j + 1) * cols // (2 * width)] for j in range(width)]
        out.append(x[:, :, i] * torch.stack(weights, dim=1)[:, None, :])
    return torch.stack(out, dim=2)
