"""Time networks against their baselines, in turn in one process: ratios, since machines are shared and noisy.

    python scripts/bench.py infer --out hub/results/bench_infer.csv
    python scripts/bench.py train --data uoft-cs/cifar10 --out hub/results/bench_train.json
    python scripts/bench.py infer --device cuda --out hub/results/bench_infer_gpu.csv
    python scripts/bench.py train --device cuda --parts full_speed --data uoft-cs/cifar10 --out gpu_train.json

Every round times each network once, from another one on each time; a ratio compares two times of the same
round. The CSV has the column names of timm's results, and one row for each network, condition and baseline.
Ratios that the file has already are not measured again.
"""

import argparse
import csv
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_draw
import bench_train
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_attn
from timm_attn.models.deployed import fuse_conv_norms
from timm_attn.training.run import hardware

console = Console()


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


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds that a call takes: the fastest of a few, as others use the machine too."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 in TF32, or not, on GPUs that have it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a GPU holds at most while a call runs, with the networks that wait; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def rounds(calls: dict[str, Callable[[], Any]], n: int, repeats: int, device: torch.device) -> dict:
    """``{name: [seconds in round 1, ...]}``; a first round, which warms up, is thrown away."""
    names, times = list(calls), {name: [] for name in calls}
    for i in track(range(n + 1), "rounds", console=console, transient=True):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(calls[name], device, repeats))
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


def surroundings(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "hardware": hardware(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in ("torch", "timm", "timm-attn")},
    }


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file."""
    if path is None:
        return
    new = not path.is_file()
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
    device = torch.device(arguments.device)
    size = arguments.img_size
    sizes = arguments.batch_sizes or ([1, 32, 256] if device.type == "cuda" else [1, 32])
    precisions = arguments.precisions or ["fp32", *(["tf32"] if device.type == "cuda" else []), "bf16"]
    assert_stock(size)
    wanted = {"resnet50", *(arguments.models or INFER)}
    models = {name: make().eval().to(device) for name, make in INFER.items() if name in wanted}
    plain = [(name, "resnet50") for name in models]
    pairs = [*plain, *(pair for pair in INFER_PAIRS if set(pair) <= set(models))]
    macs = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size, device=device))
        macs[name] = counter.get_total_flops() / 2e9
    counts = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    conditions = itertools.product(sizes, precisions, arguments.channels_last, arguments.compiled)
    for condition in (Condition(*values) for values in conditions):
        columns = {"infer_img_size": size, **condition.columns, **surroundings(device)}
        found = done(arguments.out, columns)
        missing = [pair for pair in pairs if pair not in found]
        if not missing:
            console.print(f"{condition}: in {arguments.out} already")
            continue
        names = [name for name in models if any(name in pair for pair in missing)]
        calls = {name: _forward(models[name], condition, size, device) for name in names}
        repeats = arguments.repeats if condition.batch_size == 1 else 1
        with tf32(condition.precision == "tf32"):
            times = rounds(calls, arguments.rounds, repeats, device)
            memory = {name: peak_memory(call, device) for name, call in calls.items()}
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
                    **({"peak_memory_mib": memory[name]} if device.type == "cuda" else {}),
                    **condition.columns,
                    **ratios(times, name, baseline),
                    **surroundings(device),
                }
            )
        write(arguments.out, rows)
        show(str(condition), rows)
        torch.compiler.reset()
    if arguments.out:
        bench_draw.draw(arguments.out, list(INFER))


def _forward(model: nn.Module, condition: Condition, size: int, device: torch.device) -> Callable:
    dtype = torch.bfloat16 if condition.precision == "bf16" else torch.float32
    layout = torch.channels_last if condition.channels_last else torch.contiguous_format
    model.to(dtype=dtype, memory_format=layout)  # pyright: ignore[reportCallIssue]
    images: Tensor = torch.randn(condition.batch_size, 3, size, size, device=device, dtype=dtype)
    images = images.to(memory_format=layout)
    # All these networks share their forward method, and with it one limit.
    network = torch.compile(model, isolate_recompiles=True) if condition.compiled else model
    return lambda: network(images)


def train(arguments: argparse.Namespace) -> None:
    """Training: end to end against timm's own, every mechanism's step over the plain one's, start-up."""
    parts = arguments.parts or ["end_to_end", "mechanisms", "start_up"]
    result: dict[str, Any] = {"surroundings": surroundings(torch.device("cpu"))}
    if "end_to_end" in parts:
        rates = bench_train.end_to_end(arguments.data, arguments.rounds, arguments.steps)
        best = rates["timm_attn bf16"]
        loader, step = bench_train.loader_alone(arguments.data, 200), 128 / statistics.median(best)
        result["end_to_end"] = {
            "images_per_second": {name: _spread(values) for name, values in rates.items()},
            "times_as_fast_as": {
                name: _spread([a / b for a, b in zip(best, values, strict=True)])
                for name, values in rates.items()
            },
            "loader_share_of_step": loader / step,
        }
    if "mechanisms" in parts:
        result["step_over_plain"] = {}
        for (plain, (names, size, batch)), precision in itertools.product(
            bench_train.MECHANISMS.items(), arguments.precisions
        ):
            classes = 10 if plain == "resnet20" else 1000
            calls = {name: bench_train.step_of(name, size, batch, precision, classes) for name in names}
            times = rounds(calls, arguments.rounds, 1, torch.device("cpu"))
            result["step_over_plain"][f"{plain}, {size} px, batch {batch}, {precision}"] = {
                name: ratios(times, name, plain) for name in names
            }
    if "full_speed" in parts:
        result["full_speed"] = bench_train.full_speed(
            arguments.data,
            arguments.recipe,
            arguments.model,
            torch.device(arguments.device),
            arguments.steps,
            arguments.rounds,
        )
        result["surroundings"] = surroundings(torch.device(arguments.device))
    if "start_up" in parts:
        bench_train.start_up(arguments.data)  # fills the caches
        result["seconds_to_first_step"] = _spread(
            [bench_train.start_up(arguments.data) for _ in range(arguments.rounds)]
        )
    text = json.dumps(result, indent=1)
    console.print_json(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


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
    command.add_argument("--channels-last", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    command.add_argument("--compiled", nargs="+", type=int, choices=[0, 1], default=[0, 1])
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
