"""timm's residual blocks, opened where a mechanism acts."""

# What a mixin finds in the block that it is mixed into has no static type.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..layers import FMM
from ..layers.eager import eager
from ..layers.options import check_affine


def last_norm(block: Any) -> Any:
    """The norm layer that ends a block's residual branch; an Identity in FMM's mode sigmoid."""
    return block.bn3 if isinstance(block, Bottleneck) else block.bn2


def last_conv(block: Any) -> Any:
    """The last convolution of a block's residual branch."""
    return block.conv3 if isinstance(block, Bottleneck) else block.conv2


def add_shortcut(x: Tensor, shortcut: Tensor, gate: Tensor | None = None) -> Tensor:
    """Add the shortcut to a branch (B × C × H × W), times a gate B × C if there is one; may overwrite x."""
    if gate is None:
        x += shortcut
        return x
    gate = gate[:, :, None, None]
    # One pass over the map instead of two; a new map costs more than the pass where memory is slow.
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript knows this question alone)
        if eager(x) and not torch.is_grad_enabled() and x.dtype == shortcut.dtype:
            return torch.addcmul(shortcut, x, gate, out=x)
    return torch.addcmul(shortcut, x, gate)


def attend(norm: Any, attention: Any, x: Tensor) -> Tensor:
    """The last norm layer and the attention after it; in training in one pass over the map if it can be."""
    if attention is None:
        return norm(x)
    # What replaces a plain norm (synchronised, frozen, parametrised) has a forward of its own, and whoever
    # hooks one of the two wants it called.
    plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
    plain = plain and norm.momentum is not None
    free = (torch.compiler.is_compiling() or eager(x)) and not _hooked(norm) and not _hooked(attention)
    if attention.training and plain and free and hasattr(attention, "after_norm"):
        return attention.after_norm(norm, x)
    return attention(norm(x))


def _hooked(module: nn.Module) -> bool:
    """Whether more happens than the module's own forward when it is called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module) or bool(_has_any_global_hook())


class SplitBasicBlock(BasicBlock):
    """timm's BasicBlock cut in two after the attention slot: ``merge(branch(x), x)``."""

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to its last norm layer and the attention after it."""
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.aa(x)  # pyright: ignore[reportOptionalCall] (an Identity without anti-aliasing)
        x = self.conv2(x)
        if not torch.jit.is_scripting():
            return attend(self.bn2, self.se, x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        return x

    def merge(self, x: Tensor, shortcut: Tensor, gate: Tensor | None = None) -> Tensor:
        """Add the shortcut of the block's input to the branch, times a gate B × C if there is one."""
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.act2(add_shortcut(x, shortcut, gate))

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.branch(x), x)


class SplitBottleneck(Bottleneck):
    """timm's Bottleneck cut in two after the attention slot: ``merge(branch(x), x)``."""

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch up to its last norm layer and the attention after it."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.aa(x)  # pyright: ignore[reportOptionalCall] (an Identity without anti-aliasing)
        x = self.conv3(x)
        if not torch.jit.is_scripting():
            return attend(self.bn3, self.se, x)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        return x

    def merge(self, x: Tensor, shortcut: Tensor, gate: Tensor | None = None) -> Tensor:
        """Add the shortcut of the block's input to the branch, times a gate B × C if there is one."""
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.act3(add_shortcut(x, shortcut, gate))

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.branch(x), x)


class FoldableMixin:
    """Lets a module in timm's attention slot fold into the norm layer before it.

    Such a module has a method ``fold_into(norm)`` that returns what takes its place in the slot. If it has
    ``after_norm(norm, x)``, the same as ``self(norm(x))`` for a BatchNorm2d, that is what training calls.

    Raises:
        ValueError: The norm has no weight and bias to fold into.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(self.se, "fold_into"):
            check_affine(type(self.se).__name__, last_norm(self))

    def reparameterize(self) -> None:
        """The hook that ``timm.utils.reparameterize_model`` calls."""
        if hasattr(self.se, "fold_into"):
            self.se = self.se.fold_into(last_norm(self))


class FoldableBasicBlock(FoldableMixin, SplitBasicBlock):
    """timm's BasicBlock; what folds in its attention slot folds into bn2."""


