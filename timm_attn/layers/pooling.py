"""The mean over pixels, with a fast backward pass for channels-last memory."""

from typing import Any

import torch
from torch import Tensor

from .eager import eager


class _ChannelMean(torch.autograd.Function):
    """Mean whose gradient has the memory format of a channels-last map; PyTorch's own has not.

    The gradient is added to that of the map, which is used again. Adding two memory formats takes longer than
    the mean itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.mean((2, 3), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        height, width = ctx.shape[2:]
        grad = (grads[0] / (height * width)).to(ctx.dtype)[:, :, None, None]
        # One row of the map, in memory: with whole rows, not pixels, to add, the loop over them is long.
        row = grad.expand(-1, -1, 1, width).contiguous(memory_format=torch.channels_last)
        return row.expand(ctx.shape), None


def channel_mean(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of a feature map (B × C × H × W) over its pixels: B × C, in ``dtype`` or that of the map."""
    if eager(x):
        if x.requires_grad and not x.is_contiguous():
            return _ChannelMean.apply(x, dtype or x.dtype)  # pyright: ignore[reportReturnType]
        return x.mean((2, 3), dtype=dtype)
    # A graph may be quantised, and quantised maps of one pixel have no mean without keepdim.
    return x.mean((2, 3), keepdim=True, dtype=dtype).flatten(1)
