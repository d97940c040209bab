"""The training loop, through Accelerate: one process, many GPUs or many nodes run the same lines."""

import dataclasses
import difflib
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..errors import UserError
from ..weights import sha256
from . import checkpoint, curves
from .batches import Batches, Shard, derive_seed
from .data import Split, load_split
from .progress import Bar, track
from .recipe import Recipe, load_recipe, save_recipe
from .run import (
    CURVES,
    ENVIRONMENT,
    RECIPE,
    WEIGHTS,
    environment,
    last_metrics,
    open_run,
    read_metrics,
    refuse_full_folder,
    save_model,
    write_metrics,
)

OnStep = Callable[[int], None]
DRAW_SECONDS = 15.0  # drawing takes about half a second


def train(model: str, recipe: Recipe, out: str | Path, on_step: OnStep | None = None) -> dict[str, Any]:
    """Train a model from random weights.

    Args:
        model: A timm model name, this package's or timm's own.
        recipe: How.
        out: The run folder to make.
        on_step: Called with the number of steps done, after each.

    Returns:
        The metrics of the last epoch.

    Raises:
        UserError: The model, the recipe, the data or the folder cannot be used; nothing is left behind.
    """
    run = Path(out)
    refuse_full_folder(run)
    accelerator = _accelerator(recipe)
    check_model(model)
    train_split, eval_split = _splits(recipe, accelerator)
    recipe = _resolve(recipe, train_split)
    network = build(model, recipe, train_split)
    trainer = _Trainer(accelerator, model, network, recipe, run, train_split, eval_split, on_step)
    # Only now, so that wrong input leaves nothing behind.
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run / RECIPE)
        counts = {split.name: len(split) for split in (train_split, eval_split)}
        about = environment(model, recipe.data, train_split.label_names, counts, accelerator.num_processes)
        about["recipe_sha256"] = sha256(run / RECIPE)
        checkpoint.write_json(run / ENVIRONMENT, about)
    accelerator.wait_for_everyone()
    return trainer.run_to_end()


def resume(run: str | Path, on_step: OnStep | None = None) -> dict[str, Any]:
    """Go on with a run that was stopped, from its newest intact checkpoint.

    Returns:
        The metrics of the last epoch; those of a finished run without further work.

    Raises:
        UserError: The folder is not a run, or its data is gone.
    """
    run = Path(run)
    about = open_run(run)
    if (run / WEIGHTS).is_file():
        return last_metrics(run)
    if sha256(run / RECIPE) != about["recipe_sha256"]:
        raise UserError(
            f"{run / RECIPE} was changed since the run was started: undo that, or start a new run"
        )
    recipe = load_recipe(run / RECIPE)
    accelerator = _accelerator(recipe)
    train_split, eval_split = _splits(recipe, accelerator)
    counts = {split.name: len(split) for split in (train_split, eval_split)}
    if train_split.label_names != about["label_names"] or counts != about["images"]:
        raise UserError(f"{recipe.data} has changed since {run} was started: restore it, or start a new run")
    network = build(about["model"], recipe, train_split)
    trainer = _Trainer(accelerator, about["model"], network, recipe, run, train_split, eval_split, on_step)
    trainer.restore()
    return trainer.run_to_end()


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
        "pool_size": None,
        "mean": recipe.mean,
        "std": recipe.std,
        "num_classes": len(split.label_names),
        # Small images are read whole; those that were resized, bilinearly.
        **({"crop_pct": 1.0, "interpolation": "bilinear"} if split.pixels is not None else {}),
    }
    return network.to(memory_format=torch.channels_last) if recipe.channels_last else network


def _image_size(network: Any, recipe: Recipe, split: Split) -> tuple[int, ...]:
    """Height and width of the images of a run."""
    if split.pixels is not None:
        return tuple(split.pixels.shape[2:])
    return (recipe.img_size,) * 2 if recipe.img_size else tuple(network.pretrained_cfg["input_size"][1:])


