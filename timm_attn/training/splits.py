"""The splits of a recipe, and what they settle of it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import UserError
from .augment import generator
from .data import NoSplit, Split, load_split
from .labels import match_classes
from .recipe import Recipe

#: The name of images that are held out of a training split ends in this.
HELD_OUT = "held out"


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
        eval_split = own_evaluation_split(recipe, options)
    for split in filter(None, (train_split, eval_split)):
        if split.skipped:
            accelerator.print(f"warning: {split.skipped} corrupt images of {split.name} are left out")
    if eval_split is not None:
        match_classes(eval_split, train_split.label_names)
        if not recipe.val_fraction:
            return Splits(train_split, eval_split)
    return Splits(*hold_out(train_split, recipe.val_fraction), eval_split)


def own_evaluation_split(recipe: Recipe, options: dict[str, Any]) -> Split | None:
    """The evaluation split; None where what ``val_fraction`` holds out stands in for it.

    That is where the data has none, and where ``eval_split`` is the name of held-out images.

    Raises:
        NoSplit: There is nothing to evaluate on.
        UserError: The data cannot be used.
    """
    if recipe.eval_split and recipe.eval_split.endswith(HELD_OUT):
        if not recipe.val_fraction:
            raise UserError(f"{recipe.eval_split!r} of {recipe.data} needs --val-fraction, as in training")
        return None
    try:
        return load_split(recipe.data, "eval", recipe.eval_split, **options)
    except NoSplit:
        if recipe.eval_split or not recipe.val_fraction:
            raise
        return None


def hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """A training split without a fraction of its images, always the same, and these.

    Raises:
        UserError: One of the two would be empty.
    """
    held_out = round(len(split) * fraction)
    if not 0 < held_out < len(split):
        raise UserError(
            f"val_fraction {fraction} holds out {held_out} of {len(split)} images: choose one that leaves "
            "some in both parts"
        )
    order = torch.randperm(len(split), generator=generator("held out"))
    part = split.select(order[:held_out].sort().values, f"{split.name}, {HELD_OUT}")
    part.skipped = 0  # corrupt images are in no part
    return split.select(order[held_out:].sort().values, split.name), part


def resolve_folders(recipe: Recipe) -> Recipe:
    """A recipe with whole paths of folders, since a run may be resumed and exported from another one."""
    return dataclasses.replace(
        recipe,
        **{name: resolved(getattr(recipe, name)) for name in ("data", "init", "teacher")},
    )


def resolved(source: str | None) -> str | None:
    """A source of data or weights, with its whole path if it is a folder."""
    if source is None or source == "digits":
        return source
    kind, path = split_kind(source)
    return f"{kind}{Path(path).resolve()}" if path and Path(path).is_dir() else source


def split_kind(source: str) -> tuple[str, str]:
    """What stands before the name or folder in a source, ``graft:`` and ``local-dir:``, and this."""
    rest = source.removeprefix("graft:").removeprefix("local-dir:")
    return source.removesuffix(rest), rest


def resolve_recipe(recipe: Recipe, split: Split, cfg: dict[str, Any] | None) -> Recipe:
    """The recipe with the defaults that depend on the data, and on the weights that it starts from."""
    if cfg is not None:
        mean, std = cfg["mean"], cfg["std"]
    elif split.pixels is not None:
        mean, std = split.statistics()
        if recipe.std is None and min(std) < 1e-4:
            raise UserError(
                f"the images of {recipe.data} are constant in a channel: repair them, or give --std"
            )
    else:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return dataclasses.replace(
        resolve_folders(recipe),
        mean=recipe.mean or tuple(round(m, 4) for m in mean),
        std=recipe.std or tuple(round(s, 4) for s in std),
        hflip=recipe.hflip if recipe.hflip is not None else recipe.data != "digits",
    )
