"""Launches of two processes for test_distributed.py, one after the other, forked from one that has imported all.

python distributed_runs.py '[[{"out": ..., "recipe": {...}, "kill": step or null}, {"script": path}, ...], ...]'

Each launch does what torchrun does: it serves the store at which the processes meet, sets the variables that
torch.distributed reads, waits, and ends the other process when one fails. The exit statuses of the launches,
0 or 1, are the last line printed.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401 (imported before the processes part)
import datasets  # noqa: F401
import sklearn.datasets  # noqa: F401
from helpers import BLANK
from torch.distributed import TCPStore

from timm_attn.training import Recipe, curves, resume, train
from timm_attn.training.run import is_run


def work(runs: list[dict]) -> None:
    """One process of a launch."""
    for run in runs:
        if "script" in run:
            runpy.run_path(run["script"], run_name="__main__")
            continue
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in run["recipe"].items()}

        def on_step(done: int, run=run) -> None:
            if done == run["kill"] and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            with open(f"{run['out']}.steps", "a") as stream:
                stream.write(f"{os.environ['RANK']} {done}\n")

        if is_run(Path(run["out"])):
            resume(run["out"], on_step)
        else:
            train(run["model"], Recipe(**fields), run["out"], on_step)


def launch(runs: list[dict]) -> int:
    """Two processes; 0 if both come to their end."""
    # Listens from now on: a port that was only looked up could be taken by somebody else.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = set()
    for rank in (0, 1):
        process = os.fork()
        if process:
            processes.add(process)
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        status = 1
        try:
            work(runs)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    failed = 0
    while processes:
        process, status = os.wait()
        processes.discard(process)
        if status and not failed:
            failed = 1
            for other in processes:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    curves.draw = lambda lines, title, path: path.write_bytes(BLANK)  # as conftest.py has it
    print(json.dumps([launch(runs) for runs in json.loads(sys.argv[1])]))
