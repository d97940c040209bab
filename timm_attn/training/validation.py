"""Evaluates a model on a dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from torch import Tensor

from ..compare import full_float32
from ..errors import UserError
from ..images import DataError
from ..load import is_run
from .batches import Batches, Shard
from .data import NoSplit, Split, load_split
from .evaluation import evaluate
from .labels import match_classes
from .processes import make_accelerator, own_accelerate_state
from .progress import track
from .recipe import Recipe
from .run import open_run
from .splits import HELD_OUT, hold_out, own_evaluation_split, split_options


def evaluation_split(
    model: Any, recipe: Recipe, config: dict[str, Any], source: str | Path | None = None
) -> Split:
    """The split that a recipe's data is evaluated on, with a model's classes.

    Without such a split, or where ``eval_split`` is its name, it is what ``val_fraction`` holds out of the
    training split, as in a run.

    Args:
        model: With a configuration.
        recipe: Data, split or ``val_fraction``, columns.
        config: timm's data configuration of the model.
        source: What the model was loaded from. A run knows the images of which some were held out.

    Raises:
        UserError: The data cannot be used, or its classes are not the model's; or other images would be held
            out now than in the run.
    """
    options = model_options(recipe, config)
    try:
        split = own_evaluation_split(recipe, options)
    except NoSplit as error:
        hint = "choose with --split"
        if _run_of(source) is None:
            hint += ", or give the --val-fraction that the model was trained with"
        raise DataError(f"{error.found}: {hint}{error.above}") from None
    if split is None:
        train = load_split(recipe.data, "train", recipe.train_split, **options)
        _check_same_training_split(train, source)
        split = hold_out(train, recipe.val_fraction)[1]
    names = model.pretrained_cfg.get("label_names")
    if not names and not split.named:
        names = [str(i) for i in range(model.num_classes)]
    if names:
        match_classes(split, list(names))
    elif model.num_classes != len(split.label_names):
        raise UserError(
            f"the model has {model.num_classes} classes without names, {recipe.data} has "
            f"{len(split.label_names)}: choose data with the same classes"
        )
    return split


def model_options(recipe: Recipe, config: dict[str, Any]) -> dict[str, Any]:
    """What a recipe and a model's data configuration say to ``load_split`` of any split."""
    height, width = config["input_size"][1:]
    # Small images are read whole and bilinearly: with another preparation they go the way of larger ones.
    encoded = config["crop_pct"] < 1 or config["interpolation"] != "bilinear"
    return {**split_options(recipe, (width, height)), "encoded": encoded}


def _check_same_training_split(split: Split, source: str | Path | None) -> None:
    """Raise a UserError if a run was trained on another state of a split than what is held out of now."""
    run = _run_of(source)
    if run is None:
        return
    then = open_run(run).get("fingerprints", {}).get(split.name, split.fingerprint)
    if then != split.fingerprint:
        raise UserError(
            f"the split {split.name} of {split.data} is not, or no longer, what {run} was trained on: some "
            "of what is held out of it now may have been. Restore it, or name another split with --split"
        )


def _run_of(source: str | Path | None) -> Path | None:
    """The run that a model was loaded from, if it was one."""
    run = Path(str(source).removeprefix("local-dir:"))
    return run if source is not None and is_run(run) else None


def prepared(
    model: Any, recipe: Recipe, precision: str, source: str | Path | None = None
) -> tuple[Accelerator, dict[str, Any], Split]:
    """The accelerator, timm's data configuration of a model, and the split that it is evaluated on.

    Raises:
        UserError: See ``evaluation_split``.
    """
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise UserError(f"the model takes images of {channels} channels, and data is read as RGB")
    accelerator = make_accelerator(precision)
    config: dict[str, Any] = resolve_model_data_config(model)
    with accelerator.local_main_process_first():
        split = evaluation_split(model, recipe, config, source)
    if split.name.endswith(HELD_OUT):
        accelerator.print(f"evaluated on {len(split):,} images of {recipe.data} ({split.name})")
    return accelerator, config, split


