"""timm's own tests of models, unchanged, over a small network of every mechanism and block type.

The tests come with timm's source distribution of the installed version. Every small network must pass every
test that timm gives a ResNet of its own, TorchScript aside; `--results FILE` writes what did not, and why.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".timm_tests"
PLUGIN = "timm_suite.resnet"
TESTS = "tests/test_models.py"


def fetch_tests() -> Path:
    """Folder with timm's tests of the installed version, from its source distribution."""
    name = f"timm-{version('timm')}"
    if not (CACHE / name).is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
            subprocess.run([*pip, "--dest", scratch, f"timm=={version('timm')}"], check=True)
            with tarfile.open(Path(scratch, f"{name}.tar.gz")) as archive:
                # Without timm/, so that it is the installed one that is tested.
                wanted = [
                    m for m in archive if m.name.startswith((f"{name}/tests/", f"{name}/pyproject.toml"))
                ]
                archive.extractall(scratch, wanted, filter="data")
            Path(scratch, name).rename(CACHE / name)
    return CACHE / name


def run_tests(folder: Path) -> tuple[int, dict]:
    """Exit status of pytest, and what the plugin has written of the outcomes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # The package of this checkout, wherever another one is installed from.
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "scripts", ROOT / "tests")))
    environment.pop("GITHUB_ACTIONS", None)  # timm leaves out some tests there
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch, "outcomes.json")
        options = ["-p", PLUGIN, f"--outcomes={outcomes}", "-q", "-p", "no:cacheprovider"]
        options += ["-k", "not torchscript"]  # which PyTorch has deprecated, and this package has given up
        command = [sys.executable, "-m", "pytest", *options, TESTS]
        status = subprocess.run(command, cwd=folder, env=environment).returncode
        found = json.loads(outcomes.read_text()) if outcomes.is_file() else {"tests": [], "outcomes": {}}
        return status, found


def summarise(tests: list[str], outcomes: dict[str, dict[str, tuple[str, str]]]) -> dict:
    """Counts, and what did not pass by name with its reason; prints them."""
    absent = ("missing", "not collected by timm, or not run to its end")
    result = {kind: {} for kind in ("passed", "failed", "skipped", "missing")}
    print(f"\n{'test':45}", *(f"{kind:>8}" for kind in result))
    for test in tests:
        counts = dict.fromkeys(result, 0)
        for model, own in outcomes.items():
            kind, reason = own.get(test, absent)
            counts[kind] += 1
            result[kind][f"{test}[{model}]"] = reason
        print(f"{test:45}", *(f"{count:8}" for count in counts.values()))
    for kind in ("skipped", "missing", "failed"):
        print(f"\n{kind}: {len(result[kind]) or 'none'}")
        for name, reason in result[kind].items():
            print(f"  {name}: {reason}")
    passed = len(result.pop("passed"))
    expected = len(tests) * len(outcomes)
    print(f"\n{len(outcomes)} models × {len(tests)} tests = {expected}, of which {passed} passed")
    return {"models": list(outcomes), "tests": tests, "expected": expected, "passed": passed, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, metavar="FILE")
    results = parser.parse_args().results
    folder = fetch_tests()
    started = time.perf_counter()
    status, found = run_tests(folder)
    result = {
        **summarise(**found),
        "seconds": round(time.perf_counter() - started, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("timm", "timm-attn", "torch", "torchvision", "pytest")},
        "sha256": {TESTS: hashlib.sha256((folder / TESTS).read_bytes()).hexdigest()},
    }
    if results:
        results.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(status or not 0 < result["expected"] == result["passed"])


if __name__ == "__main__":
    main()
