"""Time networks against their baselines, in turn in one process: ratios, since machines are shared and noisy.

    python scripts/bench.py infer --out hub/results/bench_infer.csv
    python scripts/bench.py train --data uoft-cs/cifar10 --out hub/results/bench_train.json

On a GPU that is lent for ten minutes at a time, each of these again until it says that nothing is left:

    python scripts/bench.py infer --device cuda --seconds 480 --out gpu_infer.csv
    python scripts/bench.py infer --device cuda --seconds 480 --compiled 1 --channels-last 1 \\
        --models seresnet50 ecaresnet50d resnet50_dia --out gpu_infer.csv
    python scripts/bench.py train --device cuda --steps 200 --data uoft-cs/cifar10 --out gpu_train.json

Every round times each network once, from another one on each time; a ratio compares two times of the same
round. The CSV has the column names of timm's results, and one row for each network, condition and baseline.
Ratios that the file has already are not measured again.
"""

import argparse
import csv
import gc
import inspect
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_draw
import bench_train
import timm
import torch
from bench_timing import console, peak_memory, ratios, rounds, surroundings, tf32, usable_device
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_attn
from timm_attn.files import write_json
from timm_attn.models.deployed import fuse_conv_norms


def fused(name: str, **kwargs: Any) -> nn.Module:
    """A network whose norms are fused into its convolutions, timm's own networks too."""
    model = timm.create_model(name, **kwargs).eval()
    fuse_conv_norms(model)
    return model


def pytorchcv(name: str) -> nn.Module:
    """A network of pytorchcv."""
    from pytorchcv.model_provider import get_model

    return get_model(name)


INFER: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "seresnet50": lambda: timm.create_model("seresnet50"),
    "ecaresnet50d": lambda: timm.create_model("ecaresnet50d"),
    "pytorchcv diaresnet50b": lambda: pytorchcv("diaresnet50b"),
    "resnet50_dia": lambda: timm.create_model("resnet50_dia"),
    "resnet50_dia reduction=4": lambda: timm.create_model("resnet50_dia", reduction=4),
    "resnet50_conam": lambda: timm.create_model("resnet50_conam"),
    "fmmnet50": lambda: timm.create_model("fmmnet50"),
    "resnet50 fused": lambda: fused("resnet50"),
    "seresnet50 fused": lambda: fused("seresnet50"),
    "resnet50_dia folded": lambda: timm.create_model("resnet50_dia", folded=True),
    "resnet50_conam folded": lambda: timm.create_model("resnet50_conam", folded=True),
    "fmmnet50 folded": lambda: timm.create_model("fmmnet50", folded=True),
}
#: Besides the ratio over the plain network: (network, baseline).
INFER_PAIRS = [
    ("resnet50_dia", "seresnet50"),
    ("resnet50_dia folded", "seresnet50 fused"),
    ("resnet50_conam folded", "seresnet50 fused"),
    ("resnet50_dia reduction=4", "pytorchcv diaresnet50b"),
]


@dataclass(frozen=True)
class Condition:
    """How networks are run: batch size, precision, memory format, eager or compiled."""

    batch_size: int
    precision: str
    channels_last: bool
    compiled: bool

    @property
    def columns(self) -> dict[str, Any]:
        return {
            "infer_batch_size": self.batch_size,
            "precision": self.precision,
            "memory_format": "channels_last" if self.channels_last else "contiguous",
            "compiled": int(self.compiled),
        }


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file."""
    if path is None:
        return
    new = not path.is_file()
    if not new and path.read_text().partition("\n")[0] != ",".join(rows[0]):
        raise SystemExit(f"{path} has other columns, as those of another device: choose another --out")
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def done(path: Path | None, condition: dict[str, Any]) -> set[tuple[str, str]]:
    """The networks, each with a baseline, that the file has in a condition, given by its columns."""
    if path is None or not path.is_file():
        return set()
    wanted = {key: str(value) for key, value in condition.items()}
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if wanted.items() <= row.items()]
    return {(row["model"], row["baseline"]) for row in rows}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Draw the ratios of one condition."""
    table = Table("network", "over", "min", "median", "max", "per second", title=title)
    for row in rows:
        table.add_row(
            row["model"],
            row["baseline"],
            *(f"{row[f'ratio_{key}']:.3f}" for key in ("min", "median", "max")),
            f"{row['infer_samples_per_sec']:.2f}",
        )
    console.print(table)


def operations(model: nn.Module, size: int) -> list[str]:
    """The operations that a network runs, in their order, each with the shape of its result."""
    program = torch.export.export(model.eval(), (torch.zeros(1, 3, size, size),))
    nodes = (node for node in program.graph.nodes if node.op == "call_function")
    return [f"{node.target} {tuple(node.meta['val'].shape)}" for node in nodes]


