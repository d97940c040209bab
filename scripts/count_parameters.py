"""Write tests/parameter_counts.csv: the parameters of every registered model, with its own classes."""

import csv
from pathlib import Path

import timm

import timm_attn

TABLE = Path(__file__).parents[1] / "tests" / "parameter_counts.csv"

with TABLE.open("w", newline="") as stream:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", "classes", "parameters"])
    for name in timm_attn.model_names():
        model = timm.create_model(name, device="meta")
        writer.writerow([name, model.num_classes, sum(p.numel() for p in model.parameters())])
