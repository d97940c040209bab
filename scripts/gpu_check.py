"""What only a GPU can show, as one JSON file.

    python scripts/gpu_check.py --out hub/results/gpu_check.json
    python scripts/gpu_check.py --device cpu --small --out /tmp/check.json    # what of it a CPU can do

Out of memory; CUDA graphs; fp16 with a scaler; the pinned loader; exact resume after SIGKILL; from training
to the exported network by the command line; SyncBatchNorm; fold, graft, freeze and channels last; outputs and
gradients of every mechanism on four families in each precision; compilation. Every check is one entry: passed
or not, only measured, or why it was left out, with what was measured and its bound. It begins no check after
--seconds and ends at most 90 seconds later; run the same command until nothing is left. Checks that the file
has already are not run again, but for those that failed, which come last.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from bench_timing import usable_device
from gpu_check_networks import (
    LOGITS,
    NETWORKS,
    Setting,
    channels_last,
    checkpointing,
    compiled,
    folding,
    freezing,
    grafting,
    numerics,
    sync_bn_conversion,
    sync_bn_two,
)
from gpu_check_training import deploying, out_of_memory, pinned_loader, resuming, training
from rich.console import Console
from rich.table import Table

from timm_attn.files import write_json
from timm_attn.training.run import hardware

console = Console(highlight=False)
#: Seconds after --seconds at which processes of a check are ended.
LAST_CHECK = 90
COMPILED = (("resnet50", "dia"), ("convnext_tiny", "asr"), ("vit_small_patch16_224", "dia"))
Check = Callable[[], dict[str, Any]]


def checks(setting: Setting) -> dict[str, Check]:
    """Every check by name: first what a CPU cannot do, last what takes long and says least."""
    on_gpu = setting.device.type == "cuda"
    half = "fp16" if on_gpu else "bf16"
    precision = ("--precision", half)
    found: dict[str, Check] = {
        "out of memory": lambda: out_of_memory(setting),
        "compiled resnet50 dia reduce-overhead": lambda: compiled(
            setting, "resnet50", "dia", "reduce-overhead"
        ),
        f"training resnet20_ssia {half}": lambda: training(setting, "resnet20_ssia", *precision),
        f"training resnet20_ssia {half}, accumulation": lambda: training(
            setting, "resnet20_ssia", *precision, "--accumulation", "2"
        ),
        "pinned loader": lambda: pinned_loader(setting),
        "resume, deterministic": lambda: resuming(setting, True),
        "deploying resnet20_dia": lambda: deploying(setting, "resnet20_dia"),
        "sync bn conversion": lambda: sync_bn_conversion(setting, "dia"),
        "sync bn, two processes": lambda: sync_bn_two(setting, "dia"),
    }
    for network in ("resnet50", "vit_small_patch16_224"):
        key = f"checkpointing {network} dia"
        found[key] = lambda n=network: checkpointing(setting, n, "dia")
    for network in ("resnet50", "convnext_tiny", "vit_small_patch16_224"):
        for mechanism in ("asr", "dia"):
            found[f"graft {network} {mechanism}"] = lambda n=network, m=mechanism: grafting(setting, n, m)
    for network, (_, mechanisms) in NETWORKS.items():
        for mechanism in (m for m in ("asr", "ssia") if m in mechanisms):
            found[f"fold {network} {mechanism}"] = lambda n=network, m=mechanism: folding(setting, n, m)
    for network, mechanism in (("resnet50", "se"), ("resnet50", "dia"), ("efficientnet_b0", "")):
        key = f"freeze {network} {mechanism or 'its own SE'}"
        found[key] = lambda n=network, m=mechanism: freezing(setting, n, m)
    for mechanism in ("asr", "dia", "conam", "fmm"):
        key = f"channels last resnet50 {mechanism}"
        found[key] = lambda m=mechanism: channels_last(setting, "resnet50", m)
    for network, (_, mechanisms) in NETWORKS.items():
        for mechanism in ("", *mechanisms):
            for name in LOGITS if on_gpu else ("fp32", "bf16"):
                key = f"numerics {network} {mechanism or 'plain'} {name}"
                found[key] = lambda n=network, m=mechanism, p=name: numerics(setting, n, m, p)
    found["training resnet20_dia compiled"] = lambda: training(setting, "resnet20_dia", "--compile")
    for mode in ("reduce-overhead", "default"):
        for network, mechanism in COMPILED:
            key = f"compiled {network} {mechanism} {mode}"
            found.setdefault(key, lambda n=network, m=mechanism, o=mode: compiled(setting, n, m, o))
    found["resume, as it comes"] = lambda: resuming(setting, False)
    return found


def settled(found: dict[str, Any]) -> bool:
    """Whether a check need not be run again."""
    return bool(found.get("passed") or found.get("measured") or "left_out" in found)


def verdict(found: dict[str, Any]) -> str:
    if "left_out" in found:
        return "left out"
    return "measured" if found.get("measured") else "passed" if found["passed"] else "FAILED"


def attempt(check: Check) -> dict[str, Any]:
    """What a check found; an error is a check that failed, and does not end the others."""
    try:
        return check()
    except Exception as error:
        traceback.print_exc()
        said = getattr(error, "stderr", None) or ""  # of a process that failed
        return {"passed": False, "why": f"{type(error).__name__}: {error} {said[-500:]}"[:1000].strip()}


def broken(device: torch.device) -> bool:
    """Whether an error has left CUDA unusable for this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # which the processes of other checks need
    except RuntimeError:
        return True
    return False


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="smaller networks of the same families")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    parser.add_argument("--seconds", type=float, default=470, help="begin no check after these")
    arguments = parser.parse_args()
    device, ends = usable_device(arguments.device), started + arguments.seconds + LAST_CHECK
    setting = Setting(device, arguments.small, ends)
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"checks": {}}
    about = {"device": device.type, "small": arguments.small}
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    if report["checks"] and {key: report.get(key) for key in about} != about:
        sys.exit(f"{arguments.out} is of {[report.get(key) for key in about]}: name another file with --out")
    report |= about | {"hardware": hardware(), "torch": torch.__version__, "timm": timm.__version__}
    results: dict[str, dict[str, Any]] = report["checks"]
    wanted = {name: check for name, check in checks(setting).items() if arguments.only in name}
    left = [name for name in wanted if not settled(results.get(name, {}))]
    left.sort(key=lambda name: name in results)  # what failed once may end the process this time
    while left and time.perf_counter() - started < arguments.seconds:
        name, begun = left[0], time.perf_counter()
        found = attempt(wanted[name])
        if not settled(found) and time.perf_counter() > ends - 1:
            break  # for want of time, which is no failure
        left.pop(0)
        results[name] = found | {"seconds_taken": round(time.perf_counter() - begun, 2)}
        write_json(arguments.out, report)
        shown = {key: value for key, value in found.items() if key not in ("passed", "measured")}
        console.print(f"{verdict(found):8} {name}  {shown}", markup=False, soft_wrap=True)
        gc.collect()
        if broken(device):
            console.print("CUDA is unusable after this error")
            break
    table = Table("", "checks")
    verdicts = [verdict(found) for found in results.values()]
    for word in ("passed", "measured", "left out", "FAILED"):
        table.add_row(word, str(verdicts.count(word)))
    table.add_row("not run yet", str(len(left)))
    console.print(table)
    if left:
        console.print("run the same command again for the rest")
    sys.exit("FAILED" in verdicts)


if __name__ == "__main__":
    main()