def assert_stock(size: int) -> None:
    """What folds away runs the same operations as the plain network: there is nothing to time."""
    stock = operations(timm.create_model("resnet50"), size)
    for name in ("resnet50_asr", "resnet50_ssia"):
        if operations(timm_attn.fold(timm.create_model(name)), size) != stock:
            raise AssertionError(f"the folded {name} does not run what resnet50 runs")
        console.print(f"the folded {name} runs the {len(stock)} operations of resnet50")


@torch.no_grad()
def infer(arguments: argparse.Namespace) -> None:
    """Latency at batch 1 and throughput at larger batches, in eval mode."""
    started = time.perf_counter()
    device, size = usable_device(arguments.device), arguments.img_size
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True  # as timm's benchmark.py does; the first round chooses
    else:
        assert_stock(size)  # the same on every device
    models = networks({"resnet50", *(arguments.models or INFER)}, device)
    pairs = [(name, "resnet50") for name in models]
    pairs += [pair for pair in INFER_PAIRS if set(pair) <= set(models)]
    macs = {name: multiply_adds(model, size, device) for name, model in models.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    left, longest = False, 0.0
    for condition in conditions(arguments, on_gpu):
        columns = {"infer_img_size": size, **condition.columns, **surroundings(device)}
        found = done(arguments.out, columns)
        missing = [pair for pair in pairs if pair not in found]
        if not missing:
            console.print(f"{condition}: in {arguments.out} already")
            continue
        begun = time.perf_counter()
        if begun - started + longest > arguments.seconds:
            left = True
            break
        names = [name for name in models if any(name in pair for pair in missing)]
        try:
            times, memory = measure({name: models[name] for name in names}, condition, arguments, device)
        except torch.OutOfMemoryError as error:
            console.print(f"{condition}: {str(error).partition('. ')[0]}")
            times, memory = {}, {}
        torch.compiler.reset()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        if not times:
            continue
        rows = []
        for name, baseline in missing:
            step = statistics.median(times[name])
            rows.append(
                {
                    "model": name,
                    "infer_samples_per_sec": round(condition.batch_size / step, 3),
                    "infer_step_time": round(1000 * step, 3),
                    "infer_img_size": size,
                    "infer_gmacs": round(macs[name], 3),
                    "param_count": round(counts[name], 3),
                    **({"peak_memory_mib": memory[name]} if on_gpu else {}),
                    **condition.columns,
                    **ratios(times, name, baseline),
                    **surroundings(device),
                }
            )
        write(arguments.out, rows)
        show(str(condition), rows)
        longest = max(longest, time.perf_counter() - begun)
    if arguments.out and arguments.out.is_file():
        bench_draw.draw(arguments.out, list(INFER))
    console.print("time is up: the same command goes on" if left else "nothing is left to measure")


def conditions(arguments: argparse.Namespace, on_gpu: bool) -> Iterator[Condition]:
    """The conditions asked for, what matters most first, for the time may be short."""
    # A compilation takes longer than all eager measurements of a network on a GPU: there it is asked for.
    compiled = arguments.compiled or ([0] if on_gpu else [0, 1])
    channels_last = arguments.channels_last or ([1, 0] if on_gpu else [0, 1])
    sizes = arguments.batch_sizes or ([1, 32, 256] if on_gpu else [1, 32])
    precisions = arguments.precisions or (["bf16", "tf32", "fp32"] if on_gpu else ["fp32", "bf16"])
    for comp, last, precision, n in itertools.product(compiled, channels_last, precisions, sizes):
        yield Condition(n, precision, bool(last), bool(comp))


def networks(wanted: set[str], device: torch.device) -> dict[str, nn.Module]:
    """Networks of ``INFER`` on a device; pytorchcv's are left out where that is not installed."""
    absent = {name for name in wanted if name.startswith("pytorchcv") and not find_spec("pytorchcv")}
    if absent:
        console.print(f"pytorchcv is not installed: without {', '.join(absent)}")
    return {name: make().eval().to(device) for name, make in INFER.items() if name in wanted - absent}


def multiply_adds(model: nn.Module, size: int, device: torch.device) -> float:
    """Multiply-adds of an image, in 10⁹."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops() / 2e9


def measure(
    models: dict[str, nn.Module], condition: Condition, arguments: argparse.Namespace, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of every network in every round, and MiB of memory, under a condition."""
    n, dtype = condition.batch_size, torch.bfloat16 if condition.precision == "bf16" else torch.float32
    layout = torch.channels_last if condition.channels_last else torch.contiguous_format
    images: Tensor = torch.randn(n, 3, arguments.img_size, arguments.img_size, device=device, dtype=dtype)
    images = images.to(memory_format=layout)
    calls = {}
    for name, model in models.items():
        model.to(dtype=dtype, memory_format=layout)  # pyright: ignore[reportCallIssue]
        calls[name] = partial(compiled(model) if condition.compiled else model, images)
    repeats, in_a_row = (arguments.repeats, 1) if n == 1 else (1, 1)
    if n > 1 and device.type == "cuda":
        in_a_row = max(3, 320 // n)
    with tf32(condition.precision == "tf32"):
        times = rounds(calls, arguments.rounds, repeats, device, in_a_row)
        memory = {name: peak_memory(call, models[name], device) for name, call in calls.items()}
    return times, memory


def compiled(model: nn.Module) -> Callable:
    """A network compiled.

    All share their forward method, and with it PyTorch's limit of programs, past which it stays eager.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(model, isolate_recompiles=True)
    torch._dynamo.config.recompile_limit = 2 * len(INFER)  # an older PyTorch
    return torch.compile(model)


def train(arguments: argparse.Namespace) -> None:
    """Training: end to end against timm's own, every mechanism's step over the plain one's, start-up."""
    device = usable_device(arguments.device)
    on_cpu = device.type == "cpu"
    parts = arguments.parts or (
        ["end_to_end", "mechanisms", "start_up"] if on_cpu else ["full_speed", "mechanisms"]
    )
    if "end_to_end" in parts and not on_cpu:
        sys.exit("end_to_end compares loaders on a CPU: take --device cpu, or other --parts")
    if on_cpu and torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the trainer, here and in other processes
    result: dict[str, Any] = {"surroundings": surroundings(device)}
    for part in parts:
        result |= {
            "end_to_end": _end_to_end,
            "mechanisms": _mechanisms,
            "full_speed": _full_speed,
            "start_up": _start_up,
        }[part](arguments, device)
        if arguments.out:
            write_json(arguments.out, result)
    console.print_json(json.dumps(result))


def _end_to_end(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rates = bench_train.end_to_end(arguments.data, arguments.rounds, arguments.steps)
    best = rates["timm_attn bf16"]
    loader, step = bench_train.loader_alone(arguments.data, 200), 128 / statistics.median(best)
    result = {
        "images_per_second": {name: _spread(values) for name, values in rates.items()},
        "times_as_fast_as": {
            name: _spread([a / b for a, b in zip(best, values, strict=True)])
            for name, values in rates.items()
        },
        "loader_share_of_step": loader / step,
    }
    return {"end_to_end": result}


def _mechanisms(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    result = {}
    in_a_row = 1 if device.type == "cpu" else 20
    for (plain, (names, size, batch)), precision in itertools.product(
        bench_train.MECHANISMS.items(), arguments.precisions
    ):
        classes = 10 if plain == "resnet20" else 1000
        calls = {name: bench_train.step_of(name, size, batch, precision, classes, device) for name in names}
        with tf32(False):
            times = rounds(calls, arguments.rounds, 1, device, in_a_row)
        result[f"{plain}, {size} px, batch {batch}, {precision}"] = {
            name: ratios(times, name, plain) for name in names
        }
    return {"step_over_plain": result}


def _full_speed(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    recipe, model, steps = arguments.recipe, arguments.model, arguments.steps
    return {
        "full_speed": bench_train.full_speed(arguments.data, recipe, model, device, steps, arguments.rounds)
    }


def _start_up(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    bench_train.start_up(arguments.data)  # fills the caches
    times = [bench_train.start_up(arguments.data) for _ in range(arguments.rounds)]
    return {"seconds_to_first_step": _spread(times)}


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("infer", help=infer.__doc__)
    command.set_defaults(run=infer)
    command.add_argument("--models", nargs="+", choices=INFER)
    command.add_argument("--batch-sizes", nargs="+", type=int, help="1 and 32; on a GPU 256, too")
    command.add_argument("--precisions", nargs="+", choices=["fp32", "tf32", "bf16"])
    command.add_argument("--channels-last", nargs="+", type=int, choices=[0, 1], help="both")
    command.add_argument("--compiled", nargs="+", type=int, choices=[0, 1], help="both; on a GPU 0")
    command.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="begin no condition that would end after these, if it took as long as the longest so far",
    )
    command.add_argument("--img-size", type=int, default=224)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument(
        "--repeats", type=int, default=5, help="calls a round at batch 1; the fastest counts"
    )
    command = commands.add_parser("train", help=train.__doc__)
    command.set_defaults(run=train)
    bench_train.add_arguments(command)
    for command in commands.choices.values():
        command.add_argument("--rounds", type=int, default=7)
        command.add_argument("--out", type=Path, help="CSV file to append to; for training, JSON")
    arguments = parser.parse_args()
    arguments.run(arguments)


assert timm_attn.__version__  # the models are registered

if __name__ == "__main__":
    main()
