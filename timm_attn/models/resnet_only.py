"""FMM and ConAM, which act before or in place of the residual sum, so that only ResNets can have them.

The class of a block is exchanged for one with the same modules; the block keeps its keys.
"""

# What a mixin finds in the block that it is mixed into has no static type.
# pyright: reportAttributeAccessIssue=false

from copy import deepcopy
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import PreActBasic, PreActBottleneck
from torch import Tensor, nn

from ..layers import FMM, ConAM
from .cifar import CifarResNetV2


def last_norm(block: Any) -> Any:
    """The norm layer that ends a block's residual branch; an Identity in FMM's mode sigmoid."""
    if hasattr(block, "fmm_branch_norm"):
        return block.fmm_branch_norm
    return block.bn3 if isinstance(block, Bottleneck) else block.bn2


def last_conv(block: Any) -> Any:
    """The last convolution of a block's residual branch."""
    return block.conv3 if isinstance(block, Bottleneck | PreActBottleneck) else block.conv2


def residual_blocks(model: nn.Module, mechanism: str) -> list[list[Any]]:
    """The blocks of a ResNet, by stage.

    Raises:
        ValueError: It is no ResNet of timm's or this package's blocks.
    """
    stages = []
    if isinstance(model, ResNet):
        stages = [list(model.get_submodule(info["module"])) for info in model.feature_info[1:]]  # pyright: ignore
    elif isinstance(model, CifarResNetV2):
        stages: list[list[Any]] = [list(stage.blocks) for stage in model.stages]  # pyright: ignore
    if not stages or any(type(b) not in _WITH_CONAM for stage in stages for b in stage):
        raise ValueError(
            f"{mechanism} is for timm's ResNets, of BasicBlock or Bottleneck, and {type(model).__name__} is "
            "none: choose asr, dia, se, sem, spem or ssia"
        )
    return stages


class _Basic(BasicBlock):
    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to the sum, without its slot for stochastic depth."""
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.bn2(self.conv2(self.aa(x)))  # pyright: ignore[reportOptionalCall] (an Identity without)
        return x if self.se is None else self.se(x)


class _Bottle(Bottleneck):
    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to the sum, without its slot for stochastic depth."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.bn3(self.conv3(self.aa(x)))  # pyright: ignore[reportOptionalCall] (an Identity without)
        return x if self.se is None else self.se(x)


class _PreBasic(PreActBasic):
    def branch(self, x: Tensor) -> Tensor:
        """The residual branch from the activated map on, without its slot for stochastic depth."""
        return self.conv2(self.norm2(self.conv1(x)))


class _PreBottle(PreActBottleneck):
    def branch(self, x: Tensor) -> Tensor:
        """The residual branch from the activated map on, without its slot for stochastic depth."""
        return self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(x)))))


class _ConAMBlock:
    """The branch sees the map weighted by ConAM, the shortcut as it is."""

    def forward(self, x: Tensor) -> Tensor:
        f = self.branch(self.conam(x))  # pyright: ignore[reportCallIssue]
        if self.drop_path is not None:
            f = self.drop_path(f)
        f += x if self.downsample is None else self.downsample(x)
        return self.act3(f) if isinstance(self, Bottleneck) else self.act2(f)


class ConAMBasicBlock(_ConAMBlock, _Basic):
    """timm's BasicBlock with ConAM before its branch."""


class ConAMBottleneck(_ConAMBlock, _Bottle):
    """timm's Bottleneck with ConAM before its branch."""


class _ConAMPreBlock:
    """The branch sees the activated map weighted by ConAM, the shortcut as it is."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        f = self.drop_path(self.branch(self.conam(z)))
        return f + (x if self.downsample is None else self.downsample(z))


class ConAMPreActBasic(_ConAMPreBlock, _PreBasic):
    """timm's PreActBasic with ConAM before its branch."""


class ConAMPreActBottleneck(_ConAMPreBlock, _PreBottle):
    """timm's PreActBottleneck with ConAM before its branch."""


def _shortcut_norm(block: Any, fmm: FMM) -> nn.Module:
    """The norm that ends a shortcut: its own, where it is a convolution and a norm, or FMM's."""
    return block.downsample[-1] if isinstance(block.downsample, nn.Sequential) else fmm.norm


