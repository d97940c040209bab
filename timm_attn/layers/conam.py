"""ConAM: weights each patch of a feature map by its agreement with the whole map (its confidence).

Paper: "ConAM: Confidence Attention Module for Convolutional Neural Networks", Xue, Yuan, Neri
https://arxiv.org/abs/2110.14369 (withdrawn from arXiv in March 2022; the code is published under Apache-2.0)

It is applied before the residual branch of the first block of stages 1 to 3; the shortcut gets the raw map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import eager
from .options import check_number, check_whole
from .pooling import channel_mean


def nearest_patch(pixels: int, patches: int, device: torch.device) -> Tensor:
    """Index of the patch whose centre is nearest to each pixel's along one side; halfway, the later one.

    floor((pixel + ½) patches / pixels) in whole numbers. ``F.interpolate`` rounds: mode "nearest" errs even
    where the grid divides, at 164 pixels say, "nearest-exact" halfway between two centres, and the
    TorchScript exporter to ONNX does not take the latter.
    """
    return torch.arange(1, 2 * pixels, 2, device=device) * patches // (2 * pixels)


def _membership(pixels: int, patches: int, x: Tensor) -> Tensor:
    """Patches × pixels of one side: 1 ÷ size of the patch where the pixel is in it, by adaptive pooling."""
    pixel, patch = torch.arange(pixels, device=x.device), torch.arange(patches, device=x.device)[:, None]
    inside = (pixel >= patch * pixels // patches) & (pixel < ((patch + 1) * pixels + patches - 1) // patches)
    weights = inside.to(x.dtype)
    return weights / weights.sum(1, keepdim=True)


def patch_means(x: Tensor, grid: int) -> Tensor:
    """Mean of each patch of a grid over x (B × C × H × W): B × C × grid × grid."""
    if torch.jit.is_tracing():  # ONNX has adaptive pooling only for maps whose size the exporter knows
        rows, columns = _membership(x.shape[2], grid, x), _membership(x.shape[3], grid, x)
        return rows @ x @ columns.T
    return F.adaptive_avg_pool2d(x, (grid, grid))


class ConAM(nn.Module):
    """One weight per patch, the same for all channels.

    With l_i the mean of patch i, g the mean of the map and one perceptron for both::

        z' = relu(fc2 relu(fc1 z))
        η  = softmax over the patches of ⟨l'_i, g'⟩ / temperature
        y  = x (1 + η of the pixel's patch)

    Args:
        channels: Width C of the feature map.
        grid: Number of patches along each side, 4 by default. If it does not divide the map, neighbouring
            patches overlap by a pixel, and each pixel gets the weight of the patch with the nearest centre.
        patch_size: Side of a patch in pixels, instead of ``grid``; it must divide the map.
        reduction: The hidden width of the perceptron is max(1, C // reduction). The paper gives no value.
        temperature: Divisor of the inner products, 1 in the paper; ``"sqrt"`` means √C.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of range, or both ``grid`` and ``patch_size`` are given.
    """

    def __init__(
        self,
        channels: int,
        grid: int | None = None,
        patch_size: int | None = None,
        reduction: int = 16,
        temperature: float | str = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        if grid is not None and patch_size is not None:
            raise ValueError(f"ConAM takes grid or patch_size, got grid={grid} and patch_size={patch_size}")
        for name, value in (("grid", grid), ("patch_size", patch_size), ("reduction", reduction)):
            if value is not None or name == "reduction":
                check_whole(f"ConAM {name}", value)
        scale: Any = channels**0.5 if temperature == "sqrt" else temperature
        check_number("ConAM temperature", scale, "a finite number above 0 or 'sqrt'")
        hidden = max(1, channels // reduction)
        self.grid = 4 if grid is None else grid
        self.patch_size = patch_size
        self.indivisible = f"ConAM patch_size {patch_size} must divide the map's "
        self.temperature = float(scale)
        self.fc1 = nn.Linear(channels, hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)

    def confidence(self, x: Tensor) -> Tensor:
        """η of every patch of x (B × C × H × W): B × rows × columns, summing to 1."""
        if self.patch_size is not None:
            # A tracer cannot branch on a size, but records an assertion.
            torch._assert(x.shape[2] % self.patch_size == 0, self.indivisible + "height: use grid")
            torch._assert(x.shape[3] % self.patch_size == 0, self.indivisible + "width: use grid")
            patches = F.avg_pool2d(x, self.patch_size)
        else:
            patches = patch_means(x, self.grid)
        means = torch.cat([patches.flatten(2), channel_mean(x)[:, :, None]], 2).transpose(1, 2)
        means = self.fc2(self.fc1(means).relu()).relu()
        # The sum over C channels may leave float16's range, and scores in bfloat16 are coarse.
        dtype = torch.promote_types(means.dtype, torch.float32)
        means = means.to(dtype)
        agreement = (means[:, :-1] * means[:, -1:]).sum(2) / self.temperature
        return agreement.softmax(1).to(x.dtype).view(-1, patches.shape[2], patches.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        """Weight the patches of x (B × C × H × W)."""
        scale = 1 + self.confidence(x)
        if eager(x) and x.shape[2] % scale.shape[1] == 0 and x.shape[3] % scale.shape[2] == 0:
            # The same there, in one pass.
            return x * F.interpolate(scale[:, None], x.shape[2:], mode="nearest-exact")
        rows = nearest_patch(x.shape[2], scale.shape[1], x.device)
        columns = nearest_patch(x.shape[3], scale.shape[2], x.device)
        return x * scale[:, rows[:, None], columns][:, None]
