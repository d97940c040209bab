"""Loads a network by model name, run folder, hub folder or repository on the Hub."""

import difflib
from pathlib import Path
from typing import Any

import timm

from .errors import UserError
from .models import register_name
from .weights import (
    CONFIG,
    WEIGHTS,
    WeightsError,
    fetch_folder,
    read_config,
    read_folder,
    without_tokens,
)

#: What a training run writes before its first step.
RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"


def load_model(name: str) -> Any:
    """Load a model with its weights, in eval mode.

    Args:
        name: A model name with pretrained weights, a run folder, a hub folder, ``hf-hub:ORG/NAME`` or
            ``local-dir:FOLDER``.

    Raises:
        UserError: The name is none of these.
        WeightsError: The model has no weights, or damaged ones.
    """
    name = source_name(name)
    try:
        return timm.create_model(name, pretrained=True).eval()
    except WeightsError:
        raise
    except Exception as error:  # timm, safetensors and the Hub client raise many types
        reason = " ".join(without_tokens(error).split())  # the Hub client's messages have empty lines
        raise UserError(f"cannot load {name}: {type(error).__name__}: {reason}") from None


def is_run(path: Path) -> bool:
    """Whether a folder was made by a training run."""
    return (path / RECIPE).is_file() and (path / ENVIRONMENT).is_file()


def source_name(source: str) -> str:
    """timm's name for a source of weights: a model name, a run or hub folder, ``hf-hub:`` or ``local-dir:``.

    Folders and repositories are checked before timm reads them.

    Raises:
        UserError: The source is none of these.
        WeightsError: Its weights are missing, damaged or pickled, or its configuration cannot be trusted.
    """
    kind, _, rest = source.partition(":")
    if kind in ("hf-hub", "hf_hub"):
        folder = fetch_folder(rest)
        config = read_config(folder / CONFIG)
    elif kind == "local-dir" or Path(source).is_dir():
        folder = Path(rest if kind == "local-dir" else source)
        if is_run(folder) and not (folder / WEIGHTS).is_file():
            hint = f"`timm-attn train --resume {folder}` resumes it"
            raise UserError(f"run {folder} is not finished: {hint}")
        config = read_folder(folder)
    else:
        if "/" in source or Path(source).exists():
            raise UserError(f"{source} is not a folder: name a model, a run folder or a hub folder")
        check_model(source)
        return source
    if not register_name(config["architecture"]):
        raise WeightsError(
            f"{source} is a {config['architecture']!r}, which nobody has registered: import its package first"
        )
    return f"local-dir:{folder}"


def check_model(name: str) -> None:
    """Raise a UserError with the nearest names if timm has no model of this name."""
    if not register_name(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "`timm-attn list` shows this package's models"
        )
        raise UserError(f"unknown model {name!r}: {hint}")
