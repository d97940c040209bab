"""A folder laid out as a Hub repository, read with suspicion before timm sees it."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from . import schema
from .checkpoint import CONFIG, INDEX, WEIGHTS, check_inside
from .fetch import fetch
from .index import read_index
from .schema import WeightsError

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
    for checkpoint in read_index(hub) if (hub / INDEX).is_file() else []:
        if checkpoint.folder == folder.resolve():
            for name in (CONFIG, WEIGHTS):
                checkpoint.verified(name)
    check_weights(folder / WEIGHTS)
    return read_config(folder / CONFIG)


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
    check_weights(weights)
    read_config(config)
    return config.parent
