"""How calls are timed: in turn, round by round; a ratio compares two times of the same round."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import timm_attn
from timm_attn.training.run import hardware

console = Console()


def usable_device(name: str) -> torch.device:
    """The device of that name; the script ends if PyTorch sees no such device here."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {name}: PyTorch sees no GPU here")
    return device


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 in TF32, or not, on GPUs that have it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def seconds(call: Callable[[], Any], device: torch.device, repeats: int, in_a_row: int = 1) -> float:
    """Seconds that a call takes: the fastest of a few measurements, as others use the machine too.

    Args:
        repeats: Measurements.
        in_a_row: Calls of a measurement. A GPU is waited for after the last, so that it need not wait for the
            next one: throughput.
    """
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(in_a_row):
            call()
        synchronize(device)
        times.append((time.perf_counter() - started) / in_a_row)
    return min(times)


def rounds(
    calls: dict[str, Callable[[], Any]], n: int, repeats: int, device: torch.device, in_a_row: int = 1
) -> dict[str, list[float]]:
    """``{name: [seconds in round 1, ...]}``.

    Each round begins with another call. One round more, in which programs are compiled and kernels chosen,
    comes first and is thrown away.
    """
    names, times = list(calls), {name: [] for name in calls}
    for i in track(range(n + 1), "rounds", console=console, transient=True):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(calls[name], device, repeats, in_a_row))
    return {name: values[1:] for name, values in times.items()}


def ratios(times: dict[str, list[float]], name: str, baseline: str) -> dict[str, Any]:
    """The columns that compare a network with its baseline, round by round."""
    values = [a / b for a, b in zip(times[name], times[baseline], strict=True)]
    return {
        "baseline": baseline,
        "ratio_min": round(min(values), 4),
        "ratio_median": round(statistics.median(values), 4),
        "ratio_max": round(max(values), 4),
        "rounds": len(values),
    }


def peak_memory(call: Callable[[], Any], model: nn.Module, device: torch.device) -> float | None:
    """MiB of a GPU that a network and a call of it take at most, or None on a CPU.

    The images, and other networks that are on the GPU, do not count.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return round((torch.cuda.max_memory_allocated(device) - before + weights) / 2**20, 1)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "hardware": hardware(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "timm": version("timm"),
        "timm_attn": timm_attn.__version__,  # which a checkout on the path has, installed or not
    }
