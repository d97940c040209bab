"""A finished run to folders laid out as Hub repositories, with what was measured of the very files."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import UserError
from ..fold import BOUNDS, NothingToFold, example_input, fold, relative_difference
from ..models import model_names, parse_name, stock_model
from ..training import Recipe, load_model, validate
from ..training.recipe_file import load_recipe
from ..training.run import (
    CONFIG,
    CURVES,
    METRICS,
    RECIPE,
    open_run,
    read_results,
    replace_file,
    save_model,
)
from ..weights import INDEX, Checkpoint, read_index, sha256
from .card import card
from .deploy import ONNX, PROGRAM, write_onnx, write_program


def export(
    run: Path,
    tag: str,
    hub: Path,
    dataset: str | None = None,
    data: str | None = None,
    onnx: bool = False,
    torch_export: bool = False,
) -> list[Checkpoint]:
    """Write ``hub/<architecture>.<tag>`` and, where the model folds, its folded form beside it.

    Both are loaded from what was written and measured in float32 on the run's evaluation split; the figures
    go into the cards and into ``hub/index.json``.

    Args:
        run: A finished run.
        tag: Name of recipe and data, e.g. ``sgd_c10``.
        hub: The hub folder.
        dataset: What cards call the data set; by default its Hub id or the folder's name.
        data: Where the data lies now, if not where the run had it.
        onnx: Write ``model.onnx`` too.
        torch_export: Write ``model.pt2`` too, for ``torch.export.load``.

    Raises:
        UserError: The run is not one or not finished, the tag is not a name, a checkpoint of that name is
            there, or the data cannot be read. Nothing is written then.
        FoldError: The folded model, or a file for another runtime, differs from the trained one.
    """
    about = open_run(run, finished=True)
    read_results(run)
    if not tag or not tag.replace("_", "").isalnum():
        raise UserError(f"tag {tag!r} must be letters, digits and underscores, e.g. sgd_c10")
    trained = load_recipe(run / RECIPE)
    recipe = dataclasses.replace(trained, data=data or trained.data, precision="no")
    architecture = about["model"]
    mechanism = parse_name(architecture)[1] if architecture in model_names() else "timm"
    name = f"{architecture}.{tag}"
    model = load_model(str(run))
    forms: list[tuple[str, str, str, Any, str | None]] = [(name, architecture, tag, model, None)]
    try:
        folded = fold(model)
    except NothingToFold:
        pass
    else:
        stock = stock_model(model, folded)
        plain = stock.pretrained_cfg["architecture"]
        folded_tag = f"{tag}_folded" if plain == architecture else f"{mechanism}_{tag}_folded"
        forms.append((f"{plain}.{folded_tag}", plain, folded_tag, stock, name))
    for form_name, *_ in forms:
        if (hub / form_name).exists():
            raise UserError(
                f"{hub / form_name} is there already: choose another --tag or --hub, or remove it"
            )

    known = read_index(hub) if (hub / INDEX).is_file() else []
    details = {
        "dataset": dataset or about["data"],
        "mechanism": mechanism,
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "precision": trained.precision,
        **{key: about[key] for key in ("images", "git_commit", "packages", "hardware")},
        "siblings": [form[0] for form in forms],
        "runtimes": [name for name, wanted in ((ONNX, onnx), (PROGRAM, torch_export)) if wanted],
    }
    written, partials = [], []
    try:
        for form_name, form_architecture, form_tag, form_model, folded_from in forms:
            partial = hub / f".{form_name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            partials.append((partial, hub / form_name))
            checkpoint = _write(
                partial, form_name, form_architecture, form_tag, form_model, folded_from, details, recipe, run
            )
            written.append(dataclasses.replace(checkpoint, folder=hub / form_name))
        for partial, final in partials:
            partial.rename(final)
    except BaseException:
        for partial, final in partials:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        raise
    _write_index(hub, [*known, *written])
    return written


def _about(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "size": path.stat().st_size}


def _saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _write(
    folder: Path,
    name: str,
    architecture: str,
    tag: str,
    model: Any,
    folded_from: str | None,
    details: dict[str, Any],
    recipe: Recipe,
    run: Path,
) -> Checkpoint:
    """Fill one folder, measure the model loaded back from it, and describe it."""
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "tag": tag}
    save_model(model, folder, list(model.pretrained_cfg["label_names"]))
    loaded = load_model(f"local-dir:{folder}")
    difference = relative_difference(load_model(str(run)), loaded, example_input(loaded, 8))
    if not difference <= BOUNDS[torch.float32]:
        raise UserError(f"{name} does not compute what {run} computes: relative difference {difference:.3g}")
    metrics = {
        **{k: v for k, v in validate(loaded, recipe).items() if k != "eval_images_per_second"},
        "n": 1,
        "epoch": read_results(run)["epoch"],
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "logit_difference": difference,
    }
    writers = {ONNX: write_onnx, PROGRAM: write_program}
    details = {**details, "runtimes": {f: writers[f](loaded, folder / f) for f in details["runtimes"]}}
    shutil.copy(run / CURVES, folder / CURVES)
    shutil.copy(run / METRICS, folder / METRICS)
    resolved = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    (folder / RECIPE).write_text(yaml.safe_dump({**resolved, "data": details["dataset"]}, sort_keys=False))
    config = _saved_config(folder)
    checkpoint = Checkpoint(
        name=name,
        folder=folder,
        architecture=architecture,
        tag=tag,
        pretrained_cfg={
            **config["pretrained_cfg"],
            "num_classes": config["num_classes"],
            "label_names": config["label_names"],
        },
        model_args=config.get("model_args", {}),
        metrics=metrics,
        folded_from=folded_from,
        details=details,
    )
    (folder / "README.md").write_text(card(checkpoint, resolved), encoding="utf-8")
    files = {p.name: _about(p) for p in sorted(folder.iterdir())}
    return dataclasses.replace(checkpoint, files=files)


def _write_index(hub: Path, checkpoints: list[Checkpoint]) -> None:
    entries = {}
    for checkpoint in sorted(checkpoints, key=lambda c: c.name):
        entry = dataclasses.asdict(checkpoint)
        entries[checkpoint.name] = {k: v for k, v in entry.items() if k not in ("name", "folder")}
    replace_file(hub / INDEX, (json.dumps({"checkpoints": entries}, indent=1) + "\n").encode())
