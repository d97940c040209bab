"""Optimiser, course of the learning rate and loss of a recipe, from timm and PyTorch."""

from typing import Any, Protocol

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Adahessian, create_optimizer_v2
from timm.optim.kron import Kron
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError
from .recipe import Recipe

_REFUSED = {
    Adahessian: "the trainer takes no second derivatives",
    Kron: "checkpoints do not hold its lists of tensors and its random numbers",
}


class Scheduler(Protocol):
    """Sets the learning rate of an optimiser as a function of the number of updates done."""

    def step_update(self, num_updates: int) -> Any: ...


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """timm's optimiser of a recipe.

    Raises:
        UserError: timm does not know the optimiser, or it refuses its arguments.
    """
    arguments = recipe.parsed_opt_args()
    try:
        optimizer = create_optimizer_v2(
            model,
            recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay,
            filter_bias_and_bn=not recipe.decay_norms,
            **arguments,
        )
    except Exception as error:  # whatever an optimiser raises on odd arguments
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"cannot make optimiser {recipe.opt}{given}: {error}") from None
    for kind, reason in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise UserError(f"optimiser {recipe.opt} cannot be used, since {reason}: take another --opt")
    return optimizer


def make_scheduler(optimizer: Optimizer, recipe: Recipe, steps: int) -> Scheduler:
    """The course of the learning rate; ``steps`` is the number of steps of an epoch."""
    warmup = min(recipe.warmup_epochs, recipe.epochs / 2)
    if recipe.sched == "onecycle":
        return OneCycle(optimizer, recipe.epochs * steps, warmup / recipe.epochs)
    # Else timm's curve would have begun its fall while the rate still rises, and the peak be missed.
    falls = recipe.sched in ("cosine", "tanh", "poly")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs - warmup if falls else recipe.epochs,  # pyright: ignore[reportArgumentType]
        warmup_prefix=falls,
        decay_epochs=recipe.decay_epochs[0] if recipe.sched == "step" else 1,
        decay_milestones=list(recipe.decay_epochs),
        decay_rate=recipe.decay_rate,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=warmup,  # pyright: ignore[reportArgumentType] (fractions work)
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    assert scheduler is not None
    return scheduler


class OneCycle:
    """PyTorch's OneCycleLR, as a function of the number of updates: nothing of it must be saved."""

    def __init__(self, optimizer: Optimizer, total_steps: int, pct_start: float) -> None:
        self.optimizer = optimizer
        self.rates = [group["lr"] * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        # One rate up to 1 for all groups; PyTorch divides by zero where the warm-up is one step.
        one = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=1.0)
        one.step()
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(
            one,
            1.0,
            total_steps,
            pct_start=pct_start if pct_start * total_steps > 1 else 0.0,
            cycle_momentum=False,
        )

    def step_update(self, num_updates: int) -> None:
        self.cycle.last_epoch = num_updates - 1
        self.cycle.step()
        (factor,) = self.cycle.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor


def learning_rate(optimizer: Optimizer) -> float:
    """The rate of the layers that learn fastest, layer decay aside."""
    return max(group["lr"] / group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def make_criterion(recipe: Recipe, mixed: bool) -> nn.Module:
    """timm's loss; ``mixed`` for the soft targets of mixup, which are smoothed already."""
    if recipe.loss == "bce":
        return BinaryCrossEntropy(smoothing=0.0 if mixed else recipe.smoothing)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()


def make_mixup(recipe: Recipe, classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None where a recipe has neither."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mixup_prob,
        label_smoothing=recipe.smoothing,
        num_classes=classes,
    )