class FoldableBottleneck(FoldableMixin, SplitBottleneck):
    """timm's Bottleneck; what folds in its attention slot folds into bn3."""


class ConAMMixin:
    """Puts ``conam`` before the residual branch; the shortcut sees the block's raw input.

    It is an Identity until the network puts a ConAM there.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.conam = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.branch(self.conam(x)), x)


class ConAMBasicBlock(ConAMMixin, SplitBasicBlock):
    """timm's BasicBlock with ConAM before its branch."""


class ConAMBottleneck(ConAMMixin, SplitBottleneck):
    """timm's Bottleneck with ConAM before its branch."""


class FMMMixin:
    """Multiplies the branch with the shortcut instead of adding it.

    Args:
        mode: Of :class:`timm_attn.layers.FMM`.
        pin_bias: Keep the biases of the two factors' norms at their initial values.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Any = None,
        norm_layer: Any = nn.BatchNorm2d,
        mode: str = "bn",
        pin_bias: bool = False,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(inplanes, planes, stride, downsample, norm_layer=norm_layer, **dd, **kwargs)
        self.fmm = FMM(planes * self.expansion, mode, norm_layer if downsample is None else None, **dd)
        if mode == "sigmoid":
            setattr(self, "bn3" if isinstance(self, Bottleneck) else "bn2", nn.Identity())
        self.pin_bias = pin_bias
        self.init_norms()

    def init_norms(self) -> None:
        """Set the biases of the two factors' norms, and pin them if that is asked for."""
        self.fmm.init_norms(*self.factor_norms(), self.pin_bias)

    def factor_norms(self) -> tuple[Any, Any]:
        """The last norm of the branch and that of the shortcut; an Identity where the mode has none."""
        return last_norm(self), self.fmm.norm if self.downsample is None else self.downsample[-1]

    def train(self, mode: bool = True) -> Any:
        """timm.utils.unfreeze lets pinned biases go; they are pinned again here."""
        if self.pin_bias:
            for norm in self.factor_norms():
                if not isinstance(norm, nn.Identity):  # as it is in the deployed form, and in mode sigmoid
                    norm.bias.requires_grad_(False)
        return super().train(mode)

    def zero_init_last(self) -> None:
        """Start with a constant factor, the counterpart of a residual branch that starts at zero."""
        self.init_norms()
        if self.fmm.mode == "sigmoid":
            nn.init.zeros_(last_conv(self).weight)  # σ(0) + 1 = 1.5
        # With γ = 0 the factor is β of the last norm, 1. The raw product has β = 0 and would be dead.
        elif self.fmm.mode != "raw":
            nn.init.zeros_(last_norm(self).weight)

    def multiply(self, f: Tensor, x: Tensor) -> Tensor:
        """The product of the branch and the shortcut of the block's input."""
        factor = self.fmm.factor(f)
        if self.drop_path is not None and self.training:
            factor = 1 + self.drop_path(factor - 1)  # a dropped path must multiply by 1, not by 0
        if self.downsample is not None:
            x = self.downsample(x)
        return self.fmm(factor, x)


class FMMBasicBlock(FMMMixin, SplitBasicBlock):
    """timm's BasicBlock with a product in place of the sum."""

    def merge(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Multiply the branch with the shortcut of the block's input."""
        return self.act2(self.multiply(x, shortcut))


class FMMBottleneck(FMMMixin, SplitBottleneck):
    """timm's Bottleneck with a product in place of the sum."""

    def merge(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Multiply the branch with the shortcut of the block's input."""
        return self.act3(self.multiply(x, shortcut))
