"""What several test files share."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from PIL import Image
from timm.models.resnet import ResNet
from torch import nn

import timm_attn
from timm_attn.models import BACKBONES, MECHANISMS, CifarResNet, CifarResNetV2, model_names, parse_name
from timm_attn.models.resnet_only import last_conv, last_norm
from timm_attn.training.run import read_lines

ROOT = Path(__file__).parents[1]


#: Share in % of one of the 360 images that digits evaluates. Two computations of a network in another order of
#: sums may differ in the last bit, and so in the class of an image that is between two.
ONE_IMAGE = 100 / 360 + 1e-6


def blank() -> bytes:
    """A PNG of one pixel."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    return stream.getvalue()


BLANK = blank()


def found(things: Iterable) -> list:
    """What a loop goes through, which must not be nothing: a test that looks at nothing cannot fail."""
    things = list(things)
    assert things, "nothing was found"
    return things


#: Parameters of timm's ResNets and of the CIFAR ResNets without any attention.
STOCK = re.compile(
    r"(conv1|bn1|fc|stem\.conv|norm|head\.fc|"
    r"(layer\d+|stages\.\d+\.blocks)\.\d+\.(conv\d|bn\d|norm\d|downsample\.(\d|conv)))\.\w+"
)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms, and gates that vary over channels: a fresh network hides bugs."""
    g = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=g, dtype=torch.float64) * (high - low) + low)

    def normal(tensor, std):
        tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64) * std)

    norms = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            uniform(module.weight, 0.5, 1.5)
            normal(module.bias, 0.3)
            norms |= {f"{path}.weight", f"{path}.bias"}
    for name, parameter in model.named_parameters():
        if name in norms or STOCK.fullmatch(name):
            continue
        if name.endswith(("reduce.bias", "fc1.bias")):
            uniform(parameter, 1.0, 3.0)  # of a few hidden units, most must be alive
        elif "conam.fc2" in name:
            normal(parameter, parameter.numel() ** -0.5)  # more would saturate its softmax
        else:
            normal(parameter, 1.0 if parameter.ndim < 2 else 2.0 / parameter.shape[1] ** 0.5)
    if isinstance(model, ResNet | CifarResNetV2):
        _calibrate(model, g)
    return model


def _calibrate(model: ResNet | CifarResNetV2, g: torch.Generator) -> None:
    """Statistics of noise, and branches as small as the network is deep, lest it amplifies rounding."""
    for info in model.feature_info[1:]:
        stage = model.get_submodule(info["module"])
        stage = getattr(stage, "blocks", stage)
        for block in stage:
            if not hasattr(block, "fmm"):
                last = last_conv(block) if isinstance(model, CifarResNetV2) else last_norm(block)
                last.weight.mul_(len(stage) ** -0.5)
                continue
            norm = last_norm(block)
            if isinstance(norm, nn.Identity):  # the last convolution, which starts at zero, has no norm
                nn.init.normal_(
                    last_conv(block).weight, std=last_conv(block).weight[0].numel() ** -0.5, generator=g
                )
            else:
                norm.weight.div_(len(stage))
            for factor in block.factor_norms():
                if hasattr(factor, "bias"):
                    factor.bias.add_(1)  # a product of factors about 0 vanishes
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    training = model.training
    size = 32 if isinstance(model, CifarResNet | CifarResNetV2) else 64
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    model.train()(noise(8, first.in_channels, size, g).to(first.weight))
    for norm in norms:
        norm.momentum = 0.1
    model.train(training)


def fixed_images(size: Sequence[int]) -> torch.Tensor:
    """Four images of waves, the same with every version: no random generator is asked."""
    i, c, y, x = torch.meshgrid(*(torch.arange(n) for n in (4, *size)), indexing="ij")
    return torch.sin(0.2 * (i + 1) * y + 0.3 * (c + 1) * x + i) + torch.cos(0.1 * x * y + c)


def noise(batch: int, channels: int, size: int, g: torch.Generator) -> torch.Tensor:
    """Noise with a colour of its own for each image: the channel means of mere noise are all alike."""
    colour = torch.randn(batch, channels, 1, 1, generator=g)
    return colour + torch.randn(batch, channels, size, size, generator=g)


def narrow(architecture: str, **kwargs) -> nn.Module:
    """A small network of an architecture: few channels and blocks, ten classes."""
    backbone = BACKBONES[parse_name(architecture)[0]]
    stages = len(backbone.layers)
    small = {"channels": [8, 16, 24, 32][:stages], "layers": [2, 1, 2, 1][:stages], "num_classes": 10}
    if "next50" in architecture:  # as many groups need as many channels, and a multiple of them
        small["channels"] = [64] * stages
    if not backbone.cifar:
        small["pretrained_cfg_overlay"] = {"input_size": (3, 64, 64), "pool_size": (2, 2)}
    return timm.create_model(architecture, **{**small, **kwargs})


def small_names(mechanism: str, backbones: Sequence[str] = ("resnet20", "resnet50")) -> list[str]:
    """One architecture of both block types and both layouts, of a row of the table of mechanisms."""
    if mechanism in ("sem", "spem"):  # which stand where others do, with no code of their own for blocks
        backbones = backbones[:1]
    found = {parse_name(name): name for name in model_names()}
    return [found[backbone, mechanism] for backbone in backbones if (backbone, mechanism) in found]


SMALL = [name for mechanism in MECHANISMS for name in small_names(mechanism)]


#: timm's ResNets that every mechanism must be on, written out: the package's own table is what is tested.
IMAGENET = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
]


class Stopped(Exception):
    """A training run was stopped by the test."""


def stop_at(step: int):
    """For ``on_step`` of a training run."""

    def on_step(done: int) -> None:
        if done == step:
            raise Stopped

    return on_step


def timeless(file: Path) -> list[dict]:
    """A file of JSON lines without what is measured in seconds."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_lines(file)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def flip_last_bit(content: bytes) -> bytes:
    """The same number of bytes, one of them wrong."""
    return content[:-1] + bytes([content[-1] ^ 1])


def use_hub(monkeypatch, endpoint: str) -> None:
    """Let the Hub client of this process talk to a server; it reads HF_ENDPOINT only once."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


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


def script(name: str, *arguments: Any, start: Any = None) -> subprocess.CompletedProcess:
    """``python scripts/name arguments`` in this process, which has imported what scripts import.

    Args:
        start: What the script calls in place of ``subprocess.run``.
    """
    import pytest  # here, since scripts import this file, too

    path, status, output = ROOT / "scripts" / name, 0, io.StringIO()
    streams = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
    with pytest.MonkeyPatch.context() as patch, streams[0], streams[1]:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(str(path.parent))
        if start:
            patch.setattr(subprocess, "run", start)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # as the interpreter does with it
                print(status)
                status = 1
    return subprocess.CompletedProcess(name, status or 0, output.getvalue(), output.getvalue())


assert timm_attn.__version__  # the models are registered
