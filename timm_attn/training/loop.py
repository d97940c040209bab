"""The training loop, through Accelerate: one process, many GPUs or many nodes run the same lines."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..errors import UserError
from ..weights import sha256
from . import checkpoint, curves
from .batches import Batches, Shard, derive_seed
from .data import Split
from .evaluation import evaluate, sum_dtype
from .progress import Bar
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
from .setup import build, check_model, load_splits, recipe_accelerator, resolve_recipe

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
    accelerator = recipe_accelerator(recipe)
    check_model(model)
    architecture, _, tag = model.partition(".")
    if tag:
        raise UserError(f"training starts from random weights: name {architecture} without a tag")
    train_split, eval_split = load_splits(recipe, accelerator)
    recipe = resolve_recipe(recipe, train_split)
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
    accelerator = recipe_accelerator(recipe)
    train_split, eval_split = load_splits(recipe, accelerator)
    counts = {split.name: len(split) for split in (train_split, eval_split)}
    if train_split.label_names != about["label_names"] or counts != about["images"]:
        raise UserError(f"{recipe.data} has changed since {run} was started: restore it, or start a new run")
    network = build(about["model"], recipe, train_split)
    trainer = _Trainer(accelerator, about["model"], network, recipe, run, train_split, eval_split, on_step)
    trainer.restore()
    return trainer.run_to_end()


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
        self.aux_scales = [b for name, b in self.network.named_buffers() if name.endswith("aux_scale")]
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
            3, dtype=sum_dtype(accelerator.device), device=accelerator.device
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
        if self.accelerator.scaler is not None:  # which the loss that a model adds itself does not see
            for scale in self.aux_scales:
                scale.fill_(self.accelerator.scaler.get_scale())
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
        sums = self.accelerator.reduce(self.sums.clone())
        assert torch.is_tensor(sums)
        self._check_finite(sums[0].item())
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
