"""ASR: channel attention whose input is a learned constant, so that it folds into the norm before it.

Paper: "Stripe Observation Guided Inference Cost-free Attention Mechanism", Zhong, Huang, Wen, Qin, Lin,
ECCV 2024 https://arxiv.org/abs/2304.06345

Trained channel attention hardly depends on the image (the stripe observation). ASR gives the attention
module a learnable vector ψ instead of the channel means of the image: v = T(ψ), y = v · norm(x). In the
paper's code, T is SE; how the other modules take a constant is this package's interpretation.
"""

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .gate import ConstantGate
from .options import check_choice, check_whole


class SEGenerator(nn.Module):
    """v = σ(fc2 relu(fc1 ψ)): SE (https://arxiv.org/abs/1709.01507) on a learned constant.

    ψ is a single row (1 × C), initialised to 0.1; the hidden width is round(C / reduction), at least 1.
    As ψ has two axes, weight decay that leaves out biases and the scales of norms includes it.
    """

    #: Parts of the map, level by level, over which the means of each channel are taken.
    levels = (1,)

    def __init__(self, channels: int, reduction: int = 16, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_whole("ASR reduction", reduction)
        hidden = max(1, round(channels / reduction))
        self.psi = nn.Parameter(torch.empty(1, channels, **dd))
        self.reset_parameters()
        self.fc1 = nn.Linear(sum(self.levels) * channels, hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)

    def reset_parameters(self) -> None:
        """Set ψ; the layers have a method of their own."""
        nn.init.constant_(self.psi, 0.1)

    def forward(self) -> Tensor:
        """The gate v, 1 × C, each entry in (0, 1)."""
        return self.fc2(self.fc1(self.means()).relu()).sigmoid()

    def means(self) -> Tensor:
        """What the channel means of an image are to SE: ψ."""
        return self.psi


class SPAGenerator(SEGenerator):
    """v = σ(fc2 relu(fc1 p)): spatial pyramid attention (https://doi.org/10.1109/TMM.2021.3068576).

    p (1 × 21 C) are the means of each channel over the 1, 2 × 2 and 4 × 4 cells of the pyramid, channel by
    channel at each level: of a map with ψ in every pixel, each is that channel's entry of ψ. A batch norm is
    left out, as there is no batch to normalise over. Else as SE.
    """

    levels = (1, 4, 16)

    def means(self) -> Tensor:
        """p, 1 × 21 C."""
        return torch.cat([self.psi.repeat_interleave(cells, 1) for cells in self.levels], 1)


class IEGenerator(nn.Module):
    """v = σ(weight · ψ + bias) per channel: instance enhancement (https://arxiv.org/abs/1908.04008).

    Initialised like IEBN, with weight 0 and bias −1, so that v = 0.269 in every channel. In the first step, ψ
    has no gradient, as the weight is 0.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.psi = nn.Parameter(torch.empty(1, channels, **dd))
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, **dd)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters."""
        nn.init.constant_(self.psi, 0.1)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, -1.0)

    def forward(self) -> Tensor:
        """The gate v, 1 × C, each entry in (0, 1)."""
        return (self.weight * self.psi + self.bias).sigmoid()


class ECAGenerator(nn.Module):
    """v = σ(conv ψ): ECA (https://arxiv.org/abs/1910.03151), a convolution along the channels.

    The kernel size grows with log₂ C, as in the paper; the convolution has zero padding and no bias.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        size = max(3, size if size % 2 else size + 1)
        self.psi = nn.Parameter(torch.empty(1, channels, **dd))
        self.reset_parameters()
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Set ψ; the convolution has a method of its own."""
        nn.init.constant_(self.psi, 0.1)

    def forward(self) -> Tensor:
        """The gate v, 1 × C, each entry in (0, 1)."""
        return self.conv(self.psi[:, None])[:, 0].sigmoid()


class SRMGenerator(nn.Module):
    """v = σ(weight₁ · ψ₁ + weight₂ · ψ₂) per channel: SRM (https://arxiv.org/abs/1903.10829).

    ψ (1 × C × 2) takes the place of each channel's mean and standard deviation. SRM's batch norm is left out,
    as there is no batch to normalise over. The weights are initialised to 0, as in SRM, so that v = 0.5; in
    the first step, ψ therefore has no gradient.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.psi = nn.Parameter(torch.empty(1, channels, 2, **dd))
        self.weight = nn.Parameter(torch.empty(channels, 2, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters."""
        nn.init.constant_(self.psi, 0.1)
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        """The gate v, 1 × C, each entry in (0, 1)."""
        return (self.weight * self.psi).sum(-1).sigmoid()


class ScaleGenerator(nn.Module):
    """v = ψ, a learned scale per channel, initialised to 1: what the other generators fold to.

    A baseline of this package, in no paper. It can learn the same functions as the folded network, so that a
    difference from it shows the effect of a generator on training. Unbounded, without a sigmoid. ψ has one
    axis, so that optimisers treat it as the scale of a norm.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.psi = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ψ."""
        nn.init.ones_(self.psi)

    def forward(self) -> Tensor:
        """The gate v, 1 × C."""
        return self.psi[None]


GENERATORS = {
    "se": SEGenerator,
    "spa": SPAGenerator,
    "ie": IEGenerator,
    "eca": ECAGenerator,
    "srm": SRMGenerator,
    "scale": ScaleGenerator,
}


class ASR(ConstantGate):
    """Product of δ gates from δ learned constants: x · Π_j T_j(ψ_j), the same for every image.

    Used at the end of a residual branch, or on a norm layer.

    Args:
        channels: Width C of the feature map.
        delta: Number δ of generators (the paper's insertion frequency).
        reduction: Reduction ratio of each SE or SPA generator, 16 by default; other generators have none.
        generator: T, one of ``GENERATORS``.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of range or does not exist for this generator.
    """

    def __init__(
        self,
        channels: int,
        delta: int = 1,
        reduction: int | None = None,
        generator: str = "se",
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_whole("ASR delta", delta)
        check_choice("ASR generator", generator, GENERATORS)
        own: dict[str, Any] = {}
        if reduction is not None:
            if not issubclass(GENERATORS[generator], SEGenerator):
                raise ValueError(f"the generator {generator!r} has no reduction, got {reduction}")
            own["reduction"] = reduction
        self.generators = nn.ModuleList(GENERATORS[generator](channels, **own, **dd) for _ in range(delta))

    def gate(self) -> Tensor:
        """The gate v, 1 × C: the product over the generators."""
        return reduce(torch.mul, [generator() for generator in self.generators])
