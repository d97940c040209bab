"""What a kernel of PyTorch's cannot do, found out before the first step."""

import os
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .recipe import Recipe

#: With as many input channels the kernel is right.
_ENOUGH = 16
#: Pixels of an output map up to which nothing is written out of bounds.
_PIXELS = 480


def check_kernels(network: nn.Module, size: tuple[int, ...], recipe: Recipe) -> None:
    """Refuse a network whose training would write out of bounds.

    The gradient of the weights of a strided 1×1 convolution of fewer than 16 input channels does so in
    oneDNN's kernels for AVX-512, in float32, where the output map is channels-last and has more than about
    500 pixels. The process ends then. Found with PyTorch 2.14 and guard pages.

    Args:
        network: With its weights on the CPU.
        size: Height and width of the images.

    Raises:
        UserError: It has such a convolution, and the machine such kernels.
    """
    suspects: dict[nn.Module, tuple[str, int]] = {
        module: (path, module.in_channels)
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.groups == 1
        and module.in_channels < _ENOUGH
    }
    if not (suspects and recipe.channels_last and recipe.precision == "no" and _has_such_kernels()):
        return
    pixels: dict[str, int] = {}

    def measure(module: nn.Module, _: Any, output: Any) -> None:
        pixels[suspects[module][0]] = output.shape[2] * output.shape[3]

    hooks = [module.register_forward_hook(measure) for module in suspects]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, *size))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    for path, channels in suspects.values():
        if pixels.get(path, 0) > _PIXELS:
            raise UserError(
                f"{path}, a strided 1×1 convolution of {channels} channels to a map of "
                f"{pixels[path]} pixels, would crash PyTorch in channels-last memory on this processor: give "
                f"--no-channels-last, or at least {_ENOUGH} channels"
            )


def _has_such_kernels() -> bool:
    """Whether training is on a CPU whose kernels are those for AVX-512."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    limited = limit.startswith(("SSE41", "AVX2")) or limit == "AVX"
    return not torch.accelerator.is_available() and torch.cpu._is_avx512_supported() and not limited
