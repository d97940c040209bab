"""The checkpoint that a model name stands for, and the verified file of its weights.

These are searched, in this order:

1. folders given to ``add_folder``, the last one first;
2. the environment variable TIMM_ATTN_HUB, read once: a hub folder, or an organisation of the Hub, whose
   repositories, at their newest, take the place of the index's;
3. what ships with the package;
4. the Hub repository that the shipped index names, at the revision that it names.
"""

import os
import re
import warnings
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from .checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint
from .config import fetch_folder, fetch_signature, read_config
from .fetch import NotOnHub, fetch
from .index import read_index
from .schema import WeightsError
from .signature import check_signature, signer_wanted

SOURCES = ("url", "file", "state_dict", "hf_hub_id")
_FIELDS = {field.name for field in fields(PretrainedCfg)}
_added: list[Path] = []


def shipped_folder() -> Path:
    """The hub folder that ships: ``hub/`` of a checkout, ``timm_attn/hub/`` of an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "hub"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "hub"


def add_folder(folder: str | Path) -> list[Checkpoint]:
    """Search a hub folder before all others from now on; its checkpoints.

    Raises:
        WeightsError: It is no hub folder.
    """
    folder = Path(folder).resolve()
    found = read_index(folder)
    if folder in _added:
        _added.remove(folder)
    _added.insert(0, folder)
    candidates.cache_clear()
    return found


@cache
def _chosen() -> tuple[Path | None, str | None]:
    """The folder or the organisation that TIMM_ATTN_HUB names."""
    chosen = os.environ.get("TIMM_ATTN_HUB")
    if chosen and not Path(chosen).exists() and re.fullmatch(r"[A-Za-z0-9][\w-]{0,95}", chosen):
        return None, chosen
    return (Path(chosen).resolve() if chosen else None), None


def check_chosen() -> None:
    """Raise a ``WeightsError`` if TIMM_ATTN_HUB names a folder that is no hub folder."""
    folder, _ = _chosen()
    if folder:
        read_index(folder)


def _folders() -> list[Path]:
    folder, _ = _chosen()
    return [*_added, *([folder] if folder else []), shipped_folder()]


@cache
def candidates() -> dict[str, list[Checkpoint]]:
    """By name, the places where a checkpoint can be, in the order in which they are searched."""
    found: dict[str, list[Checkpoint]] = {}
    for folder in _folders():
        if folder == shipped_folder() and not (folder / INDEX).is_file():
            continue  # a checkout from which nothing was exported yet
        if folder not in _added and not folder.exists():
            continue  # the folder that the first export will make; who asks for weights of it is told
        # A broken hub folder must not make the whole package unusable.
        try:
            listed = read_index(folder)
        except WeightsError as error:
            warnings.warn(f"weights are ignored: {error}", stacklevel=2)
            continue
        organisation = _chosen()[1]
        for checkpoint in listed:
            places = found.setdefault(checkpoint.name, [])
            if organisation and folder == shipped_folder():
                elsewhere = folder / "not here"
                repo_id = f"{organisation}/{checkpoint.name}"
                places.append(replace(checkpoint, folder=elsewhere, repo_id=repo_id, revision=None, files={}))
            places.append(checkpoint)
    return found


def checkpoints() -> tuple[Checkpoint, ...]:
    """All checkpoints that are found by name, each where it is looked for first."""
    return tuple(places[0] for places in candidates().values())


def _by_tag(architecture: str) -> dict[str, Checkpoint]:
    """Tag to checkpoint; one that was trained as it is comes before one that was made from another."""
    known = [c for c in checkpoints() if c.architecture == architecture]
    return {c.tag: c for c in sorted(known, key=lambda c: c.derived_from is not None)}


def pretrained_cfgs(architecture: str) -> dict[str, dict[str, Any]]:
    """timm pretrained configurations by ``<architecture>.<tag>``, the default first."""
    return {
        f"{architecture}.{tag}": {**_known_fields(c.pretrained_cfg), **c.source}
        for tag, c in _by_tag(architecture).items()
    }


def resolve(architecture: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Point timm at the verified file of the weights asked for.

    Args:
        architecture: Model name without tag.
        kwargs: What timm's ``create_model`` passes to an entry point.

    Returns:
        What to add to ``kwargs``: the file, in an overlay or a whole configuration, and the arguments that
        its network was built with. Nothing if they name a source of their own (``hf-hub:``, ``local-dir:``,
        an overlay).

    Raises:
        WeightsError: There are no such weights, they cannot be had, or they are damaged.
    """
    cfg = kwargs.get("pretrained_cfg")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if any(overlay.get(key) for key in SOURCES):
        return {}
    known = _by_tag(architecture)
    tag: str | None = cfg if isinstance(cfg, str) else None
    if cfg is not None and not isinstance(cfg, str):
        # timm's scripts pass the whole configuration of a registered tag; others bring their own source.
        given = cfg if isinstance(cfg, dict) else cfg.to_dict()
        tag = given.get("tag")
        if tag not in known or not known[tag].source.items() <= given.items():
            return {}
    check_chosen()  # nothing else is taken in the stead of a broken one
    _, organisation = _chosen()
    tag = tag or next(iter(known), None)
    if tag and tag not in known and organisation:
        return _of_organisation(f"{organisation}/{architecture}.{tag}", architecture, kwargs)
    if tag is None or tag not in known:
        for place in _folders():
            if (place / INDEX).is_file():
                read_index(place)  # a broken one is why they were not found
        raise WeightsError(_not_found(architecture, tag, list(known)))
    first, *others = candidates()[known[tag].name]
    theirs = f"{organisation}/{first.name}"
    if first.repo_id == theirs and not first.files:
        try:
            return _of_organisation(theirs, architecture, kwargs)
        except NotOnHub as reason:
            warnings.warn(
                f"{reason}. TIMM_ATTN_HUB={organisation} is no folder here and is taken for an organisation "
                f"of the Hub; as it has no {first.name}, the package's own weights are taken",
                stacklevel=2,
            )
        first = others[0]
    file = str(_verified(first))
    return {**_not_given(first.model_args, kwargs), "pretrained_cfg_overlay": {**overlay, "file": file}}


