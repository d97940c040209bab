"""Freezing gates with the data and the trainer of the command line."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..files import replace_file
from ..freeze import FreezeReport, freeze
from ..load import is_run, load_model
from ..passes import Figures
from ..search import Recover
from ..style import new_figure, style, write_png
from ..weights import WeightsError
from .data import NoSplit, load_split
from .labels import match_classes
from .loop import resume, train
from .processes import own_accelerate_state
from .recipe import Recipe
from .recipe_file import own_recipe
from .run import hardware, save_model, weights_digest
from .splits import hold_out
from .validation import model_options, prepared, split_tensors

REPORT, PICTURE = "freeze.json", "freeze.png"
#: Images for the means, from the training split.
MEANS = 4096
_NAMELESS = "timm has no name for {} without these gates: freeze it in Python, with timm_attn.freeze"
_AUGMENTATION = ("crop_padding", "hflip", "crop_scale", "aa", "color_jitter", "reprob", "remode")


def freeze_trained(
    source: str,
    recipe: Recipe,
    out: Path,
    budget: float = 0.1,
    every: bool = False,
    keep: Sequence[str] = (),
    steps: int = 0,
    most: int = 10_000,
    say: Callable[[str], None] = lambda text: None,
    show: bool = False,
) -> FreezeReport:
    """Freeze gates of a model with weights, and write a folder that timm loads.

    The means are taken from the training split, if there is one. One half of the evaluation split is used for
    choosing, the other for the final figures.

    Args:
        source: As for ``load_model``.
        recipe: Data, columns, batch size, workers; for recovery also the optimiser and its settings.
        out: Folder to write, with config.json, model.safetensors, freeze.json and freeze.png.
        budget: Points of top-1 that may be lost.
        every: Freeze all gates.
        keep: Shell patterns of paths of gates that are not frozen.
        steps: Steps of distillation from the original; 0 for none. Their runs are in ``out`` and are resumed.
        most: Maximum number of images used from the evaluation split.
        say: Called with a line of text on each step.
        show: Show progress bars.

    Raises:
        UserError: The model, the data or the folder cannot be used; nothing is written.
    """
    if steps < 0 or most < 1:
        raise UserError(f"--recover is at least 0 and --max-images at least 1, got {steps} and {most}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    if out.exists() and any(not path.name.startswith(("recover-", ".")) for path in out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, or remove it")
    model = load_model(source)
    images, labels, means, classes, names, splits = read_images(model, recipe, most, show, source)
    if steps and means is None:
        raise UserError(f"{recipe.data} has no training split, which --recover trains on: leave that out")
    try:
        report = freeze(
            model,
            images,
            labels,
            budget,
            every=every,
            keep=keep,
            calibration=means,
            calibration_labels=classes,
            recover=recovery(source, recipe, steps, out, names) if steps else None,
            batch_size=min(recipe.batch_size, 128),
            curves=True,
            note=say,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if report.frozen and not report.loads:
        raise UserError(_NAMELESS.format(source))
    if report.frozen:
        out.mkdir(parents=True, exist_ok=True)
        save_model(report.model, out, names)
        origin = {
            "source": source,
            "weights": weights_digest(model),
            "data": recipe.data,
            **splits,
            "frozen": report.frozen,
            "steps": steps,
            "hardware": hardware(images.device),
        }
        text = json.dumps(_json(report) | origin, indent=1)
        replace_file(out / REPORT, (text + "\n").encode())
        draw(report, f"{Path(source).name}: gates into constants", out / PICTURE)
    return report


def recovery(source: str, recipe: Recipe, steps: int, out: Path, names: list[str]) -> Recover:
    """Distillation from the original by the trainer.

    The images have the size that the network takes, and are augmented as in the original's training if it is
    a run or a hub folder, whose recipe says how.

    Args:
        source: The original, as for ``load_model``.
        recipe: Data, optimiser and what goes with it.
        steps: Number of optimiser steps.
        out: Folder of the runs. One that is there is resumed, or not repeated.
        names: Of the classes.
    """

    own = own_recipe(source)
    if own is not None:
        recipe = dataclasses.replace(recipe, **{name: getattr(own, name) for name in _AUGMENTATION})

    def recover(network: Any) -> Any:
        cfg = network.pretrained_cfg
        height, width = cfg["input_size"][1:]
        asked = dataclasses.replace(
            recipe,
            teacher=source,
            loss="ce",
            smoothing=0.0,
            epochs=1,
            epoch_steps=steps,
            img_size=height if height == width else None,
        )
        start_of = [network.pretrained_cfg["architecture"], network._model_args, dataclasses.asdict(asked)]
        start_of.append(weights_digest(network))
        digest = hashlib.sha256(json.dumps(start_of, sort_keys=True).encode()).hexdigest()
        folder = out / f"recover-{digest[:12]}"
        run = folder / "run"
        if not is_run(run):
            folder.mkdir(parents=True, exist_ok=True)
            start = folder / "start"
            start.mkdir(exist_ok=True)
            save_model(network, start, names)
            try:
                load_model(str(start))
            except (UserError, WeightsError) as error:
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # there are other runs in it
                    out.rmdir()
                raise UserError(f"{_NAMELESS.format(source)} ({error})") from None
            asked = dataclasses.replace(asked, init=str(start.resolve()))
            train(network.pretrained_cfg["architecture"], asked, run)
        else:
            resume(run)
        found = load_model(str(run))
        found.pretrained_cfg = found.default_cfg = cfg  # its images are prepared like the original's
        return found

    return recover


def _json(report: FreezeReport) -> dict[str, Any]:
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name != "model"}
    fields |= {"gates": [dataclasses.asdict(g) for g in report.gates]}
    fields |= {name: dataclasses.asdict(fields[name]) for name in ("before", "after")}
    return _finite(fields)


def _finite(value: Any) -> Any:
    """NaN, of which JSON knows nothing, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@own_accelerate_state()
