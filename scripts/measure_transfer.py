"""Fine-tuning of grafted networks against fine-tuning of the plain one, with all images and with a part.

    python scripts/measure_transfer.py hub/results/transfer.csv --source runs/tiny/resnet20/seed-0 \\
        --data cifar10 --networks resnet20 resnet20_asr resnet20_dia --shares 1 0.1 --lr 0.003

The source is a trained plain network. Each network starts from it, by `graft:` if it has attention, with
a new classifier where the classes are others. A share is of the training images of every class, the same for
all networks and seeds. With --held-out a part of the training split that is not in the share is evaluated in
place of the test split: learning rates are chosen with that. Each row is one run; rows that the table has are
not made again, and a run that was stopped is resumed.
"""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

import timm_attn
from timm_attn.errors import UserError
from timm_attn.files import read_csv, write_csv
from timm_attn.load import load_model
from timm_attn.training import Recipe, resume, train
from timm_attn.training.recipe_file import load_recipe
from timm_attn.training.run import is_run, machines, open_run, read_results

FIELDS = (
    "network",
    "source",
    "data",
    "share",
    "lr",
    "seed",
    "epochs",
    "held_out",
    "recipe",
    "precision",
    "images",
    "top1",
    "hardware",
)
#: In the folder of a part: of which data.
ORIGIN = ".origin"
assert timm_attn.__version__  # the models are registered


def part_of(data: str, share: float, held_out: float, folder: Path) -> str:
    """A data set with a share of the training images of every class, as parquet.

    Its test split is that of the data, or a part of the rest of the training split, and of the share itself
    where there is no rest.

    Raises:
        UserError: The share leaves some class without an image.
    """
    import datasets

    if share == 1 and not held_out:
        return data
    origin = str(Path(data).resolve()) if Path(data).exists() else data
    if folder.is_dir():
        known = folder / ORIGIN
        if not known.is_file() or known.read_text(encoding="utf-8") != origin:
            raise UserError(f"{folder} is a part of other data than {origin}: choose another --runs")
        return str(folder)
    splits = datasets.load_dataset(data)
    train, test = splits["train"], splits.get("test")
    label = next(n for n, f in train.features.items() if isinstance(f, datasets.ClassLabel))
    if share * min(map(train[label].count, set(train[label]))) < 1:
        raise UserError(f"a share of {share} leaves classes of {data} without images: take a larger one")
    options = {"stratify_by_column": label, "seed": 0}
    count = round(held_out * len(train))
    if share == 1:
        train, test = train.train_test_split(test_size=count, **options).values()
    else:
        train, rest = train.train_test_split(train_size=share, **options).values()
        if held_out:
            test = rest.train_test_split(test_size=count, **options)["test"]
    if test is None:
        raise UserError(f"{data} has no test split: hold some training images out with --held-out")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    train.to_parquet(str(partial / "train.parquet"))
    test.to_parquet(str(partial / "test.parquet"))
    (partial / ORIGIN).write_text(origin, encoding="utf-8")
    partial.rename(folder)
    return str(folder)


def table_rows(table: Path) -> list[dict[str, Any]]:
    """The rows that a table has so far."""
    return [*read_csv(table)] if table.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--source", required=True, help="run or hub folder of the plain network, or its name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--networks", nargs="+", required=True)
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", nargs="+", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--recipe", default="cifar_cpu")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--held-out", type=float, default=0.0, help="share of the training split")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    arguments = parser.parse_args()
    plain = load_model(arguments.source).pretrained_cfg["architecture"]
    plan = [
        (share, seed, lr, network)  # a seed of every network says more than all seeds of one
        for share in arguments.shares
        for seed in arguments.seeds
        for lr in arguments.lr
        for network in arguments.networks
    ]
    for share, seed, lr, network in plan:
        source = "/".join(Path(arguments.source).parts[-3:])
        key = {"network": network, "source": source, "data": Path(arguments.data).name}
        key |= {"share": share, "lr": lr, "seed": seed, "epochs": arguments.epochs}
        key |= {"held_out": arguments.held_out, "recipe": arguments.recipe, "precision": arguments.precision}
        rows = table_rows(arguments.table)
        if any(all(str(row[name]) == str(value) for name, value in key.items()) for row in rows):
            continue
        folder = arguments.runs / f"{key['data']}-{share}-{arguments.held_out}"
        data = part_of(arguments.data, share, arguments.held_out, folder)
        recipe = load_recipe(arguments.recipe)
        fields = vars(recipe) | {
            "data": data,
            "init": arguments.source if network == plain else f"graft:{arguments.source}",
            "epochs": arguments.epochs,
            "lr": lr,
            "seed": seed,
            "precision": arguments.precision,
            "val_fraction": 0.0,  # what is held out, part_of holds out
        }
        run = arguments.runs / "-".join(map(str, key.values())).replace("/", "-")
        print(f"$ {shlex.join(map(str, key.values()))}", flush=True)
        if is_run(run):
            resume(run)
        else:
            train(network, Recipe(**fields), run)
        last = read_results(run)
        where = ", then ".join(machines(open_run(run)))
        row = key | {"images": last["images"], "top1": round(last["top1"], 3), "hardware": where}
        rows = [*table_rows(arguments.table), row]  # with those of another process
        write_csv(arguments.table, [{name: row[name] for name in FIELDS} for row in rows])


if __name__ == "__main__":
    main()
