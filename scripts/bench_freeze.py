"""Times networks with all their channel gates frozen against the original and against the same without gates.

    python scripts/bench_freeze.py hub/results/freeze_speed.csv

Weights are random: they do not matter for the time. The networks are taken in turn; a ratio is the median
time of the frozen network ÷ that of the original, and ÷ that of the network that has never had gates.
"""

import argparse
import csv
import itertools
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

import timm_attn
from timm_attn.training.run import hardware

NETWORKS = (
    "seresnet50",
    "seresnet33ts",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_016",
    "lcnet_050",
)
FIELDS = (
    *("network", "precision", "batch", "compiled", "rounds", "gates", "multiplied", "original_ms"),
    *("frozen_ms", "without_ms", "over_original", "over_without", "machine"),
)


def trio(name: str) -> tuple[list[Any], int, int]:
    """The original, that with its gates frozen, one without; number of gates, and of multiplications left."""
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
    return [original, report.model, without.eval()], len(report.gates), multiplied


@torch.no_grad()
def medians(networks: list[Any], x: torch.Tensor, bf16: bool, rounds: int) -> list[float]:
    """Milliseconds of each, in turn."""
    taken: list[list[float]] = [[] for _ in networks]
    for i in range(rounds + 2):
        for network, times in zip(networks, taken, strict=True):
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
    parser.add_argument("--eager-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.networks:
        networks, gates, multiplied = trio(name)
        networks = [n.to(memory_format=torch.channels_last) for n in networks]
        for compiled in (False,) if arguments.eager_only else (False, True):
            for bf16, batch in itertools.product((False, True), (1, 32)):
                torch._dynamo.reset()
                taken = [torch.compile(n) for n in networks] if compiled else networks
                x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
                rounds = arguments.rounds if batch == 32 else 4 * arguments.rounds
                original, frozen, without = medians(taken, x, bf16, rounds)
                row = dict.fromkeys(FIELDS, "") | {
                    "network": name,
                    "precision": "bf16" if bf16 else "fp32",
                    "batch": batch,
                    "compiled": int(compiled),
                    "rounds": rounds,
                    "gates": gates,
                    "multiplied": multiplied,
                    "original_ms": round(original, 2),
                    "frozen_ms": round(frozen, 2),
                    "without_ms": round(without, 2),
                    "over_original": round(frozen / original, 3),
                    "over_without": round(frozen / without, 3),
                    "machine": hardware(),
                }
                print(row, flush=True)
                rows.append(row)
                with arguments.out.open("w", newline="") as stream:
                    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
