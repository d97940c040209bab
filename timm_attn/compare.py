"""Two networks on the same images."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from typing import Any

import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

#: What a model is called with: one tensor, a tuple of positional arguments or a dictionary of named ones.
Inputs = Tensor | tuple[Any, ...] | dict[str, Any]

#: Largest max|Δlogit| ÷ max|logit| that folding may cause, by dtype. The half-precision bounds are a few
#: roundings of the network's own arithmetic: folding moves the rounding of γ · v from run time to fold time.
#: FMMNets multiply roundings: random ones of 50 layers differ from themselves in float64 by up to 4e-5 in
#: float32, and from their fused form as much (3e-12 in float64). `fold` refuses those, in float32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


_WRAPPERS = (DataParallel, DistributedDataParallel, ModelEmaV2, ModelEmaV3, AveragedModel)


def unwrapped(model: Any) -> Any:
    """The network in what wraps it for training. A network with a child called ``module`` is no wrapper."""
    while True:
        model = getattr(model, "_orig_mod", model)  # of a compiled one
        if isinstance(model, ModelEma):
            model = model.ema
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


def double(x: Tensor) -> Tensor:
    """x in float64; on the CPU if it is on one of Apple's GPUs, which have none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class FoldError(RuntimeError):
    """The outputs of a folded model differ from those of the original."""


def above_bound(error: float, dtype: torch.dtype) -> str:
    """A message if max|Δlogit| ÷ max|logit| is above ``BOUNDS`` or NaN, or else ''."""
    if error <= BOUNDS[dtype]:
        return ""
    return f"max|Δlogit| / max|logit| = {error:.3g}, allowed {BOUNDS[dtype]:g}"


@torch.no_grad()
def relative_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """max|Δlogit| ÷ max|logit| of two models on the same images; both are put in eval mode.

    With several outputs, the largest of their values.

    Raises:
        ValueError: The output contains no tensor.
        FoldError: An output of the first model is not finite, or the other's has another shape.
    """
    return max(relative(a, b) for a, b in compared(model, other, inputs))


def call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors of a model's output in float64 on the CPU."""

    def tensors(output: Any) -> list[Tensor]:
        leaves = tree_leaves(output)
        if len(leaves) == 1 and leaves[0] is output:
            if torch.is_tensor(output):
                return [torch.view_as_real(output) if output.is_complex() else output]
            return tensors(vars(output)) if is_dataclass(output) else []
        return [tensor for leaf in leaves for tensor in tensors(leaf)]

    output = call(model.eval(), inputs)
    found = [tensor.cpu().double() for tensor in tensors(output) if tensor.numel()]
    if not found:
        raise ValueError(f"the output, {type(output).__name__}, holds no tensor that could be compared")
    return found


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in float32, not in TF32 or bfloat16, whatever has been chosen for speed.

    PyTorch has two ways to choose, the older of which cannot be read where the newer says otherwise. Both are
    set. What a switch inherited is its own afterwards.
    """
    backends: Any = torch.backends
    switches = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    switches += [backends.mkldnn.conv, backends.mkldnn.matmul]
    chosen = [switch.fp32_precision for switch in switches]
    convolutions, products = True, "highest"  # PyTorch's defaults
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    try:
        backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        for switch, precision in zip(switches, chosen, strict=True):
            switch.fp32_precision = precision


def compared(model: nn.Module, other: nn.Module, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """The outputs of two models, in pairs."""
    with full_float32():
        ours, theirs = outputs_of(model, inputs), outputs_of(other, inputs)
    if not all(tensor.isfinite().all() for tensor in ours):
        raise FoldError(
            "the model's own output is not finite: its weights or the images hold NaN or infinity"
        )
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise FoldError(f"the outputs have the shapes {shapes[1]} instead of {shapes[0]}")
    return list(zip(ours, theirs, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    difference = (a - b).abs().max().item()
    return difference / a.abs().max().item() if difference else 0.0
