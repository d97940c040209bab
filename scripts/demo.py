"""The whole story on scikit-learn's digits, in about three minutes and without network.

Trains resnet20_dia, and a ConvNeXt of timm's with ASR attached; folds the one, freezes gates of the other,
writes a report, exports both into demo/hub, and loads them by name with
``timm.create_model(..., pretrained=True)``, the folded one in a process that has only timm.
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

DEMO = Path(__file__).parents[1] / "demo"
HUB = DEMO / "hub"
ENVIRONMENT = {**os.environ, "TIMM_ATTN_HUB": str(HUB), "HF_HUB_OFFLINE": "1", "HF_HOME": str(DEMO / "cache")}
OPTIONS = ["--data", "digits", "--batch-size", "64", "--seed", "0"]
RUNS = {
    "resnet20_dia": [*OPTIONS, "--epochs", "12", "--lr", "0.2", "--img-size", "16", "--crop-padding", "2"],
    "test_convnext_asr": [*OPTIONS, "--epochs", "12", "--lr", "0.1", "--img-size", "32"],
}
FOLDED = "test_convnext.asr_sgd_digits_folded"
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


def step(what: str) -> None:
    """Say what comes next."""
    console.print(f"\n{what}", style="bold cyan")


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
    runs = {model: str(DEMO / "runs" / model) for model in RUNS}
    step("Train a network with DIA, one recurrent cell for the blocks of a stage")
    command("train", "resnet20_dia", *RUNS["resnet20_dia"], "--out", runs["resnet20_dia"])
    step("Attach ASR to another family: a ConvNeXt of timm's")
    options = RUNS["test_convnext_asr"]
    command("train", "test_convnext", "--attention", "asr", *options, "--out", runs["test_convnext_asr"])
    step("Fold: ASR goes into the layers before it, and what is left is timm's ConvNeXt")
    command("fold", runs["test_convnext_asr"])
    step("Freeze: gates that hardly depend on the image become constants, within a point of top-1")
    frozen = ["--budget", "1", "--recover", "30", "--out", str(DEMO / "frozen")]
    command("freeze", runs["resnet20_dia"], "--data", "digits", *frozen)
    step("Report: one HTML file on the network")
    command("report", runs["resnet20_dia"], "--data", "digits", "--out", str(DEMO / "report.html"))
    step("Export: checked, measured, with cards")
    for run in runs.values():
        command("export", run, "--tag", "sgd_digits", "--hub", str(HUB))
    command("list", "*.*sgd_digits*")

    step("Load by name, and the folded network in a process that has only timm")
    dia, asr = predict("resnet20_dia", "plugin"), predict("test_convnext_asr", "plugin")
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
        "test_convnext_asr",
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
    # The last step a user takes, in this very process.
    os.environ.update(ENVIRONMENT)
    import timm

    import timm_attn  # noqa: F401 (registers the models)

    model = timm.create_model("resnet20_dia", pretrained=True)
    seconds = time.perf_counter() - started
    console.print(f"""
Done in {seconds:.0f} s.
timm.create_model("resnet20_dia", pretrained=True) gives {model.pretrained_cfg["file"]}

What next:
  open {DEMO}/report.html in a browser; {DEMO}/frozen/freeze.png shows the accuracy lost against time
  timm-attn look stripes resnet20_se --data CIFAR10_FOLDER      see what gates do
  timm-attn train resnet50_asr --data YOUR_PHOTOS --init graft:resnet50.a1_in1k --recipe photos
  README.md and docs/ say the rest""")


if __name__ == "__main__":
    main()
