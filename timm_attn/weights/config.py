"""A folder laid out as a Hub repository, read with suspicion before timm sees it."""

import contextlib
import threading
from math import prod
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from . import schema
from .checkpoint import CONFIG, WEIGHTS, check_inside
from .fetch import fetch
from .index import is_hub, read_index
from .schema import WeightsError
from .signature import SIGNATURE, check_signature, signer_wanted

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, as timm writes it.

    Raises:
        WeightsError: It cannot be read, or says what it must not: absurd sizes, arguments that no
            architecture takes, another source of weights.
    """
    config = schema.read_json(path)
    schema.CONFIG(config, str(path))
    names = config.get("label_names")
    if names and len(names) != config["num_classes"]:
        raise WeightsError(f"{path} names {len(names)} labels for {config['num_classes']} classes")
    return config


#: timm's largest networks have some thousand.
MOST_MODULES = 50_000
#: Values that a network may hold besides four times those of its file: tables made at loading.
_SPARE = 100_000_000
#: Values and modules of the networks that have been built to be counted, by entry point and arguments.
_SIZES: dict[Any, tuple[int, int]] = {}


class _TooLarge(Exception):
    """A network that is larger than it may be."""


def check_size(config: dict[str, Any], weights: Path) -> None:
    """Raise a WeightsError if the network of a config.json is far larger than the file of its weights."""
    from ..models import register_name  # which needs this package

    architecture, arguments = config["architecture"], config.get("model_args") or {}
    if not register_name(architecture):
        return  # whoever builds it says so
    with safe_open(weights, framework="pt") as file:
        held = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    arguments = {"num_classes": config["num_classes"], **arguments}
    try:
        _check_network(architecture, arguments, 4 * held + _SPARE)
    except _TooLarge:
        raise WeightsError(
            f"{weights} holds {held:,} values, far fewer than {architecture} with {str(arguments)[:200]} "
            "has: these are not its weights"
        ) from None
    except Exception:  # what else is wrong with the arguments, whoever builds it says
        return


def _check_network(architecture: str, arguments: dict[str, Any], most_values: int) -> None:
    """Build a network without memory, and give it up with ``_TooLarge`` as soon as it is."""
    key = timm.model_entrypoint(architecture), repr(sorted(arguments.items()))
    thread, values, modules = threading.get_ident(), 0, 0

    def check() -> None:
        if values > most_values or modules > MOST_MODULES:
            raise _TooLarge

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal values, modules
        if threading.get_ident() != thread or value is None:
            return
        modules += isinstance(value, nn.Module)
        values += value.numel() if torch.is_tensor(value) else 0
        check()

    if key in _SIZES:
        values, modules = _SIZES[key]
        return check()
    hooks = [
        register(count)
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        )
    ]
    try:
        try:
            timm.create_model(architecture, device="meta", **arguments)
        except TypeError:  # not every registered network takes a device
            with torch.device("meta"):
                timm.create_model(architecture, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    _SIZES[key] = values, modules


def check_weights(path: Path) -> None:
    """Look at the header of a safetensors file.

    Raises:
        WeightsError: It is none, or is cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be read: {error}. Restore it, or write or download it again"
        ) from None


def read_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a folder with config.json and model.safetensors, after a look at both.

    Raises:
        WeightsError: One is missing, cannot be read, says what it must not, is a link out of the folder, or
            differs from the index of the folder's hub; only pickled weights are there.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickles = [p.name for p in folder.glob("*") if p.suffix in _PICKLES]
            hint = "name a run folder or a hub folder"
            if pickles:
                hint = f"{pickles[0]} is not read, as pickles can run code: save it as safetensors"
            raise WeightsError(f"{folder} has no {name}: {hint}")
        check_inside(folder / name, folder)
    hub = folder.resolve().parent
    for checkpoint in read_index(hub) if is_hub(hub) else []:
        if checkpoint.folder == folder.resolve():
            for name in (CONFIG, WEIGHTS):
                checkpoint.verified(name)
    check_weights(folder / WEIGHTS)
    check_signature(folder)
    config = read_config(folder / CONFIG)
    check_size(config, folder / WEIGHTS)
    return config


def fetch_timm(name: str) -> Path | None:
    """The file of timm's own weights, by the name of the model with or without a tag.

    Returns:
        Its path in the cache; None if timm does not have them on the Hub, or reads them in a way of its own.

    Raises:
        WeightsError: As ``fetch``.
    """
    cfg: Any = timm.models.get_pretrained_cfg(name)
    if not cfg or not cfg.hf_hub_id or cfg.custom_load == "hf":
        return None
    repo_id, _, revision = cfg.hf_hub_id.partition("@")
    return fetch(repo_id, cfg.hf_hub_filename or WEIGHTS, revision or None)


def fetch_folder(name: str) -> Path:
    """The files of ``ORG/NAME`` or ``ORG/NAME@REVISION`` on the Hub, as a folder in its cache.

    Raises:
        WeightsError: They cannot be had, or the repository has no safetensors.
    """
    repo_id, _, revision = name.partition("@")
    schema.REPO(repo_id, "the Hub repository")
    config = fetch(repo_id, CONFIG, revision or None)
    # Both of the same commit, which is the name of the folder in the cache.
    weights = fetch(repo_id, WEIGHTS, config.parent.name)
    fetch_signature(repo_id, config.parent.name)
    check_weights(weights)
    check_signature(config.parent)
    check_size(read_config(config), weights)
    return config.parent


def fetch_signature(repo_id: str, revision: str | None) -> None:
    """Let the cache hold a repository's signature, if one is asked for and there is one."""
    if signer_wanted():
        with contextlib.suppress(WeightsError):  # whoever looks for it says that it is missing
            fetch(repo_id, SIGNATURE, revision)