def _verified(checkpoint: Checkpoint) -> Path:
    """The file of the weights, which is what the index says; signed, where TIMM_ATTN_SIGNER asks for it."""
    file = checkpoint.weights()
    if checkpoint.here and checkpoint.folder.parent == shipped_folder():
        return file  # it came with the package
    if checkpoint.repo_id and not checkpoint.here and signer_wanted():
        fetch(checkpoint.repo_id, CONFIG, checkpoint.revision)
        fetch_signature(checkpoint.repo_id, checkpoint.revision)
    check_signature(file.parent)
    return file


def _of_organisation(repo_id: str, architecture: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What to add to ``kwargs`` for the newest weights of a repository, by its own config.json."""
    folder = fetch_folder(repo_id)
    config = read_config(folder / CONFIG)
    if config["architecture"] != architecture:
        raise WeightsError(
            f"{repo_id} holds a {config['architecture']}: unset TIMM_ATTN_HUB, or load it as hf-hub:{repo_id}"
        )
    cfg = _known_fields(config["pretrained_cfg"])
    cfg |= {"architecture": architecture, "file": str(folder / WEIGHTS), "num_classes": config["num_classes"]}
    return {**_not_given(config.get("model_args") or {}, kwargs), "pretrained_cfg": cfg}


def _known_fields(cfg: dict[str, Any]) -> dict[str, Any]:
    """A pretrained configuration without what a file written with another version of timm has besides."""
    return {name: value for name, value in cfg.items() if name in _FIELDS}


def _not_given(arguments: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in kwargs}


def _not_found(architecture: str, tag: str | None, known: list[str]) -> str:
    name = f"{architecture}.{tag}" if tag else architecture
    looked = ", ".join(
        str(folder) if (folder / INDEX).is_file() else f"{folder}, which has no {INDEX}"
        for folder in _folders()
    )
    others = f" Known tags of {architecture}: {', '.join(known)}." if known else ""
    return (
        f"no pretrained weights for {name} (looked in {looked}).{others} `timm-attn list` shows "
        "what there is; set TIMM_ATTN_HUB to a hub folder or an organisation of the Hub, use "
        f"pretrained=False for random weights, or train it: `timm-attn train {architecture} --data DATA`"
    )
