"""Kill a training run at random moments, go on with it each time, and compare it with one left alone.

    python scripts/torture_resume.py --kills 25 --out hub/results/torture_resume.json

Every kill is a SIGKILL, to all processes of the run, after a random time since they were started: while they
start, train, evaluate or write. A run that ends before it was killed often enough is followed by another one.
Each ends in the same bits if model, average, optimiser and metrics (timing apart) are equal. Parts that the
file has already are not run again.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

from timm_attn.training.checkpoint import folders
from timm_attn.training.run import ENVIRONMENT, METRICS, STEPS, WEIGHTS, read_lines, surroundings

OPTIONS = shlex.split("""
    --data digits --img-size 16 --crop-padding 2 --batch-size 64 --epochs 12 --lr 0.1 --checkpoint-every 7
    --ema-decay 0.99 --reprob 0.25 --mixup 0.2 --smoothing 0.1 --drop-path 0.1 --accumulation 2 --log-every 5
""")


def launch(processes: int, *arguments: str) -> subprocess.Popen:
    """Start a run."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*python, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a run's processes; the launcher puts each of them into a session of its own."""
    launcher = psutil.Process(process.pid)
    launcher.suspend()  # or it would start them again
    for one in (*launcher.children(recursive=True), launcher):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()


def finish(process: subprocess.Popen) -> None:
    """Wait for a run; end with its message if it fails."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)


def content(file: Path) -> bytes | list[dict[str, Any]]:
    """What a file holds, but for what is measured in seconds."""
    if file.suffix != ".jsonl":
        return file.read_bytes()
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_lines(file)]


def last_step(run: Path) -> int:
    """The step of a run's last checkpoint, 0 if there is none."""
    return max((step for step, _ in folders(run)), default=0)


def torture(arguments: argparse.Namespace, folder: Path, processes: int, precision: str) -> dict[str, Any]:
    """Train a run undisturbed and one that is killed; what came of it."""
    chance = random.Random(f"{arguments.seed} {processes} {precision}")
    options = [*OPTIONS, "--precision", precision]
    command = str(Path(__file__).with_name("train.py"))
    name = f"{processes}_{precision}"
    whole, killed = folder / f"whole_{name}", [folder / f"killed_{name}_0"]

    def start(run: Path) -> subprocess.Popen:
        if (run / ENVIRONMENT).is_file():
            return launch(processes, command, "--resume", str(run))
        return launch(processes, command, "resnet20_ssia", *options, "--out", str(run))

    started = time.perf_counter()
    process = start(whole)
    while not (whole / METRICS).is_file() and process.poll() is None:
        time.sleep(0.01)
    first_epoch = time.perf_counter() - started
    finish(process)
    seconds = time.perf_counter() - started
    process, at_steps = start(killed[-1]), []
    longest = first_epoch + 1.6 * (seconds - first_epoch) / arguments.kills
    for _ in track(range(arguments.kills), f"{processes} processes, precision {precision}"):
        while True:
            deadline = time.perf_counter() + chance.uniform(0.3 * first_epoch, longest)
            while time.perf_counter() < deadline and process.poll() is None:
                time.sleep(0.01)
            if process.poll() is None:
                break
            finish(process)  # it ended first
            killed.append(folder / f"killed_{name}_{len(killed)}")
            process = start(killed[-1])
        kill(process)
        at_steps.append(last_step(killed[-1]))
        process = start(killed[-1])
    finish(process)
    last = f"step-{last_step(whole)}"
    tensors = [f"{last}/{name}.safetensors" for name in ("model", "ema", "optimizer")]
    files = [WEIGHTS, *tensors, METRICS, STEPS]
    equal = {name: all(content(run / name) == content(whole / name) for run in killed) for name in files}
    return {
        "processes": processes,
        "precision": precision,
        "kills": len(at_steps),
        "runs_killed": len(killed),
        "last_checkpoint_at_each_kill": at_steps,
        "steps": int(last.removeprefix("step-")),
        "equal": equal,
        "seconds_undisturbed": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {**surroundings(), "options": " ".join(OPTIONS), "runs": []}
    if arguments.out and arguments.out.is_file():
        result["runs"] = json.loads(arguments.out.read_text())["runs"]
    runs = result["runs"]
    done = {(run["processes"], run["precision"]) for run in runs}
    parts = [
        part for part in itertools.product(arguments.processes, arguments.precisions) if part not in done
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # a killed launcher leaves its folders
        for processes, precision in parts:
            runs.append(torture(arguments, Path(folder), processes, precision))
            print(json.dumps(runs[-1], indent=1))
            if arguments.out:  # after each, lest an hour's work is lost
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if not all(all(run["equal"].values()) for run in runs):
        sys.exit("the runs differ")


if __name__ == "__main__":
    main()
