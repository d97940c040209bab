"""Start a run, or go on with one: one process, many GPUs or many nodes run the same lines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..weights import sha256
from . import checkpoint
from .network import build, check_model, construction, rebuild
from .recipe import Recipe
from .recipe_file import load_recipe, save_recipe
from .run import (
    ENVIRONMENT,
    RECIPE,
    WEIGHTS,
    environment,
    is_run,
    open_run,
    read_results,
    refuse_full_folder,
)
from .setup import load_splits, recipe_accelerator
from .trainer import OnStep, Trainer, take_up


def train(
    model: str,
    recipe: Recipe,
    out: str | Path,
    on_step: OnStep | None = None,
    on_start: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Train a model.

    Args:
        model: A timm model name, this package's or timm's own.
        recipe: How.
        out: The run folder to make.
        on_step: Called with the number of steps done, after each.
        on_start: Called by the main process when the run folder is made.

    Returns:
        The run's results: split, top-1 and top-5 accuracy (%), loss (nats) and number of images of the last
        epoch, and ``best_epoch``.

    Raises:
        UserError: The model, the recipe, the data or the folder cannot be used; nothing is left behind. Or
            the loss became infinite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    run = Path(out)
    refuse_full_folder(run)
    accelerator = recipe_accelerator(recipe, run)
    check_model(model)
    architecture, _, tag = model.partition(".")
    if tag:
        raise UserError(f"{model} names weights: train {architecture} with --init {model}")
    splits = load_splits(recipe, accelerator)
    network, recipe = build(model, recipe, splits.train)
    built = construction(network)  # before it is wrapped
    trainer = Trainer(accelerator, model, network, recipe, run, splits, on_step)
    # Only now, so that wrong input leaves nothing behind.
    if accelerator.is_main_process:
        about = environment(
            model, recipe.data, splits.train.label_names, splits.counts, accelerator.num_processes
        )
        run.mkdir(parents=True, exist_ok=True)
        if on_start is not None:
            on_start()
        save_recipe(recipe, run / RECIPE)
        about |= {"recipe_sha256": sha256(run / RECIPE), **built}
        checkpoint.write_json(run / ENVIRONMENT, about)
    accelerator.wait_for_everyone()
    if not is_run(run):
        raise UserError(f"{run} cannot be seen by all machines: put --out where all of them can read it")
    return trainer.run_to_end()


def resume(run: str | Path, on_step: OnStep | None = None) -> dict[str, Any]:
    """Go on with a run that was stopped, from its newest intact checkpoint.

    Returns:
        The run's results, as :func:`train`; those of a finished run without further work.

    Raises:
        UserError: The folder is not a run, or its data is gone.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    run = Path(run)
    about = open_run(run)
    if (run / WEIGHTS).is_file():
        return read_results(run)
    if sha256(run / RECIPE) != about["recipe_sha256"]:
        raise UserError(
            f"{run / RECIPE} was changed since the run was started: undo that, or start a new run"
        )
    recipe = load_recipe(run / RECIPE)
    accelerator = recipe_accelerator(recipe, run)
    splits = load_splits(recipe, accelerator)
    if splits.train.label_names != about["label_names"] or splits.counts != about["images"]:
        raise UserError(f"{recipe.data} has changed since {run} was started: restore it, or start a new run")
    if accelerator.num_processes != about["processes"]:
        accelerator.print(
            f"warning: {run} was started with {about['processes']} processes and goes on with "
            f"{accelerator.num_processes}: not in the same bits"
        )
    state = take_up(run, accelerator)
    if state is None:
        network, recipe = build(about["model"], recipe, splits.train)
    else:
        network = rebuild(about["model"], about, recipe)
    trainer = Trainer(accelerator, about["model"], network, recipe, run, splits, on_step)
    if state is not None:
        trainer.restore(state)
    return trainer.run_to_end()
