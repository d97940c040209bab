"""Adds checkpoints to a hub folder: all of them with their entries in its index, or none."""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from ..errors import UserError
from ..models import GRAFT, model_names, parse_name
from ..weights import CONFIG, INDEX, Checkpoint, read_config, read_index, sha256, write_index
from .render import render, rendered


@contextlib.contextmanager
def locked(hub: Path) -> Iterator[None]:
    """One process at a time reads the index of a hub folder and writes it anew."""
    with WeakFileLock(hub / ".index.lock"):
        yield


def check_ready(hub: Path, names: Iterable[str]) -> None:
    """Find before the work what would keep checkpoints from being added.

    Raises:
        UserError: A checkpoint of that name is there, or the index differs from a checkpoint that it lists.
        WeightsError: The index cannot be read.
    """
    if hub.exists() and not hub.is_dir():
        raise UserError(f"{hub} is a file: name a folder with --hub")
    for name in names:
        if (hub / name).exists():
            raise UserError(f"{hub / name} is there already: choose another --tag or --hub, or remove it")
    if (hub / INDEX).is_file():
        with locked(hub):
            render(hub, write=False)


def check_tag(tag: str) -> None:
    """Raise a UserError if a checkpoint cannot be named so."""
    if not re.fullmatch("[A-Za-z0-9_]+", tag) or not tag.strip("_"):
        raise UserError(f"tag {tag!r} must be letters, digits and underscores, e.g. sgd_c10")
    if tag.startswith(GRAFT):
        raise UserError(f"tag {tag!r} would stand for grafted weights: begin it otherwise than with {GRAFT}")


@contextlib.contextmanager
def new_folders(hub: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Empty folders to fill, one for each name; what ``add`` has not taken by the end is removed."""
    folders = [hub / f".{name}.{os.getpid()}.partial" for name in names]
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # of a process of this number that was killed
            folder.mkdir(parents=True)
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def described(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint that its filled folder says: configuration, arguments and files."""
    config = read_config(folder / CONFIG)
    cfg = {"num_classes": config["num_classes"], "label_names": config["label_names"]}
    return {
        "pretrained_cfg": {**config["pretrained_cfg"], **cfg},
        "model_args": config.get("model_args", {}),
        "files": {p.name: {"sha256": sha256(p), "size": p.stat().st_size} for p in sorted(folder.iterdir())},
    }


def add(hub: Path, filled: Mapping[Path, Checkpoint]) -> list[Checkpoint]:
    """Take filled folders into a hub folder and its index, with cards.

    Others may add theirs at the same time: one waits for the other.

    Args:
        hub: The hub folder.
        filled: Checkpoints, each with its place in the hub folder, by the folders that ``new_folders`` gave.

    Returns:
        The checkpoints as the index lists them, with their controls.

    Raises:
        UserError: A checkpoint of that name has been written meanwhile, or the index has come to differ from
            one that it lists. Nothing is added.
    """
    moved: list[Path] = []
    with locked(hub):
        known: list[Checkpoint] = []
        if (hub / INDEX).is_file():
            render(hub, write=False)
            known = read_index(hub)
        try:
            names = {checkpoint.name for checkpoint in filled.values()}
            linked = link([*(c for c in known if c.name not in names), *filled.values()])
            new = {c.name: c for c in linked if c.name in names}
            for folder, checkpoint in filled.items():
                for path, text in rendered(new[checkpoint.name], linked).items():
                    (folder / path).parent.mkdir(exist_ok=True)
                    (folder / path).write_text(text, encoding="utf-8")
            for folder, checkpoint in filled.items():
                if checkpoint.folder.exists():
                    raise UserError(
                        f"{checkpoint.folder} has been written meanwhile: choose another --tag or --hub"
                    )
                folder.rename(checkpoint.folder)
                moved.append(checkpoint.folder)
            write_index(hub, linked)
        except BaseException:
            for folder in moved:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        render(hub)  # the cards of those that were there may name the new ones
    return list(new.values())


def link(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Entries of an index with their controls: plain and SE networks of the same backbone and recipe."""
    checkpoints = list(checkpoints)
    by_name = {c.name: c for c in checkpoints}

    def key(checkpoint: Checkpoint) -> tuple[Any, ...]:
        trained = checkpoint.as_trained(by_name)
        backbone = (
            parse_name(trained.architecture)[0]
            if trained.architecture in model_names()
            else trained.architecture
        )
        # What a field without a value says, older recipes say by not having it.
        recipe = {k: v for k, v in trained.recipe.items() if k != "model_kwargs" and v is not None}
        return backbone, recipe, checkpoint.dataset.get("id")

    controls = [c for c in checkpoints if c.is_control and not c.derived_from]
    return [
        dataclasses.replace(
            c,
            controls=[
                other.name
                for other in controls
                if other.name not in (c.name, c.derived_from) and key(other) == key(c)
            ],
        )
        for c in checkpoints
    ]
