"""What a kernel of PyTorch's cannot do, found out before the first step."""

import os
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .processes import device_of_process
from .recipe import Recipe

#: By instruction set, the input channels from which the kernel is right, and the pixels of an output map up
#: to which it is.
_RIGHT = {"AVX512": (16, 480), "AVX2": (8, 0), "": (0, 0)}


def check_kernels(network: nn.Module, size: tuple[int, ...], recipe: Recipe) -> None:
    """Refuse a network whose training would write out of bounds.

    The gradient of the weights of a strided 1×1 convolution does so in oneDNN, in float32 and channels-last
    memory: with fewer than 16 input channels and an output map of more than about 500 pixels in kernels for
    AVX-512, with fewer than 8 channels in those for AVX2. The process ends then, or goes on with damaged
    memory. Found with PyTorch 2.14 and guard pages around every tensor.

    Args:
        network: With its weights on the CPU.
        size: Height and width of the images.

    Raises:
        UserError: It has such a convolution, and the machine such kernels.
    """
    enough, small = _RIGHT[_instructions()]
    suspects: dict[nn.Module, tuple[str, int]] = {
        module: (path, module.in_channels)
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.groups == 1
        and module.in_channels < enough
    }
    if not (suspects and recipe.channels_last and recipe.precision == "no"):
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
        if pixels.get(path, 0) > small:
            raise UserError(
                f"{path}, a strided 1×1 convolution of {channels} channels to a map of "
                f"{pixels[path]} pixels, would crash PyTorch in channels-last memory on this processor: give "
                f"--no-channels-last, or at least {enough} channels"
            )


def _instructions() -> str:
    """Those that oneDNN's kernels use here, as far as they matter; '' too where training is on no CPU."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if device_of_process().type != "cpu" or limit == "SSE41" or not torch.cpu._is_avx2_supported():
        return ""
    wide = torch.cpu._is_avx512_supported() and not limit.startswith("AVX2")
    return "AVX512" if wide else "AVX2"
