"""What a run needs of its machine: a compiler, memory, and Accelerate for its processes."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from ..errors import UserError, install
from .recipe import Recipe

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def check_compiler(device: torch.device) -> None:
    """Raise a UserError if ``torch.compile`` cannot make a program for a device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, no Python headers: each of its own type
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.compile does not work on this machine ({type(error).__name__}: {reason}): install a C++ "
            "compiler, or leave out --compile"
        ) from error


def make_accelerator(precision: str, **kwargs: Any) -> Accelerator:
    """Accelerate's view of this process; several may be made in turn, with different precisions."""
    if precision == "fp16" and (not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")):
        raise UserError("precision fp16 needs a GPU: use bf16")
    # The state is a singleton that refuses another precision; the process group lives elsewhere and stays.
    AcceleratorState._reset_state()
    # Some processes wait while the first one downloads and prepares the data.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        mixed_precision=precision,
        # Without a word from us Accelerate ignores the other processes of a `torchrun` on CPUs.
        cpu=not torch.accelerator.is_available(),
        # Whatever `accelerate config` and the environment say: the recipe decides.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[patience],
        **kwargs,
    )
    if accelerator.distributed_type in _SHARDED:
        raise UserError(
            f"Accelerate is configured for {accelerator.distributed_type.value}, where no process has "
            "the whole network: start with `accelerate launch --multi_gpu`, or change `accelerate config`"
        )
    return accelerator


def device_of_process() -> torch.device:
    """Where this process computes: what Accelerate has settled, or else the accelerator, if there is one."""
    settled = PartialState._shared_state.get("device")
    return settled or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextlib.contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Give a caller's Accelerate its state back: precision and accumulation are singletons of the process."""
    singletons = [AcceleratorState._shared_state, GradientState._shared_state]
    theirs = [dict(state) for state in singletons]
    GradientState._shared_state.clear()  # one in the middle of an accumulation would let no optimiser step
    try:
        yield
    finally:
        for state, before in zip(singletons, theirs, strict=True):
            # An empty one stays ours: whoever asks next, the command line, would have to make it.
            if before:
                state.clear()
                state.update(before)


def keep_freed_memory() -> None:
    """Let glibc keep what one step frees for the next.

    By default it gives tensors of some megabytes back to the kernel at once, which then fills their pages
    with zeros anew at every step. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Before 2.35, glibc takes no more than 32 MiB; to set the other alone would make it keep even less.
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def recipe_accelerator(recipe: Recipe, run: Path) -> Accelerator:
    """The accelerator of a training run; a UserError if its processes cannot share the batch evenly."""
    try:
        accelerator = make_accelerator(
            recipe.precision, log_with=list(recipe.track) or None, project_dir=run if recipe.track else None
        )
    except ValueError as error:
        if not recipe.track:
            raise
        raise UserError(f"cannot track with {', '.join(recipe.track)}: {error}") from None
    missing = {*recipe.track} - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing:
        raise UserError(f"tracker {', '.join(missing)} is not installed: {install('track')}")
    parts = accelerator.num_processes * recipe.accumulation
    if recipe.batch_size % parts:
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"{recipe.accumulation} parts: make it a multiple of {parts}"
        )
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2:
        raise UserError(
            f"mixup and cutmix need an even number of images a process, not {recipe.batch_size // parts}: "
            f"make batch_size a multiple of {2 * parts}"
        )
    return accelerator
