"""Train and validate."""

from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional

from ..errors import UserError
from ..load import check_model, is_run, load_model
from ..models import register
from ..training import Recipe, resume_seeds, train_seeds, validate
from ..training import resume as resume_run
from ..training import train as train_run
from ..training.seeds import is_seeds
from .console import Images, Stopped, app, console, figure


@app.command
def train(
    model: Positional[str | None] = None,
    /,
    recipe: str | None = None,
    attention: str | None = None,
    resume: Path | None = None,
    out: Path | None = None,
    seeds: tuple[int, ...] = (),
    options: OmitArgPrefixes[Recipe] = Recipe(),  # noqa: B008 (frozen)
) -> None:
    """Train a model and write a run folder, or resume a run.

    For several processes, use `accelerate launch -m timm_attn train` with the same arguments.

    Args:
        model: Model name, e.g. resnet20_dia.
        recipe: Name of a recipe of the package, or a YAML file with any of the options below. Options on the
            command line override it.
        attention: Mechanism (asr, dia, ssia, sem, spem, se, eca, …) to put into the model, which may be any
            model of timm.
        resume: Run folder to resume. Takes no other option than --data, for data that has moved.
        out: Run folder to create; runs/<model>_<data>_s<seed> by default.
        seeds: Train once with each of these seeds, in seed-<seed> of the run folder.
    """
    if recipe is not None:
        raise UserError("give --recipe once")  # main() has put the fields of the first into the options
    if resume is not None:
        if model is not None or attention or out is not None or seeds or options != Recipe(data=options.data):
            raise UserError("--resume uses the recipe of the run: it takes --data and nothing else")
        run = resume
    else:
        if model is None:
            raise UserError("name a model to train, e.g. `timm-attn train resnet20_dia --data digits`")
        if attention is not None:
            check_model(model)
            try:
                model = register(model, attention)
            except ValueError as error:
                raise UserError(str(error)) from None
        data = Path(options.data).name or "data"
        run = out or Path("runs") / f"{model}_{data}{'' if seeds else f'_s{options.seed}'}"
    try:
        if model is None:
            moved = options.data or None
            results = resume_seeds(run, moved) if is_seeds(run) else resume_run(run, data=moved)
        elif seeds:
            results = train_seeds(model, options, run, seeds)
        else:
            results = train_run(model, options, run)
    except KeyboardInterrupt as reason:
        started = is_run(run) or is_seeds(run)
        hint = f"`timm-attn train --resume {run}` resumes it" if started else "no run yet"
        if started and PartialState().num_processes > 1:
            hint += ", with the launcher that it was started with"
        why = f" by {reason}, a checkpoint is written" if str(reason) else ""
        raise Stopped(f"stopped{why}; {hint}") from None
    if PartialState().is_main_process:
        _print_results(run, results)


def _print_results(run: Path, results: dict[str, Any]) -> None:
    table = Table("run folder", "split", "epoch", "top-1", "top-5", "loss", "n", "best epoch")
    best = results.get("best_epoch")
    figures = [results[key] for key in ("top1", "top5", "loss")]
    table.add_row(
        str(run),
        results["split"],
        str(results["epoch"]),
        *(figure(value, digits) for value, digits in zip(figures, (2, 2, 4), strict=True)),
        str(figures[0]["n"] if "seeds" in results else 1),
        f"{best['top1']:.2f} on {best['split']} in epoch {best['epoch']}" if best else "",
    )
    console.print(table)


@app.command(name="validate")
def validate_command(
    model: Positional[str],
    /,
    images: OmitArgPrefixes[Images],
    precision: Literal["no", "bf16", "fp16"] = "no",
) -> None:
    """Evaluate a model: print top-1, top-5, loss and images per second.

    Args:
        model: A model name with pretrained weights, a run folder, a hub folder, or hf-hub:ORG/NAME.
        precision: Precision: no (fp32), bf16 or fp16.
    """
    recipe = images.recipe(model, precision=precision)
    figures = validate(load_model(model), recipe, console.is_terminal, model)
    table = Table("model", "data", "images", "top-1", "top-5", "loss", "images/s")
    table.add_row(
        model,
        images.data,
        f"{figures['images']:,}",
        f"{figures['top1']:.2f}",
        f"{figures['top5']:.2f}",
        f"{figures['loss']:.4f}",
        f"{figures['eval_images_per_second']:.0f}",
    )
    console.print(table)
    if figures.get("skipped"):
        console.print(f"{figures['skipped']:,} corrupt images are left out")
