"""What the commands share: the app, the console, and options that say which images are evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.extras import SubcommandApp

from ..errors import UserError
from ..training import Recipe
from ..training.progress import PipedConsole
from ..training.recipe_file import own_recipe

app = SubcommandApp()
console = PipedConsole(soft_wrap=True, highlight=False, markup=False)  # names may hold brackets
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
        split: Split to evaluate on; by default test, or validation if there is no test. 'train, held out' is
            what `train --val-fraction` held out, which is also taken where there is neither.
        val_fraction: The model's --val-fraction in training; known of a run and of a hub folder.
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
    val_fraction: float | None = None
    data_config: str | None = None
    data_revision: str | None = None
    batch_size: int = 128
    image_column: str | None = None
    label_column: str | None = None
    on_corrupt: Literal["stop", "skip"] = "stop"
    workers: int = 2

    def recipe(self, source: str, **others: Any) -> Recipe:
        """A recipe that reads them, for a model from a source that may have a recipe of its own.

        Raises:
            UserError: The model was trained with another ``val_fraction``, or a value is out of range.
        """
        fields = {name: value for name, value in vars(self).items() if name != "split"}
        own = own_recipe(source) or Recipe(val_fraction=self.val_fraction or 0.0)
        if self.val_fraction and self.val_fraction != own.val_fraction:
            raise UserError(
                f"{source} was trained with --val-fraction {own.val_fraction}, not "
                f"{self.val_fraction}: leave it out"
            )
        if self.val_fraction is None:
            fields["val_fraction"] = own.val_fraction
        if Path(own.data).name == Path(self.data).name:
            fields["train_split"] = own.train_split
        return Recipe(**fields, eval_split=self.split, **others)


def figure(value: Any, digits: int) -> str:
    """A number, or mean ± standard deviation of several runs."""
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"
