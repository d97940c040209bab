"""How many images at a time fit a device's memory, found by trying."""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from .batches import Batch


def images_that_fit(
    update: Callable[[Iterator[Batch]], Any],
    shape: torch.Size,
    least: int,
    memory_format: torch.memory_format,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
) -> int:
    """The most images at a time with which steps can be taken, of a half, a quarter and so on; 0 if none.

    What is tried is the step of the run itself, with what the optimiser keeps. It spoils the weights.

    Args:
        update: Takes an optimiser step on the next batches of an iterator.
        shape: Of the images that did not fit, B × C × H × W.
        least: The number of images is a multiple of it.
        memory_format: Of the images.
        accelerator: Accelerate's view of this process.
        optimizer: The optimiser of ``update``.
    """
    size, *rest = shape
    fits = size // 2 // least * least
    _forget_step(accelerator, optimizer)
    while fits:
        try:
            _two_steps(update, [fits, *rest], memory_format, accelerator.device)
            break
        except torch.OutOfMemoryError:
            fits = fits // 2 // least * least
        _forget_step(accelerator, optimizer)  # here, where no error holds what has been computed
    return fits


def _two_steps(
    update: Callable[[Iterator[Batch]], Any],
    shape: list[int],
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    """In the second step the optimiser has all it keeps."""
    images = torch.zeros(shape, device=device).contiguous(memory_format=memory_format)
    batch = Batch(images, torch.zeros(shape[0], dtype=torch.int64, device=device))
    for _ in range(2):
        update(itertools.repeat(batch))


def _forget_step(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Give back what a step holds that broke off."""
    optimizer.zero_grad()
    scaler = accelerator.scaler
    if scaler is not None:  # which may have unscaled gradients already, and would not do so again
        scaler.scale(torch.zeros(1, device=accelerator.device))  # it has no scale before it is first used
        scaler.update(scaler.get_scale())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
