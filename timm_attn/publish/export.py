"""Exports finished runs as folders laid out like Hub repositories, with figures measured on these files."""

import dataclasses
import itertools
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..compare import BOUNDS, FoldError, relative_difference
from ..errors import UserError
from ..fold import NothingToFold, example_input, fold
from ..load import RECIPE, load_model
from ..models import mechanism as row_of
from ..models import model_names, parse_name, stock_model
from ..models.backbones import is_resnet
from ..papers import Paper, paper_of
from ..training import Recipe, validate
from ..training.data import load_split
from ..training.recipe_file import load_recipe
from ..training.run import CURVES, METRICS, RESULTS, machines, open_run, read_results, run_recipe, save_model
from ..training.seeds import is_seeds, seed_runs, spread
from ..training.splits import HELD_OUT, split_kind, split_options
from ..weights import Checkpoint
from .datasets import license_of
from .deploy import ONNX, PROGRAM, write_onnx, write_program
from .folders import add, check_ready, check_tag, described, new_folders

WRITERS = {ONNX: write_onnx, PROGRAM: write_program}
FIGURES = ("top1", "top5", "loss")


@dataclass(frozen=True)
class _Form:
    """A network to export: as it was trained, or folded."""

    name: str
    architecture: str
    tag: str
    model: Any
    folded_from: str | None = None


def export(
    run: Path,
    tag: str,
    hub: Path,
    dataset: str | None = None,
    data: str | None = None,
    onnx: bool = False,
    torch_export: bool = False,
    dataset_license: str | None = None,
) -> list[Checkpoint]:
    """Write ``hub/<architecture>.<tag>`` and, if the model folds, its folded form next to it.

    Both are loaded from the written files and evaluated in float32 on the run's evaluation split; the figures
    go into ``hub/index.json``, from which cards and results are rendered. Of several seeds, all runs are
    evaluated in this way, and the one with the median top-1 is written (of an even number, the lower of the
    two in the middle).

    Args:
        run: A finished run, or the finished runs of several seeds.
        tag: Tag of the weights, which names recipe and data, e.g. ``sgd_c10``.
        hub: The hub folder.
        dataset: Name of the dataset in cards; by default its Hub id or the name of the folder.
        data: Location of the data, if it has moved since the run.
        onnx: Also write ``model.onnx``.
        torch_export: Also write ``model.pt2``, for ``torch.export.load``.
        dataset_license: Licence of the images, e.g. ``cc-by-4.0``, if this package does not know it.

    Raises:
        UserError: The run does not exist or is not finished, the tag is invalid, a checkpoint of that name
            already exists, the data cannot be read, or its licence is unknown. Nothing is written.
        FoldError: The folded model, or a file for another runtime, differs from the trained one.
    """
    runs = _finished(run)
    environment = open_run(runs[0])
    check_tag(tag)
    dataset = str(dataset or environment["data"])
    license_ = license_of(dataset, dataset_license)
    forms_of = {run: _forms(environment["model"], tag, run) for run in runs}
    check_ready(hub, {form.name for form in itertools.chain(*forms_of.values())})
    recipes = {run: _evaluation(run, data) for run in runs}  # which looks at the data, once for each
    run, measured = _median(forms_of, recipes)
    environment, forms, trained = open_run(run), forms_of[run], load_recipe(run / RECIPE)
    recipe = recipes[run]

    mechanism = (
        parse_name(environment["model"])[1] or "resnet" if environment["model"] in model_names() else "timm"
    )
    paper = paper_of(mechanism)
    resolved = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    for key in ("init", "teacher"):  # where they lay is nobody's business
        kind, path = split_kind(str(resolved.get(key) or ""))
        if Path(path).is_absolute():
            resolved[key] = f"{kind}{Path(path).name}"
    fields = {
        "recipe": {key: value for key, value in resolved.items() if key not in ("data", "seed")},
        "dataset": {
            "id": dataset,
            "license": license_,
            "split": _reported(environment),
            "images": environment["images"],
        },
        "training": {
            "precision": trained.precision,
            **{key: environment[key] for key in ("git_commit", "packages")},
            "hardware": ", then ".join(machines(environment)),
        },
        "mechanism": mechanism,
        "paper": {"title": paper.title, "arxiv": paper.arxiv, "url": paper.url},
        "caveats": _caveats(environment["model"], paper),
    }
    runtimes = [name for name, wanted in ((ONNX, onnx), (PROGRAM, torch_export)) if wanted]
    filled: dict[Path, Checkpoint] = {}
    with new_folders(hub, [form.name for form in forms]) as folders:
        for form, folder in zip(forms, folders, strict=True):
            checkpoint = _write(folder, form, run, recipe, runtimes, {**resolved, "data": dataset})
            figures = {
                **{load_recipe(r / RECIPE).seed: f[form.name] for r, f in measured.items() if form.name in f},
                trained.seed: checkpoint.metrics,
            }
            over = {
                "seeds": sorted(figures),
                **{key: spread([figures[seed][key] for seed in sorted(figures)]) for key in FIGURES},
            }
            folded = forms[1].name if form.folded_from is None and len(forms) > 1 else None
            filled[folder] = dataclasses.replace(
                checkpoint, folder=hub / form.name, over_seeds=over, folded=folded, **fields
            )
        return add(hub, filled)


