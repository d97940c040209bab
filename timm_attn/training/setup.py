"""What stands before the first step: processes, splits, the recipe's open ends, the network."""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ..errors import UserError
from .batches import derive_seed
from .data import Split, load_split
from .recipe import Recipe


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's view of this process; several may be made in turn, with different precisions."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU: use bf16")
    # The state is a singleton that refuses another precision; the process group lives elsewhere and stays.
    AcceleratorState._reset_state()
    # Without a word from us Accelerate ignores the other processes of a `torchrun` on CPUs.
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def recipe_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of a training run; a UserError if its processes cannot share the batch evenly."""
    accelerator = make_accelerator(recipe.precision)
    if recipe.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be shared by {accelerator.num_processes} processes: "
            "make it a multiple"
        )
    return accelerator


def load_splits(recipe: Recipe, accelerator: Accelerator) -> tuple[Split, Split]:
    """The training split and the one that is evaluated, with the same classes and decoded the same way."""
    size = (recipe.img_size, recipe.img_size) if recipe.img_size else None
    options: dict[str, Any] = {
        "size": size,
        "image_column": recipe.image_column,
        "label_column": recipe.label_column,
    }
    # The first process of each machine fills the cache of decoded images, the others read it.
    with accelerator.local_main_process_first():
        train_split = load_split(recipe.data, "train", recipe.train_split, **options)
        # Both the same way: the evaluated images are brought to the size of those trained on.
        if train_split.pixels is None:
            options["encoded"] = True
        else:
            height, width = train_split.pixels.shape[2:]
            options["size"] = (width, height)
        eval_split = load_split(recipe.data, "eval", recipe.eval_split, **options)
    match_classes(eval_split, train_split.label_names)
    return train_split, eval_split


def match_classes(split: Split, names: list[str]) -> None:
    """Give a split the classes of another, or raise a UserError if it has its own."""
    if not split.named and len(split.label_names) <= len(names):
        split.label_names = names
    elif split.label_names != names:
        raise UserError(
            f"{split.data} ({split.name}) has the classes {_some(split.label_names)}, not the expected "
            f"{_some(names)}: choose data with the same classes"
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''} ({len(names)})"


def resolve_recipe(recipe: Recipe, split: Split) -> Recipe:
    """The recipe with the defaults that depend on the data."""
    if split.pixels is not None:
        mean, std = split.statistics()
        if recipe.std is None and min(std) < 1e-4:
            raise UserError(
                f"the images of {recipe.data} are constant in a channel: repair them, or give --std"
            )
    else:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return dataclasses.replace(
        recipe,
        # A run may be resumed and exported from another folder.
        data=str(Path(recipe.data).resolve()) if Path(recipe.data).is_dir() else recipe.data,
        mean=recipe.mean or tuple(round(m, 4) for m in mean),
        std=recipe.std or tuple(round(s, 4) for s in std),
        hflip=recipe.hflip if recipe.hflip is not None else recipe.data != "digits",
    )


def build(model: str, recipe: Recipe, split: Split) -> nn.Module:
    """The network of a recipe, with the configuration that its checkpoint will carry.

    Raises:
        UserError: timm does not know the model, or the model refuses its arguments.
    """
    set_seed(derive_seed(recipe.seed, "init") % 2**32)
    # create_model drops arguments that are None, so they say nothing here.
    arguments = recipe.parsed_model_kwargs()
    try:
        network: Any = timm.create_model(model, num_classes=len(split.label_names), in_chans=3, **arguments)
        size = _image_size(network, recipe, split)
        with torch.no_grad():
            shape = tuple(network.eval()(torch.zeros(2, 3, *size)).shape)
        if shape != (2, len(split.label_names)):
            raise ValueError(f"its output has shape {shape} for 2 images, not (2, {len(split.label_names)})")
    except Exception as error:  # whatever a constructor of timm raises on odd arguments
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"cannot build {model}{given}: {type(error).__name__}: {error}") from None
    network.pretrained_cfg = network.default_cfg = {
        **{
            k: v
            for k, v in network.pretrained_cfg.items()
            if k not in ("file", "url", "hf_hub_id", "label_names")
        },
        "tag": None,
        "input_size": (3, *size),
        "pool_size": _pool_size(network.pretrained_cfg, size),
        "mean": recipe.mean,
        "std": recipe.std,
        "num_classes": len(split.label_names),
        # Small images are read whole; those that were resized, bilinearly.
        **({"crop_pct": 1.0, "interpolation": "bilinear"} if split.pixels is not None else {}),
    }
    return network.to(memory_format=torch.channels_last) if recipe.channels_last else network


def _pool_size(cfg: dict[str, Any], size: tuple[int, ...]) -> tuple[int, ...] | None:
    """Size of the last feature map: timm's configuration has it for images of the default size."""
    if not cfg.get("pool_size"):
        return None
    return tuple(
        math.ceil(pool * new / old)
        for pool, new, old in zip(cfg["pool_size"], size, cfg["input_size"][1:], strict=True)
    )


def _image_size(network: Any, recipe: Recipe, split: Split) -> tuple[int, ...]:
    """Height and width of the images of a run."""
    if split.pixels is not None:
        return tuple(split.pixels.shape[2:])
    return (recipe.img_size,) * 2 if recipe.img_size else tuple(network.pretrained_cfg["input_size"][1:])


def check_model(name: str) -> None:
    """Raise a UserError with the nearest names if timm has no model of this name."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "`timm-attn list` shows this package's models"
        )
        raise UserError(f"unknown model {name!r}: {hint}")
