"""SPEM: channel attention on a learned mixture of the maximum and the minimum of each channel.

Paper: "SPEM: Self-adaptive Pooling Enhanced Attention Module for Image Recognition", Zhong, Wen, Qin,
MMM 2023 https://arxiv.org/abs/2208.10322. The formula is that of the authors' code
(https://github.com/Qrange-group/SPEM, MIT).
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .options import check_number
from .ssia import attach_loss

torch.fx.wrap("attach_loss")  # by name, in each file that calls it


class SPEM(nn.Module):
    """x · σ(M' + m') · σ(z), with M and m the maximum and the minimum of each channel::

        M' = w₂ M + b₂,  m' = w₂ m + b₂           per channel; initially w₂ = 0 and b₂ = −1
        z  = w₁ (q₀ M' + q₁ m') + b₁              initially w₁ = 0 and b₁ = −1
        q  = (p₀², p₁²) / (p₀² + p₁²)             initially p = (½, ½)

    In training, the gradient of ``aux_weight`` · ‖p‖² is added in the backward pass.

    Args:
        channels: Width C of the feature map.
        aux_weight: Weight of this regularisation loss, α in the authors' code.

    Raises:
        TypeError: ``aux_weight`` is not a number.
        ValueError: ``aux_weight`` is negative.
    """

    aux_scale: Tensor

    def __init__(self, channels: int, aux_weight: float = 0.1, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_number("SPEM aux_weight", aux_weight, "a finite number of 0 or more", zero=True)
        self.aux_weight = aux_weight
        self.p = nn.Parameter(torch.empty(2, **dd))
        self.weight1, self.weight2 = (nn.Parameter(torch.empty(channels, **dd)) for _ in range(2))
        self.bias1, self.bias2 = (nn.Parameter(torch.empty(channels, **dd)) for _ in range(2))
        self.register_buffer("aux_scale", torch.ones((), **dd), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters."""
        nn.init.constant_(self.p, 0.5)
        for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
            nn.init.zeros_(weight)
            nn.init.constant_(bias, -1.0)

    def init_non_persistent_buffers(self) -> None:
        """Set the buffer that checkpoints do not contain; timm calls it after ``to_empty``."""
        self.aux_scale.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x (B × C × H × W)."""
        high = x.amax((2, 3)) * self.weight2 + self.bias2
        low = x.amin((2, 3)) * self.weight2 + self.bias2
        # q is that of any multiple of p; the loss pulls p to 0, where fp16 has no squares.
        p = self.p / self.p.detach().abs().amax().clamp_min(1e-7)
        q = p.square() / p.square().sum()
        z = (q[0] * high + q[1] * low) * self.weight1 + self.bias1
        gate = (high + low).sigmoid() * z.sigmoid()
        if self.training and self.aux_weight:
            gate = attach_loss(gate, self.aux_weight * self.p.square().sum(), self.aux_scale)
        return x * gate.to(x.dtype)[:, :, None, None]

    @torch.no_grad()
    def start_constant(self) -> Tensor:
        """Set the parameters so that the gate is the same for every image, and return it, C entries."""
        self.weight1.zero_()
        self.weight2.zero_()
        return (2 * self.bias2).sigmoid() * self.bias1.sigmoid()
