"""Networks with DIA (https://arxiv.org/abs/1905.10671): one recurrent cell a stage."""

# Modules that are found by index or by name have no static type.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from typing import Any

import torch
from timm.models import checkpoint
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..layers import DIACell
from ..layers.pooling import channel_mean
from .blocks import SplitBasicBlock, SplitBottleneck
from .cifar import CifarResNet


class DIAStep:
    """One step of a stage's cell, from the state that the block before has left.

    Each block gets its own, so that one which is run again, as under gradient checkpointing, reads the same
    state again. No module holds it: it lives for one forward pass.

    Args:
        cell: The stage's.
        h: Hidden state, B × C.
        c: Cell state, B × C.
    """

    def __init__(self, cell: DIACell, h: Tensor, c: Tensor) -> None:
        self.cell, self.before = cell, (h, c)
        self.after: tuple[Tensor, Tensor] | None = None

    def gate(self, f: Tensor) -> Tensor:
        """The gate (B × C) of a residual branch (B × C × H × W); leaves the new state in ``after``."""
        self.after = h, _ = self.cell(channel_mean(f), *self.before)
        return h


class DIABlockMixin:
    """A block that takes its step of the cell beside the feature map, and returns the map alone."""

    @torch.jit.unused
    def forward(self, x: Tensor, step: DIAStep | None = None) -> Tensor:
        """B × C × H × W to the same, with ``step`` taken."""
        if step is None:
            raise TypeError("a block of a DIA network needs the state of the block before: call its stage")
        f = self.branch(x)
        return self.merge(f, x, step.gate(f))


class DIABasicBlock(DIABlockMixin, SplitBasicBlock):
    """timm's BasicBlock with DIA's gate before the sum."""


class DIABottleneck(DIABlockMixin, SplitBottleneck):
    """timm's Bottleneck with DIA's gate before the sum."""


def _run(block: nn.Module, cell: DIACell, x: Tensor, h: Tensor, c: Tensor) -> Any:
    step = DIAStep(cell, h, c)
    return block(x, step), step.after


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
            if torch.jit.is_scripting():  # which has no objects to hand on, and no hooks
                f = block.branch(x)
                h, c = cell(channel_mean(f), h, c)
                x = block.merge(f, x, h)
            elif self.grad_checkpointing:
                x, (h, c) = checkpoint(_run, block, cell, x, h, c)
            else:
                x, (h, c) = _run(block, cell, x, h, c)
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
