"""Reference forward pass of a ResNet, plain or with one of the mechanisms, from a flat state dict."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from .asr import asr_gate
from .blocks import batchnorm, branch, relu, se_gate, shortcut
from .conam import conam
from .dia import dia_cell
from .fmm import fmm_merge, fmm_shortcut
from .sem import sem_gate, spem_gate

MECHANISMS = (None, "se", "dia", "asr", "asr_se", "conam", "fmm", "ssia", "sem", "spem")


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose keys start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _generators(state: dict[str, Tensor], name: str) -> list[dict[str, Tensor]]:
    """The parameters of the ASR generators 0, 1, ... below ``name``."""
    generators: list[dict[str, Tensor]] = []
    while f"{name}.generators.{len(generators)}.psi" in state:
        generators.append(_below(state, f"{name}.generators.{len(generators)}."))
    return generators


def forward(
    state: dict[str, Tensor],
    x: Tensor,
    *,
    layout: str,
    block: str,
    layers: list[int],
    mechanism: str | None,
    groups: int = 1,
    trace: list | None = None,
    patches: list[tuple[int, int] | None] | None = None,
    temperature: float = 1.0,
    mode: str | None = None,
    train: bool = False,
) -> Tensor:
    """Logits (B, classes) of images x (B, 3, H, W) in the dtype of x.

    ``layout`` is "imagenet" or "cifar" (3x3 stem, no max-pool), ``block`` "basic" or "bottleneck",
    ``layers`` the blocks per stage. ``train`` normalises with the batch's own statistics. ``mechanism``:

    * None: the plain network, and so is "ssia" (arXiv 2206.07434), which is a loss on the outputs.
    * "se" (arXiv 1709.01507), "dia" (arXiv 1905.10671; one cell and a fresh zero state per stage), "asr"
      (arXiv 2304.06345) or "asr_se" (ASR, then SE of what it gated): a gate multiplies the branch after
      the last batch norm, before the shortcut is added.
    * "conam" (arXiv 2110.14369), on what the branch of the first block of a stage reads, not on what the
      shortcut reads. ``patches`` has (rows, cols), or None for no ConAM, for each of the stages;
      missing stages at the end have none.
    * "fmm" (arXiv 2106.15067) in ``mode``: the product that :func:`fmm_merge` writes out, not a sum.

    ``trace`` receives one dict per block: stage (from 1), index (from 0), f (B, C, H, W) before the gate,
    gate ((B, C); (C,) for "asr"; None where there is none) and output.
    """
    if layout not in ("imagenet", "cifar") or mechanism not in MECHANISMS:
        raise ValueError(f"unknown layout {layout!r} or mechanism {mechanism!r}")
    if (mechanism == "conam") != (patches is not None) or (mechanism == "fmm") != (mode is not None):
        raise ValueError('"conam" takes patches, "fmm" takes mode, and no other mechanism does')
    state = {key: value.to(x.dtype) for key, value in state.items() if value.is_floating_point()}

    if layout == "imagenet":
        x = conv2d(x, state["conv1.weight"], stride=2, padding=3)
        x = relu(batchnorm(state, "bn1", x, train))
        x = max_pool2d(x, kernel_size=3, stride=2, padding=1)
    else:
        x = conv2d(x, state["conv1.weight"], stride=1, padding=1)
        x = relu(batchnorm(state, "bn1", x, train))

    for stage, blocks in enumerate(layers, start=1):
        h = c = torch.empty(0)
        for index in range(blocks):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            read = x
            if mechanism == "conam" and index == 0 and stage <= len(patches) and patches[stage - 1]:
                rows, cols = patches[stage - 1]
                read = conam(x, _below(state, f"{name}.conam."), rows, cols, temperature)
            f = branch(state, name, read, block, stride, groups, train, last_norm=mode != "sigmoid")
            gate, gated = None, f
            if mechanism == "se":
                gate = se_gate(state, f"{name}.se", f)
                gated = f * gate[:, :, None, None]
            elif mechanism == "dia":
                g = f.mean(dim=(2, 3))
                if index == 0:
                    h, c = torch.zeros_like(g), torch.zeros_like(g)
                h, c = dia_cell(g, h, c, _below(state, f"layer{stage}.0.dia."))
                gate = h
                gated = f * gate[:, :, None, None]
            elif mechanism == "asr":
                gate = asr_gate(_generators(state, f"{name}.asr"))
                gated = f * gate[None, :, None, None]
            elif mechanism == "asr_se":
                v = asr_gate(_generators(state, f"{name}.asr"))[None, :]
                gate = v * se_gate(state, f"{name}.se", f * v[:, :, None, None])
                gated = f * gate[:, :, None, None]
            elif mechanism in ("sem", "spem"):
                made = sem_gate if mechanism == "sem" else spem_gate
                gate = made(_below(state, f"{name}.{mechanism}."), f)
                gated = f * gate[:, :, None, None]
            if mechanism == "fmm":
                x = fmm_merge(f, fmm_shortcut(state, name, x, stride, mode, train), mode)
            else:
                x = relu(shortcut(state, name, x, stride, train) + gated)
            if trace is not None:
                trace.append({"stage": stage, "index": index, "f": f, "gate": gate, "output": x})

    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
