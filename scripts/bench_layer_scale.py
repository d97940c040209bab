"""Times networks with their LayerScales folded into the layers before them against those without, in turn.

python scripts/bench_layer_scale.py hub/results/layer_scale.csv
"""

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch

import timm_attn
from timm_attn.branches import example_input
from timm_attn.files import write_csv
from timm_attn.training.run import hardware

FIELDS = (
    *("network", "precision", "batch", "rounds"),
    *("before_ms", "folded_ms", "ratio", "logit_difference", "machine"),
)
ROUNDS, BATCH = 15, 8


def seconds(model: Any, x: torch.Tensor, bf16: bool) -> float:
    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for name, precision in itertools.product(("convnext_tiny", "deit3_small_patch16_224"), ("fp32", "bf16")):
        torch.manual_seed(0)
        model: Any = timm.create_model(name).eval()
        folded = timm_attn.fold(model, layer_scale=True)
        x = example_input(model, BATCH)
        with torch.inference_mode():
            difference = float((folded(x) - model(x)).abs().max() / model(x).abs().max())
        pair, times = (model, folded), ([], [])
        for turn in range(ROUNDS + 1):
            for i in (0, 1) if turn % 2 else (1, 0):
                took = seconds(pair[i], x, precision == "bf16")
                if turn:  # the first is warm-up
                    times[i].append(took)
        before, after = (1000 * statistics.median(series) for series in times)
        figures = (round(before, 1), round(after, 1), round(after / before, 3), f"{difference:.1e}")
        row = (name, precision, BATCH, ROUNDS, *figures, hardware())
        rows.append(dict(zip(FIELDS, row, strict=True)))
        print(rows[-1], flush=True)
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
