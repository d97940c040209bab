"""Several runs in one launch of two processes, for test_distributed.py: starting processes takes seconds.

torchrun --nproc-per-node 2 distributed_runs.py '[{"out": ..., "recipe": {...}, "kill": step or null}, ...]'
"""

import json
import os
import signal
import sys
from pathlib import Path

from timm_attn.training import Recipe, resume, train
from timm_attn.training.run import is_run


def main() -> None:
    for run in json.loads(sys.argv[1]):
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


if __name__ == "__main__":
    main()
