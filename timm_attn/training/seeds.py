"""Runs of one recipe with several seeds: a run folder each, resumed together, with mean and deviation."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import UserError
from ..files import write_json
from ..load import RECIPE, is_run
from ..weights import WEIGHTS
from . import curves
from .loop import resume, train
from .recipe import Recipe
from .recipe_file import load_recipe, save_recipe
from .run import CURVES, RESULTS, open_run, read_metrics, read_results, refuse_full_folder, run_recipe
from .splits import resolve_folders

SEEDS = "seeds.json"


def is_seeds(path: Path) -> bool:
    """Whether a folder holds the runs of several seeds."""
    return (path / SEEDS).is_file()


def train_seeds(model: str, recipe: Recipe, out: str | Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Train a model once with each seed, into ``out/seed-<seed>``.

    Returns:
        ``{"top1": {"mean": %, "std": % or None, "n": runs, "values": [...]}, "top5": ..., "loss": ...}`` of
        the runs' results; the standard deviation is that of a sample (n - 1).

    Raises:
        UserError: As ``train``.
    """
    out = Path(out)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds must be different numbers, got {' '.join(map(str, seeds))}")
    refuse_full_folder(out)
    recipe = resolve_folders(recipe)  # it is read again when the rest is trained, perhaps from another folder
    recipes = [dataclasses.replace(recipe, seed=seed) for seed in seeds]
    # When a run starts its input has been checked: until then nothing is left behind.
    announce = partial(_announce, model, recipe, out, seeds)
    failed: list[str] = []
    for recipe in recipes:
        run = out / f"seed-{recipe.seed}"
        with _noted(run, failed):
            train(model, recipe, run, on_start=announce)
    return _summary_or_failure(out, seeds, failed)


def resume_seeds(out: str | Path, data: str | None = None) -> dict[str, Any]:
    """Resume the runs of ``train_seeds``; finished runs are left as they are.

    Args:
        out: The folder of the runs.
        data: New location of the data, if it has moved.
    """
    out = Path(out)
    asked = json.loads((out / SEEDS).read_text(encoding="utf-8"))
    recipe = load_recipe(out / RECIPE)
    runs = seed_runs(out)
    started = [run for run in runs if is_run(run)]
    like = next(iter(started), None)
    seen = list(_places(started))
    failed: list[str] = []
    for seed, run in zip(asked["seeds"], runs, strict=True):
        with _noted(run, failed):
            if is_run(run):
                resume(run, data=data or _moved(run_recipe(run).data, seen))
            else:
                place = data or _moved(recipe.data, seen) or recipe.data
                again = dataclasses.replace(recipe, seed=seed, data=place)
                train(asked["model"], again, run, like=like)
    return _summary_or_failure(out, asked["seeds"], failed)


def _places(runs: Sequence[Path]) -> Iterator[str]:
    """Where runs have found their data."""
    for run in runs:
        with suppress(UserError):  # who resumes the run is told
            yield run_recipe(run).data


def _moved(data: str, places: Sequence[str]) -> str | None:
    """Where data has gone that is no folder any more, of the places where runs have found it; or None."""
    there = [place for place in places if Path(place).is_dir()]
    gone = Path(data).is_absolute() and not Path(data).is_dir()  # not so a name on the Hub
    return there[-1] if there and gone else None


@contextmanager
def _noted(run: Path, failed: list[str]) -> Iterator[None]:
    """Note that a run broke off, as one that diverges, and go on; what is wrong before it starts ends all."""
    try:
        yield
    except UserError as error:
        if not is_run(run):
            raise
        failed.append(f"{run}: {error}")


def _summary_or_failure(out: Path, seeds: Sequence[int], failed: list[str]) -> dict[str, Any]:
    if failed:
        raise UserError("\n".join(failed))
    return _summary(out, seeds)


def gather_seeds(out: str | Path) -> dict[str, Any]:
    """Take the finished runs ``out/seed-<seed>``, made one by one, as those of ``train_seeds``.

    Where the data lay may differ between them (a folder, a Hub id), but not how many images it had nor their
    classes; commit and hardware may differ too.

    Returns:
        As ``train_seeds``.

    Raises:
        UserError: None is finished, or they differ in more than the seed.
    """
    out = Path(out)
    runs = [run for run in sorted(out.glob("seed-*")) if (run / WEIGHTS).is_file()]
    if not runs:
        raise UserError(f"{out} has no finished run seed-<seed>: train one, or name another folder")
    recipes = [load_recipe(run / RECIPE) for run in runs]
    environments = [open_run(run) for run in runs]
    same = [
        (
            environment["model"],
            environment["images"],
            environment["label_names"],
            dataclasses.replace(recipe, seed=0, data=""),
        )
        for environment, recipe in zip(environments, recipes, strict=True)
    ]
    for run, one in zip(runs, same, strict=True):
        if one != same[0]:
            raise UserError(f"{run} and {runs[0]} differ in more than the seed: take one of them away")
    seeds = sorted(recipe.seed for recipe in recipes)
    _announce(environments[0]["model"], recipes[0], out, seeds)
    return _summary(out, seeds)


def seed_runs(out: Path) -> list[Path]:
    """The run folders of several seeds."""
    seeds = json.loads((out / SEEDS).read_text(encoding="utf-8"))["seeds"]
    return [out / f"seed-{seed}" for seed in seeds]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of a sample (None of a single value), number of values, and the values."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": std, "n": len(values), "values": [*values]}


def _announce(model: str, recipe: Recipe, out: Path, seeds: Sequence[int]) -> None:
    save_recipe(recipe, out / RECIPE)
    write_json(out / SEEDS, {"model": model, "seeds": list(seeds)})


def _summary(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    runs = seed_runs(out)
    results = [read_results(run) for run in runs]
    summary: dict[str, Any] = {
        "split": results[0]["split"],
        "epoch": results[0]["epoch"],
        "seeds": list(seeds),
    }
    for key in ("top1", "top5", "loss"):
        summary[key] = spread([result[key] for result in results])
    if PartialState().is_main_process:
        write_json(out / RESULTS, summary)
        model = json.loads((out / SEEDS).read_text(encoding="utf-8"))["model"]
        title = f"{model}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
        curves.draw_seeds([read_metrics(run) for run in runs], title, out / CURVES)
    return summary
