"""Checkpoints as data: the index of a hub folder, and the file that a model name stands for.

A hub folder holds one folder a checkpoint, laid out as its Hub repository (config.json, model.safetensors,
README.md), and ``index.json``, which says of each what it is and the sha256 of its files. Two hub folders are
searched, in this order: the one named by the environment variable TIMM_ATTN_HUB, then the one that ships
with the package.
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

INDEX = "index.json"
WEIGHTS = "model.safetensors"
_SOURCES = ("url", "file", "state_dict", "hf_hub_id")


class WeightsError(RuntimeError):
    """Pretrained weights are missing, damaged or unknown."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a hub folder, as its index describes it.

    Args:
        name: Folder name, ``<architecture>.<tag>``.
        folder: Where it lies.
        pretrained_cfg: timm's pretrained configuration: preprocessing, number of classes, label names.
        model_args: Keyword arguments that the architecture was built with.
        files: ``{file name: {"sha256": hex digest, "size": bytes}}``.
        metrics: ``{"top1": %, "top5": %, "loss": nats, "n": runs, ...}`` as measured on the test split.
        folded_from: Name of the checkpoint that this one is the folded form of, or None.
    """

    name: str
    folder: Path
    architecture: str
    tag: str
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    folded_from: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def verified(self, filename: str = WEIGHTS) -> Path:
        """Path of one of its files, after comparing size and sha256 with the index.

        Raises:
            WeightsError: The file is missing or differs from the index.
        """
        path = self.folder / filename
        want = self.files.get(filename)
        if want is None or not path.is_file():
            raise WeightsError(f"{path} is missing: restore it, or export the run again")
        if path.stat().st_size != want["size"] or sha256(path) != want["sha256"]:
            raise WeightsError(
                f"{path} is damaged: its sha256 is not the one in {self.folder.parent / INDEX}. "
                "Restore the file, or export the run again"
            )
        return path


def sha256(path: str | Path) -> str:
    """Hex sha256 digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shipped_folder() -> Path:
    """The hub folder that ships: ``hub/`` of a checkout, ``timm_attn/hub/`` of an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "hub"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "hub"


def read_index(folder: str | Path) -> list[Checkpoint]:
    """The checkpoints of a hub folder, in the order of its index.

    Raises:
        WeightsError: The folder has no index or one that cannot be read.
    """
    folder = Path(folder)
    path = folder / INDEX
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        return [Checkpoint(name=name, folder=folder / name, **entry) for name, entry in entries.items()]
    except FileNotFoundError:
        raise WeightsError(
            f"{folder} is no hub folder: it has no {INDEX}. `timm-attn export RUN --hub {folder}` writes one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def _folders() -> list[Path]:
    chosen = os.environ.get("TIMM_ATTN_HUB")
    return [Path(chosen).resolve(), shipped_folder()] if chosen else [shipped_folder()]


@cache
def checkpoints() -> tuple[Checkpoint, ...]:
    """All checkpoints that are found by name, first come first served; read once, at import."""
    found: dict[str, Checkpoint] = {}
    for folder in _folders():
        if folder == shipped_folder() and not (folder / INDEX).is_file():
            continue  # a checkout from which nothing was exported yet
        # A broken hub folder must not make the whole package unusable.
        try:
            for checkpoint in read_index(folder):
                found.setdefault(checkpoint.name, checkpoint)
        except WeightsError as error:
            warnings.warn(f"weights are ignored: {error}", stacklevel=2)
    return tuple(found.values())


def _by_tag(architecture: str) -> dict[str, Checkpoint]:
    """Tag to checkpoint; a checkpoint trained as it is comes before one that was folded from another."""
    own = [c for c in checkpoints() if c.architecture == architecture]
    return {c.tag: c for c in sorted(own, key=lambda c: c.folded_from is not None)}


def pretrained_cfgs(architecture: str) -> dict[str, dict[str, Any]]:
    """timm pretrained configurations by ``<architecture>.<tag>``, the default first."""
    return {
        f"{architecture}.{tag}": {**c.pretrained_cfg, "file": str(c.folder / WEIGHTS)}
        for tag, c in _by_tag(architecture).items()
    }


def resolve(architecture: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Point timm at the verified file of the weights asked for.

    Args:
        architecture: Model name without tag.
        kwargs: What timm's ``create_model`` passes to an entry point.

    Returns:
        What to add to ``kwargs``: an overlay with the file, and the arguments that its network was built
        with. Nothing if they name a source of their own (``hf-hub:``, ``local-dir:``, an overlay).

    Raises:
        WeightsError: There are no such weights, or the file is damaged.
    """
    cfg = kwargs.get("pretrained_cfg")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if any(overlay.get(key) for key in _SOURCES):
        return {}
    known = _by_tag(architecture)
    if isinstance(cfg, str) or cfg is None:
        tag = cfg or next(iter(known), None)
        if tag is None or tag not in known:
            raise WeightsError(_not_found(architecture, tag, list(known)))
    else:
        # timm's scripts pass the whole configuration of a registered tag; others bring their own source.
        fields = cfg if isinstance(cfg, dict) else cfg.to_dict()
        tag = fields.get("tag")
        if tag not in known or fields.get("file") != str(known[tag].folder / WEIGHTS):
            return {}
    checkpoint = known[tag]
    arguments = {name: value for name, value in checkpoint.model_args.items() if name not in kwargs}
    return {**arguments, "pretrained_cfg_overlay": {**overlay, "file": str(checkpoint.verified())}}


def _not_found(architecture: str, tag: str | None, known: list[str]) -> str:
    name = f"{architecture}.{tag}" if tag else architecture
    looked = ", ".join(map(str, _folders()))
    others = f" Known tags of {architecture}: {', '.join(known)}." if known else ""
    return (
        f"no pretrained weights for {name} (looked in {looked}).{others} `timm-attn list` shows "
        "what there is; set TIMM_ATTN_HUB to a hub folder, use pretrained=False for random weights, or train "
        f"it: `timm-attn train {architecture} --data DATA`"
    )
