"""Load a model by whatever names it, and measure it on a data set."""

from typing import Any

import timm
from timm.data import resolve_model_data_config

from ..errors import UserError
from ..weights import WeightsError, without_tokens
from .batches import Batches, Shard
from .data import Split, load_split
from .evaluation import evaluate
from .labels import match_classes
from .network import source_name
from .recipe import Recipe
from .setup import make_accelerator, own_accelerate_state, split_options


def load_model(name: str) -> Any:
    """A model with its weights, in eval mode.

    Args:
        name: A model name with pretrained weights, a run folder, a hub folder, or ``hf-hub:`` or
            ``local-dir:`` and what timm takes after them.

    Raises:
        UserError: The name stands for none of these.
        WeightsError: The model has no weights, or damaged ones.
    """
    name = source_name(name)
    try:
        return timm.create_model(name, pretrained=True).eval()
    except WeightsError:
        raise
    except Exception as error:  # timm, safetensors and the Hub client raise many types
        reason = " ".join(without_tokens(error).split())  # the Hub client's messages have empty lines
        raise UserError(f"cannot load {name}: {type(error).__name__}: {reason}") from None


def evaluation_split(model: Any, recipe: Recipe, config: dict[str, Any]) -> Split:
    """The split that a recipe's data is evaluated on, with a model's classes.

    Args:
        model: With a configuration.
        recipe: Data, split, columns.
        config: timm's data configuration of the model.

    Raises:
        UserError: The data cannot be used, or its classes are not the model's.
    """
    height, width = config["input_size"][1:]
    split = load_split(recipe.data, "eval", recipe.eval_split, **split_options(recipe, (width, height)))
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


@own_accelerate_state()
def validate(model: Any, recipe: Recipe, show: bool = False) -> dict[str, float]:
    """Measure a model on the evaluation split of a recipe's data; see :func:`evaluate` for the figures.

    Args:
        model: From :func:`load_model`.
        recipe: Data, split, columns, batch size, precision, workers.
        show: Draw a progress bar.

    Raises:
        UserError: The data cannot be used, or its classes are not the model's.
    """
    accelerator = make_accelerator(recipe.precision)
    config: dict[str, Any] = resolve_model_data_config(model)
    with accelerator.local_main_process_first():
        split = evaluation_split(model, recipe, config)
    model = model.to(accelerator.device)
    shard = Shard(accelerator.device, accelerator.process_index, accelerator.num_processes)
    figures = evaluate(model, Batches(split, recipe, config, shard), accelerator, show)
    skipped = split.skipped + int(figures.get("skipped", 0))
    return {**figures, "skipped": skipped} if skipped else figures
