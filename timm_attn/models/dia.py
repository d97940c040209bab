"""Networks with DIA (https://arxiv.org/abs/1905.10671): one recurrent cell a stage."""

# Modules that are found by index or by name have no static type.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
from timm.models import checkpoint
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..layers import DIACell
from ..layers.pooling import channel_mean
from .blocks import SplitBasicBlock, SplitBottleneck
from .cifar import CifarResNet


def _step(
    block: SplitBasicBlock | SplitBottleneck, cell: DIACell, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    f = block.branch(x)
    h, c = cell(channel_mean(f), h, c)
    return block.merge(f, x, h), h, c


class DIAStage(nn.Sequential):
    """The blocks of one stage; hands DIA's state from block to block, starting from zero.

    The cell is registered once, as ``dia`` of the first block: the children of a timm stage must be its
    blocks, and a module registered twice would appear twice in the state dict.
    """

    def __init__(self, blocks: nn.Sequential, cell: DIACell) -> None:
        super().__init__(*blocks)
        for block in self:
            block.dia = None
        self[0].dia = cell
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        cell = self[0].dia
        h = x.new_zeros((x.shape[0], cell.channels))
        c = h
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, h, c = checkpoint(_step, block, cell, x, h, c)
            else:
                f = block.branch(x)
                h, c = cell(channel_mean(f), h, c)
                x = block.merge(f, x, h)
        return x


class DIAMixin:
    """Puts a DIA cell into every stage of the ResNet that it is mixed into.

    Args:
        reduction: r of each stage's cell.
    """

    def __init__(self, *args, reduction: int = 20, device=None, dtype=None, **kwargs) -> None:
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        for info in self.feature_info[1:]:
            name, channels = info["module"], info["num_chs"]
            cell = DIACell(channels, reduction, device=device, dtype=dtype)
            setattr(self, name, DIAStage(getattr(self, name), cell))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        # timm's own flag would run the blocks of all stages in one flat sequence and lose the state.
        for stage in self.children():
            if isinstance(stage, DIAStage):
                stage.grad_checkpointing = enable


class DIAResNet(DIAMixin, ResNet):
    """timm's ResNet with a DIA cell in every stage."""


class DIACifarResNet(DIAMixin, CifarResNet):
    """The CIFAR ResNet with a DIA cell in every stage."""
