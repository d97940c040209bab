"""Times this checkout's networks against those of another one, in turn, in one run.

    git worktree add /tmp/before COMMIT
    python scripts/bench_against.py /tmp/before --out hub/results/cost_of_attach.csv

Each checkout has a process of its own that waits while the other computes. A ratio is the median time of this
checkout ÷ that of the other.
"""

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from timm_attn.training.run import hardware

HERE = Path(__file__).resolve().parents[1]
#: Network, batch size, side of the images.
CASES = (("resnet50_dia", 8, 160), ("resnet50_asr", 8, 160), ("resnet20_dia", 128, 32))
FIELDS = (
    "network",
    "precision",
    "pass",
    "batch",
    "size",
    "rounds",
    "before_ms",
    "now_ms",
    "ratio",
    "machine",
)
WORKER = """
import sys, time
import timm, torch
import timm_attn
torch.set_num_threads(int(sys.argv[1]))
for line in sys.stdin:
    command, *given = line.split()
    if command == "build":
        name, batch, size, precision, training = given
        torch.manual_seed(0)
        training, bf16 = training == "train", precision == "bf16"
        model = timm.create_model(name).train(training).to(memory_format=torch.channels_last)
        x = torch.randn(int(batch), 3, int(size), int(size)).to(memory_format=torch.channels_last)
    def step():
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = model(x)
        if training:
            y.float().square().mean().backward()
            model.zero_grad()
    if command == "build":
        step()
        print("ready", flush=True)
    else:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
"""


def worker(checkout: Path, threads: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER, str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=checkout,
    )


def ask(process: Any, *words: Any) -> str:
    print(*words, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"{process.args[0]} stopped: see its message above")
    return answer.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--out", type=Path, required=True, help="table to write")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    pair = [worker(checkout.resolve(), arguments.threads) for checkout in (arguments.before, HERE)]
    rows = []
    for (name, batch, size), precision, kind in itertools.product(CASES, ("fp32", "bf16"), ("eval", "train")):
        for process in pair:
            ask(process, "build", name, batch, size, precision, kind)
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(arguments.rounds):
            for i in (0, 1) if turn % 2 else (1, 0):
                times[i].append(float(ask(pair[i], "step")))
        before, now = (1000 * statistics.median(series) for series in times)
        figures = (round(before, 1), round(now, 1), round(now / before, 3))
        row = (name, precision, kind, batch, size, arguments.rounds, *figures, hardware())
        rows.append(dict(zip(FIELDS, row, strict=True)))
        print(rows[-1], flush=True)
    with arguments.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for process in pair:
        process.terminate()


if __name__ == "__main__":
    main()