def read_images(
    model: Any, recipe: Recipe, most: int, show: bool, source: str | Path | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[str], dict[str, str]]:
    """Images and labels of the evaluation split, and for the means those of the training split.

    Then the names of the classes, and the split that is evaluated (``split``) and that of the ``means``.
    """
    accelerator, config, split = prepared(model, recipe, "no", source)
    with accelerator.local_main_process_first():
        try:
            means = load_split(recipe.data, "train", recipe.train_split, **model_options(recipe, config))
            match_classes(means, split.label_names)
            if recipe.val_fraction:
                means, _ = hold_out(means, recipe.val_fraction)
        except NoSplit as error:
            accelerator.print(f"{error.found}: the means of the gates are from evaluation images")
            means = None

    images, labels = split_tensors(split, recipe, config, most, show)
    names, named = split.label_names, {"split": split.name, "means": (means or split).name}
    if means is None:
        return images, labels, None, None, names, named
    return images, labels, *split_tensors(means, recipe, config, min(most, MEANS), show), names, named


def draw(report: FreezeReport, title: str, path: Path) -> None:
    """Top-1 lost against time as gates are frozen one by one, in both orders, as a PNG."""
    with style():
        write_png(freeze_figure(report, title), path)


def freeze_figure(report: FreezeReport, title: str) -> Any:
    """The same as a figure."""
    figure, axes = new_figure(title, 4.2)
    axis = axes[0, 0]
    styles = {"greedy": ("o", "C0", "in the order of the choice"), "depth": ("s", "C1", "by depth")}
    for name, points in report.curves.items():
        marker, colour, label = styles[name]
        counts, right, times = zip(*points, strict=True)
        lost = [right[0] - value for value in right]
        axis.plot(times, lost, marker=marker, color=colour, label=label, markersize=4)
        for n, x, y in ((n, x, y) for n, x, y in zip(counts, times, lost, strict=True) if n % 3 == 0):
            offset = 6 if name == "greedy" else -12
            axis.annotate(str(n), (x, y), (0, offset), textcoords="offset points", color=colour, fontsize=8)
    lost = _right(report.before) - _right(report.after)
    axis.plot(
        report.after.milliseconds, lost, "*", color="C2", markersize=13, label="result, on other images"
    )
    if math.isfinite(report.budget):
        axis.axhline(report.budget, color="0.6", linestyle="--", linewidth=1, label="budget")
    labelled = not math.isnan(report.before.top1)
    axis.set(
        xlabel=f"milliseconds for a batch of {report.batch_size}",
        ylabel="top-1 lost (points)" if labelled else "images with another class than the original's (%)",
    )
    axis.invert_yaxis()  # better is higher
    axis.legend(loc="lower right")
    return figure


def _right(figures: Figures) -> float:
    return figures.agreement if math.isnan(figures.top1) else figures.top1
