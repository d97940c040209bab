"""Checkpoints to resume from: complete ``step-N`` folders of safetensors and JSON.

A folder is written under another name, synced to disk, and renamed, with the sha256 of every file in its
manifest: a crash at any moment leaves the checkpoint before it as it was.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import disk_errors, sha256, write_json

MANIFEST = "manifest.json"
MODEL, AVERAGE = "model.safetensors", "ema.safetensors"


@dataclass
class State:
    """All that a run needs to go on.

    Args:
        step: Optimiser steps done.
        model: The model's state dict.
        optimizer: The optimiser's state dict.
        ema: State dict of the averaged weights, or nothing.
        progress: JSON values: running sums of the epoch, gradient scaler.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)


def save(run: Path, state: State, keep: int) -> Path:
    """Write ``run/step-N`` and remove all but the newest ``keep`` checkpoints."""
    final = run / f"step-{state.step}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        tensors, rest = _split_optimizer(state.optimizer)
        with disk_errors(final):
            save_file(separate(state.model), partial / MODEL)
            save_file(separate(tensors), partial / "optimizer.safetensors")
            if state.ema:
                save_file(separate(state.ema), partial / AVERAGE)
        write_json(
            partial / "state.json", {"step": state.step, "optimizer": rest, "progress": state.progress}
        )
        for path in partial.iterdir():
            sync(path)
        write_json(partial / MANIFEST, {p.name: sha256(p) for p in sorted(partial.iterdir())})
        for path in (partial / MANIFEST, partial):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(run)
    for _, old in folders(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_last(run: Path) -> tuple[State | None, dict[Path, str]]:
    """The newest checkpoint of a run that is intact, and what is wrong with newer ones, by folder."""
    damaged = {}
    for _, folder in reversed(folders(run)):
        problem = _problem(folder)
        if problem is None:
            meta = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "optimizer.safetensors")
            optimizer = _join_optimizer(tensors, meta["optimizer"])
            ema = load_file(folder / AVERAGE) if (folder / AVERAGE).is_file() else {}
            model = load_file(folder / MODEL)
            return State(meta["step"], model, optimizer, ema, meta["progress"]), damaged
        damaged[folder] = problem
    return None, damaged


def take_up(run: Path, accelerator: Accelerator) -> State | None:
    """The newest intact checkpoint of a run, or None; damaged ones are named and removed."""
    state, damaged = load_last(run)
    accelerator.wait_for_everyone()
    for folder, problem in damaged.items():
        accelerator.print(f"warning: {folder} is damaged ({problem}): passed over and removed")
        if accelerator.is_main_process:  # or it would count among those that are kept
            shutil.rmtree(folder)
    if state is None:
        accelerator.print(f"{run} has no intact checkpoint: starting again from step 0")
    return state


def _problem(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} has the wrong sha256"
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def folders(run: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by step, the oldest first."""
    steps = [(p.name.removeprefix("step-"), p) for p in run.glob("step-*") if p.is_dir()]
    return sorted((int(n), p) for n, p in steps if n.isdigit())


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, as safetensors takes them: contiguous, and each in memory of its own.

    Some networks have a layer in several places, CoaT for example, whose tensors have several names then.
    """
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``<parameter index>/<name>`` or ``group <index>/<name>``, the rest as JSON values."""
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        scalars[str(index)] = {}
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}/{name}"] = value
            else:
                scalars[str(index)][name] = value
    groups = []
    for number, group in enumerate(state["param_groups"]):
        groups.append({k: v for k, v in group.items() if _is_json(v)})
        # timm's LAMB counts its steps in one.
        tensors |= {f"group {number}/{k}": v for k, v in group.items() if torch.is_tensor(v)}
    return tensors, {"state": scalars, "param_groups": groups}


def _is_json(value: Any) -> bool:
    """Whether a value can be saved; the others (a dtype) follow from the recipe."""
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)


def _join_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(values) for index, values in rest["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split("/", 1)
        if index.startswith("group "):
            rest["param_groups"][int(index.removeprefix("group "))][name] = tensor
        else:
            state[int(index)][name] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load an optimiser's state, laid out in memory as its parameters are.

    The layout matters to the last bit where an optimiser takes the norm of its state.
    """
    fresh = optimizer.state_dict()["param_groups"]
    groups = [{**new, **old} for new, old in zip(fresh, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    # On Windows folders cannot be opened, so that the rename alone has to do, and only writable files synced.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
