"""What the commands share: the app, the console, and options that say which images are evaluated."""

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from tyro.extras import SubcommandApp

from ..training import Recipe

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
    data_config: str | None = None
    data_revision: str | None = None
    batch_size: int = 128
    image_column: str | None = None
    label_column: str | None = None
    on_corrupt: Literal["stop", "skip"] = "stop"
    workers: int = 2

    def recipe(self, **others: Any) -> Recipe:
        """A recipe that reads them."""
        fields = {name: value for name, value in vars(self).items() if name != "split"}
        return Recipe(**fields, eval_split=self.split, **others)


def figure(value: Any, digits: int) -> str:
    """A number, or mean ± standard deviation of several runs."""
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"
