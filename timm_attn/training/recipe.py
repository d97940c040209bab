"""The recipe of a run: a dataclass whose field docstrings are the help of ``timm-attn train``."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import UserError


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    data: str = ""
    """A folder of parquet files or images, a Hugging Face dataset id, or `digits` (in scikit-learn)."""

    epochs: int = 30
    """Passes over the training split."""

    batch_size: int = 128
    """Images per optimiser step, over all processes. An incomplete last batch is dropped."""

    seed: int = 0
    """Seed of initialisation, order and augmentation."""

    model_kwargs: tuple[str, ...] = ()
    """Arguments of timm.create_model as key=value, e.g. `channels=[16,32,64,128] delta=2`."""

    opt: str = "sgd"
    """Optimiser, by timm's name (`sgd` has Nesterov momentum, `momentum` has not)."""

    lr: float = 0.2
    """Peak learning rate."""

    momentum: float = 0.9
    """Momentum, for optimisers that have one."""

    weight_decay: float = 5e-4
    """Weight decay; as in timm, not on biases and norm layers."""

    sched: Literal["cosine", "multistep"] = "cosine"
    """Course of the learning rate: down to `min_lr`, or times `decay_rate` at each of `decay_epochs`."""

    decay_epochs: tuple[int, ...] = ()
    """Epochs at which `multistep` lowers the learning rate."""

    decay_rate: float = 0.1
    """Factor of `multistep`."""

    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises linearly from 0; never more than half of the run."""

    min_lr: float = 0.0
    """Learning rate at the end."""

    smoothing: float = 0.0
    """Label smoothing."""

    clip_grad: float | None = None
    """Greatest norm of the gradient; longer ones are scaled down to it."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision: `no` is fp32, fp16 needs a GPU."""

    channels_last: bool = True
    """Keep the model and the images in channels-last memory format, which is faster."""

    img_size: int | None = None
    """Side of the images in pixels. By default small images stay as they are, others get the model's."""

    crop_padding: int = 4
    """Small images: zeros around the image before a random crop of its own size."""

    hflip: bool | None = None
    """Mirror half of the training images. By default yes, but not on digits."""

    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]. By default the training split's for small images, ImageNet's for others."""

    std: tuple[float, float, float] | None = None
    """Channel standard deviations in [0, 1], with the same default."""

    train_split: str | None = None
    """Name of the training split; `train` by default."""

    eval_split: str | None = None
    """Name of the split evaluated after each epoch; by default `test`, or `validation` without one."""

    image_column: str | None = None
    """Image column; found by its type by default."""

    label_column: str | None = None
    """Label column; found by its type by default."""

    workers: int = 2
    """Processes that decode and augment larger images. Small images need none."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0 means one at the end of each epoch."""

    keep_checkpoints: int = 2
    """Number of checkpoints kept for resuming."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "warmup_epochs",
            "checkpoint_every",
            "crop_padding",
            "workers",
            "weight_decay",
            "min_lr",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.lr > 0:
            raise UserError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UserError(f"clip_grad must be positive, got {self.clip_grad}")
        if self.img_size is not None and self.img_size < 8:
            raise UserError(f"img_size must be at least 8 pixels, got {self.img_size}")
        if (self.sched == "multistep") != bool(self.decay_epochs):
            raise UserError(
                f"decay_epochs belong to sched multistep, got {self.decay_epochs} with {self.sched}"
            )
        self.parsed_model_kwargs()

    def parsed_model_kwargs(self) -> dict[str, Any]:
        """``model_kwargs`` as a dictionary; values are read as YAML, so that numbers and lists work."""
        parsed = {}
        for item in self.model_kwargs:
            key, equals, value = item.partition("=")
            if not equals or not key.isidentifier():
                raise UserError(f"model_kwargs takes key=value, got {item!r}")
            if key in ("num_classes", "pretrained", "in_chans"):
                raise UserError(f"model_kwargs cannot set {key}: it follows from the data")
            try:
                parsed[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"model_kwargs {key}={value!r} is not a YAML value: {error}") from None
        return parsed


def recipe_arguments(path: str | Path) -> list[str]:
    """The fields of a YAML recipe as command-line arguments, so that one parser checks both.

    Raises:
        UserError: The file is missing, is not a YAML mapping, or names an unknown field.
    """
    path = Path(path)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"recipe {path} must be a mapping of field to value, got {type(fields).__name__}")
    kinds = {f.name: f.type for f in dataclasses.fields(Recipe)}
    arguments = []
    for name, value in fields.items():
        if name not in kinds:
            raise UserError(f"recipe {path}: unknown field {name!r}; the fields are {', '.join(kinds)}")
        flag = str(name).replace("_", "-")
        if kinds[name] is bool:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            arguments += [f"--{flag}", *(f"{key}={json.dumps(item)}" for key, item in value.items())]
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{flag}", *map(str, values)]
    return arguments


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file.

    Raises:
        UserError: As :func:`recipe_arguments`, or a value is out of range.
        SystemExit: A value is of the wrong type; the parser has printed which.
    """
    import tyro  # slow to import, and only commands need it

    return tyro.cli(Recipe, args=recipe_arguments(path), prog=str(path))


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write all fields of a recipe as YAML."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}
    Path(path).write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