def _caveats(architecture: str, paper: Paper) -> list[str]:
    """What a reader of the card must know before comparing with the paper."""
    if paper.caveat:
        return [paper.caveat]
    backbone, key = parse_name(architecture) if architecture in model_names() else (architecture, "")
    if key in ("dia", "asr", "sem", "spem") and not is_resnet(backbone):
        return [
            f"Where the mechanism stands in {backbone} is this package's choice: the authors' code has "
            "ResNets only."
        ]
    return []


def _finished(run: Path) -> list[Path]:
    """The run, or those of several seeds."""
    if is_seeds(run) and not (run / RESULTS).is_file():
        raise UserError(f"{run} has no {RESULTS}: `timm-attn train --resume {run}` finishes its runs")
    runs = seed_runs(run) if is_seeds(run) else [run]
    for one in runs:
        open_run(one, finished=True)
        read_results(one)
    return runs


def _evaluation(run: Path, data: str | None) -> Recipe:
    """A run's recipe, to evaluate it in float32 on what the run reports, whatever splits the data has by now.

    Warns:
        UserWarning: What is named holds other images than the run was evaluated on.

    Raises:
        UserError: The data is where it was, and has changed.
    """
    environment = open_run(run)
    split = _reported(environment)
    recipe = dataclasses.replace(run_recipe(run, data), eval_split=split, precision="no")
    then = environment.get("fingerprints", {}).get(split)  # runs of older versions have none
    if then is not None and not split.endswith(HELD_OUT):  # held-out images are checked when they are read
        now = load_split(recipe.data, "eval", split, encoded=True, **split_options(recipe, None)).fingerprint
        if now == then:
            return recipe
        if data is None:
            raise UserError(
                f"the split {split} of {recipe.data} has changed since {run} was evaluated on it: "
                "restore it, or name its place with --data"
            )
        warnings.warn(
            f"the split {split} of {recipe.data} is not, byte for byte, what {run} was evaluated on (its "
            "images, labels or their order): the cards give the figures of these images",
            stacklevel=3,
        )
    return recipe


def _reported(environment: dict[str, Any]) -> str:
    """The split whose figures a run reports."""
    return list(environment["images"])[-1]


def _median(
    forms_of: Mapping[Path, Sequence[_Form]], recipes: Mapping[Path, Recipe]
) -> tuple[Path, dict[Path, dict[str, dict[str, Any]]]]:
    """The run to write, and of several the figures of each by the form's name."""
    first, *others = forms_of
    if not others:
        return first, {}
    measured = {
        run: {form.name: validate(form.model, recipes[run], source=run) for form in forms}
        for run, forms in forms_of.items()
    }
    trained = forms_of[first][0].name
    runs = sorted(measured, key=lambda run: measured[run][trained]["top1"])
    return runs[(len(runs) - 1) // 2], measured


def _forms(architecture: str, tag: str, run: Path) -> list[_Form]:
    """The model of a run and, where it folds, its folded form."""
    model = load_model(str(run))
    name = f"{architecture}.{tag}"
    forms = [_Form(name, architecture, tag, model)]
    try:
        folded = fold(model)
    except NothingToFold:
        return forms
    except FoldError as error:
        if not row_of(parse_name(architecture)[1]).fuses:
            raise
        # Its rounding, that is: an FMMNet multiplies it.
        warnings.warn(f"{name} is exported without its folded form: {error}", stacklevel=2)
        return forms
    stock = stock_model(model, folded)
    plain = stock.pretrained_cfg["architecture"]
    mechanism = parse_name(architecture)[1]
    folded_tag = f"{tag}_folded" if plain == architecture else f"{mechanism}_{tag}_folded"
    return [*forms, _Form(f"{plain}.{folded_tag}", plain, folded_tag, stock, name)]


def _write(
    folder: Path, form: _Form, run: Path, recipe: Recipe, runtimes: Sequence[str], resolved: dict[str, Any]
) -> Checkpoint:
    """Fill one folder, the rendered files aside, and measure the model loaded back from it."""
    license_ = form.model.pretrained_cfg.get("license") or "apache-2.0"
    cfg = {**form.model.pretrained_cfg, "license": license_, "tag": form.tag}
    form.model.pretrained_cfg = form.model.default_cfg = cfg
    save_model(form.model, folder, list(form.model.pretrained_cfg["label_names"]))
    loaded = load_model(f"local-dir:{folder}")
    difference = relative_difference(load_model(str(run)), loaded, example_input(loaded, 8))
    if not difference <= BOUNDS[torch.float32]:
        raise UserError(
            f"{form.name} does not compute what {run} computes: relative difference {difference:.3g}"
        )
    measured = validate(loaded, recipe, source=run)
    metrics = {
        **{key: measured[key] for key in (*FIGURES, "images", "skipped") if key in measured},
        "epoch": read_results(run)["epoch"],
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "logit_difference": difference,
    }
    differences = {name: WRITERS[name](loaded, folder / name) for name in runtimes}
    for name in (CURVES, METRICS):
        shutil.copy(run / name, folder / name)
    (folder / RECIPE).write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    return Checkpoint(
        name=form.name,
        folder=folder,
        architecture=form.architecture,
        tag=form.tag,
        metrics=metrics,
        runtimes=differences,
        folded_from=form.folded_from,
        **described(folder),
    )
