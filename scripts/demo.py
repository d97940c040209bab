"""The whole way on scikit-learn's digits, in about three minutes and without network.

Trains resnet20_dia and a narrow resnet18_asr, validates, folds and exports them into demo/hub, loads them
back by name with ``timm.create_model(..., pretrained=True)``, and the folded one in a process that has only
timm.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

DEMO = Path("demo")
HUB = DEMO / "hub"
ENVIRONMENT = {**os.environ, "TIMM_ATTN_HUB": str(HUB), "HF_HUB_OFFLINE": "1", "HF_HOME": str(DEMO / "cache")}
OPTIONS = ["--data", "digits", "--batch-size", "64", "--seed", "0"]
RUNS = {
    "resnet20_dia": [*OPTIONS, "--epochs", "15", "--lr", "0.2", "--img-size", "16", "--crop-padding", "2"],
    "resnet18_asr": [*OPTIONS, "--epochs", "12", "--lr", "0.1", "--model-kwargs", "channels=[16,32,64,128]"],
}
FOLDED = "resnet18.asr_sgd_digits_folded"
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140

# Runs in a process of its own: loads, predicts the test digits, times itself, and answers in JSON.
PREDICT = """
import json, sys, time
import timm, torch
from sklearn.datasets import load_digits
name, plugin = sys.argv[1], sys.argv[2] == "plugin"
if plugin:
    import timm_attn
assert plugin or not any(m.startswith("timm_attn") for m in sys.modules)
model = timm.create_model(name, pretrained=True).eval()
digits = load_digits()
size, cfg = model.pretrained_cfg["input_size"][1:], model.pretrained_cfg
images = torch.from_numpy(digits.images[1437:] / 16).float()[:, None]
images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
images = (images * 255).round().expand(-1, 3, -1, -1) / 255
images = (images - torch.tensor(cfg["mean"]).view(1, 3, 1, 1)) / torch.tensor(cfg["std"]).view(1, 3, 1, 1)
rates = []
with torch.inference_mode():
    model(images)
    for _ in range(5):
        start = time.perf_counter()
        logits = model(images)
        rates.append(len(images) / (time.perf_counter() - start))
    answers = logits.argmax(1)
top1 = 100 * (answers == torch.from_numpy(digits.target[1437:])).float().mean().item()
print(json.dumps(dict(top1=top1, rate=sorted(rates)[2], logits=logits.double().tolist(),
                      parameters=sum(p.numel() for p in model.parameters()),
                      shown=[answers[:8].tolist(), digits.target[1437:1445].tolist()])))
"""


def command(*arguments: str) -> None:
    """Run ``timm-attn`` and show it."""
    console.print(f"\n$ timm-attn {shlex.join(arguments)}", style="bold", markup=False)
    subprocess.run([sys.executable, "-m", "timm_attn", *arguments], check=True, env=ENVIRONMENT)


def predict(name: str, process: str) -> dict:
    """What ``PREDICT`` says of a model, in a process with the plugin or with timm only."""
    code = [sys.executable, "-c", PREDICT, name, process]
    return json.loads(subprocess.run(code, check=True, env=ENVIRONMENT, stdout=subprocess.PIPE).stdout)


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    for model, options in RUNS.items():
        run = DEMO / "runs" / model
        command("train", model, *options, "--out", str(run))
        command("validate", str(run), "--data", "digits")
        command("fold", str(run))
        command("export", str(run), "--tag", "sgd_digits", "--hub", str(HUB))
    command("list", "*.sgd_digits*")

    console.print("\nLoading by name, and the folded network in a process that has only timm")
    dia, asr = predict("resnet20_dia", "plugin"), predict("resnet18_asr", "plugin")
    folded = predict(f"local-dir:{HUB / FOLDED}", "timm only")
    difference = max(
        abs(a - b)
        for x, y in zip(asr["logits"], folded["logits"], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    table = Table(
        "model", "parameters", "folded", "top-1", "folded", "greatest logit difference", "images/s", "folded"
    )
    table.add_row(
        "resnet20_dia",
        f"{dia['parameters']:,}",
        "–",
        f"{dia['top1']:.2f}",
        "–",
        "–",
        f"{dia['rate']:.0f}",
        "–",
    )
    table.add_row(
        "resnet18_asr",
        f"{asr['parameters']:,}",
        f"{folded['parameters']:,}",
        f"{asr['top1']:.2f}",
        f"{folded['top1']:.2f}",
        f"{difference:.1e}",
        f"{asr['rate']:.0f}",
        f"{folded['rate']:.0f}",
    )
    console.print(table)
    predicted, labels = folded["shown"]
    console.print(f"first test digits {labels}, the folded network says {predicted}")
    console.print(f"done in {time.perf_counter() - started:.0f} s; curves are in {DEMO}/runs/*/curves.png")

    # The last step a user takes, in this very process.
    os.environ.update(ENVIRONMENT)
    import timm

    import timm_attn  # noqa: F401 (registers the models)

    model = timm.create_model("resnet20_dia", pretrained=True)
    console.print(f'timm.create_model("resnet20_dia", pretrained=True) gives {model.pretrained_cfg["file"]}')


if __name__ == "__main__":
    main()
