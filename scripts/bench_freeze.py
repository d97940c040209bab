"""Times networks with all their channel gates frozen against the original and against the same without gates.

    python scripts/bench_freeze.py hub/results/freeze_speed.csv --budgets hub/results/freeze_accuracy.csv

Weights are random: they do not matter for the time. The networks are taken in turn; a ratio is the median
time of the frozen network ÷ that of the original, and ÷ that of the network that has never had gates; saved
is the share of the gates' cost that freezing saves. What the file has is not measured again.
"""

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import timm_attn
from timm_attn.files import read_csv, write_csv
from timm_attn.training.run import hardware

NETWORKS = (
    "seresnet50",
    "seresnet33ts",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_016",
    "lcnet_050",
)


@dataclass(frozen=True)
class Trio:
    """The original, that with gates frozen, one without; numbers of gates; images and batch sizes."""

    networks: list[Any]
    gates: int
    frozen: int
    multiplied: int
    size: int = 224
    batches: tuple[int, ...] = (1, 32)


def all_frozen(name: str) -> Trio:
    """A network of timm's with all gates frozen."""
    torch.manual_seed(0)
    original = timm.create_model(name).eval()
    images = torch.randn(670, 3, 32, 32) + torch.randn(670, 3, 1, 1)
    report = timm_attn.freeze(original, images, every=True)
    cfg, arguments = report.model.pretrained_cfg, report.model._model_args  # pyright: ignore
    without = (
        timm.create_model(cfg["architecture"], **{**arguments, "multiplied": []})
        if cfg["architecture"] == "frozen"
        else timm.create_model(cfg["architecture"], **arguments)
    )
    multiplied = sum(gate.where == "a multiplication" for gate in report.gates)
    return Trio([original, report.model, without.eval()], len(report.gates), report.frozen, multiplied)


def within_budget(row: dict[str, str]) -> Trio:
    """The network of a row of freeze_accuracy.csv."""
    kept = [int(i) for i in row["kept"].split()]
    names = [row["network"], "frozen", row["network"].partition("_")[0]]
    more = [{}, {"backbone": row["network"], "kept": kept}, {}]
    networks = [timm.create_model(n, num_classes=10, **m).eval() for n, m in zip(names, more, strict=True)]
    return Trio(networks, int(row["gates"]), int(row["frozen"]), 0, 32, (1, 128))


def trios(arguments: argparse.Namespace) -> Iterator[tuple[str, Trio]]:
    """Name and networks of what is timed."""
    for name in arguments.networks:
        yield name, all_frozen(name)
    if arguments.budgets:
        for row in read_csv(arguments.budgets):
            if (row["network"], row["budget"]) == ("resnet20_se", "0.25") and row["recover"] != "0":
                yield f"resnet20_se, {row['run']}, budget 0.25", within_budget(row)


@torch.no_grad()
def medians(networks: list[Any], x: torch.Tensor, bf16: bool, rounds: int) -> list[float]:
    """Milliseconds of each, in turn, from another one on each time: what ran before leaves its trace."""
    taken: list[list[float]] = [[] for _ in networks]
    turns = list(zip(networks, taken, strict=True))
    for i in range(rounds + 2):
        turns.append(turns.pop(0))
        for network, times in turns:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                network(x)
            if i > 1:
                times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", type=int, nargs="*", choices=[0, 1], default=[0, 1])
    parser.add_argument(
        "--budgets", type=Path, help="freeze_accuracy.csv: resnet20_se at a budget of 0.25, too"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = []
    if arguments.out.exists():
        rows = read_csv(arguments.out)
    known = {tuple(str(row[k]) for k in ("network", "precision", "batch", "compiled")) for row in rows}
    for name, trio in trios(arguments):
        networks = [n.to(memory_format=torch.channels_last) for n in trio.networks]
        for compiled, bf16, batch in itertools.product(arguments.compiled, (False, True), trio.batches):
            precision = "bf16" if bf16 else "fp32"
            if (name, precision, str(batch), str(compiled)) in known:
                continue
            torch._dynamo.reset()
            taken = [torch.compile(n) for n in networks] if compiled else networks
            x = torch.randn(batch, 3, trio.size, trio.size).to(memory_format=torch.channels_last)
            rounds = arguments.rounds if batch > 1 else 4 * arguments.rounds
            original, frozen, without = medians(taken, x, bf16, rounds)
            row = {
                "network": name,
                "precision": precision,
                "batch": batch,
                "compiled": compiled,
                "rounds": rounds,
                "gates": trio.gates,
                "frozen": trio.frozen,
                "multiplied": trio.multiplied,
                "original_ms": round(original, 2),
                "frozen_ms": round(frozen, 2),
                "without_ms": round(without, 2),
                "over_original": round(frozen / original, 3),
                "over_without": round(frozen / without, 3),
                "saved": round((original - frozen) / (original - without), 2),
                "machine": hardware(),
            }
            print(row, flush=True)
            rows.append(row)
            write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
