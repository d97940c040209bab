"""What stands at the end of a residual branch, or in place of a norm layer, without touching their keys."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .branches import Branch
from .compare import double, unwrapped
from .layers import ConstantGate
from .layers.eager import eager
from .tokens import map_size, reads_neighbours


class BranchEnd(nn.Module):
    """Stands in the slot of a residual branch: a mechanism, and after it what stood there.

    The mechanism is registered in the block, so that its keys carry its name, and found there at each call.

    Args:
        block: The block.
        branch: Where in it.
        key: Name of the mechanism.
        mechanism: Called with what the branch gives. An ``nn.Sequential``, which would run it after its own
            layers, has it in its end instead. None if it is registered already.
        home: Where that is, if not in the block.
    """

    #: Whether tokens that are no patches are scaled like the others.
    all_tokens = False

    def __init__(
        self,
        block: nn.Module,
        branch: Branch,
        key: str,
        mechanism: nn.Module | None = None,
        home: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.inner = getattr(block, branch.slot)
        self.key = key
        # In a tuple, modules are no children.
        self._held = (block, home or (self if isinstance(block, nn.Sequential) else block))
        if mechanism is not None:
            setattr(self.home, key, mechanism)

    @property
    def block(self) -> nn.Module:
        return self._held[0]

    @property
    def home(self) -> nn.Module:
        """Where the mechanism is registered."""
        return self._held[1]

    @property
    def mechanism(self) -> Any:
        found = self.home._modules.get(self.key)
        if found is None:  # an AttributeError would speak of this property
            raise RuntimeError(f"{type(self.home).__name__} has lost its {self.key}: put a module there")
        return found

    def replace(self, mechanism: nn.Module | None) -> None:
        """Put another mechanism here, or leave what stood in the slot."""
        if mechanism is None:
            delattr(self.home, self.key)
            setattr(self.block, self.branch.slot, self.inner)
        else:
            setattr(self.home, self.key, mechanism)

    def forward(self, x: Tensor) -> Tensor:
        """What leaves a branch, B × C × H × W, B × H × W × C or B × N × C, to the same."""
        x = self.attend(x)
        return x if self.inner is None else self.inner(x)

    def attend(self, x: Tensor) -> Tensor:
        """The mechanism on what leaves the branch."""
        return self.on_map(self.mechanism, x)

    def on_map(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module on a map B × C × H × W; of tokens, on the patches.

        Raises:
            ValueError: It reads neighbouring patches, and which these are is not known.
        """
        if self.branch.axis == 1:
            return module(x)
        if x.dim() == 4:
            return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        others, patches = x[:, : self.branch.prefix], x[:, self.branch.prefix :]
        size = map_size(self.branch.grid, patches.shape[1])
        if size is None and reads_neighbours(module):
            grid = self.branch.grid
            attached = f" (it was attached for {grid[0]} × {grid[1]})" if grid else ""
            raise ValueError(
                f"{type(module).__name__} reads neighbouring patches, and how {patches.shape[1]} of them lie "
                f"is not known{attached}: name this size with img_size= of the network, or with images="
            )
        size = size or (patches.shape[1], 1)
        patches = module(patches.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return torch.cat([others, patches], 1) if others.shape[1] else patches


class GateEnd(BranchEnd):
    """A gate that does not depend on the image; ``timm_attn.fold`` multiplies it into the branch.

    Where the branch ends in a batch norm, that computes with its affine times the gate, as when it is folded:
    forward and backward pass each save a pass over the map.
    """

    all_tokens = True

    def __init__(self, block: nn.Module, branch: Branch, key: str, mechanism: nn.Module) -> None:
        super().__init__(block, branch, key, mechanism)
        self.norm = next(iter({name.rpartition(".")[0] for name in branch.affine}), "")
        norm: Any = block.get_submodule(self.norm)
        if type(norm) is nn.BatchNorm2d and len(branch.affine) == 2 and norm.track_running_stats:
            norm.__class__ = GatedBatchNorm2d
            vars(norm)["end"] = (self,)

    def attend(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            self.ungate()
        if self.in_norm(x):
            return x
        gate, axis = self.mechanism, self.branch.axis
        if isinstance(unwrapped(gate), ConstantGate):
            return gate(x, axis)
        if axis == 1:  # what somebody has put in its place takes B × C × H × W
            return gate(x)
        maps = x.movedim(-1, 1)
        return (gate(maps) if x.dim() == 4 else gate(maps[..., None])[..., 0]).movedim(1, -1)

    def ungate(self) -> None:
        """Make the norm a plain one for good, as tracers must see it, and apply the gate here."""
        norm: Any = self.block.get_submodule(self.norm)
        if type(norm) is GatedBatchNorm2d:
            norm.__class__ = nn.BatchNorm2d  # pyright: ignore[reportAttributeAccessIssue]
            del norm.end

    def in_norm(self, x: Tensor) -> bool:
        """Whether the norm multiplies by the gate, so that nothing is left to do at the end of the branch.

        It does not if it or the gate was replaced, is hooked, is traced, or has lost its running statistics.
        """
        norm = self.block.get_submodule(self.norm)
        if type(norm) is not GatedBatchNorm2d or not isinstance(self.mechanism, ConstantGate):
            return False
        if norm.momentum is None or not norm.track_running_stats or norm.running_mean is None:
            return False
        if hooked(norm) or hooked(self) or hooked(self.mechanism):
            return False
        return torch.compiler.is_compiling() or eager(x)

    def fuse(self) -> nn.Module | None:
        """Multiply the gate into the branch; what stood in the slot. ``reparameterize_model`` calls it.

        Raises:
            ValueError: No parameters of the branch scale its channels, or another module stands in place of
                the gate.
        """
        gate = unwrapped(self.mechanism)
        if not isinstance(gate, ConstantGate):
            raise ValueError(
                f"{type(gate).__name__} stands in place of the gate: merge or unload what has put it there"
            )
        scale_parameters(self.block, self.branch, gate.gate())
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
    v = double(gate.detach()).flatten()
    with torch.no_grad():
        for name in names:
            tensor = tensor_at(block, name)
            shape = tensor.shape if tensor.numel() == v.numel() else (-1, *[1] * (tensor.dim() - 1))
            # The parameters keep their identity, so that optimisers and EMA copies that hold them stay valid.
            was = double(tensor)
            tensor.copy_(was * v.to(was.device).expand(channels).reshape(shape))


class GatedNorm:
    """Mixed into a norm layer: its weight and bias are its own times the gate of its child ``gated_by``.

    The class of the layer is exchanged, so its keys stay. What replaces norm layers, such as
    ``convert_sync_batchnorm``, must come first; it raises TypeError here, or takes the gate in for good, as
    timm's ``freeze_batch_norm_2d`` does.
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
                parameter.copy_(double(parameter) * double(gate))

    def fuse(self) -> Any:
        """The norm layer alone, with the gate in its parameters."""
        self.scale(self.gate())
        del self._modules[self.gated_by]
        del self.gated_by
        return without_mixin(self)
