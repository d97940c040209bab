"""Whole networks against the reference forward pass, and wrong networks that must be told apart."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import narrow, randomise, small_names
from reference import preact
from reference.resnet import MECHANISMS, forward

import timm_attn
from timm_attn.compare import relative_difference
from timm_attn.dia_end import DIARun
from timm_attn.ends import GateEnd
from timm_attn.layers import ASR, FMM, ConAM
from timm_attn.layers.fmm import MODES as FMM_MODES
from timm_attn.models import BACKBONES, parse_name
from timm_attn.models import MECHANISMS as TABLE
from timm_attn.models.resnet_only import _ConAMBlock


def check_network(architecture: str, size: int = 64, patches=None, **kwargs) -> None:
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
        temperature=kwargs.get("temperature", 1.0),
        groups=32 if backbone_name.startswith("resnext") else 1,
    )
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


EVERY_BLOCK = ("resnet20", "resnet164", "resnet18", "resnet50")


@pytest.mark.parametrize("architecture", [name for key in TABLE for name in small_names(key, EVERY_BLOCK)])
def test_network_is_the_papers(architecture):
    mechanism = parse_name(architecture)[1] or None
    if mechanism not in MECHANISMS:
        pytest.skip(f"no reference of {mechanism!r} in tests/reference/resnet.py")
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


@pytest.mark.parametrize("generator", ["spa", "ie", "eca", "srm", "scale"])
@pytest.mark.parametrize("architecture", ["resnet20_asr", "resnet50_asr_se"])
def test_asr_network_with_another_generator(architecture, generator):
    check_network(architecture, generator=generator, delta=2)


@pytest.mark.parametrize("mode", ["bn", "sigmoid", "gate", "raw"])
@pytest.mark.parametrize("architecture", ["fmmnet20", "fmmnet50"])
def test_fmm_network_in_another_mode(architecture, mode):
    check_network(architecture, mode=mode)


def test_conam_network_with_another_grid_and_temperature():
    check_network("resnet20_conam", patches=[(3, 3)] * 3, grid=3, temperature=2.5, reduction=2)


def test_conam_network_with_literal_patches():
    # 64-pixel images: maps of 64, 64 and 32 pixels before the three stages
    check_network("resnet20_conam", patches=[(8, 8), None, (8, 8)], patch_size=(8, 0, 4))
    check_network("resnet18_conam", patches=[(8, 8), (4, 4), (2, 2)], patch_size=(2, 4, 4, 0))


def test_a_column_of_patches_is_told_from_a_row(monkeypatch):
    confidence = ConAM.confidence
    monkeypatch.setattr(ConAM, "confidence", lambda self, x: confidence(self, x).transpose(1, 2))
    with pytest.raises(AssertionError):
        check_network("resnet20_conam")


def softmax_over_channels(self, x):
    patches = F.adaptive_avg_pool2d(x, (self.grid, self.grid))
    means = torch.cat([patches.flatten(2), x.mean((2, 3))[:, :, None]], 2).transpose(1, 2)
    means = self.fc2(self.fc1(means).relu()).relu()
    return (means[:, :-1] * means[:, -1:]).softmax(2).sum(2).view(-1, self.grid, self.grid)


def test_a_softmax_over_channels_is_told_apart(monkeypatch):
    monkeypatch.setattr(ConAM, "confidence", softmax_over_channels)
    with pytest.raises(AssertionError):
        check_network("resnet20_conam")


@pytest.mark.parametrize("architecture", ["resnet20_conam", "resnet50_conam"])
def test_conam_on_the_shortcut_too_is_told_apart(architecture, monkeypatch):
    def forward(self, x):
        return stock(self, self.conam(x))

    stock = _ConAMBlock.forward
    monkeypatch.setattr(ConAM, "forward", lambda self, x: x)
    monkeypatch.setattr(_ConAMBlock, "forward", forward)
    with pytest.raises(AssertionError):
        check_network(architecture)


def test_a_sum_is_told_from_a_product(monkeypatch):
    monkeypatch.setattr(FMM, "forward", lambda self, factor, shortcut: factor + self.norm(shortcut))
    with pytest.raises(AssertionError):
        check_network("fmmnet20")


def reset_at_every_block(self, step, g):
    return before(self, 0, g)


def hidden_only(self, step, g):
    given = before(self, step, g)
    h, c = given.state
    given.state = h, torch.zeros_like(c)
    return given


before = DIARun.before


@pytest.mark.parametrize("wrong", [reset_at_every_block, hidden_only])
def test_wrong_states_of_dia_are_told_apart(wrong, monkeypatch):
    monkeypatch.setattr(DIARun, "before", wrong)
    with pytest.raises(AssertionError):
        check_network("resnet20_dia")


def test_a_norm_before_dias_cell():
    """A new norm, whose affine can be that of the norm before it."""
    plain = randomise(narrow("resnet20_dia").double()).eval()
    model = narrow("resnet20_dia", norm=True).double().eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(".dia_norm." in key for key in missing) and not unexpected
    new = {path: module for path, module in model.named_modules() if path.endswith("dia_norm")}
    assert len(new) == 5
    for path, norm in new.items():
        before = plain.get_submodule(path.replace("dia_norm", "bn2"))
        norm.eps = 0.0  # of fresh statistics it is then 2 x + 1
        norm.weight.data.fill_(2.0)
        norm.bias.data.fill_(1.0)
        before.weight.data.mul_(2.0)
        before.bias.data.mul_(2.0).add_(1.0)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


def test_where_dia_has_a_norm_by_itself():
    def norms(name, **kwargs):
        return sum("dia_norm.weight" in key for key in narrow(name, **kwargs).state_dict())

    assert norms("preresnet164_dia") == 5  # where a branch would end in a convolution
    assert norms("preresnet164_dia", norm=False) == norms("resnet20_dia") == 0
    with pytest.raises(ValueError, match=r"DIA norm=True needs maps B × C × H × W"):
        timm.create_model("vit_tiny_patch16_224_dia", norm=True, depth=1, device="meta")


def psi_per_image(self, x, axis):
    v = torch.ones((), dtype=x.dtype)
    for generator in self.generators:
        hidden = generator.fc1(generator.psi + x.mean((2, 3))).relu()
        v = v * generator.fc2(hidden).sigmoid()
    return x * v[:, :, None, None]


def test_psi_per_image_is_told_apart(monkeypatch):
    monkeypatch.setattr(ASR, "forward", psi_per_image)
    monkeypatch.setattr(GateEnd, "in_norm", lambda self, x: False)
    with pytest.raises(AssertionError):
        check_network("resnet20_asr")


def test_what_saves_memory_gives_way_to_transforms_and_tracers():
    """Without gradients DIA writes in place, and its mean has a gradient of its own: not in there."""
    model = randomise(narrow("resnet20_dia")).double().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).double().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.vmap(lambda image: model(image[None])[0])(x), expected)
        torch.testing.assert_close(torch.func.jvp(model, (x,), (x,))[0], expected)
        traced = torch.jit.trace(model, x)
    traced(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(model(x).detach(), expected)


def test_hooks_on_a_norm_and_its_gate_are_called_in_training():
    model, called = narrow("resnet20_asr").train(), []
    block = model.layer1[0]
    block.bn2.register_forward_hook(lambda *arguments: called.append("norm"))
    block.asr.register_forward_hook(lambda *arguments: called.append("gate"))
    model(torch.randn(2, 3, 32, 32))
    assert called == ["norm", "gate"]


def test_the_gate_in_the_norm_trains_as_the_gate_after_it():
    x = torch.randn(4, 3, 32, 32)
    results = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = randomise(narrow("resnet20_asr")).double().train()
        if hooked:
            for block in (*model.layer1, *model.layer2, *model.layer3):
                block.bn2.register_forward_hook(lambda *arguments: None)
        model(x.double()).square().sum().backward()
        statistics = [buffer for name, buffer in model.named_buffers()]
        results.append([*(p.grad for p in model.parameters()), *statistics])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("preresnet164", {}),
        ("preresnet164_dia", {}),
        ("wrn52_4_dia", {}),
        ("preresnet164_conam", {}),
        ("wrn28_10_conam", {}),
        ("prefmmnet164", {}),
        *(("wrn28_10_fmm", {"mode": mode}) for mode in FMM_MODES),
    ],
)
def test_preactivation_network_is_the_papers(architecture, kwargs):
    torch.manual_seed(0)
    model = randomise(narrow(architecture, **kwargs).double()).eval()
    x = torch.randn(3, 3, 1, 1, dtype=torch.float64) + torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = preact.forward(model.state_dict(), x, mechanism=parse_name(architecture)[1], **kwargs)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["preresnet164_dia", "wrn28_10_fmm"])
def test_preactivation_networks_fuse_the_norms_that_close_their_branches(architecture):
    model = randomise(narrow(architecture).double()).eval()
    folded = timm_attn.fold(model)
    built = narrow(architecture, folded=True).double().eval()
    built.load_state_dict(folded.state_dict())
    assert not any("dia_norm" in key or "fmm_branch_norm" in key for key in built.state_dict())
    assert relative_difference(model, built, torch.randn(2, 3, 32, 32).double()) < 1e-10


@pytest.mark.parametrize("architecture", ["preresnet164_dia", "wrn52_4_asr", "wrn28_10_conam"])
def test_preactivation_networks_are_grafted(architecture):
    sizes = {"channels": [8, 16, 24], "layers": [2, 1, 2]}
    stock = randomise(narrow(parse_name(architecture)[0]).double()).eval()
    variant = timm_attn.graft(architecture, stock, **sizes)  # compares them
    variant.train()(torch.randn(4, 3, 32, 32).double()).square().sum().backward()
    new = {k: p for k, p in variant.named_parameters() if k not in dict(stock.named_parameters())}
    # In training mode a new norm normalises; the cell's weights on the state see zeros in first blocks.
    assert new and all(p.grad is not None for p in new.values())
    assert any(p.grad.abs().sum() > 0 for p in new.values())
