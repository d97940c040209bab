"""Loads a network by model name, run folder, hub folder or repository on the Hub."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import timm

from .errors import UserError
from .models import GRAFT, did_you_mean, model_names, register_graft, register_name
from .weights import (
    CONFIG,
    WEIGHTS,
    NoSuchFile,
    WeightsError,
    fetch_folder,
    fetch_timm,
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
        return create_pretrained(name).eval()
    except WeightsError:
        raise
    except Exception as error:  # timm, safetensors and the Hub client raise many types
        reason = " ".join(without_tokens(error).split())  # the Hub client's messages have empty lines
        raise UserError(f"cannot load {name}: {type(error).__name__}: {reason}") from None


def create_pretrained(name: str, **kwargs: Any) -> Any:
    """``timm.create_model(name, pretrained=True, **kwargs)``.

    A file of timm's own weights is compared with the sha256 of the Hub, which is asked once and given five
    seconds to answer.

    Raises:
        WeightsError: The file cannot be had, or is damaged.
    """
    if ":" not in name and name.partition(".")[0] not in (*model_names(), "frozen"):
        with suppress(NoSuchFile):  # timm reads other files, too
            file = fetch_timm(name)
            if file is not None:
                kwargs["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
    return timm.create_model(name, pretrained=True, **kwargs)


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
        check_model(source, "there is no folder of that name here, either")
        return source
    if not register_name(config["architecture"]):
        raise WeightsError(
            f"{source} is a {config['architecture']!r}, which nobody has registered: import its package first"
        )
    return f"local-dir:{folder}"


def check_model(name: str, unknown: str = "") -> None:
    """Raise a UserError with the nearest names if timm has no model, or no weights, of this name.

    Args:
        name: With or without a tag.
        unknown: What else to say of a name that nothing is like.
    """
    architecture, _, tag = name.partition(".")
    if not register_name(architecture):
        hint = did_you_mean(name) or unknown or "`timm-attn list` shows the models"
        raise UserError(f"unknown model {name!r}: {hint}")
    if tag.startswith(GRAFT) and architecture in model_names():
        try:
            register_graft(architecture, tag.removeprefix(GRAFT))
        except ValueError as error:
            raise UserError(str(error)) from None
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and architecture not in model_names() and tag not in tags:
        raise UserError(f"{architecture} has no weights {tag!r}: choose from {', '.join(tags) or 'none'}")
