"""The checks of ``gpu_check.py`` that train, by the command line in processes of their own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_check_networks import Setting
from safetensors.torch import load_file

TRAIN = (
    "--data digits --img-size 16 --crop-padding 2 --batch-size 64 --epochs 4 --lr 0.1 --checkpoint-every 5"
)
#: The command line, with kernels that give the same bits each time, or as it comes.
RUN = """
import sys, torch
torch.use_deterministic_algorithms({deterministic}, warn_only=True)
from timm_attn.cli import main
main(sys.argv[1:])
"""


def command(setting: Setting, *arguments: str) -> subprocess.CompletedProcess:
    """``timm-attn arguments`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "timm_attn", *arguments],
        capture_output=True,
        text=True,
        timeout=setting.left(240),
        env=_environment(setting),
    )


def _environment(setting: Setting) -> dict[str, str]:
    cpu = {"ACCELERATE_USE_CPU": "true"} if setting.device.type == "cpu" else {}
    return {**os.environ, **cpu}


def resuming(setting: Setting, deterministic: bool) -> dict[str, Any]:
    """A run that is SIGKILLed and goes on, against one that is left alone: equal bits, or how far apart."""
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        env = _environment(setting) | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {})
        script = Path(scratch) / "run.py"
        script.write_text(RUN.format(deterministic=deterministic))
        start = [sys.executable, str(script), "train", "resnet20_dia", *shlex.split(TRAIN), "--out"]
        options: dict[str, Any] = {"check": True, "capture_output": True, "text": True, "env": env}
        subprocess.run([*start, str(whole)], **options, timeout=setting.left(120))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*start, str(killed)], env=env, **quiet) as process:
            deadline = time.perf_counter() + setting.left(120)
            while process.poll() is None and time.perf_counter() < deadline:
                if list(killed.glob("step-*")):
                    break
                time.sleep(0.005)
            process.kill()
        if process.returncode != -signal.SIGKILL or (killed / "model.safetensors").exists():
            return {"passed": False, "why": "the run ended before it was killed"}
        steps = [int(folder.name.removeprefix("step-")) for folder in killed.glob("step-*")]
        if not steps:
            return {"passed": False, "why": "the run wrote no checkpoint in time"}
        resume = [sys.executable, str(script), "train", "--resume", str(killed)]
        resumed = subprocess.run(resume, **options, timeout=setting.left(120))
        if "starting again" in resumed.stdout:
            return {"passed": False, "why": "the run was not resumed, but began anew"}
        a, b = (load_file(run / "model.safetensors") for run in (whole, killed))
    apart = max((a[k].double() - b[k].double()).abs().max().item() for k in a if a[k].is_floating_point())
    equal = all(torch.equal(a[k], b[k]) for k in a)
    # Without deterministic kernels a GPU may differ from itself: that is measured, not asked for.
    verdict = {"passed": equal} if deterministic else {"measured": True}
    return verdict | {"equal_bits": equal, "max_abs_difference": apart, "resumed_at": max(steps)}


def training(setting: Setting, model: str, *options: str) -> dict[str, Any]:
    """A short training ends well and learns."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        done = command(setting, "train", model, *shlex.split(TRAIN), *options, "--out", str(run))
        if done.returncode:
            return {"passed": False, "why": done.stderr[-500:]}
        results = json.loads((run / "results.json").read_text())
    return {"passed": results["top1"] > 30, "top1": results["top1"], "bound": 30}


def deploying(setting: Setting, model: str) -> dict[str, Any]:
    """A trained network in a hub folder, by the command line: as it is, with norms fused, and frozen."""
    with tempfile.TemporaryDirectory() as scratch:
        run, hub, frozen = (str(Path(scratch) / name) for name in ("run", "hub", "frozen"))
        ready = f"{hub}/{model}.check"
        for arguments in (
            ["train", model, *shlex.split(TRAIN), "--out", run],
            ["export", run, "--tag", "check", "--hub", hub],
            ["freeze", ready, "--data", "digits", "--all", "--out", frozen],
            ["export", frozen, "--tag", "check_frozen", "--hub", hub],
            ["report", ready, "--data", "digits", "--out", f"{scratch}/report"],
        ):
            done = command(setting, *arguments)
            if done.returncode:
                return {"passed": False, "why": f"{arguments[0]}: {done.stderr[-500:]}"}
        index = json.loads((Path(hub) / "index.json").read_text())
    top1 = {name: checkpoint["metrics"]["top1"] for name, checkpoint in index["checkpoints"].items()}
    return {"passed": len(top1) == 3 and min(top1.values()) > 30, "top1": top1, "bound": 30}


def out_of_memory(setting: Setting) -> dict[str, Any]:
    """A batch that no GPU holds: one error with the batch size that fits, and that one does fit."""
    if setting.device.type != "cuda":
        return {"left_out": "needs a GPU; tests/test_memory.py plays one"}
    options = ["train", "resnet152", *shlex.split("--data digits --img-size 224 --epochs 1"), "--batch-size"]
    with tempfile.TemporaryDirectory() as scratch:
        done = command(setting, *options, "1408", "--out", f"{scratch}/too-large")
        said = (done.stderr.strip().splitlines() or [""])[-1]
        named = re.search(r"fit: take --batch-size (\d+)", said)
        if done.returncode != 2 or named is None:
            return {"passed": False, "why": said[:500]}
        done = command(setting, *options, named[1], "--out", f"{scratch}/fits")
    return {"passed": not done.returncode, "said": said[:300], "why": done.stderr[-300:]}


def pinned_loader(setting: Setting) -> dict[str, Any]:
    """Larger images by worker processes, through pinned memory on CUDA."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch:
        generator = torch.Generator().manual_seed(0)
        for split, label, i in ((s, c, i) for s in ("train", "test") for c in "ab" for i in range(16)):
            folder = Path(scratch) / "data" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 255, (96, 96, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        options = "--img-size 80 --batch-size 8 --epochs 1 --workers 2 --model-kwargs channels=[16,16,16]"
        data = ["--data", f"{scratch}/data", "--out", f"{scratch}/run"]
        done = command(setting, "train", "resnet20_asr", *shlex.split(options), *data)
        if done.returncode:
            return {"passed": False, "why": done.stderr[-300:]}
        line = json.loads((Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {"passed": True, "seconds": line["seconds"]}
