"""A run in progress: its steps, checkpoints, evaluations and what is seen of them."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from ..ends import GatedNorm
from ..errors import UserError
from ..files import write_json
from . import checkpoint
from .augment import seed_everything
from .average import Average
from .batches import Batch, Batches, Shard
from .evaluation import evaluate, sum_dtype
from .history import History
from .memory import images_that_fit
from .network import classifier_parameters, freeze_backbone, load_teacher
from .optim import learning_rate, make_criterion, make_mixup, make_optimizer, make_scheduler
from .processes import keep_freed_memory
from .progress import Bar, PipedConsole
from .recipe import Recipe
from .run import RESULTS, save_model
from .signals import Interrupted, Signals
from .splits import Splits

#: Steps on GPUs after which processes ask each other whether a signal came to one of them.
_ASK_EVERY = 10
#: fp16's scale of the loss after some 36 steps in a row without a finite gradient.
_LEAST_SCALE = 1e-6
OnStep = Callable[[int], None]


class Trainer:
    """Trains a network by a recipe, from a checkpoint or from the start.

    Args:
        accelerator: Accelerate's view of this process.
        name: The model's name.
        network: The network, with the configuration that its checkpoint will carry.
        recipe: With its open ends resolved.
        run: The run folder.
        splits: Training split, the one evaluated after each epoch, and the one that is evaluated at the end.
        on_step: Called with the number of steps done, after each.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        name: str,
        network: nn.Module,
        recipe: Recipe,
        run: Path,
        splits: Splits,
        on_step: OnStep | None,
    ) -> None:
        self.accelerator = accelerator
        self.name = name
        self.recipe = recipe
        self.run = run
        self.splits = splits
        self.on_step = on_step
        self.signals = Signals()
        self.console = PipedConsole(quiet=not accelerator.is_main_process)
        title = f"{name} on {Path(recipe.data).name}, seed {recipe.seed}"
        self.history = History(run, title, writes=accelerator.is_main_process)
        device = accelerator.device

        shard = Shard(device, accelerator.process_index, accelerator.num_processes)
        config: dict[str, Any] = resolve_model_data_config(network)
        self.batches = Batches(splits.train, recipe, config, shard)
        self.eval_batches = Batches(splits.eval, recipe, config, shard)
        self.test_batches = Batches(splits.test, recipe, config, shard) if splits.test else None
        whole = self.batches.steps  # asked for in any case: it refuses splits smaller than a batch
        self.steps = recipe.epoch_steps or whole
        self.mixup = make_mixup(recipe, len(splits.train.label_names))

        if recipe.sync_bn:
            if any(isinstance(module, GatedNorm) for module in network.modules()):
                raise UserError("--sync-bn replaces the norms that asr with where=norms gates: leave one out")
            if device.type != "cuda":
                raise UserError("--sync-bn needs GPUs: PyTorch has no SyncBatchNorm for CPUs")
            network = convert_sync_batchnorm(network)  # timm's: its norms may hold their activation
        self.frozen_norms = freeze_backbone(network) if recipe.freeze == "backbone" else []
        # Before the network is moved and wrapped: groups are made by the names of its parameters.
        optimizer = make_optimizer(network, recipe)
        self.scheduler = make_scheduler(optimizer, recipe, self.steps)
        self.wrapped, self.optimizer = accelerator.prepare(network, optimizer)
        self.model = torch.compile(self.wrapped) if recipe.compile else self.wrapped
        self.network: nn.Module = accelerator.unwrap_model(self.wrapped)
        # Bounds that do nothing, as timm's Gemma 4 has, are infinite from the start.
        self.unbounded = [key for key, t in _floats(self.network) if not t.isfinite().all()]
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.clipped = self.trained
        if recipe.clip_mode == "agc":
            # timm's leaves out the last two parameters, which SSIA's heads come after.
            head = {id(p) for p in classifier_parameters(self.network)}
            self.clipped = [p for p in self.trained if id(p) not in head]
        self.ema = None
        if recipe.ema_decay is not None:
            self.ema = Average(self.network, recipe.ema_decay, recipe.ema_warmup, self.unbounded)

        self.aux_scales = [b for key, b in self.network.named_buffers() if key.endswith("aux_scale")]
        self.criterion = make_criterion(recipe, mixed=self.mixup is not None).to(device)
        self.teacher = None
        if recipe.teacher is not None:
            self.teacher = load_teacher(
                recipe.teacher, splits.train.label_names, network, recipe, accelerator.print
            ).to(device)

        self.step = 0
        self.saved: int | None = None  # step of the newest checkpoint
        self.part_shape: torch.Size | None = None  # of the images that go through the network at a time
        # Of the epoch: loss, correct predictions, images, images that stood in for corrupt ones.
        self.sums = torch.zeros(4, dtype=sum_dtype(device), device=device)
        # Of the first step that went wrong: its number, loss, gradient norm, learning rate.
        self.trouble = torch.full((4,), math.inf, dtype=sum_dtype(device), device=device)

    def state(self) -> checkpoint.State:
        """What a checkpoint holds; every process must ask."""
        sums = self._reduce(self.sums)
        scaler = self.accelerator.scaler
        return checkpoint.State(
            step=self.step,
            model=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema={} if self.ema is None else self.ema.module.state_dict(),
            progress={"sums": sums, "scaler": None if scaler is None else scaler.state_dict()},
        )

    def restore(self, state: checkpoint.State) -> None:
        """Take up a checkpoint."""
        self.network.load_state_dict(state.model)
        checkpoint.restore_optimizer(self.optimizer, state.optimizer)
        if self.ema is not None:
            self.ema.module.load_state_dict(state.ema)
        self.step = self.saved = state.step
        sums = torch.tensor(state.progress["sums"], dtype=self.sums.dtype, device=self.sums.device)
        self.sums = sums if self.accelerator.is_main_process else torch.zeros_like(sums)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.progress["scaler"])

    def run_to_end(self) -> dict[str, Any]:
        """Train what is left, then write the finished model; returns the run's results."""
        recipe = self.recipe
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.history.start(self.step)
        if recipe.track:
            fields = {key: str(value) for key, value in dataclasses.asdict(recipe).items()}
            self.accelerator.init_trackers(self.name, fields)
        batches = self.batches.train(self.step)
        with (
            self.signals.noted(),
            contextlib.closing(batches),
            Bar(self.name, self.steps * recipe.epochs, self.step, recipe.batch_size, self.console) as bar,
        ):
            # A run that was stopped before an evaluation begins with that.
            try:
                for epoch in range(len(self.history.epochs), recipe.epochs):
                    self._epoch(epoch, batches, bar)
            except torch.OutOfMemoryError as error:
                if self.part_shape is None:  # not even the first batch
                    raise
                reason = str(error).partition("\n")[0]
            else:
                reason = ""
            if reason:  # here, where the error no longer holds what has been computed
                raise UserError(self._out_of_memory(reason))
        results = self._results()
        if self.accelerator.is_main_process:
            self.history.draw()
            write_json(self.run / RESULTS, results)
            save_model(self.averaged, self.run, self.splits.train.label_names)
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # end_training would end the process group, too
            tracker.finish()
        return results

    @property
    def averaged(self) -> nn.Module:
        """The network that is evaluated and saved."""
        return self.network if self.ema is None else self.ema.module

    def _epoch(self, epoch: int, batches: Iterator[Batch], bar: Bar) -> None:
        """Train an epoch, or what is left of it, evaluate, and write both down."""
        started = time.perf_counter()
        images_per_second = self._train(epoch, batches, bar)
        loss, correct, images, skipped = self._reduce(self.sums)
        self._share_buffers()
        self._save()  # whatever ends the evaluation, the epoch is not lost
        evaluated = evaluate(self.averaged, self.eval_batches, self.accelerator)
        if not math.isfinite(evaluated["loss"]):
            raise UserError(
                f"the evaluation loss after step {self.step} is {evaluated['loss']}, though the training "
                f"loss is {loss / images:.4g}: the norms' running statistics are far from the batches'. "
                f"Lower --lr (it was {self.recipe.lr}) in a new run"
            )
        line = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": learning_rate(self.optimizer),
            "train_loss": loss / images,
            "train_top1": 100 * correct / images,
            **evaluated,
            "images_per_second": images_per_second,
            "seconds": time.perf_counter() - started,
        }
        if self.recipe.on_corrupt == "skip":
            line["skipped_images"] = int(skipped) + self.splits.train.skipped
        bar.epoch(line)
        self.history.add_epoch(line)
        self._track(line)
        if epoch + 1 < self.recipe.epochs:
            self._check_signal()

    def _train(self, epoch: int, batches: Iterator[Batch], bar: Bar) -> float | None:
        """The steps of an epoch that are left; images per second of all processes, None if none are."""
        recipe = self.recipe
        if self.step == epoch * self.steps:
            self.sums.zero_()
        self.model.train()
        for norm in self.frozen_norms:
            norm.eval()
        if self.mixup is not None:
            self.mixup.mixup_enabled = not recipe.mixup_off_epoch or epoch < recipe.mixup_off_epoch
        started = time.perf_counter()
        first = self.step
        while self.step < (epoch + 1) * self.steps:
            loss, norm = self._update(batches)
            self.step += 1
            bar.step(self.sums)
            if self.on_step is not None:
                self.on_step(self.step)
            logged = self.step % recipe.log_every == 0
            # To look at what a GPU has computed is to wait for it, and to ask the others, too.
            if logged or self.accelerator.device.type == "cpu":
                self._check_trouble()
                self._check_signal()
            elif self.step % _ASK_EVERY == 0 or (self.accelerator.num_processes == 1 and self.signals.number):
                self._check_signal()
            if logged:
                self._log(epoch, loss, norm, (self.step - first) * recipe.batch_size, started)
            if (
                recipe.checkpoint_every
                and self.step % recipe.checkpoint_every == 0
                and self.step % self.steps
            ):
                self._save()
        self._check_trouble()
        self._check_signal()  # before the evaluation, which may take long
        steps = self.step - first
        return steps * recipe.batch_size / (time.perf_counter() - started) if steps else None

    def _update(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One optimiser step; this process's loss and the gradient's norm."""
        recipe = self.recipe
        parts = recipe.accumulation
        self.scheduler.step_update(self.step)
        scaler = self.accelerator.scaler
        for scale in self.aux_scales:  # for the loss that a model adds itself, which the scaler does not see
            scale.fill_((1.0 if scaler is None else scaler.get_scale()) / parts)
        total = torch.zeros((), device=self.sums.device)
        for part in range(parts):
            images, labels, skipped = next(batches)
            # After the batch, which may have drawn from the same generators.
            seed_everything(recipe.seed, "step", self.step, part, self.accelerator.process_index)
            images, targets = (images, labels) if self.mixup is None else self.mixup(images, labels)
            self.part_shape = images.shape
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                logits = self.model(images)  # prepared by Accelerate: autocast inside, float32 outside
                loss = self._loss(logits, images, targets)
                self.accelerator.backward(loss / parts)
            total += loss.detach() / parts
            correct = (logits.detach().argmax(1) == labels).sum()
            counts = (torch.full_like(correct, n) for n in (len(labels), skipped))
            self.sums += torch.stack([loss.detach() * len(labels), correct, *counts])
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if recipe.clip_grad is not None:
            if recipe.clip_mode == "norm":
                torch.nn.utils.clip_grads_with_norm_(self.clipped, recipe.clip_grad, norm)
            else:
                dispatch_clip_grad(self.clipped, recipe.clip_grad, mode=recipe.clip_mode)
        self._note_trouble(total, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.network, self.step + 1)
        return total, norm

    def _note_trouble(self, loss: Tensor, norm: Tensor) -> None:
        """Remember the first step that goes wrong, without waiting for a GPU."""
        # With a scaler infinite gradients are usual: it passes over the step.
        fine = loss.isfinite() if self.accelerator.scaler is not None else loss.isfinite() & norm.isfinite()
        step, rate = (torch.full_like(loss, n) for n in (self.step + 1, learning_rate(self.optimizer)))
        now = torch.stack([step, loss, norm, rate]).to(self.trouble)
        self.trouble = torch.where(fine | self.trouble[0].isfinite(), self.trouble, now)

    def _loss(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        if self.teacher is None:
            return self.criterion(logits, targets)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(images).float().log_softmax(1)
        return nn.functional.kl_div(logits.log_softmax(1), wanted, reduction="batchmean", log_target=True)

    def _out_of_memory(self, reason: str) -> str:
        """What to say, with the batch size that fits; the run is over, and its weights are spoilt.

        With several processes nothing is tried: what broke off in one of them has the others waiting.
        """
        assert self.part_shape is not None
        size, recipe = self.part_shape[0], self.recipe
        if self.accelerator.num_processes > 1:
            return (
                f"out of memory ({reason}) with {size} images at a time: lower --batch-size, or raise "
                f"--accumulation. {self._last_checkpoint()}"
            )
        least = 1 if self.mixup is None else 2  # mixup takes even numbers of images
        self.model = self.network  # not compiled, which takes less time and if anything more memory
        fits = images_that_fit(
            self._update, self.part_shape, least, self.batches.format, self.accelerator, self.optimizer
        )
        if not fits:
            images = "one image" if least == 1 else "two images"
            return f"out of memory ({reason}), even for {images}: take smaller images or a smaller network"
        batch = fits * recipe.accumulation
        equal = (n for n in range(1, size + 1) if size % n == 0 and size // n % least == 0)
        parts = recipe.accumulation * next(n for n in equal if size // n <= fits)
        return (
            f"out of memory ({reason}) with {size} images at a time; {fits} fit: take --batch-size {batch}, "
            f"or --accumulation {parts} for the same steps. {self._last_checkpoint()}"
        )

    def _reduce(self, tensor: Tensor) -> list[float]:
        """Sum over all processes."""
        summed = self.accelerator.reduce(tensor.clone())
        assert torch.is_tensor(summed)
        return summed.tolist()

    def _check_trouble(self) -> None:
        """Stop if a step went wrong, on all processes."""
        rows = self.accelerator.gather(self.trouble[None])
        assert torch.is_tensor(rows)
        step, loss, norm, rate = min(rows.tolist())
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < _LEAST_SCALE:
            raise UserError(
                f"no gradient has been finite for dozens of steps before step {self.step}, however small the "
                f"scale of fp16's loss: try --precision bf16 or no. {self._last_checkpoint()}"
            )
        if step < math.inf:
            raise UserError(
                f"the loss became {loss:.4g} at step {step:.0f}, with a gradient norm of {norm:.4g} and a "
                f"learning rate of {rate:.4g}: lower --lr (it was {self.recipe.lr}), clip with --clip-grad, "
                f"or try --precision no. {self._last_checkpoint()}"
            )

    def _check_signal(self) -> None:
        """Stop if a signal came to any process, on all of them, with a checkpoint."""
        numbers = self.accelerator.gather(self.trouble.new_tensor([self.signals.number]))
        assert torch.is_tensor(numbers)
        number = int(numbers.max())
        if number:
            self._save()
            raise Interrupted(f"{signal.Signals(number).name} after step {self.step}")

    def _last_checkpoint(self) -> str:
        steps = [step for step, _ in checkpoint.folders(self.run)]
        return (
            f"The last good checkpoint is {self.run / f'step-{steps[-1]}'}" if steps else "No checkpoint yet"
        )

    def _share_buffers(self) -> None:
        """Give all processes the running statistics of the first, whose are saved."""
        if self.accelerator.num_processes > 1:
            for buffer in (*self.network.buffers(), *(self.ema.module.buffers() if self.ema else ())):
                broadcast(buffer)

    def _log(self, epoch: int, loss: Tensor, norm: Tensor, images: int, started: float) -> None:
        processes = self.accelerator.num_processes
        line = {
            "step": self.step,
            "epoch": epoch + 1,
            "lr": learning_rate(self.optimizer),
            "train_loss": self._reduce(loss[None])[0] / processes,
            "grad_norm": norm.item() if norm.isfinite() else None,  # JSON has no infinity
            "images_per_second": images / (time.perf_counter() - started),
        }
        self.history.add_step(line)
        self._track(line)

    def _track(self, line: dict[str, Any]) -> None:
        if self.recipe.track:
            self.accelerator.log({k: v for k, v in line.items() if k not in ("epoch", "step")}, self.step)

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved == self.step:
            return
        self._check_trouble()
        if not self._finite():
            raise UserError(
                f"the weights or running statistics became infinite by step {self.step}: lower --lr (it was "
                f"{self.recipe.lr}), clip with --clip-grad, or try --precision no. {self._last_checkpoint()}"
            )
        state = self.state()
        if self.accelerator.is_main_process:
            checkpoint.save(self.run, state, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.saved = self.step

    def _finite(self) -> bool:
        """Whether the state can be saved, on all processes."""
        state = [t for key, t in _floats(self.network) if key not in self.unbounded]
        bad = torch.stack([~t.isfinite().all() for t in state]).any()
        return not self._reduce(bad.to(self.sums.dtype)[None])[0]

    def _results(self) -> dict[str, Any]:
        """Figures of the last epoch; the best epoch's are there for comparison, under their own name."""
        last = self.history.epochs[-1]
        figures = last
        split = self.splits.eval.name
        if self.test_batches is not None:
            assert self.splits.test is not None
            self._share_buffers()
            split = self.splits.test.name
            figures = evaluate(self.averaged, self.test_batches, self.accelerator)
        best = max(self.history.epochs, key=lambda line: line["top1"])
        return {
            "split": split,
            "epoch": last["epoch"],
            **{key: figures[key] for key in ("top1", "top5", "loss", "images")},
            "weights": "average" if self.ema else "last step",
            "best_epoch": {"epoch": best["epoch"], "split": self.splits.eval.name, "top1": best["top1"]},
        }


def _floats(network: nn.Module) -> list[tuple[str, Tensor]]:
    """What of a network's state can be infinite."""
    return [(key, t) for key, t in network.state_dict().items() if t.is_floating_point()]
