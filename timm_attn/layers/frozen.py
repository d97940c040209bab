"""A frozen gate that no layer could absorb."""

import torch
from torch import Tensor, nn


class FrozenGate(nn.Module):
    """Multiplies each channel of x by a constant.

    Args:
        channels: Width C of the feature map.
        axis: Axis of the channels: 1 for B × C × H × W, −1 for B × N × C or B × H × W × C.
    """

    gate: Tensor

    def __init__(self, channels: int, axis: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("gate", torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x."""
        gate = self.gate.to(x.dtype)  # under autocast
        return x * (gate[:, None, None] if self.axis == 1 else gate)
