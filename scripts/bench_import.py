"""How much `import timm_attn` adds to `import timm`, in fresh processes taken in turn.

Prints the medians and their ratio, and with `--out FILE` writes them as JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds(modules: str) -> float:
    """Seconds that a fresh process takes to import some modules."""
    command = [sys.executable, "-c", CODE.format(modules)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=15, help="pairs of processes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seconds("timm, timm_attn")  # byte-compile, fill the page cache
    pairs = [(seconds("timm"), seconds("timm, timm_attn")) for _ in range(arguments.n)]
    ratios = [both / timm for timm, both in pairs]
    result = {
        "command": f"python scripts/bench_import.py -n {arguments.n}",
        "timm_seconds": statistics.median(timm for timm, _ in pairs),
        "timm_and_timm_attn_seconds": statistics.median(both for _, both in pairs),
        "median_ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "n": arguments.n,
        "python": platform.python_version(),
        "timm": version("timm"),
        "torch": version("torch"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
