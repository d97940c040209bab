"""What only a GPU can show, in under eight minutes on an H100, as one JSON file.

    python scripts/gpu_check.py --out hub/results/gpu_check.json
    python scripts/gpu_check.py --device cpu --small --out /tmp/check.json    # what of it a CPU can do

Numerics of every mechanism on four families in each precision; fold, graft and freeze; exact resume after
SIGKILL; fp16 with a scaler; SyncBatchNorm; compile and CUDA graphs; channels last; running out of memory; the
pinned loader. Every check is one entry: passed or not, or why it was left out, with what was measured and its
bound. Checks that the file has already are not run again, so that a visit that was cut short goes on.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

import timm_attn
from timm_attn.compare import BOUNDS
from timm_attn.training.run import hardware

console = Console(highlight=False)
#: Name: (a smaller one of the family for --small, mechanisms that stand in it).
NETWORKS = {
    "resnet50": ("resnet20", ("asr", "dia", "ssia", "sem", "spem", "se", "conam", "fmm")),
    "convnext_tiny": ("test_convnext", ("asr", "dia", "ssia", "sem", "spem", "se")),
    "vit_small_patch16_224": ("test_vit", ("asr", "dia", "ssia", "sem", "spem")),
    "efficientnet_b0": ("efficientnet_b0", ("asr", "dia", "ssia")),
}
#: Greatest max|Δlogit| ÷ max|logit| against float64 on the CPU: a few roundings of the arithmetic.
AGAINST_FLOAT64 = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Setting:
    """Where the checks run."""

    device: torch.device
    small: bool

    def network(self, name: str, mechanism: str = "", **kwargs: Any) -> nn.Module:
        """A network with live norms and branches, on the CPU in eval mode."""
        torch.manual_seed(0)
        model: Any = timm.create_model(NETWORKS[name][0] if self.small else name, num_classes=10, **kwargs)
        if mechanism:
            timm_attn.attach(model, mechanism)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(getattr(module, "running_var", None), Tensor):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.8, 1.2)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                    module.weight.uniform_(0.5, 1.0)  # timm starts the last ones at zero
        return model.eval()

    def images(self, model: Any, batch: int = 4) -> Tensor:
        channels, height, width = model.pretrained_cfg["input_size"]
        if self.small and model.pretrained_cfg["architecture"].startswith("efficientnet"):
            height = width = 64
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, channels, height, width, generator=generator)


@contextmanager
def precision(setting: Setting, name: str) -> Iterator[None]:
    """fp32, TF32, or autocast to a half precision."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(setting.device.type, DTYPES.get(name), enabled=name in DTYPES):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def difference(found: Tensor, wanted: Tensor) -> float:
    """max|Δ| ÷ max|wanted|."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def numerics(setting: Setting, network: str, mechanism: str, name: str) -> dict[str, Any]:
    """A network with a mechanism, in a precision, against itself in float64 on the CPU; its gradients."""
    model = setting.network(network, mechanism)
    x = setting.images(model)
    with torch.no_grad():
        wanted = deepcopy(model).double()(x.double())
    model.to(setting.device)
    with precision(setting, name):
        found = model(x.to(setting.device))
        model.train()
        logits = model(x.to(setting.device)).float()
    nn.functional.cross_entropy(logits, torch.arange(len(x), device=setting.device) % 10).backward()
    finite = all(p.grad.isfinite().all().item() for p in model.parameters() if p.grad is not None)
    error, bound = difference(found, wanted), AGAINST_FLOAT64[name]
    return {"passed": error <= bound and (finite or name == "fp16"), "error": error, "bound": bound} | {
        "gradients_finite": finite
    }


def folding(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """fold on the device, in fp32 and with half weights."""
    model = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    with precision(setting, "fp32"), torch.no_grad():
        error = difference(timm_attn.fold(model).to(setting.device)(x), model(x))
        half = deepcopy(model).to(torch.bfloat16)
        error_half = difference(timm_attn.fold(half).to(setting.device)(x.bfloat16()), half(x.bfloat16()))
    bound, bound_half = 10 * BOUNDS[torch.float32], 2 * BOUNDS[torch.bfloat16]
    return {"passed": error <= bound and error_half <= bound_half, "error": error, "bound": bound} | {
        "error_bf16": error_half,
        "bound_bf16": bound_half,
    }


def grafting(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """graft from a network on the device."""
    stock = setting.network(network).to(setting.device)
    architecture = timm_attn.register(stock.pretrained_cfg["architecture"], mechanism)  # pyright: ignore
    model = timm_attn.graft(architecture, stock)
    x = setting.images(stock).to(setting.device)
    with precision(setting, "fp32"), torch.no_grad():
        error = difference(model.eval()(x), stock(x))
    same = next(model.parameters()).device.type == setting.device.type
    return {"passed": error <= 1e-4 and same, "error": error, "bound": 1e-4}


def freezing(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """freeze on the device: all gates, absorbed."""
    model = setting.network(network, mechanism).to(setting.device)
    x = torch.cat([setting.images(model, 64) + i for i in range(6)])
    report = timm_attn.freeze(model, x, every=True, batch_size=32)
    taken = sum(gate.where != "a multiplication" for gate in report.gates)
    device = next(report.model.parameters()).device.type
    right = report.frozen == len(report.gates) == taken and device == setting.device.type
    return {"passed": right} | {
        "gates": len(report.gates),
        "absorbed": taken,
        "agreement": report.after.agreement,
    }


def channels_last(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """Channels last against contiguous memory."""
    model = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    with precision(setting, "fp32"), torch.no_grad():
        wanted = model(x)
        found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    error = difference(found, wanted)
    return {"passed": error <= 1e-4, "error": error, "bound": 1e-4}


def compiled(setting: Setting, network: str, mechanism: str, mode: str) -> dict[str, Any]:
    """torch.compile, with CUDA graphs where the mode says so, called more than once."""
    if mode == "reduce-overhead" and setting.device.type != "cuda":
        return {"left_out": "CUDA graphs need CUDA"}
    model = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    network_compiled = torch.compile(model, mode=mode)
    with precision(setting, "fp32"), torch.no_grad():
        # A graph that is replayed must see each input.
        inputs = [x + i for i in range(5)]
        errors = [difference(network_compiled(t).clone(), model(t)) for t in inputs]
    torch.compiler.reset()
    return {"passed": max(errors) <= 1e-3, "error": max(errors), "bound": 1e-3}


def sync_bn(setting: Setting, mechanism: str) -> dict[str, Any]:
    """SyncBatchNorm with one process."""
    if setting.device.type != "cuda":
        return {"left_out": "PyTorch has no SyncBatchNorm for CPUs"}
    torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:29581", rank=0, world_size=1)
    try:
        model = convert_sync_batchnorm(setting.network("resnet50", mechanism)).to(setting.device).train()
        loss = model(setting.images(model).to(setting.device)).square().mean()
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    return {"passed": bool(loss.isfinite())}


def command(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """``timm-attn arguments`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "timm_attn", *arguments], capture_output=True, text=True, timeout=timeout
    )


TRAIN = (
    "--data digits --img-size 16 --crop-padding 2 --batch-size 64 --epochs 4 --lr 0.1 --checkpoint-every 5"
)


def last_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def resuming(setting: Setting, deterministic: bool) -> dict[str, Any]:
    """A run that is SIGKILLed and goes on, against one that is left alone: equal bits, or how far apart."""
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        env = {**os.environ, **({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {})}
        script = Path(scratch) / "run.py"
        script.write_text(
            "import sys, torch\n"
            f"torch.use_deterministic_algorithms({deterministic}, warn_only=True)\n"
            "torch.backends.cudnn.benchmark = False\n"
            "from timm_attn.cli import main\nmain(sys.argv[1:])\n"
        )
        start = [sys.executable, str(script), "train", "resnet20_dia", *shlex.split(TRAIN), "--out"]
        subprocess.run([*start, str(whole)], check=True, capture_output=True, env=env, timeout=120)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*start, str(killed)], env=env, **quiet)
        deadline = time.perf_counter() + 120
        while process.poll() is None and not list(killed.glob("step-*")) and time.perf_counter() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (killed / "model.safetensors").exists():
            return {"passed": False, "why": "the run ended before it was killed"}
        resume = [sys.executable, str(script), "train", "--resume", str(killed)]
        subprocess.run(resume, check=True, capture_output=True, env=env, timeout=120)
        a, b = last_weights(whole), last_weights(killed)
    apart = max((a[k].double() - b[k].double()).abs().max().item() for k in a if a[k].is_floating_point())
    equal = all(torch.equal(a[k], b[k]) for k in a)
    # Without deterministic kernels a GPU may differ from itself: that is measured, not asked for.
    return {"passed": equal or not deterministic, "equal_bits": equal, "max_abs_difference": apart}


def training(setting: Setting, model: str, *options: str) -> dict[str, Any]:
    """A short training by the command line ends well and learns."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        done = command("train", model, *shlex.split(TRAIN), *options, "--out", str(run))
        if done.returncode:
            return {"passed": False, "why": done.stderr[-500:]}
        results = json.loads((run / "results.json").read_text())
    return {"passed": results["top1"] > 30, "top1": results["top1"], "bound": 30}


def out_of_memory(setting: Setting) -> dict[str, Any]:
    """A batch that no GPU holds: one error with the batch size that fits."""
    if setting.device.type != "cuda":
        return {"left_out": "needs a GPU; tests/test_memory.py plays one"}
    options = "--data digits --img-size 224 --batch-size 1408 --epochs 1"
    with tempfile.TemporaryDirectory() as scratch:
        done = command("train", "resnet152", *shlex.split(options), "--out", f"{scratch}/run")
    said = done.stderr.strip().splitlines()
    return {"passed": done.returncode == 2 and "fit: take --batch-size" in said[-1], "said": said[-1][:300]}


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
        done = command("train", "resnet20_asr", *shlex.split(options), *data)
        seconds = None
        if not done.returncode:
            line = json.loads((Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
            seconds = line["seconds"]
    return {
        "passed": not done.returncode,
        "seconds": seconds,
        "why": done.stderr[-300:] if done.returncode else "",
    }


def checks(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every check by name, what matters most first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    precisions = ["fp32", "bf16"] if setting.device.type == "cpu" else list(AGAINST_FLOAT64)
    for network, (_, mechanisms) in NETWORKS.items():
        for mechanism in ("", *mechanisms):
            for name in precisions:
                key = f"numerics {network} {mechanism or 'plain'} {name}"
                found[key] = lambda n=network, m=mechanism, p=name: numerics(setting, n, m, p)
        for mechanism in set(mechanisms) & {"asr", "ssia"}:
            found[f"fold {network} {mechanism}"] = lambda n=network, m=mechanism: folding(setting, n, m)
    for network in ("resnet50", "convnext_tiny", "vit_small_patch16_224"):
        for mechanism in ("asr", "dia"):
            found[f"graft {network} {mechanism}"] = lambda n=network, m=mechanism: grafting(setting, n, m)
    for network, mechanism in (("resnet50", "se"), ("resnet50", "dia"), ("efficientnet_b0", "")):
        key = f"freeze {network} {mechanism or 'its own SE'}"
        found[key] = lambda n=network, m=mechanism: freezing(setting, n, m)
    for mechanism in ("asr", "dia", "conam", "fmm"):
        found[f"channels last resnet50 {mechanism}"] = lambda m=mechanism: channels_last(
            setting, "resnet50", m
        )
    found["resume, deterministic"] = lambda: resuming(setting, True)
    found["resume, as it comes"] = lambda: resuming(setting, False)
    half = "fp16" if setting.device.type == "cuda" else "bf16"
    found[f"training resnet20_ssia {half}"] = lambda: training(setting, "resnet20_ssia", "--precision", half)
    accumulated = ("--precision", half, "--accumulation", "2")
    found[f"training resnet20_ssia {half}, accumulation"] = lambda: training(
        setting, "resnet20_ssia", *accumulated
    )
    found["training resnet20_dia compiled"] = lambda: training(setting, "resnet20_dia", "--compile")
    found["pinned loader"] = lambda: pinned_loader(setting)
    found["out of memory"] = lambda: out_of_memory(setting)
    found["sync bn"] = lambda: sync_bn(setting, "dia")
    for network, mechanism in (
        ("resnet50", "dia"),
        ("convnext_tiny", "asr"),
        ("vit_small_patch16_224", "dia"),
    ):
        for mode in ("default", "reduce-overhead"):
            key = f"compiled {network} {mechanism} {mode}"
            found[key] = lambda n=network, m=mechanism, o=mode: compiled(setting, n, m, o)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="smaller networks of the same families")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    parser.add_argument("--seconds", type=float, default=470, help="start no check after these")
    arguments = parser.parse_args()
    started = time.perf_counter()
    setting = Setting(torch.device(arguments.device), arguments.small)
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"checks": {}}
    about = {"device": arguments.device, "small": arguments.small}
    if arguments.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    if report["checks"] and {key: report.get(key) for key in about} != about:
        sys.exit(f"{arguments.out} is of {[report.get(key) for key in about]}: name another file with --out")
    report |= about | {"hardware": hardware(), "torch": torch.__version__, "timm": timm.__version__}
    for name, check in checks(setting).items():
        before = report["checks"].get(name, {})
        if arguments.only not in name or before.get("passed") or "left_out" in before:
            continue
        if time.perf_counter() - started > arguments.seconds:
            console.print("time is up: run the same command again for the rest")
            break
        begun = time.perf_counter()
        try:
            found = check()
        except Exception as error:  # a check that fails must not end the others
            found = {"passed": False, "why": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        report["checks"][name] = found | {"seconds_taken": round(time.perf_counter() - begun, 2)}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        mark = "left out" if "left_out" in found else "passed" if found["passed"] else "FAILED"
        shown = {k: v for k, v in found.items() if k != "passed"}
        console.print(f"{mark:8} {name}  {shown}", markup=False, soft_wrap=True)
    table = Table("", "checks")
    results = list(report["checks"].values())
    failed = [name for name, found in report["checks"].items() if not found.get("passed", True)]
    table.add_row("passed", str(sum(bool(found.get("passed")) for found in results)))
    table.add_row("left out", str(sum("left_out" in found for found in results)))
    table.add_row("failed", str(len(failed)))
    console.print(table)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
