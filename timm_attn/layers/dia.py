"""DIA: one recurrent attention unit shared by all blocks of a stage.

Paper: "DIANet: Dense-and-Implicit Attention Network", Huang, Liang, Liang, Yang, AAAI 2020
https://arxiv.org/abs/1905.10671

The cell reads the channel means of each block's residual branch and carries an LSTM state from block to
block. Its hidden state, with a sigmoid in place of the tanh, is the channel gate.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .options import check_whole


@torch.fx.wrap  # whose quantisation would else keep the state in eight bits, which is too coarse for it
def update(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The new (h, c), each B × C, from [i, f, u, o] before their activations (B × 4 C) and the old c."""
    i, f, u, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * u.tanh()
    return o.sigmoid() * c.sigmoid(), c


class DIACell(nn.Module):
    """DIA-LSTM: an LSTM cell with bottleneck layers in its gates and a sigmoid output.

    With g the channel means of the branch and (h, c) the state from the block before::

        [i, f, u, o] = x_expand(relu(x_reduce(g))) + h_expand(relu(h_reduce(h)))
        c' = σ(f) c + σ(i) tanh(u)
        h' = σ(o) σ(c')

    h' is both the next state and the gate, in (0, 1).

    Args:
        channels: Width C of the stage in which the cell is used.
        reduction: r of the paper; the hidden width of the gates is max(1, C // r). The paper uses 4 on CIFAR
            and 20 on ImageNet.

    Raises:
        TypeError: ``reduction`` is not an integer.
        ValueError: ``reduction`` is below 1.
    """

    def __init__(self, channels: int, reduction: int = 20, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_whole("DIA reduction", reduction)
        hidden = max(1, channels // reduction)
        self.channels = channels
        self.x_reduce = nn.Linear(channels, hidden, **dd)
        self.x_expand = nn.Linear(hidden, 4 * channels, **dd)
        self.h_reduce = nn.Linear(channels, hidden, **dd)
        self.h_expand = nn.Linear(hidden, 4 * channels, **dd)

    @torch.no_grad()
    def start_constant(self) -> float:
        """Set the parameters so that the gate is the same everywhere, and return it.

        With the last layers at 0, i = f = o = ½ and u = 0, so that c stays 0.
        """
        for layer in (self.x_expand, self.h_expand):
            layer.weight.zero_()
            layer.bias.zero_()
        return 0.25

    def forward(self, g: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step: channel means g and state (h, c), each B × C, to the new (h, c)."""
        gates = self.x_expand(self.x_reduce(g).relu()) + self.h_expand(self.h_reduce(h).relu())
        h, c = update(gates, c)
        return h, c  # unpacked here, for tracers that take the last node of a stage for its output
