"""Install the built wheel into an empty environment and run the README's first block, with the network off.

    python scripts/try_wheel.py dist
    python scripts/try_wheel.py dist --data FOLDER

With a folder of CIFAR-10's parquet files, the accuracy of all weights of it in the wheel is counted, with
timm and nothing of this package but its models, and compared with the wheel's index, of which the README's
table is rendered.
"""

import argparse
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
# An accuracy may differ by two images: the order of sums differs between processors.
COUNT = """
import io, json, sys
from pathlib import Path
import datasets, numpy, timm, timm_attn, torch
from PIL import Image
rows = datasets.load_dataset(sys.argv[1], split="test")
kinds = {type(feature): name for name, feature in rows.features.items()}
image, label = kinds[datasets.Image], kinds[datasets.ClassLabel]
labels = torch.tensor(rows[label])
cells = rows.cast_column(image, datasets.Image(decode=False))[image]
pixels = [numpy.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]
images = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2) / 255
shipped = json.loads((Path(timm_attn.__file__).parent / "hub" / "index.json").read_text())["checkpoints"]
wrong = False
for name, entry in shipped.items():
    if entry["dataset"]["id"] != "uoft-cs/cifar10":
        continue
    model = timm.create_model(name, pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        answers = torch.cat([model((part - mean) / std).argmax(1) for part in images.split(500)])
    counted, told = 100 * (answers == labels).double().mean().item(), entry["metrics"]["top1"]
    print(f"{name:40} {counted:.2f} % counted, {told:.2f} % in the index", flush=True)
    wrong |= abs(counted - told) > 0.021
sys.exit("the index is wrong" if wrong else 0)
"""


def main(folder: Path, data: Path | None) -> None:
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
        if data:
            subprocess.run([python, "-c", NO_NETWORK + COUNT, data], check=True, cwd=scratch, env=env)
    print(f"the README's first block runs from {wheel.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="the folder of sdist and wheel")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    main(arguments.dist.resolve(), arguments.data and arguments.data.resolve())
