"""Write tests/parameter_counts.csv: the parameters of registered models, with their own classes.

    python scripts/count_parameters.py [PATTERN]

With a shell pattern of names, only these are counted anew.
"""

import argparse
import csv
from fnmatch import fnmatch
from pathlib import Path

import timm

import timm_attn

TABLE = Path(__file__).parents[1] / "tests" / "parameter_counts.csv"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="*")
    pattern = parser.parse_args().pattern
    with TABLE.open(newline="") as stream:
        known = {row["model"]: list(row.values()) for row in csv.DictReader(stream)}
    rows = []
    for name in timm_attn.model_names():
        if fnmatch(name, pattern):
            model = timm.create_model(name, device="meta")
            known[name] = [name, model.num_classes, sum(p.numel() for p in model.parameters())]
        rows += [known[name]] if name in known else []
    with TABLE.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "classes", "parameters"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