def split_tensors(
    split: Split, recipe: Recipe, config: dict[str, Any], most: int, show: bool = False
) -> tuple[Tensor, Tensor]:
    """Images B × C × H × W as the model takes them, and labels, of a split or of so many of it, at random.

    Args:
        split: From ``evaluation_split``, say.
        recipe: Batch size, workers, what is done about corrupt images.
        config: timm's data configuration of the model.
        most: Number of images.
        show: Draw a progress bar.
    """
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:most].sort().values
    batches = Batches(split.select(rows, split.name), recipe, config, Shard(torch.device("cpu")))
    images, labels, count = torch.empty(0), torch.empty(len(rows), dtype=torch.int64), 0
    for part in track(batches.evaluate(), batches.evaluation_steps, show, "reading images"):
        end = count + len(part.labels)
        if end == count:  # of corrupt images nothing is left
            continue
        if not count:  # room for all, which may take much of the memory, is made once
            images = part.images.new_empty(len(rows), *part.images.shape[1:])
        images[count:end], labels[count:end], count = part.images, part.labels, end
    if not count:
        raise DataError(f"no image of {split.data} ({split.name}) can be decoded: choose other data")
    return images[:count], labels[:count]


@own_accelerate_state()
def evaluation_images(
    model: Any, recipe: Recipe, most: int, show: bool = False, source: str | Path | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """Images of the evaluation split in random order, always the same, their labels, and the classes' names.

    Args:
        model: With a configuration.
        recipe: Data, split, columns.
        most: Number of images.
        show: Draw a progress bar.
        source: What the model was loaded from.

    Raises:
        UserError: See ``evaluation_split``.
    """
    _, config, split = prepared(model, recipe, "no", source)
    images, labels = split_tensors(split, recipe, config, most, show)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    return images[order], labels[order], split.label_names


@dataclass(frozen=True)
class Evaluated:
    """What a model says of a whole split.

    Attributes:
        logits: B × classes in float32, on the CPU.
        labels: B.
        names: Of the classes.
        split: The images.
        config: timm's data configuration of the model.
        recipe: How they are read.
    """

    logits: Tensor
    labels: Tensor
    names: list[str]
    split: Split
    config: dict[str, Any]
    recipe: Recipe

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images B × C × H × W as the model takes them, and labels, by number."""
        return split_tensors(self.split.select(rows, self.split.name), self.recipe, self.config, len(rows))


@own_accelerate_state()
@torch.no_grad()
def evaluated(model: Any, recipe: Recipe, show: bool = False, source: str | Path | None = None) -> Evaluated:
    """Logits of every image of the evaluation split, without keeping the images.

    Args:
        model: From ``load_model``.
        recipe: Data, split, columns, batch size. Corrupt images must not be skipped.
        show: Draw a progress bar.
        source: What the model was loaded from.

    Raises:
        UserError: See ``evaluation_split``.
    """
    accelerator, config, split = prepared(model, recipe, recipe.precision, source)
    model = model.to(accelerator.device)
    batches = Batches(split, recipe, config, Shard(accelerator.device))
    logits, labels = [], []
    for part in track(batches.evaluate(), batches.evaluation_steps, show):
        with accelerator.autocast(), full_float32():
            logits.append(model(part.images).float().cpu())
        labels.append(part.labels.cpu())
    return Evaluated(torch.cat(logits), torch.cat(labels), split.label_names, split, config, recipe)


@own_accelerate_state()
def validate(
    model: Any, recipe: Recipe, show: bool = False, source: str | Path | None = None
) -> dict[str, float]:
    """Evaluate a model on the evaluation split of a recipe's data; see ``evaluate`` for the figures.

    Args:
        model: A model from ``load_model``.
        recipe: Data, split, columns, batch size, precision, workers.
        show: Show a progress bar.
        source: What the model was loaded from.

    Raises:
        UserError: See ``evaluation_split``.
    """
    accelerator, config, split = prepared(model, recipe, recipe.precision, source)
    model = model.to(accelerator.device)
    shard = Shard(accelerator.device, accelerator.process_index, accelerator.num_processes)
    with full_float32():
        figures = evaluate(model, Batches(split, recipe, config, shard), accelerator, show)
    skipped = split.skipped + int(figures.get("skipped", 0))
    return {**figures, "skipped": skipped} if skipped else figures
