"""Time of networks as they are deployed over that of the plain one, deployed too, in turn in one process.

    python scripts/bench_deployed.py resnet20_se resnet20_asr:generator=scale --classes 200 \\
        --out hub/results/tiny_resnet20_cost.csv

Networks are named as in scripts/train_zoo.py, and have random weights, on which time does not depend. All are
folded: batch norms are fused into the convolutions, and attention that can be folded is gone.
"""

import argparse
from contextlib import suppress
from functools import partial
from pathlib import Path

import timm
import torch
from bench_timing import console, ratios, rounds, surroundings
from rich.table import Table
from torch import nn
from train_zoo import folder_name

import timm_attn
from timm_attn.files import write_csv
from timm_attn.fold import NothingToFold
from timm_attn.load import check_model
from timm_attn.models.deployed import fuse_conv_norms
from timm_attn.training import Recipe
from timm_attn.training.processes import keep_freed_memory


def deployed(arm: str, classes: int) -> nn.Module:
    """A network as ``timm_attn.fold`` leaves it, with its norms fused."""
    name, *model_kwargs = arm.split(":")
    check_model(name)
    arguments = Recipe(model_kwargs=tuple(model_kwargs)).parsed_model_kwargs()
    model = timm.create_model(name, num_classes=classes, **arguments).eval()
    with suppress(NothingToFold):  # a plain network, or timm's own attention
        model = timm_attn.fold(model)
    fuse_conv_norms(model)
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--baseline", default="resnet20")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()
    keep_freed_memory()  # else the time of a network depends on what was freed before it
    images = torch.randn(arguments.batch_size, 3, arguments.img_size, arguments.img_size)
    names = dict.fromkeys((arguments.baseline, *arguments.networks))
    calls = {name: partial(deployed(name, arguments.classes), images) for name in names}
    times = rounds(calls, arguments.rounds, 2, torch.device("cpu"))
    about = {"batch": arguments.batch_size, "img_size": arguments.img_size, "precision": "fp32"}
    about |= surroundings(torch.device("cpu"))
    rows = [
        {"network": folder_name(name), **ratios(times, name, arguments.baseline), **about}
        for name in arguments.networks
    ]
    table = Table("network", "min", "median", "max", title=f"time over {arguments.baseline}'s, folded")
    for row in rows:
        table.add_row(row["network"], *(f"{row[f'ratio_{key}']:.3f}" for key in ("min", "median", "max")))
    console.print(table)
    if arguments.out:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
