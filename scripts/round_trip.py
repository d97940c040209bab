"""The whole way on a real data set: train, validate, fold, export, publish, load back, validate again.

    python scripts/round_trip.py --data ../shared/data/cifar10 --dataset uoft-cs/cifar10 --tag sgd5_c10

Publishes from a scratch hub folder to a Hub-compatible server on loopback, with the real client.
Finished runs are kept and stopped ones go on, so the script can be run again. Writes what it measured, and a
picture of it, to ``--results``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from rich.console import Console

import timm_attn
from timm_attn.training.run import open_run, read_metrics
from timm_attn.weights import read_index

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub_server import HubServer

MODELS = ("resnet20", "resnet20_asr", "resnet20_dia")
ORGANISATION = "my-org"
console = Console(highlight=False, soft_wrap=True)


def command(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run ``timm-attn`` and show it."""
    console.print(f"\n$ timm-attn {' '.join(arguments)}", markup=False)
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **(env or {})}
    subprocess.run([sys.executable, "-m", "timm_attn", *arguments], check=True, env=environment)


def throughput(
    folders: dict[str, Path], rounds: int = 15, batch_size: int = 128
) -> dict[str, dict[str, float]]:
    """Images per second in eval mode (fp32), and the ratio to the first model, taken in turn."""
    models = {
        name: timm.create_model(f"local-dir:{f}", pretrained=True).eval() for name, f in folders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, model in models.items():
                images = torch.randn(batch_size, *model.pretrained_cfg["input_size"])
                model(images)
                start = time.perf_counter()
                model(images)
                seconds[name].append(time.perf_counter() - start)
    baseline = seconds[next(iter(models))]
    return {
        name: {
            "images_per_second": batch_size / statistics.median(own),
            "ratio_to_baseline": statistics.median(b / s for b, s in zip(baseline, own, strict=True)),
        }
        for name, own in seconds.items()
    }


def draw(results: dict, path: Path) -> None:
    """Accuracy by epoch, and accuracy against inference speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in results["runs"].items():
        left.plot(
            [e["epoch"] for e in run["epochs"]], [e["top1"] for e in run["epochs"]], marker="o", label=name
        )
    left.set(xlabel="epoch", ylabel="top-1 on the test split (%)", title="training")
    left.xaxis.get_major_locator().set_params(integer=True)
    for name, checkpoint in results["checkpoints"].items():
        x, y = checkpoint["ratio_to_baseline"], checkpoint["top1"]
        right.plot(x, y, "o", label=name)
    right.set(xlabel="inference speed, plain ResNet-20 = 1", ylabel="top-1 (%)", title="what is deployed")
    right.set_xlim(0, 1.15 * max(c["ratio_to_baseline"] for c in results["checkpoints"].values()))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{results['dataset']}, {results['epochs']} epochs, n = 1")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--dataset", required=True, help="what cards call the data set")
    parser.add_argument("--tag", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("hub/results/round_trip.json"))
    arguments = parser.parse_args()

    runs = {model: arguments.runs / f"{model}.{arguments.tag}" for model in MODELS}
    for model, run in runs.items():
        if (run / "recipe.yaml").is_file():
            command("train", "--resume", str(run))
        else:
            options = ["--epochs", str(arguments.epochs), "--seed", str(arguments.seed)]
            options += ["--precision", arguments.precision, "--checkpoint-every", "100"]
            command("train", model, "--data", arguments.data, *options, "--out", str(run))

    tokens = {"hf_test": {"name": "me", "orgs": {ORGANISATION: "write"}}}
    with tempfile.TemporaryDirectory() as scratch, HubServer(tokens=tokens) as server:
        hub = Path(scratch) / "hub"
        client = {
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": "hf_test",
            "HF_HUB_CACHE": str(Path(scratch) / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        for run in runs.values():
            command("fold", str(run), "--out", str(Path(scratch) / run.name))
            command(
                "export", str(run), "--tag", arguments.tag, "--hub", str(hub), "--dataset", arguments.dataset
            )
        checkpoints = {c.name: c for c in read_index(hub)}
        for name in checkpoints:
            command("publish", str(hub / name), "--to", ORGANISATION, env=client)
            command("validate", f"hf-hub:{ORGANISATION}/{name}", "--data", arguments.data, env=client)
        commits = sum(method == "POST" and "/commit/" in path for method, path in server.requests)
        console.print(f"\n{len(checkpoints)} repositories published in {commits} commits")
        plain_first = sorted(checkpoints, key=lambda name: name != f"{MODELS[0]}.{arguments.tag}")
        speeds = throughput({name: checkpoints[name].folder for name in plain_first})

    results = {
        "command": f"round_trip.py --data DATA --dataset {arguments.dataset} --tag {arguments.tag}",
        "dataset": arguments.dataset,
        "epochs": arguments.epochs,
        "n": 1,
        "seed": arguments.seed,
        "precision": arguments.precision,
        "version": timm_attn.__version__,
        "runs": {
            model: {
                **{k: v for k, v in open_run(run).items() if k in ("hardware", "git_commit", "packages")},
                "epochs": read_metrics(run),
            }
            for model, run in runs.items()
        },
        "checkpoints": {name: {**checkpoints[name].metrics, **speeds[name]} for name in plain_first},
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, arguments.results.with_suffix(".png"))
    console.print_json(json.dumps(results["checkpoints"]))


if __name__ == "__main__":
    main()
