"""Whole networks against the reference forward pass, and wrong networks that must be told apart."""

import pytest
import torch
from helpers import SMALL, narrow, randomise
from reference.resnet import forward

from timm_attn.layers import ASR
from timm_attn.models import BACKBONES, parse_name
from timm_attn.models.dia import DIAStage


def check_network(architecture: str, size: int = 64, patches=None, temperature=1.0, **kwargs) -> None:
    """Logits of a small random network in float64."""
    backbone_name, mechanism = parse_name(architecture)
    backbone = BACKBONES[backbone_name]
    torch.manual_seed(0)
    model = randomise(narrow(architecture, **kwargs).double()).eval()
    colour = torch.randn(3, 3, 1, 1, dtype=torch.float64)  # else all images have about the same channel means
    x = colour + torch.randn(3, 3, size, size, dtype=torch.float64)
    layers = [len(model.get_submodule(info["module"])) for info in model.feature_info[1:]]
    expected = forward(
        model.state_dict(),
        x,
        layout="cifar" if backbone.cifar else "imagenet",
        block="bottleneck" if backbone.bottleneck else "basic",
        layers=layers,
        mechanism=mechanism or None,
        mode=kwargs.get("mode", "bn") if mechanism == "fmm" else None,
        patches=patches or [(4, 4)] * 3 if mechanism == "conam" else None,
        temperature=temperature,
        groups=backbone.args.get("cardinality", 1),
    )
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", SMALL)
def test_network_is_the_papers(architecture):
    check_network(architecture)


@pytest.mark.parametrize("kwargs", [{"reduction": 2}, {"reduction": 7}])
def test_dia_network_with_another_reduction(kwargs):
    check_network("resnet20_dia", **kwargs)


@pytest.mark.parametrize("delta", [2, 3])
def test_asr_network_with_several_generators(delta):
    check_network("resnet20_asr", delta=delta)


def test_grouped_convolutions():
    # 4 channels a group in the first stage of resnext50_32x4d at its real width
    check_network("resnext50_32x4d_asr", channels=[64, 64, 64, 64], layers=[1, 1, 1, 1], size=32)


def reset_at_every_block(self, x):
    cell = self[0].dia
    for block in self:
        h = c = x.new_zeros((x.shape[0], cell.channels))
        f, _, _ = cell.gate(block.branch(x), h, c)
        x = block.merge(f, x)
    return x


def hidden_only(self, x):
    cell = self[0].dia
    h = x.new_zeros((x.shape[0], cell.channels))
    for block in self:
        f, h, _ = cell.gate(block.branch(x), h, torch.zeros_like(h))
        x = block.merge(f, x)
    return x


@pytest.mark.parametrize("wrong", [reset_at_every_block, hidden_only])
def test_wrong_dia_stages_are_told_apart(wrong, monkeypatch):
    monkeypatch.setattr(DIAStage, "forward", wrong)
    with pytest.raises(AssertionError):
        check_network("resnet20_dia")


def psi_per_image(self, x):
    v = torch.ones((), dtype=x.dtype)
    for generator in self.generators:
        hidden = generator.fc1(generator.psi + x.mean((2, 3))).relu()
        v = v * generator.fc2(hidden).sigmoid()
    return x * v[:, :, None, None]


def test_psi_per_image_is_told_apart(monkeypatch):
    monkeypatch.setattr(ASR, "forward", psi_per_image)
    with pytest.raises(AssertionError):
        check_network("resnet20_asr")
