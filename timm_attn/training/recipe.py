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
    """How a model is trained."""

    #: In files, where a split may be called 2024.
    __pydantic_config__: ClassVar = {"coerce_numbers_to_str": True}

    data: str = ""
    """A folder of parquet files or images, a Hugging Face dataset id, or `digits` (in scikit-learn)."""

    data_config: str | None = None
    """Configuration of a data set that has several, as `datasets` calls it."""

    data_revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""

    epochs: int = 30
    """Passes over the training split."""

    epoch_steps: int | None = None
    """Optimiser steps that count as an epoch. By default a pass over the training split."""

    batch_size: int = 128
    """Images per optimiser step, over all processes. An incomplete last batch is dropped."""

    seed: int = 0
    """Seed of initialisation, order and augmentation."""

    model_kwargs: tuple[str, ...] = ()
    """Arguments of timm.create_model as key=value, e.g. `channels=[16,32,64,128] delta=2`."""

    init: str | None = None
    """Start from these weights: a name with a tag, a run or hub folder, `hf-hub:ORG/NAME`, or `graft:` and
    the stock network to graft from (`graft:resnet50.a1_in1k`). The classifier may have other classes."""

    teacher: str | None = None
    """Train towards what this network says of the images, and not towards their labels: named like `init`,
    of the same classes."""

    freeze: Literal["nothing", "backbone"] = "nothing"
    """`backbone` trains the classifier and the attention only."""

    opt: str = "sgd"
    """Optimiser, by timm's name (`sgd` has Nesterov momentum, `momentum` has not)."""

    opt_args: tuple[str, ...] = ()
    """Further arguments of the optimiser as key=value, e.g. `betas=[0.9,0.95] eps=1e-6`."""

    lr: float = 0.2
    """Peak learning rate."""

    momentum: float = 0.9
    """Momentum, for optimisers that have one."""

    weight_decay: float = 5e-4
    """Weight decay; as in timm, not on biases and norm layers."""

    decay_norms: bool = False
    """Weight decay on biases and norm layers, too, as in most papers."""

    layer_decay: float | None = None
    """Learning rate of each layer as a factor of the next one's; the last has `lr`."""

    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "onecycle"] = "cosine"
    """Course of the learning rate by the step. timm's, and PyTorch's OneCycleLR (momentum stays)."""

    decay_epochs: tuple[int, ...] = ()
    """Epochs at which `multistep` lowers the learning rate; for `step`, the interval."""

    decay_rate: float = 0.1
    """Factor of `multistep` and `step`; the power of `poly`."""

    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises: linearly from `warmup_lr`, with `onecycle` by a cosine from
    lr / 25. Never more than half of the run."""

    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up."""

    min_lr: float = 0.0
    """Learning rate at the end."""

    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or timm's binary cross-entropy over the classes."""

    smoothing: float = 0.0
    """Label smoothing."""

    mixup: float = 0.0
    """Mixup's α; 0 is off. timm's mixup and cutmix mix images of one process's batch."""

    cutmix: float = 0.0
    """CutMix's α; 0 is off."""

    mixup_prob: float = 1.0
    """Share of the batches that are mixed."""

    mixup_off_epoch: int = 0
    """Epoch from which nothing is mixed; 0 is never."""

    drop_path: float = 0.0
    """Greatest rate of stochastic depth."""

    clip_grad: float | None = None
    """Greatest norm of the gradient; longer ones are scaled down to it."""

    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What `clip_grad` bounds: the norm, each value, or the norm relative to the weights' (AGC)."""

    accumulation: int = 1
    """Parts in which a batch goes through the network, one after the other, to need less memory."""

    ema_decay: float | None = None
    """Average the weights with this decay; the average is what is evaluated and saved."""

    ema_warmup: bool = False
    """Let the decay rise with the steps, as timm's ModelEmaV3 does."""

    sync_bn: bool = False
    """Batch norm over the batches of all processes (GPUs only)."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision: `no` is fp32, fp16 needs a GPU."""

    compile: bool = False
    """torch.compile the network; the first step then takes a minute or so."""

    channels_last: bool = True
    """Keep the model and the images in channels-last memory format, which is faster."""

    img_size: int | None = None
    """Side of the images in pixels. By default small images stay as they are, others get the model's."""

    crop_padding: int = 4
    """Small images: zeros around the image before a random crop of its own size."""

    hflip: bool | None = None
    """Mirror half of the training images. By default yes, but not on digits."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Larger images: area of the random crop, as a share of the image's."""

    aa: str | None = None
    """AutoAugment or RandAugment, as timm writes it (`rand-m9-mstd0.5-inc1`); in worker processes."""

    color_jitter: float | None = None
    """Larger images: strength of the jitter of brightness, contrast and saturation (not with `aa`)."""

    reprob: float = 0.0
    """Share of the training images of which a rectangle is erased (timm's random erasing)."""

    remode: Literal["pixel", "rand", "const"] = "pixel"
    """What is put there: noise, one random colour, or the mean."""

    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]. By default those of the weights that `init` names; without, the training
    split's for small images, ImageNet's for others."""

    std: tuple[float, float, float] | None = None
    """Channel standard deviations in [0, 1], with the same default."""

    train_split: str | None = None
    """Name of the training split; `train` by default."""

    eval_split: str | None = None
    """Name of the split evaluated after each epoch; by default `test`, or `validation` without one."""

    val_fraction: float = 0.0
    """Share of the training split that is held out and evaluated after each epoch. The split of
    `eval_split` is then evaluated once, after the last epoch. The same images for every seed."""

    image_column: str | None = None
    """Image column; found by its type by default."""

    label_column: str | None = None
    """Label column; found by its type by default."""

    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do about a corrupt image: stop and name its row, or skip and count it (where larger images are
    trained on, another one takes its place)."""

    workers: int = 2
    """Processes that decode and augment larger images. Small images need them for `aa` only."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0 means one at the end of each epoch."""

    keep_checkpoints: int = 2
    """Number of checkpoints kept for resuming."""

    log_every: int = 50
    """Steps between lines of steps.jsonl."""

    track: tuple[str, ...] = ()
    """Trackers that Accelerate knows, e.g. `tensorboard`, besides the files of the run folder."""

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
