"""Whole networks against pytorchcv's, which share no code with ours: the same weights, the same logits."""

import re
from collections import Counter
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
from helpers import parameters, randomise
from pytorchcv.models.diaresnet import diaresnet50, diaresnet50b
from pytorchcv.models.diaresnet_cifar import diaresnet20_cifar10
from pytorchcv.models.resnet_cifar import resnet20_cifar10
from pytorchcv.models.seresnet_cifar import seresnet20_cifar10
from torch import nn

from timm_attn.layers import DIACell

#: Architecture, its arguments, pytorchcv's network, image size. pytorchcv's DIA has r = 4 at every width. Its
#: SE has C // 16 hidden units and biases in both layers, as ours has by default. diaresnet50b strides in the
#: 3×3 convolution, as timm's blocks do; diaresnet50 in the 1×1 before it.
PAIRS = [
    ("resnet20", {}, resnet20_cifar10, 32),
    ("resnet20_se", {}, seresnet20_cifar10, 32),
    ("resnet20_dia", {"reduction": 4}, diaresnet20_cifar10, 32),
    ("resnet50_dia", {"reduction": 4}, diaresnet50b, 64),
]
DIA20, DIA50 = PAIRS[2:]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}

RENAMES = [
    (r"^features\.init_block\.(conv\.)?(conv|bn)\.", r"\g<2>1."),
    (r"^features\.stage(\d+)\.unit(\d+)\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}."),
    (r"\.body\.conv(\d)\.(conv|bn)\.", r".\2\1."),
    (r"\.identity_conv\.conv\.", ".downsample.0."),
    (r"\.identity_conv\.bn\.", ".downsample.1."),
    (r"\.se\.conv(\d)\.", r".se.fc\1."),
    (r"\.\d+\.attention\.lstm\.([xh])_amps\.amp1\.fc1\.", r".0.dia.\1_reduce."),
    (r"\.\d+\.attention\.lstm\.([xh])_amps\.amp1\.fc2\.", r".0.dia.\1_expand."),
    (r"^output\.", "fc."),
]


def our_name(name: str) -> str:
    """Our name of a tensor of pytorchcv's; a stage's DIA cell has one name of ours and one a unit of theirs."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def copy_weights(model: nn.Module, reference: nn.Module) -> None:
    """Our weights to pytorchcv's network: every tensor of either side, once."""
    ours, theirs = model.state_dict(), reference.state_dict()
    constant = [name for name, t in ours.items() if t.numel() > 1 and t.min() == t.max()]
    assert not constant
    copies = Counter(our_name(name) for name in theirs)
    blocks = {name: len(stage) for name, stage in model.named_children() if name.startswith("layer")}
    assert copies == {name: blocks[name.split(".")[0]] if ".dia." in name else 1 for name in ours}
    reference.load_state_dict({name: ours[our_name(name)] for name in theirs})
    # Each tensor counts once here, so the cell that they register in every unit is one cell.
    assert parameters(model) == parameters(reference)


def build_pair(architecture, kwargs, build_reference, size):
    """Our random network, pytorchcv's with its weights, both in eval mode, and a batch of images (float64)."""
    return deepcopy(built(architecture, tuple(kwargs.items()), build_reference, size))


@cache
def built(architecture, kwargs, build_reference, size):
    torch.manual_seed(0)
    model = randomise(timm.create_model(architecture, pretrained=False, **dict(kwargs))).eval()
    reference = build_reference(pretrained=False).eval()
    copy_weights(model, reference)
    # Its last pooling has a fixed kernel, made for 32 and 224 pixels.
    reference.features.final_pool.kernel_size = size // model.feature_info[-1]["reduction"]
    # Images of different colours: noise alone has nearly the same channel means, and so the same gates.
    images = torch.randn(4, 3, size, size) + 3 * torch.randn(4, 3, 1, 1)
    return model, reference, images.double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|"""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def logit_error(model, reference, images, dtype) -> float:
    """Relative error of the logits, both networks in eval mode and one dtype."""
    expected = reference.to(dtype)(images.to(dtype))
    assert relative_error(expected[1:], expected[:-1]) > 1e-2  # they depend on the image
    return relative_error(model.to(dtype)(images.to(dtype)), expected)


pairs = pytest.mark.parametrize("pair", PAIRS, ids=[pair[0] for pair in PAIRS])


@pairs
def test_logits(pair):
    model, reference, images = build_pair(*pair)
    for dtype, bound in BOUNDS.items():
        assert logit_error(model, reference, images, dtype) <= bound


@pairs
def test_training_step(pair):
    """Logits, running statistics and every gradient; the Dropout in their cell feeds no output."""
    model, reference, images = build_pair(*pair)
    direction = torch.randn(len(images), model.num_classes, dtype=torch.float64)
    logits = []
    for network in (model, reference):
        logits.append(network.double().train()(images))
        (logits[-1] * direction).sum().backward()
    bound = BOUNDS[torch.float64]
    assert relative_error(*logits) <= bound
    ours = model.state_dict()
    for name, expected in reference.state_dict().items():
        assert relative_error(ours[our_name(name)], expected) <= bound, name
    for name, parameter in reference.named_parameters():
        actual = model.get_parameter(our_name(name)).grad
        assert parameter.grad.abs().max() > 0
        assert relative_error(actual, parameter.grad) <= bound, name


def cells(model):
    return [module for module in model.modules() if isinstance(module, DIACell)]


@pytest.mark.parametrize("gates", ["fiuo", "ufio", "ofui", "iufo", "iouf", "ifou"])
@torch.no_grad()
def test_two_gates_swapped_are_told_apart(gates):
    model, reference, images = build_pair(*DIA20)
    for cell in cells(model):
        for parameter in (*cell.x_expand.parameters(), *cell.h_expand.parameters()):
            rows = dict(zip("ifuo", parameter.chunk(4), strict=True))
            parameter.copy_(torch.cat([rows[gate] for gate in gates]))
    assert logit_error(model, reference, images, torch.float32) > 1e-2


def test_input_and_state_swapped_are_told_apart():
    model, reference, images = build_pair(*DIA20)
    for cell in cells(model):
        cell.x_reduce, cell.h_reduce = cell.h_reduce, cell.x_reduce
        cell.x_expand, cell.h_expand = cell.h_expand, cell.x_expand
    assert logit_error(model, reference, images, torch.float32) > 1e-2


def test_stride_in_the_other_convolution_is_told_apart():
    architecture, kwargs, _, size = DIA50
    model, reference, images = build_pair(architecture, kwargs, diaresnet50, size)
    assert logit_error(model, reference, images, torch.float32) > 1e-2
