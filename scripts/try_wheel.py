"""Install the built wheel into an empty environment and run the README's first block, with the network off.

python scripts/try_wheel.py dist
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Bytes that sdist and wheel must stay under.
LARGEST = 25_000_000
NO_NETWORK = """
import socket

def refuse(*arguments, **options):
    raise OSError("there is no network")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def main(folder: Path) -> None:
    files = sorted(folder.iterdir())
    for file in files:
        print(f"{file.name}: {file.stat().st_size:,} bytes")
        if file.stat().st_size >= LARGEST:
            sys.exit(f"{file} has not less than {LARGEST:,} bytes")
    (wheel,) = (file for file in files if file.suffix == ".whl")
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel.resolve()], check=True)
        # Away from the checkout, with nothing in the cache.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "TIMM_"))}
        env["HF_HOME"] = f"{scratch}/cache"
        print(block)
        subprocess.run([python, "-c", NO_NETWORK + block], check=True, cwd=scratch, env=env)
    print(f"the README's first block runs from {wheel.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
