"""Files for other runtimes, kept only if they compute what the network computes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..branches import copied, example_input
from ..compare import FoldError
from ..errors import UserError, install

ONNX = "model.onnx"
PROGRAM = "model.pt2"
#: Greatest max|Δlogit| ÷ max|logit| against PyTorch in float32: two implementations of convolution.
BOUND = 5e-5


@torch.no_grad()
def write_onnx(model: nn.Module, path: Path) -> float:
    """Write a network in eval mode as ONNX with a dynamic batch size, and run it in onnxruntime.

    Returns:
        Greatest max|Δlogit| ÷ max|logit| over batches of one and of five images.

    Raises:
        UserError: The packages of the extra ``export`` are not installed.
        FoldError: The difference is above ``BOUND``; the file is removed.
    """
    model = copied(model).cpu().eval()
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (what PyTorch's exporter needs)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: {install('export')}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example_input(model),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=_dynamic_batch(),
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _compare(model, path, run)


@torch.no_grad()
def write_program(model: nn.Module, path: Path) -> float:
    """Write a network in eval mode with ``torch.export``, with a dynamic batch size, and run what is written.

    Returns:
        Greatest max|Δlogit| ÷ max|logit| over batches of one and of five images.

    Raises:
        FoldError: The difference is above ``BOUND``; the file is removed.
    """
    model = copied(model).cpu().eval()  # a program names the device of its constants
    program = torch.export.export(model, (example_input(model),), dynamic_shapes=_dynamic_batch())
    torch.export.save(program, path)
    return _compare(model, path, torch.export.load(path).module())


def _dynamic_batch() -> Any:
    return ({0: torch.export.Dim("batch", min=1)},)


def _compare(model: nn.Module, path: Path, run: Any) -> float:
    error = 0.0
    for batch in (1, 5):
        x = example_input(model, batch)
        expected: Tensor = model(x)
        difference = (run(x) - expected).abs().max() / expected.abs().max()
        error = max(error, difference.item()) if difference.isfinite() else float("inf")
    if not error <= BOUND:
        path.unlink()
        raise FoldError(
            f"{path.name} does not compute what the network computes: max|Δlogit| / max|logit| = "
            f"{error:.3g}, allowed {BOUND:g}"
        )
    return error
