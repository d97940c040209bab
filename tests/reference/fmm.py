"""Reference for FMM, blocks that multiply branch and shortcut (arXiv 2106.15067)."""

import torch
from torch import Tensor

from .blocks import batchnorm, relu, shortcut


def fmm_merge(f: Tensor, s: Tensor, mode: str) -> Tensor:
    """The output of a block (arXiv 2106.15067) from its branch f and its shortcut s, all (B, C, H, W).

    f is the branch after its last batch norm, for "sigmoid" after its last convolution, which has none, as
    the first author's code has it. s is normalised already for "bn" and "sigmoid", and the
    plain shortcut for "raw" and "gate"; :func:`fmm_shortcut` returns it.
    """
    if mode in ("bn", "raw"):
        return relu(f * s)
    if mode == "gate":
        return relu(s * (1 + f))
    if mode == "sigmoid":
        return relu((1 / (1 + torch.exp(-f)) + 1) * s)
    raise ValueError(f"unknown mode {mode!r}")


def fmm_shortcut(
    state: dict[str, Tensor], name: str, x: Tensor, stride: int, mode: str, train: bool = False
) -> Tensor:
    """The shortcut of the block ``name`` (arXiv 2106.15067): (B, C, H, W).

    With a downsample, its 1x1 convolution and batch norm in every mode. Without, x itself for "raw" and
    "gate", and ``{name}.fmm.norm`` of x for "bn" and "sigmoid".
    """
    if mode not in ("bn", "raw", "gate", "sigmoid"):
        raise ValueError(f"unknown mode {mode!r}")
    if f"{name}.downsample.0.weight" in state or mode in ("raw", "gate"):
        return shortcut(state, name, x, stride, train)
    return batchnorm(state, f"{name}.fmm.norm", x, train)
