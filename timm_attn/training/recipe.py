"""The recipe of a run: a dataclass whose field docstrings are the help of ``timm-attn train``."""

import ast
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import yaml

from ..errors import UserError
from .augment import AutoAugment


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run."""

    #: For recipe files, where a split may be called 2024.
    __pydantic_config__: ClassVar = {"coerce_numbers_to_str": True}

    data: str = ""
    """A folder of parquet files or images, a dataset id on the Hugging Face Hub, or `digits` (from
    scikit-learn)."""

    data_config: str | None = None
    """Configuration of the dataset, in the sense of `datasets`, if it has several."""

    data_revision: str | None = None
    """Branch, tag or commit of a dataset on the Hub."""

    epochs: int = 30
    """Number of epochs, by default passes over the training split."""

    epoch_steps: int | None = None
    """Optimiser steps per epoch; by default, as many as one pass over the training split takes."""

    batch_size: int = 128
    """Images per optimiser step, summed over all processes. An incomplete last batch is dropped."""

    seed: int = 0
    """Seed of the initialisation, the order of the images and their augmentation."""

    model_kwargs: tuple[str, ...] = ()
    """Arguments of timm.create_model as key=value, e.g. `channels=[16,32,64,128] delta=2`."""

    init: str | None = None
    """Initial weights: a model name with a tag, a run or hub folder, `hf-hub:ORG/NAME`, or `graft:` and the
    stock network to graft from (`graft:resnet50.a1_in1k`). Their classes may differ from the data's."""

    teacher: str | None = None
    """Distillation: train on the predictions of this network instead of the labels. Named like `init`; it
    must have the same classes."""

    freeze: Literal["nothing", "backbone"] = "nothing"
    """What to freeze; with `backbone`, only the classifier and the attention are trained."""

    opt: str = "sgd"
    """Optimiser, by timm's name (`sgd` uses Nesterov momentum, `momentum` does not)."""

    opt_args: tuple[str, ...] = ()
    """Further arguments of the optimiser as key=value, e.g. `betas=[0.9,0.95] eps=1e-6`."""

    lr: float = 0.2
    """Peak learning rate."""

    momentum: float = 0.9
    """Momentum, for optimisers that use it."""

    weight_decay: float = 5e-4
    """Weight decay; as in timm, not applied to biases and norm layers."""

    decay_norms: bool = False
    """Apply weight decay to biases and norm layers, too, as in most papers."""

    layer_decay: float | None = None
    """Layer-wise decay: the learning rate of each layer is that of the layer after it times this, e.g. 0.75.
    The last layer has `lr`."""

    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "onecycle"] = "cosine"
    """Learning rate schedule, updated at every step: timm's, or PyTorch's OneCycleLR (constant momentum)."""

    decay_epochs: tuple[int, ...] = ()
    """Epochs at which `multistep` lowers the learning rate; for `step`, the interval in epochs."""

    decay_rate: float = 0.1
    """Factor by which `multistep` and `step` multiply the learning rate; for `poly`, the exponent."""

    warmup_epochs: float = 1.0
    """Epochs of warm-up: linear from `warmup_lr`, or with `onecycle` a cosine from lr / 25. At most half of
    the run."""

    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up."""

    min_lr: float = 0.0
    """Learning rate at the end of the schedules `cosine`, `tanh` and `poly`."""

    loss: Literal["ce", "bce"] = "ce"
    """Loss: `ce` is cross-entropy, `bce` is timm's binary cross-entropy over the classes."""

    smoothing: float = 0.0
    """Label smoothing."""

    mixup: float = 0.0
    """Mixup α; 0 turns it off. Mixup and CutMix are timm's, and mix images within the batch of a process."""

    cutmix: float = 0.0
    """CutMix α; 0 turns it off."""

    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""

    mixup_off_epoch: int = 0
    """Epoch from which mixup and CutMix are off; 0 means never."""

    drop_path: float = 0.0
    """Largest drop rate of stochastic depth."""

    clip_grad: float | None = None
    """Gradient clipping: largest norm of the gradient; a larger gradient is scaled down to it."""

    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What `clip_grad` limits: the norm, each value, or the norm relative to that of the weights (AGC)."""

    accumulation: int = 1
    """Gradient accumulation: number of parts in which a batch is processed, to save memory."""

    ema_decay: float | None = None
    """Decay of the exponential moving average (EMA) of the weights; the average is evaluated and saved."""

    ema_warmup: bool = False
    """Increase the EMA decay with the steps, as timm's ModelEmaV3 does."""

    sync_bn: bool = False
    """Synchronised batch norm: statistics over the batches of all processes (GPUs only)."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision: `no` is fp32, fp16 needs a GPU."""

    compile: bool = False
    """Compile the network with torch.compile; the first step then takes about a minute."""

    channels_last: bool = True
    """Keep the model and the images in channels-last memory format, which is faster."""

    img_size: int | None = None
    """Height and width of the images in pixels. By default, small images (at most 64 pixels) keep their size,
    and larger ones get the input size of the model."""

    crop_padding: int = 4
    """Small images: pixels of zero padding around the image, before a random crop of the original size."""

    hflip: bool | None = None
    """Flip half of the training images horizontally. On by default, except for digits."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Larger images: smallest and largest area of the random crop, as fractions of the image area."""

    aa: str | None = None
    """AutoAugment or RandAugment policy, in timm's notation (`rand-m9-mstd0.5-inc1`); applied in the worker
    processes."""

    color_jitter: float | None = None
    """Larger images: strength of brightness, contrast and saturation jitter (not with `aa`)."""

    reprob: float = 0.0
    """Random erasing (timm's): probability that a rectangle of a training image is erased."""

    remode: Literal["pixel", "rand", "const"] = "pixel"
    """Random erasing: fill with noise, one random colour, or the mean."""

    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]. By default those of the weights in `init`; without `init`, those of the
    training split for small images and of ImageNet for larger ones."""

    std: tuple[float, float, float] | None = None
    """Channel standard deviations, for images in [0, 1]; same default as `mean`."""

    train_split: str | None = None
    """Name of the training split; `train` by default."""

    eval_split: str | None = None
    """Name of the split to evaluate after each epoch; by default `test`, or `validation` if there is none."""

    val_fraction: float = 0.0
    """Fraction of the training split to hold out and evaluate on after each epoch. `eval_split` is then
    evaluated only once, after the last epoch, if the data has it. The held-out images are the same for every
    seed."""

    image_column: str | None = None
    """Image column; by default found by its type."""

    label_column: str | None = None
    """Label column; by default found by its type."""

    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do about a corrupt image: stop and name its row, or skip and count it (in training on larger
    images, another image takes its place)."""

    workers: int = 2
    """Worker processes that decode and augment larger images. Small images need them only for `aa`."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0 means one at the end of each epoch."""

    keep_checkpoints: int = 2
    """Number of checkpoints kept for resuming."""

    log_every: int = 50
    """Steps between the lines written to steps.jsonl."""

    track: tuple[str, ...] = ()
    """Accelerate's experiment trackers to log to, e.g. `tensorboard`, besides the files of the run folder."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "keep_checkpoints", "accumulation", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in _NOT_NEGATIVE:
            self._check(name, 0 <= getattr(self, name) < math.inf, "finite and not negative")
        for name in ("lr", "decay_rate", "clip_grad", "layer_decay"):
            value = getattr(self, name)
            self._check(name, value is None or 0 < value < math.inf, "positive")
        for name in ("mixup_prob", "reprob"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("smoothing", "drop_path", "val_fraction"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("epoch_steps", self.epoch_steps is None or self.epoch_steps >= 1, "at least 1")
        self._check("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1)")
        self._check("img_size", self.img_size is None or self.img_size >= 8, "at least 8 pixels")
        self._check("mean", self.mean is None or all(map(math.isfinite, self.mean)), "finite")
        self._check("std", self.std is None or all(0 < s < math.inf for s in self.std), "positive")
        low, high = self.crop_scale
        self._check("crop_scale", 0 < low <= high <= 1, "two rising shares in (0, 1]")
        steps = self.sched in ("step", "multistep")
        if steps != bool(self.decay_epochs) or (self.sched == "step" and len(self.decay_epochs) != 1):
            raise UserError(
                "decay_epochs are one number for sched step, some for multistep and none for the others, got "
                f"{self.decay_epochs} with {self.sched}"
            )
        self._check("decay_epochs", all(epoch > 0 for epoch in self.decay_epochs), "positive")
        if self.teacher is not None and (self.loss != "ce" or self.smoothing):
            raise UserError(
                "loss and smoothing do nothing beside a teacher, whose outputs are learned: leave them out"
            )
        if self.clip_mode != "norm" and self.clip_grad is None:
            raise UserError(f"clip_mode {self.clip_mode} needs a clip_grad")
        if self.aa:
            if self.color_jitter:
                raise UserError("color_jitter does nothing beside aa: leave one out")
            try:
                AutoAugment(self.aa, (0.5, 0.5, 0.5), 32)
            except Exception as error:  # timm asserts, and parses what it is given
                raise UserError(f"aa {self.aa!r} is no policy of timm's: {error}") from None
        if self.batch_size % self.accumulation:
            raise UserError(
                f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}: change one"
            )
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulation % 2:
            raise UserError("mixup and cutmix need batches, and parts of them, of an even number of images")
        self.parsed_model_kwargs()
        self.parsed_opt_args()

    def _check(self, name: str, fits: bool, what: str) -> None:
        if not fits:
            raise UserError(f"{name} must be {what}, got {getattr(self, name)}")

    def parsed_opt_args(self) -> dict[str, Any]:
        """``opt_args`` as a dictionary."""
        return _parse("opt_args", self.opt_args, {"lr": "--lr", "weight_decay": "--weight-decay"})

    def parsed_model_kwargs(self) -> dict[str, Any]:
        """``model_kwargs`` and ``drop_path`` as a dictionary."""
        data = "the data and --init"
        taken = {"num_classes": data, "pretrained": data, "in_chans": data}
        if self.drop_path:
            taken["drop_path_rate"] = "--drop-path"
        parsed = _parse("model_kwargs", self.model_kwargs, taken)
        return {**parsed, "drop_path_rate": self.drop_path} if self.drop_path else parsed


_NOT_NEGATIVE = (
    "warmup_epochs",
    "warmup_lr",
    "checkpoint_every",
    "crop_padding",
    "workers",
    "weight_decay",
    "min_lr",
    "momentum",
    "mixup",
    "cutmix",
    "mixup_off_epoch",
    "seed",
)


def _parse(field: str, items: tuple[str, ...], taken: dict[str, str]) -> dict[str, Any]:
    """``key=value`` items as a dictionary; values are Python literals, as timm takes them, or YAML."""
    parsed = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{field} takes key=value, got {item!r}")
        if key in taken:
            raise UserError(f"{field} cannot set {key}: it follows from {taken[key]}")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            try:
                parsed[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(
                    f"{field} {key}={value!r} is neither a Python literal nor YAML: {error}"
                ) from None
    return parsed
