"""What the commands share: the app, the console, and options that say which images are evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tyro.extras import SubcommandApp

from ..load import RECIPE
from ..training import Recipe
from ..training.recipe_file import load_recipe

app = SubcommandApp()
console = Console(soft_wrap=True, highlight=False, markup=False)  # names may hold brackets
if not console.is_terminal:
    console.width = 170  # a pipe has no width, and tables cut to 80 columns lose names


class Stopped(Exception):
    """A command was stopped by the user."""


@dataclass(frozen=True)
class Images:
    """Labelled images to evaluate a model on.

    Args:
        data: A folder of parquet files or images, a dataset id on the Hugging Face Hub, or digits (from
            scikit-learn).
        split: Split to evaluate on; by default test, or validation if there is no test.
        val_fraction: Without such a split, evaluate on the images that `train --val-fraction` holds out of
            the training split; by default as in the run.
        data_config: Configuration of the dataset, if it has several.
        data_revision: Branch, tag or commit of a dataset on the Hub.
        batch_size: Images per batch.
        image_column: Image column; by default found by its type.
        label_column: Label column; by default found by its type.
        on_corrupt: Stop at a corrupt image, or skip and count it.
        workers: Worker processes that decode larger images.
    """

    data: str
    split: str | None = None
    val_fraction: float = 0.0
    data_config: str | None = None
    data_revision: str | None = None
    batch_size: int = 128
    image_column: str | None = None
    label_column: str | None = None
    on_corrupt: Literal["stop", "skip"] = "stop"
    workers: int = 2

    def recipe(self, source: str, **others: Any) -> Recipe:
        """A recipe that reads them, for a model from a source that may have a recipe of its own."""
        fields = {name: value for name, value in vars(self).items() if name != "split"}
        own = Path(source.removeprefix("local-dir:")) / RECIPE
        if not self.val_fraction and own.is_file():
            fields["val_fraction"] = load_recipe(own).val_fraction
        return Recipe(**fields, eval_split=self.split, **others)


def figure(value: Any, digits: int) -> str:
    """A number, or mean ± standard deviation of several runs."""
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"
