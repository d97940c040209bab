"""Goes over timm's architectures: what attaches, folds out again and exports; one row of a table each.

    python scripts/sweep_timm.py hub/results/timm_sweep.csv

Every architecture is built on the meta device and its residual branches are looked for. The smallest two of
every module file are built for real, with random statistics and affines: ASR is attached and folded (at the
ends of branches, or where that is not possible on the norms) and the stock network loads the result, DIA is
attached and exported, SSIA trains for a step. An interrupted sweep goes on where it was.
"""

import argparse
import csv
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._registry import _model_to_module  # pyright: ignore[reportPrivateUsage]
from torch import nn

import timm_attn
from timm_attn.branches import branches, example_input
from timm_attn.compare import relative_difference
from timm_attn.files import read_csv
from timm_attn.models.placing import norm_layers

FIELDS = (
    *("architecture", "module", "parameters", "branches", "once", "folding", "norms", "found"),
    *("asr_where", "asr_error", "asr", "dia", "ssia", "seconds"),
)
SMALLEST = 2
LIMIT = 90  # seconds for one of the trials


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def attempt(trial: Callable[[], str]) -> str:
    """What a trial says, or why it failed."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"takes more than {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        return trial()
    except Exception as error:
        return reason(error)
    finally:
        signal.alarm(0)


def survey(architecture: str) -> dict[str, Any]:
    """What there is in a network, found on the meta device."""
    row: dict[str, Any] = {"architecture": architecture, "module": _model_to_module[architecture]}
    try:
        model = timm.create_model(architecture, device="meta")
    except Exception:
        try:
            model = timm.create_model(architecture)
        except Exception as error:
            return row | {"found": reason(error)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["norms"] = len(norm_layers(model))

    def look() -> str:
        images = example_input(model, 1)
        found = branches(model, images)
        row["branches"], row["folding"] = len(found), sum(bool(branch.affine) for branch in found)
        row["once"] = sum(branch.calls == 1 for branch in found)
        return "yes"

    return row | {"found": attempt(look)}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Statistics and affines that hide nothing; small enough that depth does not amplify rounding."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():  # what else there is, a checkpoint does not hold
        if tensor.is_floating_point() and tensor.dim() <= 1 and "classifier" not in name:
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_mean") or "bias" in name:
                tensor.copy_(0.2 * noise - 0.1)
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif name.endswith("weight") and float(tensor.abs().sum()) in (0.0, float(tensor.numel())):
                tensor.copy_(0.5 + 0.5 * noise)
    for module in model.modules():
        if isinstance(module, timm_attn.layers.ASR):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def asr(architecture: str, row: dict[str, Any]) -> str:
    """ASR in and out again; the stock network must load what is left."""
    why = ""
    for where in ("branches", "norms"):
        stock = timm.create_model(architecture)
        try:
            model = timm_attn.attach(stock, "asr", where=where)
        except ValueError as error:
            why = why or reason(error)
            continue
        randomise(model)
        images = example_input(model)
        folded = timm_attn.fold(model, images)
        again = timm.create_model(architecture).eval()
        again.load_state_dict(folded.state_dict(), strict=True)
        row["asr_where"] = where
        row["asr_error"] = f"{relative_difference(model.eval(), again, images):.1e}"
        return "yes" if where == "branches" else why
    return why


def dia(architecture: str) -> str:
    model: Any = timm_attn.attach(timm.create_model(architecture), "dia").eval()
    images = example_input(model)
    program = torch.export.export(model, (images,), strict=False)
    with torch.no_grad():
        expected, exported = model(images), program.module()(images)
    difference = float((exported - expected).abs().max())
    error = difference / float(expected.abs().max()) if difference else 0.0
    return "yes" if error <= 1e-5 else f"exported, it differs by {error:.1e}"


def ssia(architecture: str) -> str:
    model: Any = timm_attn.attach(timm.create_model(architecture), "ssia").train()
    model(example_input(model)).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if "ssia" in name and p.grad is None]
    if missing:
        return f"no gradient in {missing[0]}"
    stock = set(timm.create_model(architecture, device="meta").state_dict())
    return "yes" if set(timm_attn.fold(model).state_dict()) == stock else "other keys after fold"


def try_out(row: dict[str, Any]) -> None:
    """The trials on a network with weights, into its row."""
    start = time.monotonic()
    architecture = row["architecture"]
    row["asr"] = attempt(lambda: asr(architecture, row))
    row["dia"] = attempt(lambda: dia(architecture))
    row["ssia"] = attempt(lambda: ssia(architecture))
    row["seconds"] = round(time.monotonic() - start)


def smallest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The representatives of every module file."""
    by_module: dict[str, list[dict[str, Any]]] = {}
    real = [row for row in rows if not row["architecture"].startswith("test_")]
    for row in sorted(real, key=lambda row: int(row.get("parameters") or 10**12)):
        by_module.setdefault(row["module"], []).append(row)
    return [row for group in by_module.values() for row in group[:SMALLEST]]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="table to write, or to go on with")
    parser.add_argument("--only", help="shell pattern of architectures")
    parser.add_argument("--survey", action="store_true", help="meta device only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    ours = {*timm_attn.model_names(), "frozen"}
    names = [n for n in timm.list_models(arguments.only or "") if n not in ours]
    rows: list[dict[str, Any]] = []
    if arguments.out.is_file():
        rows = read_csv(arguments.out)
    known = {row["architecture"] for row in rows}
    for number, name in enumerate(names):
        if name not in known:
            rows.append(survey(name))
            if number % 20 == 0:
                write(arguments.out, rows)
                print(f"{number} of {len(names)} looked at", file=sys.stderr, flush=True)
    write(arguments.out, rows)
    chosen = [] if arguments.survey else [row for row in smallest(rows) if not row.get("seconds")]
    tried = {row["module"] for row in rows if row.get("seconds")}
    chosen.sort(key=lambda row: (row["module"] in tried, int(row["parameters"])))
    for number, row in enumerate(chosen):
        try_out(row)
        print(f"{number + 1} of {len(chosen)}: {[row.get(f) for f in FIELDS]}", file=sys.stderr, flush=True)
        write(arguments.out, rows)
    write(arguments.out, sorted(rows, key=lambda row: row["architecture"]))


if __name__ == "__main__":
    main()
