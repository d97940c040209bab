"""What stands before the first step: processes, memory and splits."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs

from ..errors import UserError
from .augment import generator
from .data import Split, load_split
from .labels import match_classes
from .recipe import Recipe

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


@dataclass(frozen=True)
class Splits:
    """What a run reads.

    Attributes:
        train: Trained on.
        eval: Evaluated after each epoch.
        test: Evaluated once, after the last epoch; None where ``eval`` is the reported split.
    """

    train: Split
    eval: Split
    test: Split | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {split.name: len(split) for split in (self.train, self.eval, self.test) if split}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Digests of labels and images by split."""
        return {split.name: split.fingerprint for split in (self.train, self.eval, self.test) if split}


def make_accelerator(precision: str, **kwargs: Any) -> Accelerator:
    """Accelerate's view of this process; several may be made in turn, with different precisions."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU: use bf16")
    # The state is a singleton that refuses another precision; the process group lives elsewhere and stays.
    AcceleratorState._reset_state()
    # Some processes wait while the first one downloads and prepares the data.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(
        mixed_precision=precision,
        # Without a word from us Accelerate ignores the other processes of a `torchrun` on CPUs.
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[patience],
        **kwargs,
    )


@contextlib.contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Give a caller's Accelerate its state back: precision and accumulation are singletons of the process."""
    singletons = [AcceleratorState._shared_state, GradientState._shared_state]
    theirs = [dict(state) for state in singletons]
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
    if mallopt is not None:
        for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(threshold, 1 << 30)


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
        raise UserError(f"tracker {', '.join(missing)} is not installed: `pip install 'timm-attn[track]'`")
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


def split_options(recipe: Recipe, size: tuple[int, int] | None) -> dict[str, Any]:
    """What a recipe says to ``load_split`` of any split; ``size`` is width and height."""
    return {
        "size": size,
        "image_column": recipe.image_column,
        "label_column": recipe.label_column,
        "skip_corrupt": recipe.on_corrupt == "skip",
        "config": recipe.data_config,
        "revision": recipe.data_revision,
    }


def load_splits(recipe: Recipe, accelerator: Accelerator) -> Splits:
    """The splits of a recipe, with the same classes and decoded the same way."""
    options = split_options(recipe, (recipe.img_size, recipe.img_size) if recipe.img_size else None)
    # The first process of each machine fills the cache of decoded images, the others read it.
    with accelerator.local_main_process_first():
        train_split = load_split(recipe.data, "train", recipe.train_split, **options)
        # Both the same way: the evaluated images are brought to the size of those trained on.
        if train_split.pixels is None:
            options["encoded"] = True
        else:
            height, width = train_split.pixels.shape[1:3]
            options["size"] = (width, height)
        eval_split = load_split(recipe.data, "eval", recipe.eval_split, **options)
    for split in (train_split, eval_split):
        if split.skipped:
            accelerator.print(f"warning: {split.skipped} corrupt images of {split.name} are left out")
    match_classes(eval_split, train_split.label_names)
    if not recipe.val_fraction:
        return Splits(train_split, eval_split)
    held_out = round(len(train_split) * recipe.val_fraction)
    if not 0 < held_out < len(train_split):
        raise UserError(
            f"val_fraction {recipe.val_fraction} holds out {held_out} of {len(train_split)} images"
        )
    order = torch.randperm(len(train_split), generator=generator("held out"))
    name = train_split.name
    return Splits(
        train_split.select(order[held_out:].sort().values, name),
        train_split.select(order[:held_out].sort().values, f"{name}, held out"),
        eval_split,
    )
