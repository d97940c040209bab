"""ASR: channel attention whose input is a learnt constant, so that it folds into the norm before it.

Paper: "Stripe Observation Guided Inference Cost-free Attention Mechanism", Zhong, Huang, Wen, Qin, Lin,
ECCV 2024 https://arxiv.org/abs/2304.06345

Trained channel attention hardly depends on the image (the stripe observation). ASR gives the attention
module a learnable vector ψ in place of the image's channel means: v = T(ψ), y = v · norm(x).
"""

from typing import Any

import torch
from torch import Tensor, nn


class SEGenerator(nn.Module):
    """v = σ(fc2 relu(fc1 ψ)): the SE module of the paper fed with a learnt constant.

    ψ is a single row (1 × C), all 0.1 at the start; the hidden width is round(C / reduction), at least 1.
    """

    def __init__(self, channels: int, reduction: int = 16, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        if reduction < 1:
            raise ValueError(f"ASR reduction must be at least 1, got {reduction}")
        hidden = max(1, round(channels / reduction))
        self.psi = nn.Parameter(torch.full((1, channels), 0.1, **dd))
        self.fc1 = nn.Linear(channels, hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)

    def forward(self) -> Tensor:
        """The gate v, 1 × C, each entry in (0, 1)."""
        return self.fc2(self.fc1(self.psi).relu()).sigmoid()


class ASR(nn.Module):
    """δ gates from δ learnt constants, multiplied: x · Π_j T_j(ψ_j), the same for every image.

    Stands after a block's last norm layer, before the shortcut is added; the block's ``reparameterize()``
    multiplies the gate into that norm's weight and bias and removes this module.

    Args:
        channels: Width C of the feature map.
        delta: Number δ of generators (the paper's insertion frequency).
        reduction: Reduction ratio of each SE generator.
    """

    def __init__(self, channels: int, delta: int = 1, reduction: int = 16, device=None, dtype=None) -> None:
        super().__init__()
        if delta < 1:
            raise ValueError(f"ASR delta must be at least 1, got {delta}")
        self.generators = nn.ModuleList(
            SEGenerator(channels, reduction, device=device, dtype=dtype) for _ in range(delta)
        )

    def gate(self) -> Tensor:
        """The gate v, 1 × C: the product over the generators."""
        v = torch.ones_like(self.generators[0].psi)  # pyright: ignore[reportArgumentType]
        for generator in self.generators:
            v = v * generator()
        return v

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x (B × C × H × W)."""
        return x * self.gate()[:, :, None, None]
