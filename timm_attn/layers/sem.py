"""SEM: three channel attentions, weighted by a learned switch.

Paper: "Switchable Self-attention Module", Zhong, Wen, Qin https://arxiv.org/abs/2209.05680. The formula is
that of the authors' code (https://github.com/Qrange-group/SEM, MIT).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .options import check_whole
from .pooling import channel_mean


class SEM(nn.Module):
    """x · σ(w₁ a₁) · σ(w₂ a₂) · σ(w₃ a₃), each B × C, with g the channel means of x::

        w  = σ(switch g)                  three numbers per image
        a₁ = fc2 relu(fc1 g)              as in SE
        a₂ = conv g                       as in ECA
        a₃ = weight · g + bias            instance enhancement, initialised to weight 0 and bias −1

    Args:
        channels: Width C of the feature map.
        reduction: The hidden width (of fc1) is max(1, C // reduction).

    Raises:
        TypeError: ``reduction`` is not an integer.
        ValueError: ``reduction`` is below 1.
    """

    def __init__(self, channels: int, reduction: int = 16, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_whole("SEM reduction", reduction)
        hidden = max(1, channels // reduction)
        size = int((math.log2(channels) + 1) / 2)
        size = size if size % 2 else size + 1
        self.switch = nn.Linear(channels, 3, **dd)
        self.fc1 = nn.Linear(channels, hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, **dd)
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, **dd)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters of its own; its layers have theirs."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x (B × C × H × W)."""
        g = channel_mean(x)
        w = self.switch(g).sigmoid()
        logits = self.fc2(self.fc1(g).relu()), self.conv(g[:, None])[:, 0], self.weight * g + self.bias
        gates = [(w[:, i : i + 1] * logit).sigmoid() for i, logit in enumerate(logits)]
        return x * (gates[0] * gates[1] * gates[2]).to(x.dtype)[:, :, None, None]

    @torch.no_grad()
    def start_constant(self) -> float:
        """Set the parameters so that the gate is constant, and return it."""
        for parameter in (self.fc2.weight, self.fc2.bias, self.conv.weight, self.weight, self.bias):
            parameter.zero_()
        return 0.125
