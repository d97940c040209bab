"""Exports the output of ``timm-attn freeze`` as a folder laid out like a Hub repository."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ..compare import relative_difference
from ..errors import UserError
from ..fold import example_input
from ..load import RECIPE, load_model
from ..training import validate
from ..training.freezing import PICTURE, REPORT
from ..training.recipe_file import load_recipe
from ..training.run import save_model, weights_digest
from ..training.seeds import spread
from ..weights import INDEX, Checkpoint, read_index
from .folders import add, check_ready, check_tag, described, new_folders

_COPIED = ("gates", "frozen", "budget", "steps", "images", "before", "after", "batch_size", "hardware")
_COPIED += ("means", "split")


def is_frozen_folder(folder: Path) -> bool:
    """Whether ``timm-attn freeze`` has written a folder."""
    return (folder / REPORT).is_file()


def export_frozen(folder: Path, tag: str, hub: Path, data: str | None = None) -> Checkpoint:
    """Write ``hub/<architecture>.<tag>`` for a network with frozen gates, and add it to the index.

    Its training settings are those of the original, which must be in the same index. It is loaded from the
    written files and evaluated in float32 on the original's evaluation split.

    Args:
        folder: The output of ``timm-attn freeze`` for a checkpoint of the hub folder.
        tag: Tag of the new checkpoint.
        hub: The hub folder with the original.
        data: Location of the data, if it has moved.

    Raises:
        UserError: The folder is not such an output, the original is not in the index, or a checkpoint of that
            name already exists. Nothing is written.
    """
    check_tag(tag)
    report = _report(folder / REPORT)
    original = _original(report, hub)
    model: Any = load_model(f"local-dir:{folder}")
    architecture = model.pretrained_cfg["architecture"]
    name = f"{architecture}.{tag}"
    check_ready(hub, [name])
    recipe = dataclasses.replace(
        load_recipe(original.folder / RECIPE),
        data=data or report["data"],
        eval_split=str(original.dataset["split"]),
        precision="no",
    )
    with new_folders(hub, [name]) as (new,):
        model.pretrained_cfg = model.default_cfg = {
            "license": original.pretrained_cfg.get("license", "apache-2.0"),
            **model.pretrained_cfg,
            "tag": tag,
        }
        save_model(model, new, list(model.pretrained_cfg["label_names"]))
        loaded = load_model(f"local-dir:{new}")
        difference = relative_difference(model, loaded, example_input(loaded, 8))
        measured = validate(loaded, recipe)  # on the accelerator, if there is one
        figures = {key: measured[key] for key in ("top1", "top5", "loss")}
        for path in (folder / PICTURE, original.folder / RECIPE):
            shutil.copy(path, new / path.name)
        # Where things lay is nobody's business.
        shown = {**report, "source": original.name, "data": original.dataset["id"]}
        (new / REPORT).write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        checkpoint = dataclasses.replace(
            original,
            name=name,
            folder=hub / name,
            architecture=architecture,
            tag=tag,
            repo_id=None,
            revision=None,
            metrics={
                **{key: original.metrics[key] for key in ("epoch", "seed")},
                **{key: measured[key] for key in (*figures, "images", "skipped") if key in measured},
                "parameters": sum(p.numel() for p in loaded.parameters()),
                "logit_difference": difference,
            },
            over_seeds={
                "seeds": [original.metrics["seed"]],
                **{key: spread([value]) for key, value in figures.items()},
            },
            runtimes={},
            folded_from=None,
            folded=None,
            frozen_from=original.name,
            frozen=_summary(report),
            **described(new),
        )
        (added,) = add(hub, {new: checkpoint})
    return added


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in (*_COPIED, "source", "weights", "data") if key not in report]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): freeze the network again") from None
    if missing:
        raise UserError(f"{path} says nothing of {', '.join(missing)}: freeze the network again")
    return report


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """What the index says of it."""
    gates = report["gates"]
    return {key: report[key] for key in _COPIED} | {
        "gates": len(gates),
        "frozen": sum(gate["frozen"] for gate in gates),
        "images": report["images"][-1],
    }


def _original(report: dict[str, Any], hub: Path) -> Checkpoint:
    """The checkpoint that a network was frozen from, by its weights."""
    known = read_index(hub) if (hub / INDEX).is_file() else []
    for checkpoint in (c for c in known if c.here):
        if weights_digest(load_model(f"local-dir:{checkpoint.folder}")) == report["weights"]:
            return checkpoint
    raise UserError(
        f"the network was frozen from {report['source']}, whose weights are in no checkpoint of {hub}: "
        "export that one first"
    )
