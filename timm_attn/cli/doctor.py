"""Facts for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import timm
import torch
from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from packaging.requirements import Requirement
from rich.table import Table

from ..branches import example_input
from ..compare import relative_difference
from ..fold import fold
from ..version import __version__
from ..weights import checkpoints, shipped_folder, without_tokens
from .console import app, console


@app.command
def doctor() -> None:
    """Print versions, devices, extras, where weights are searched, and the result of a short self-test."""
    table = Table("", "")
    for what, value in facts():
        table.add_row(what, value)
    console.print(table)
    model: Any = timm.create_model("resnet20_asr", pretrained=True).eval()
    error = relative_difference(model, fold(model), example_input(model, 4))
    console.print(f"self-test: resnet20_asr loads and folds, max|Δlogit| / max|logit| = {error:.1e}")


def facts() -> list[tuple[str, str]]:
    """What is installed and configured, as (name, value)."""
    names = ("torchvision", "timm", "huggingface_hub", "safetensors")
    found = [
        ("timm_attn", __version__),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in names),
        ("devices", "; ".join(_devices())),
        *(("extra " + extra, state) for extra, state in _extras()),
        ("shipped weights", str(shipped_folder())),
        ("TIMM_ATTN_HUB", without_tokens(os.environ.get("TIMM_ATTN_HUB", "not set"))),
        ("weights by name", f"{len(checkpoints())}"),
        ("Hub", without_tokens(constants.ENDPOINT) + (", offline" if constants.is_offline_mode() else "")),
        ("Hub cache", _cache()),
    ]
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    found = [f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("Apple's GPU")
    return found


def _extras() -> list[tuple[str, str]]:
    """For each extra, whether it is installed, or which packages are missing."""
    asked: dict[str, list[str]] = {}
    try:
        lines = requires("timm-attn") or ()
    except PackageNotFoundError:  # a checkout on the path
        lines = ()
    for line in lines:
        requirement = Requirement(line)
        for extra in ("train", "export", "track", "sign"):
            marker = requirement.marker
            if marker and "extra" in str(marker) and marker.evaluate({"extra": extra}):
                asked.setdefault(extra, []).append(requirement.name)
    found = []
    for extra, names in asked.items():
        missing = [name for name in names if _version(name) == "not installed"]
        found.append((extra, f"missing {', '.join(missing)}" if missing else "installed"))
    return found


def _cache() -> str:
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return f"{constants.HF_HUB_CACHE}, empty"
    models = [repo for repo in cache.repos if repo.repo_type == "model"]
    return f"{constants.HF_HUB_CACHE}, {len(models)} models, {cache.size_on_disk / 1e9:.1f} GB"