def check_model(name: str) -> None:
    """Raise a UserError with the nearest names if timm has no model of this name."""
    if name.partition(".")[2]:
        raise UserError(f"training starts from random weights: name {name.partition('.')[0]} without a tag")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "`timm-attn list` shows this package's models"
        )
        raise UserError(f"unknown model {name!r}: {hint}")


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, accelerator: Accelerator, show: bool = False
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (%), cross-entropy (nats) and images per second over a whole split.

    Every image counts once, however many processes share the work. With fewer than five classes top-5 is
    top-k for all of them. ``show`` draws a progress bar.
    """
    model.eval()
    sums = torch.zeros(4, dtype=_sum_dtype(accelerator.device), device=accelerator.device)
    started = time.perf_counter()
    for images, labels in track(batches.evaluate(), batches.evaluation_steps, show):
        with accelerator.autocast():
            logits = model(images)
        logits = logits.to(sums.dtype)
        ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack(
            [ranks[:, 0].sum(), ranks.sum(), loss, torch.tensor(len(labels), device=loss.device)]
        )
    sums = accelerator.reduce(sums)
    assert torch.is_tensor(sums)
    top1, top5, loss, n = sums.tolist()
    seconds = time.perf_counter() - started
    return {
        "top1": 100 * top1 / n,
        "top5": 100 * top5 / n,
        "loss": loss / n,
        "images": int(n),
        "eval_images_per_second": n / seconds,
    }


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's view of this process; several may be made in turn, with different precisions."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU: use bf16")
    # The state is a singleton that refuses another precision; the process group lives elsewhere and stays.
    AcceleratorState._reset_state()
    # Without a word from us Accelerate ignores the other processes of a `torchrun` on CPUs.
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def _accelerator(recipe: Recipe) -> Accelerator:
    accelerator = make_accelerator(recipe.precision)
    if recipe.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be shared by {accelerator.num_processes} processes: "
            "make it a multiple"
        )
    return accelerator


def _splits(recipe: Recipe, accelerator: Accelerator) -> tuple[Split, Split]:
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


def _resolve(recipe: Recipe, split: Split) -> Recipe:
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


class _Trainer:
    """A run in progress."""

    def __init__(
        self,
        accelerator: Accelerator,
        name: str,
        network: nn.Module,
        recipe: Recipe,
        run: Path,
        train_split: Split,
        eval_split: Split,
        on_step: OnStep | None,
    ) -> None:
        self.accelerator, self.name, self.recipe, self.run = accelerator, name, recipe, run
        self.on_step = on_step
        self.label_names = train_split.label_names
        shard = Shard(accelerator.device, accelerator.process_index, accelerator.num_processes)
        config: dict[str, Any] = resolve_model_data_config(network)
        self.batches = Batches(train_split, recipe, config, shard)
        self.eval_batches = Batches(eval_split, recipe, config, shard)
        self.steps = self.batches.steps
        optimizer = create_optimizer_v2(
            network, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
        self.model, self.optimizer = accelerator.prepare(network, optimizer)
        self.network = accelerator.unwrap_model(self.model)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            decay_milestones=list(recipe.decay_epochs),
            decay_rate=recipe.decay_rate,
            min_lr=recipe.min_lr,
            warmup_lr=0.0,
            warmup_epochs=min(recipe.warmup_epochs, recipe.epochs / 2),  # pyright: ignore[reportArgumentType] (fractions work)
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        assert self.scheduler is not None
        self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        self.step = 0
        self.sums = torch.zeros(
            3, dtype=_sum_dtype(accelerator.device), device=accelerator.device
        )  # loss, correct, images
        self.metrics: list[dict[str, Any]] = []
        self.drawn = time.perf_counter()

    def restore(self) -> None:
        """Take up the newest intact checkpoint, or start anew where there is none."""
        state, damaged = checkpoint.load_last(self.run)
        self.accelerator.wait_for_everyone()
        for folder, problem in damaged.items():
            self.accelerator.print(f"warning: {folder} is damaged ({problem}): passed over and removed")
            if self.accelerator.is_main_process:  # or it would count among those that are kept
                shutil.rmtree(folder)
        if state is None:
            self.accelerator.print(f"{self.run} has no intact checkpoint: starting again from step 0")
            return
        self.network.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.step = state.step
        sums = torch.tensor(state.progress["sums"], dtype=self.sums.dtype, device=self.sums.device)
        self.sums = sums if self.accelerator.is_main_process else torch.zeros_like(sums)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.progress["scaler"])
        self.metrics = [line for line in read_metrics(self.run) if line["step"] <= self.step]

    def run_to_end(self) -> dict[str, Any]:
        """Train what is left, then write the finished model."""
        main = self.accelerator.is_main_process
        console = Console(quiet=not main)
        first_epoch, first_step = divmod(self.step, self.steps)
        with Bar(
            self.name, self.steps * self.recipe.epochs, self.step, self.recipe.batch_size, console
        ) as bar:
            for epoch in range(first_epoch, self.recipe.epochs):
                self._epoch(epoch, first_step if epoch == first_epoch else 0, bar)
        if main:
            self._draw()
            save_model(self.network, self.run, self.label_names)
        self.accelerator.wait_for_everyone()
        return self.metrics[-1]

    def _epoch(self, epoch: int, first: int, bar: Bar) -> None:
        recipe = self.recipe
        self.model.train()
        started, start_step = time.perf_counter(), self.step
        for images, labels in self.batches.train(epoch, first):
            loss, correct = self._update(images, labels)
            self.sums += torch.stack([loss * len(labels), correct, correct.new_tensor(len(labels))])
            self.step += 1
            bar.step(self.sums)
            if self.on_step is not None:
                self.on_step(self.step)
            if (
                recipe.checkpoint_every
                and self.step % recipe.checkpoint_every == 0
                and self.step % self.steps
            ):
                self._save()
        seconds = time.perf_counter() - started
        sums = self.accelerator.reduce(self.sums)
        assert torch.is_tensor(sums)
        loss, correct, images = sums.tolist()
        self._check_finite(loss / images)
        line = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_top1": 100 * correct / images,
            **evaluate(self.network, self.eval_batches, self.accelerator),
            "images_per_second": (self.step - start_step) * recipe.batch_size / seconds,
            "seconds": time.perf_counter() - started,
        }
        bar.epoch(line)
        self.sums.zero_()
        self.metrics.append(line)
        if self.accelerator.is_main_process:
            write_metrics(self.run, self.metrics)
            if time.perf_counter() - self.drawn > DRAW_SECONDS:
                self._draw()
        self._save()

    def _update(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One optimiser step; loss and number of correct predictions of this process's images."""
        # The scheduler is a function of the number of updates done.
        self.scheduler.step_update(self.step)  # pyright: ignore[reportOptionalMemberAccess]
        torch.manual_seed(derive_seed(self.recipe.seed, "step", self.step, self.accelerator.process_index))
        logits = self.model(images)  # prepared by Accelerate: autocast inside, float32 outside
        loss = self.criterion(logits, labels)
        self.accelerator.backward(loss)
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def _check_finite(self, loss: float) -> None:
        """Stop a run that has diverged before its checkpoints are replaced; the same on all processes."""
        state = self.network.state_dict().values()
        if math.isfinite(loss) and all(bool(t.isfinite().all()) for t in state if t.is_floating_point()):
            return
        raise UserError(
            f"the loss became {loss} or the weights infinite by step {self.step}: lower --lr (it was "
            f"{self.recipe.lr}), clip with --clip-grad, or try --precision no. The checkpoints in {self.run} "
            "are of earlier steps"
        )

    def _save(self) -> None:
        self._check_finite(self.sums[0].item())
        sums = self.accelerator.reduce(self.sums.clone())
        assert torch.is_tensor(sums)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            progress = {"sums": sums.tolist(), "scaler": scaler.state_dict() if scaler is not None else None}
            state = checkpoint.State(
                self.step, self.network.state_dict(), self.optimizer.state_dict(), progress
            )
            checkpoint.save(self.run, state, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _draw(self) -> None:
        last = self.metrics[-1]
        title = (
            f"{self.name} on {Path(self.recipe.data).name}, seed {self.recipe.seed}, epoch {last['epoch']}"
        )
        curves.draw(self.metrics, title, self.run / CURVES)
        self.drawn = time.perf_counter()