class _FMMBlock:
    """Multiplies the branch with the shortcut instead of adding it."""

    def factor_norms(self) -> tuple[Any, Any]:
        """The last norm of the branch and that of the shortcut; an Identity where the mode has none."""
        return last_norm(self), _shortcut_norm(self, self.fmm)

    def train(self, mode: bool = True) -> Any:
        """timm.utils.unfreeze lets pinned biases go; they are pinned again here."""
        if self.pin_bias:
            for norm in self.factor_norms():
                if not isinstance(norm, nn.Identity):  # as it is in the deployed form, and in mode sigmoid
                    norm.bias.requires_grad_(False)
        return super().train(mode)  # pyright: ignore[reportCallIssue]

    def zero_init_last(self) -> None:
        """Start with a constant factor, the counterpart of a residual branch that starts at zero."""
        self.fmm.init_norms(*self.factor_norms(), self.pin_bias)
        if self.fmm.mode == "sigmoid":
            nn.init.zeros_(last_conv(self).weight)  # σ(0) + 1 = 1.5
        # With γ = 0 the factor is β of the last norm, 1. The raw product has β = 0 and would be dead.
        else:
            nn.init.constant_(last_norm(self).weight, float(self.fmm.mode == "raw"))

    def product(self, f: Tensor, shortcut: Tensor) -> Tensor:
        """Of what the branch and the shortcut give."""
        factor = self.fmm.factor(f)
        if self.drop_path is not None and self.training:
            factor = 1 + self.drop_path(factor - 1)  # a dropped path must multiply by 1, not by 0
        return self.fmm(factor, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(self.branch(x), x if self.downsample is None else self.downsample(x))
        return self.act3(x) if isinstance(self, Bottleneck) else self.act2(x)


class FMMBasicBlock(_FMMBlock, _Basic):
    """timm's BasicBlock with a product in place of the sum."""


class FMMBottleneck(_FMMBlock, _Bottle):
    """timm's Bottleneck with a product in place of the sum."""


class _FMMPreBlock(_FMMBlock):
    """No activation follows the product. Branch and shortcut have no norm, so both get one."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        return self.product(
            self.fmm_branch_norm(self.branch(z)), x if self.downsample is None else self.downsample(z)
        )


class FMMPreActBasic(_FMMPreBlock, _PreBasic):
    """timm's PreActBasic with a product in place of the sum."""


class FMMPreActBottleneck(_FMMPreBlock, _PreBottle):
    """timm's PreActBottleneck with a product in place of the sum."""


_WITH_CONAM: dict[type, type] = {
    BasicBlock: ConAMBasicBlock,
    Bottleneck: ConAMBottleneck,
    PreActBasic: ConAMPreActBasic,
    PreActBottleneck: ConAMPreActBottleneck,
}
_WITH_FMM: dict[type, type] = {
    BasicBlock: FMMBasicBlock,
    Bottleneck: FMMBottleneck,
    PreActBasic: FMMPreActBasic,
    PreActBottleneck: FMMPreActBottleneck,
}


def put_conam(model: nn.Module, places: list[tuple[Any, ConAM]]) -> None:
    """Put a ConAM before the branch of each of these blocks."""
    for block, conam in places:
        block.__class__ = _WITH_CONAM[type(block)]
        block.conam = conam


def put_fmm(blocks: list[Any], mode: str, pin_bias: Any) -> None:
    """Let blocks multiply. Where the last γ starts at zero, the branch's factor starts constant."""
    made = []
    for block in blocks:
        conv = last_conv(block)
        preact = isinstance(block, PreActBasic | PreActBottleneck)
        # Before activation, the branch has no norm of the width of what it gives.
        norm = nn.BatchNorm2d(conv.out_channels).to(conv.weight) if preact else last_norm(block)
        identity = not isinstance(block.downsample, nn.Sequential)

        def fresh(*_: Any, norm: Any = norm, **__: Any) -> nn.Module:
            copy = deepcopy(norm)
            copy.reset_parameters()
            return copy

        fmm = FMM(conv.out_channels, mode, fresh if identity else None)
        fmm.init_norms(norm, _shortcut_norm(block, fmm), pin_bias)
        made.append((fmm, norm))
    for block, (fmm, norm) in zip(blocks, made, strict=True):
        preact = isinstance(block, PreActBasic | PreActBottleneck)
        starts_at_zero = preact or (not norm.weight.is_meta and not torch.count_nonzero(norm.weight))
        kept = nn.Identity() if mode == "sigmoid" else norm
        name = "fmm_branch_norm" if preact else "bn3" if isinstance(block, Bottleneck) else "bn2"
        setattr(block, name, kept)
        block.__class__ = _WITH_FMM[type(block)]
        block.fmm, block.pin_bias = fmm, pin_bias
        if starts_at_zero:
            block.zero_init_last()
