"""timm's residual blocks with a gate: one that folds (ASR), one that is handed from block to block (DIA)."""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from ..algebra import scale_affine
from ..layers import ASR


def fold_gate(norm: Any, asr: ASR) -> None:
    """Multiply ASR's gate into the weight and bias of the norm layer before it, in place."""
    # The parameters keep their identity, so that optimisers and EMA copies that hold them stay valid.
    weight, bias = scale_affine(norm.weight.data, norm.bias.data, asr.gate().detach()[0])
    norm.weight.data.copy_(weight)
    norm.bias.data.copy_(bias)


class FoldableBasicBlock(BasicBlock):
    """timm's BasicBlock; an ASR in its attention slot folds into bn2."""

    def reparameterize(self) -> None:
        """Fold ASR and empty the slot: the hook that ``timm.utils.reparameterize_model`` calls."""
        if isinstance(self.se, ASR):
            fold_gate(self.bn2, self.se)
            self.se = None


class FoldableBottleneck(Bottleneck):
    """timm's Bottleneck; an ASR in its attention slot folds into bn3."""

    def reparameterize(self) -> None:
        """Fold ASR and empty the slot: the hook that ``timm.utils.reparameterize_model`` calls."""
        if isinstance(self.se, ASR):
            fold_gate(self.bn3, self.se)
            self.se = None


class DIABasicBlock(BasicBlock):
    """timm's BasicBlock cut in two where DIA gates it: after bn2, before drop path and shortcut.

    ``dia`` is the stage's cell in the first block of a stage and None in the others.
    """

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to its last norm layer."""
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.aa(x)  # pyright: ignore[reportOptionalCall] (an Identity without anti-aliasing)
        return self.bn2(self.conv2(x))

    def merge(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut of the block's input to the gated branch."""
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.act2(x + shortcut)


class DIABottleneck(Bottleneck):
    """timm's Bottleneck cut in two where DIA gates it: after bn3, before drop path and shortcut.

    ``dia`` is the stage's cell in the first block of a stage and None in the others.
    """

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to its last norm layer."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.aa(x)  # pyright: ignore[reportOptionalCall] (an Identity without anti-aliasing)
        return self.bn3(self.conv3(x))

    def merge(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut of the block's input to the gated branch."""
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.act3(x + shortcut)
