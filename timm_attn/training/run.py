"""The run folder: what a training run leaves behind, and how it is read again.

recipe.yaml          resolved recipe
environment.json     model, data, versions, hardware, git commit, command
metrics.jsonl        one line an epoch
steps.jsonl          one line every `log_every` steps
curves.png           the epochs, drawn
results.json         what is reported of a finished run: the last epoch's figures
step-N/              checkpoints to resume from
config.json          timm's configuration of the finished model
model.safetensors    its weights: the last of the files, so a run that has it is finished
"""

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from ..errors import UserError
from ..files import disk_errors, replace_file, sha256, write_json
from ..load import ENVIRONMENT, RECIPE, is_run
from ..version import __version__
from ..weights import CONFIG, WEIGHTS, read_config
from .checkpoint import separate, sync
from .processes import device_of_process
from .recipe import Recipe
from .recipe_file import load_recipe, save_recipe
from .splits import Splits, resolved

METRICS, CURVES, STEPS, RESULTS = "metrics.jsonl", "curves.png", "steps.jsonl", "results.json"


def refuse_full_folder(path: Path) -> None:
    """Raise a UserError if a new run cannot be made here, since there is something already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        hint = "choose another --out"
        if is_run(path):
            hint = f"resume with --resume {path}, or {hint}"
        elif (path / RECIPE).is_file():
            hint = "it is what is left of a run that ended before its first step: remove it"
        raise UserError(f"{path} is not empty: {hint}")


def open_run(path: Path, finished: bool = False) -> dict[str, Any]:
    """The environment of a run.

    Raises:
        UserError: The folder is not a run, or is not finished although it must be.
    """
    if not is_run(path):
        raise UserError(
            f"{path} is not a run folder: it has no {RECIPE} and {ENVIRONMENT}. Name the --out of a run"
        )
    if finished and not (path / WEIGHTS).is_file():
        raise UserError(f"run {path} is not finished: `timm-attn train --resume {path}` resumes it")
    try:
        return json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path / ENVIRONMENT} cannot be read ({error}): restore it, or start a new run"
        ) from None


def run_recipe(run: Path, data: str | None = None) -> Recipe:
    """The recipe of a run, with its data where it was last seen, or where the caller says."""
    recipe = load_recipe(run / RECIPE)
    return dataclasses.replace(recipe, data=resolved(data) or open_run(run).get("moved_to", recipe.data))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; nothing if there is none. A last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, one an epoch."""
    return read_lines(path / METRICS)


def read_results(path: Path) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
        UserError: They are missing or cannot be read.
    """
    try:
        return json.loads((path / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / RESULTS} cannot be read ({error}): restore it, or start a new run"
        ) from None


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a file of JSON lines, whole."""
    replace_file(path, "".join(map(_json_line, lines)).encode())


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_json_line(line))


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def save_model(model: nn.Module, folder: Path, label_names: list[str]) -> None:
    """Write config.json and model.safetensors as timm does, weights last.

    ``num_classes`` stays out of ``model_args``, since transformers passes it a second time.
    """
    partial = folder / ".model.partial"
    partial.mkdir(exist_ok=True)
    try:
        with disk_errors(folder / WEIGHTS):
            save_file(separate(model.state_dict()), partial / WEIGHTS)
        _write_config(model, partial / CONFIG, label_names)
        # safetensors lets nobody else read the file.
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)
        for name in (CONFIG, WEIGHTS):
            sync(partial / name)
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_config(model: nn.Module, path: Path, label_names: list[str]) -> None:
    save_config_for_hf(model, str(path), {"label_names": label_names})
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    replace_file(path, (json.dumps(config, indent=2) + "\n").encode())


def check_readable(model: nn.Module, label_names: list[str]) -> None:
    """Refuse a network that could not be loaded again from what ``save_model`` would write of it.

    Raises:
        UserError: Its configuration says what no reader takes, or leads to another network.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        try:
            _write_config(model, Path(folder) / CONFIG, label_names)
            read_config(Path(folder) / CONFIG)
            again = timm.create_model(f"local-dir:{folder}")
        except Exception as error:  # a constructor's, timm's and ours
            reason = str(error).replace(f"{folder}{os.sep}", "").replace(folder, CONFIG)
            raise UserError(
                f"the trained network could not be loaded again: {reason}. Change that (a class's name, "
                "--model-kwargs, the size of the images)"
            ) from error
    old, new = ({key: tuple(t.shape) for key, t in net.state_dict().items()} for net in (model, again))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise UserError(
            f"the trained network could not be loaded again: built from its config.json, {changed[0]} has "
            f"the shape {new.get(changed[0])}, not {old.get(changed[0])} ({len(changed)} such in all). "
            "Change --model-kwargs"
        )


def start_run(
    run: Path, model: str, arguments: dict[str, Any], recipe: Recipe, splits: Splits, processes: int
) -> None:
    """Write a new run's recipe and environment.

    Args:
        run: Its folder, which is empty.
        model: The network's name.
        arguments: What it is built from again, JSON values.
        recipe: With its open ends resolved.
        splits: The data.
        processes: Number of processes that train.

    Raises:
        UserError: Another process has started a run there.
    """
    about = surroundings()
    try:
        (run / RECIPE).touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"another run has been started in {run} meanwhile: choose another --out") from None
    save_recipe(recipe, run / RECIPE)
    environment = {
        "model": model,
        "data": Path(recipe.data).name if Path(recipe.data).is_dir() else recipe.data,
        "images": splits.counts,
        "label_names": splits.train.label_names,
        **about,
        "processes": processes,
        "recipe_sha256": sha256(run / RECIPE),
        "fingerprints": splits.fingerprints,
        **arguments,
    }
    write_json(run / ENVIRONMENT, environment)


def surroundings() -> dict[str, Any]:
    """Where and with what this process computes: command, commit, versions and hardware."""
    packages = ("torch", "timm", "accelerate", "datasets", "huggingface-hub", "safetensors")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {"timm-attn": __version__, **{name: installed(name) for name in packages}},
        "hardware": hardware(),
    }


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hardware(device: torch.device | None = None) -> str:
    """What a device is, by default that of this process: GPUs by name, processors with their threads."""
    processes = PartialState._shared_state.get("num_processes", 1) if device is None else 1
    device = device or device_of_process()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if processes == 1 else f"{processes} × {name}"
    threads = torch.get_num_threads()
    return f"{_cpu()}, {threads} thread{'s' if threads > 1 else ''}"


def machines(environment: dict[str, Any]) -> list[str]:
    """The hardware of a run: where it was started, then where it was continued."""
    return [environment["hardware"], *environment.get("continued_on", [])]


def weights_digest(model: nn.Module) -> str:
    """sha256 of a network's state dict."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the code that ran, with `+` if it had been changed since; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        if not (root / "timm_attn" / "training").samefile(Path(__file__).parent):
            return None  # an installed wheel inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "timm_attn") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
