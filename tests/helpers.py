"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import timm
import torch
from torch import nn

import timm_attn
from timm_attn.layers import ASR, DIACell
from timm_attn.models.resnet_attn import BACKBONES, parse_name

ROOT = Path(__file__).parents[1]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norm statistics and affines, and gates that vary over channels: a fresh network hides bugs."""
    g = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=g, dtype=torch.float64) * (high - low) + low)

    def normal(tensor, std):
        tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64) * std)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            normal(module.running_mean, 0.3)
            uniform(module.running_var, 0.5, 2.0)
            uniform(module.weight, 0.5, 1.5)
            normal(module.bias, 0.3)
        elif isinstance(module, DIACell | ASR | timm.layers.SEModule):
            for name, parameter in module.named_parameters():
                if name.endswith(("reduce.bias", "fc1.bias")):
                    uniform(parameter, 1.0, 3.0)  # of a few hidden units, most must be alive
                else:
                    normal(parameter, 1.0 if parameter.ndim < 2 else 2.0 / parameter.shape[1] ** 0.5)
    return model


def narrow(architecture: str, **kwargs) -> nn.Module:
    """A small network of an architecture: few channels and blocks, ten classes."""
    backbone = BACKBONES[parse_name(architecture)[0]]
    stages = len(backbone.layers)
    small = {"channels": [8, 16, 24, 32][:stages], "layers": [2, 1, 2, 1][:stages], "num_classes": 10}
    return timm.create_model(architecture, **{**small, **kwargs})


#: One architecture of every mechanism and block type, in both layouts where there are both.
SMALL = [
    "resnet20",
    "resnet164",
    "resnet20_se",
    "resnet164_se",
    *(
        f"{backbone}_{m}"
        for m in ("dia", "asr")
        for backbone in ("resnet20", "resnet164", "resnet18", "resnet50")
    ),
]


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def flip_last_bit(content: bytes) -> bytes:
    """The same number of bytes, one of them wrong."""
    return content[:-1] + bytes([content[-1] ^ 1])


def python(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run this Python; output is captured as text."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


assert timm_attn.__version__  # the models are registered
