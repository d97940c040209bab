"""Reference forward pass of a pre-activation ResNet (https://arxiv.org/abs/1603.05027), with a mechanism."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .blocks import batchnorm, relu
from .conam import conam
from .dia import dia_cell


def forward(state: dict[str, Tensor], x: Tensor, *, mechanism: str, mode: str = "bn") -> Tensor:
    """Logits of images B × 3 × 32 × 32; shortcuts that change shape convolve the activated map.

    ``dia`` has a batch norm at the end of every branch, before the cell reads it; ``fmm`` one on the branch
    and one on every shortcut, and nothing after the product; ``conam`` weighs what the branch convolves in
    the first block of each stage.
    """
    x = conv2d(x, state["stem.conv.weight"], padding=1)
    for stage in range(3):
        index = 0
        h = c = torch.zeros(())
        while f"stages.{stage}.blocks.{index}.conv1.weight" in state:
            name = f"stages.{stage}.blocks.{index}"
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            stride = 2 if stage and not index else 1
            z = relu(batchnorm(own, "norm1", x, False))
            shortcut = x
            if "downsample.conv.weight" in own:
                shortcut = conv2d(z, own["downsample.conv.weight"], stride=stride)
            f = z
            if mechanism == "conam" and not index:
                f = conam(z, {k.removeprefix("conam."): v for k, v in own.items() if "conam" in k}, 4, 4, 1.0)
            kernels = [own[f"conv{i}.weight"] for i in (1, 2, 3) if f"conv{i}.weight" in own]
            for i, kernel in enumerate(kernels, start=1):
                if i > 1:
                    f = relu(batchnorm(own, f"norm{i}", f, False))
                # The stride is in the first 3×3 convolution.
                strided = i == (1 if len(kernels) == 2 else 2)
                f = conv2d(f, kernel, stride=stride if strided else 1, padding=kernel.shape[-1] // 2)
            if mechanism == "dia":
                f = batchnorm(own, "dia_norm", f, False)
                g = f.mean((2, 3))
                if not index:
                    h, c = torch.zeros_like(g), torch.zeros_like(g)
                    cell = {k.removeprefix("dia."): v for k, v in own.items() if k.startswith("dia.")}
                h, c = dia_cell(g, h, c, cell)
                f = f * h[:, :, None, None]
            if mechanism == "fmm":
                if mode != "sigmoid":
                    f = batchnorm(own, "fmm_branch_norm", f, False)
                if mode in ("bn", "sigmoid"):
                    shortcut = batchnorm(own, "fmm.norm", shortcut, False)
                factor = {"bn": f, "raw": f, "gate": 1 + f, "sigmoid": 1 + torch.sigmoid(f)}[mode]
                x = factor * shortcut
            else:
                x = f + shortcut
            index += 1
    x = relu(batchnorm(state, "norm", x, False)).mean((2, 3))
    return x @ state["head.fc.weight"].flatten(1).T + state["head.fc.bias"]
