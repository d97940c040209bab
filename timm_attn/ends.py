"""What stands at the end of a residual branch, or in place of a norm layer, without touching their keys."""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .branches import Branch, slots
from .layers.eager import eager


class BranchEnd(nn.Module):
    """Stands in the slot of a residual branch: a mechanism, and after it what stood there.

    The mechanism is registered in the block, so that its keys carry its name; here it is only held.

    Args:
        block: The block.
        branch: Where in it.
        mechanism: Called with what the branch gives.
    """

    #: Whether tokens that are no patches are scaled like the others.
    all_tokens = False

    def __init__(self, block: Any, branch: Branch, mechanism: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.inner = getattr(block, branch.slot)
        self._held = (block, mechanism)
        # RepVGG and its like merge their branches, others their norms: what stands here must come first.
        if isinstance(self, GateEnd) or hasattr(block, "reparameterize"):
            block.reparameterize = partial(merge, block)

    @property
    def block(self) -> nn.Module:
        return self._held[0]

    @property
    def mechanism(self) -> Any:
        return self._held[1]

    def key(self) -> str:
        """Name of the mechanism in the block."""
        return next(name for name, module in self.block.named_children() if module is self.mechanism)

    def replace(self, mechanism: nn.Module | None) -> None:
        """Put another mechanism here, or leave what stood in the slot."""
        block, key = self.block, self.key()
        if mechanism is None:
            delattr(block, key)
            setattr(block, self.branch.slot, self.inner)
        else:
            setattr(block, key, mechanism)
            self._held = (block, mechanism)

    def forward(self, x: Tensor) -> Tensor:
        """What leaves a branch, B × C × H × W, B × H × W × C or B × N × C, to the same."""
        x = self.attend(x)
        return x if self.inner is None else self.inner(x)

    def attend(self, x: Tensor) -> Tensor:
        """The mechanism on what leaves the branch."""
        return self.on_map(self._held[1], x)

    def on_map(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module on a map B × C × H × W; of tokens, on the patches.

        Where these are not the grid that they were when this was put here, they are taken for a square, or
        else for a column.
        """
        if self.branch.axis == 1:
            return module(x)
        if x.dim() == 4:
            return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        others, patches = x[:, : self.branch.prefix], x[:, self.branch.prefix :]
        count = patches.shape[1]
        side = math.isqrt(count)
        size = self.branch.grid or (side, side)
        if math.prod(size) != count:
            size = (side, side) if side * side == count else (count, 1)
        patches = module(patches.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return torch.cat([others, patches], 1) if others.shape[1] else patches

    def scale(self, x: Tensor, gate: Tensor) -> Tensor:
        """x times a gate, 1 × C or B × C."""
        if self.branch.axis == 1:
            return x * gate[:, :, None, None]
        return x * (gate[:, None] if x.dim() == 3 else gate[:, None, None])


class GateEnd(BranchEnd):
    """A gate that does not depend on the image; ``timm_attn.fold`` multiplies it into the branch.

    Where the branch ends in a batch norm, that computes with its affine times the gate, as when it is folded:
    forward and backward pass each save a pass over the map.
    """

    all_tokens = True

    def __init__(self, block: nn.Module, branch: Branch, mechanism: nn.Module) -> None:
        super().__init__(block, branch, mechanism)
        self.norm = next(iter({name.rpartition(".")[0] for name in branch.affine}), "")
        norm: Any = block.get_submodule(self.norm)
        if type(norm) is nn.BatchNorm2d and len(branch.affine) == 2 and norm.track_running_stats:
            norm.__class__ = GatedBatchNorm2d
            vars(norm)["end"] = (self,)

    def attend(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            self.ungate()
        return x if self.in_norm(x) else self._held[1](x, self.branch.axis)

    def ungate(self) -> None:
        """Make the norm a plain one for good, as tracers must see it, and apply the gate here."""
        norm: Any = self._held[0].get_submodule(self.norm)
        if type(norm) is GatedBatchNorm2d:
            norm.__class__ = nn.BatchNorm2d  # pyright: ignore[reportAttributeAccessIssue]
            del norm.end

    def in_norm(self, x: Tensor) -> bool:
        """Whether the norm multiplies by the gate, so that nothing is left to do at the end of the branch.

        It does not if it was replaced, is hooked, is traced, or has lost its running statistics.
        """
        norm = self._held[0].get_submodule(self.norm)
        if type(norm) is not GatedBatchNorm2d:
            return False
        if norm.momentum is None or not norm.track_running_stats or norm.running_mean is None:
            return False
        if hooked(norm) or hooked(self) or hooked(self._held[1]):
            return False
        return torch.compiler.is_compiling() or eager(x)

    def fuse(self) -> nn.Module | None:
        """Multiply the gate into the branch; what stood in the slot. ``reparameterize_model`` calls it.

        Raises:
            ValueError: No parameters of the branch scale its channels.
        """
        scale_parameters(self.block, self.branch, self.mechanism.gate())
        self.ungate()
        return self.inner


class GatedInput:
    """Mixed into the attention module that ends a branch: a gate on what it is given.

    The class of the module is exchanged, so its keys stay.
    """

    gate_end: tuple[GateEnd]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate_end[0].attend(x))  # pyright: ignore[reportAttributeAccessIssue]

    def fuse(self) -> Any:
        """The module alone, with the gate in the branch before it."""
        self.gate_end[0].fuse()
        del self.gate_end
        return without_mixin(self)


@cache
def mixed(mixin: type, cls: type) -> type:
    """A class with a mixin, from that without."""
    return type(mixin.__name__ + cls.__name__, (mixin, cls), {"__reduce_ex__": _reduce})


def without_mixin(module: Any) -> Any:
    """A module, of the class that it had before ``mixed``."""
    module.__class__ = type(module).__mro__[2]
    return module


def _reduce(self: Any, protocol: Any) -> Any:
    return _new, type(self).__mro__[1:3], self.__getstate__()


def _new(mixin: type, cls: type) -> Any:
    made: Any = mixed(mixin, cls)
    return made.__new__(made)


class GatedBatchNorm2d(nn.BatchNorm2d):
    """The norm before a ``GateEnd``, with the same parameters and buffers as any."""

    end: tuple[GateEnd]

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            self.end[0].ungate()
            return self(input)
        if not self.end[0].in_norm(input):
            return super().forward(input)
        gate = self.end[0].mechanism.gate()[0]
        if self.training:
            self.num_batches_tracked.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
        weight, bias = self.weight * gate, self.bias * gate
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, weight, bias, self.training, self.momentum or 0.0, self.eps)


def hooked(module: nn.Module) -> bool:
    """Whether more happens than the module's own forward when it is called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module) or bool(_has_any_global_hook())


def merge(block: Any) -> None:
    """Fold the gates of a block, then let it do what timm's ``reparameterize_model`` asks of it.

    Raises:
        ValueError: What stands there depends on the image.
    """
    for name in slots(block):
        end = getattr(block, name)
        if isinstance(end, GateEnd):
            key = end.key()
            setattr(block, name, end.fuse())
            delattr(block, key)
        elif isinstance(end, BranchEnd):
            kind = type(end.mechanism).__name__
            raise ValueError(
                f"{type(block).__name__} cannot merge its branches: {kind} stands where they meet"
            )
    del block.reparameterize
    if hasattr(block, "reparameterize"):
        block.reparameterize()


def scale_parameters(block: nn.Module, branch: Branch, gate: Tensor) -> None:
    """Multiply what a branch gives by a gate of C entries above zero, in its parameters, in place.

    Raises:
        ValueError: No parameters of the branch scale its channels.
    """
    if not branch.affine:
        raise ValueError(
            f"{branch.block or 'the network'}.{branch.slot} ends in nothing that takes in a gate"
        )
    scale(block, branch.affine, gate, branch.channels)


def tensor_at(module: nn.Module, name: str) -> Any:
    """A parameter or buffer by its name in the state dict."""
    path, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(path), attribute)


def scale(block: nn.Module, names: Sequence[str], gate: Tensor, channels: int) -> None:
    """Multiply parameters, or buffers, of a block along their first axis, in place."""
    v = gate.detach().double().flatten()
    with torch.no_grad():
        for name in names:
            tensor = tensor_at(block, name)
            shape = tensor.shape if tensor.numel() == v.numel() else (-1, *[1] * (tensor.dim() - 1))
            # The parameters keep their identity, so that optimisers and EMA copies that hold them stay valid.
            tensor.copy_(tensor.double() * v.to(tensor.device).expand(channels).reshape(shape))


class GatedNorm:
    """Mixed into a norm layer: its weight and bias are its own times the gate of its child ``gated_by``.

    The class of the layer is exchanged, so its keys stay. What replaces norm layers, such as
    ``convert_sync_batchnorm``, must come first; it raises TypeError here.
    """

    gated_by: str
    _parameters: dict[str, Any]
    _modules: dict[str, Any]

    def reset_parameters(self) -> None:
        """As the norm layer does: ``weight`` and ``bias`` are computed here, and cannot be written to."""
        cls = type(self)
        without_mixin(self)
        try:
            self.reset_parameters()
        finally:
            self.__class__ = cls

    @property
    def weight(self) -> Any:
        return self._gated("weight")

    @property
    def bias(self) -> Any:
        return self._gated("bias")

    def _gated(self, name: str) -> Any:
        own = self._parameters.get(name)  # RMS norms have no bias
        return None if own is None else own * self.gate()

    def gate(self) -> Tensor:
        """The gate, C entries."""
        return self._modules[self.gated_by].gate()[0]

    @torch.no_grad()
    def scale(self, gate: Tensor) -> None:
        """Multiply the layer's own weight and bias."""
        for name in ("weight", "bias"):
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.copy_(parameter.double() * gate.double())

    def fuse(self) -> Any:
        """The norm layer alone, with the gate in its parameters."""
        self.scale(self.gate())
        del self._modules[self.gated_by]
        del self.gated_by
        return without_mixin(self)
