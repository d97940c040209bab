"""Start or resume a run, with the same code for one process, many GPUs or many nodes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import sha256, write_json
from ..load import check_model
from .checkpoint import take_up
from .network import build, construction, rebuild
from .processes import check_compiler, own_accelerate_state, recipe_accelerator
from .recipe import Recipe
from .run import (
    ENVIRONMENT,
    RECIPE,
    WEIGHTS,
    check_readable,
    hardware,
    is_run,
    machines,
    open_run,
    read_results,
    refuse_full_folder,
    run_recipe,
    start_run,
)
from .splits import Splits, load_splits
from .trainer import OnStep, Trainer

#: A run with fewer steps hardly moves its weights.
FEW_STEPS = 30


@own_accelerate_state()
def train(
    model: str,
    recipe: Recipe,
    out: str | Path,
    on_step: OnStep | None = None,
    on_start: Callable[[], Any] | None = None,
    like: Path | None = None,
) -> dict[str, Any]:
    """Train a model.

    Args:
        model: Name of a model of this package or timm.
        recipe: The settings of the run.
        out: The run folder to create.
        on_step: Called after each step, with the number of steps done.
        on_start: Called by the main process once the run folder is created.
        like: A run whose data this one must have.

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
    if recipe.compile:
        check_compiler(accelerator.device)
    splits = load_splits(recipe, accelerator)
    if like is not None:
        _check_same_data(splits, open_run(like), recipe.data, like)
    network, recipe = build(model, recipe, splits.train, accelerator.print)
    check_readable(network, splits.train.label_names)
    arguments = construction(network)  # before it is wrapped
    trainer = Trainer(accelerator, model, network, recipe, run, splits, on_step)
    # Only now, so that wrong input leaves nothing behind.
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        if on_start is not None:
            on_start()
        start_run(run, model, arguments, recipe, splits, accelerator.num_processes)
        _note_few_steps(trainer)
    accelerator.wait_for_everyone()
    if not is_run(run):
        raise UserError(f"{run} cannot be seen by all machines: put --out where all of them can read it")
    return trainer.run_to_end()


def _note_few_steps(trainer: Trainer) -> None:
    steps, images = trainer.steps * trainer.recipe.epochs, len(trainer.splits.train)
    if steps < FEW_STEPS:
        trainer.console.print(
            f"note: only {steps} steps in all, {trainer.steps} per epoch with {trainer.recipe.batch_size} "
            f"of the {images:,} images each: lower --batch-size, or raise --epochs",
            soft_wrap=True,
        )


@own_accelerate_state()
def resume(run: str | Path, on_step: OnStep | None = None, data: str | None = None) -> dict[str, Any]:
    """Resume a run from its newest intact checkpoint.

    Args:
        run: The run folder.
        on_step: Called after each step, with the number of steps done.
        data: New location of the data, if it has moved.

    Returns:
        The run's results, as for ``train``. A finished run returns its results without further training.

    Raises:
        UserError: The folder is not a run, or the data differs from that of the start of the run.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    run = Path(run)
    environment = open_run(run)
    if (run / WEIGHTS).is_file():
        return read_results(run)
    if sha256(run / RECIPE) != environment["recipe_sha256"]:
        raise UserError(
            f"{run / RECIPE} was changed since the run was started: undo that, or start a new run"
        )
    model = environment["model"]
    check_model(model)
    recipe = run_recipe(run, data)
    accelerator = recipe_accelerator(recipe, run)
    if recipe.compile:
        check_compiler(accelerator.device)
    splits = load_splits(recipe, accelerator)
    _check_same_data(splits, environment, recipe.data, run)
    now = environment | ({} if data is None else {"moved_to": recipe.data})
    where = hardware()
    if where not in machines(environment):
        now["continued_on"] = [*environment.get("continued_on", []), where]
    if now != environment and accelerator.is_main_process:
        write_json(run / ENVIRONMENT, now)
    if accelerator.num_processes != environment["processes"]:
        accelerator.print(
            f"warning: {run} was started with {environment['processes']} processes and is resumed with "
            f"{accelerator.num_processes}: it will not be bit-identical"
        )
    state = take_up(run, accelerator)
    if state is None:
        network, recipe = build(model, recipe, splits.train, accelerator.print)
    else:
        network = rebuild(model, environment, recipe)
    trainer = Trainer(accelerator, model, network, recipe, run, splits, on_step)
    if state is not None:
        trainer.restore(state)
    return trainer.run_to_end()


def _check_same_data(splits: Splits, environment: dict[str, Any], data: str, run: Path) -> None:
    """Raise a UserError if the splits are not those that a run was started with."""
    now = (splits.train.label_names, splits.counts, splits.fingerprints)
    # Runs of older versions have no fingerprints.
    then = [environment.get(name, splits.fingerprints) for name in ("label_names", "images", "fingerprints")]
    kinds = ("class names", "numbers of images", "images or labels")
    changed = [kind for kind, a, b in zip(kinds, now, then, strict=True) if a != b]
    if changed:
        raise UserError(
            f"{data} has changed since {run} was started (its {' and '.join(changed)}): restore it, name its "
            "new place with --data, or start a new run"
        )
