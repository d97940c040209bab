"""The layers against plain computations, and wrong versions of them that must be told apart."""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from helpers import narrow, randomise
from reference.asr import asr_gate, fold_batchnorm, se_generator
from reference.conam import conam, conam_eta
from reference.dia import dia_cell
from reference.fmm import fmm_merge
from reference.ssia import ssia_loss
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from timm_attn.branches import Branch
from timm_attn.ends import scale_parameters
from timm_attn.layers import ASR, FMM, SPEM, SSIA, ConAM, DIACell, SEGenerator
from timm_attn.layers.asr import GENERATORS
from timm_attn.layers.fmm import MODES
from timm_attn.models.resnet_only import _FMMBlock, last_norm, put_conam, put_fmm


def fmm_block(block, width: int, planes: int, mode: str = "bn", pin_bias: bool = False, **kwargs):
    """A residual block of timm that multiplies."""
    made = block(width, planes, **kwargs)
    put_fmm([made], mode, pin_bias)
    return made


def below(state: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def check_cell(channels: int, reduction: int, steps: int = 4) -> None:
    """Several steps of a cell with random weights, compared in float64."""
    torch.manual_seed(channels)
    cell = randomise(DIACell(channels, reduction, dtype=torch.float64))
    h = c = h_ref = c_ref = torch.zeros(3, channels, dtype=torch.float64)
    for _ in range(steps):
        g = torch.randn(3, channels, dtype=torch.float64)
        h, c = cell(g, h, c)
        h_ref, c_ref = dia_cell(g, h_ref, c_ref, cell.state_dict())
        torch.testing.assert_close(h, h_ref, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(c, c_ref, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "reduction"), [(8, 1), (16, 4), (10, 4), (6, 20)])
def test_dia_cell_is_the_papers(channels, reduction):
    check_cell(channels, reduction)
    assert DIACell(channels, reduction).x_reduce.out_features == max(1, channels // reduction)


def tanh_output(self, g, h, c):
    gates = self.x_expand(self.x_reduce(g).relu()) + self.h_expand(self.h_reduce(h).relu())
    i, f, u, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * u.tanh()
    return o.sigmoid() * c.tanh(), c


def swapped(first: int, second: int):
    def forward(self, g, h, c):
        gates = self.x_expand(self.x_reduce(g).relu()) + self.h_expand(self.h_reduce(h).relu())
        parts = list(gates.chunk(4, dim=1))
        parts[first], parts[second] = parts[second], parts[first]
        i, f, u, o = parts
        c = f.sigmoid() * c + i.sigmoid() * u.tanh()
        return o.sigmoid() * c.sigmoid(), c

    return forward


WRONG_CELLS = {"tanh output": tanh_output} | {
    f"gates {'ifuo'[a]} and {'ifuo'[b]} swapped": swapped(a, b) for a in range(4) for b in range(a + 1, 4)
}


@pytest.mark.parametrize("name", WRONG_CELLS)
def test_wrong_dia_cells_are_told_apart(name, monkeypatch):
    monkeypatch.setattr(DIACell, "forward", WRONG_CELLS[name])
    with pytest.raises(AssertionError):
        check_cell(16, 4)


def test_a_fresh_dia_gate_is_about_a_quarter():
    torch.manual_seed(0)
    cell = DIACell(1024, 20)
    zero = torch.zeros(4, 1024)
    h, _ = cell(torch.randn(4, 1024), zero, zero)
    assert abs(h.mean() - 0.25) < 0.01


@pytest.mark.parametrize(("channels", "delta", "reduction"), [(16, 1, 16), (32, 2, 16), (10, 3, 4)])
def test_asr_gate_is_the_papers(channels, delta, reduction):
    asr = randomise(ASR(channels, delta, reduction, dtype=torch.float64))
    state = asr.state_dict()
    generators = [below(state, f"generators.{j}.") for j in range(delta)]
    gate = asr_gate(generators)
    torch.testing.assert_close(asr.gate()[0], gate, rtol=1e-12, atol=1e-14)
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(asr(x), x * gate[None, :, None, None])
    assert gate.std() > 0.01
    one = asr.generators[0]
    torch.testing.assert_close(one()[0], se_generator(generators[0]["psi"], generators[0]))


def test_asr_starts_as_the_papers():
    generator = SEGenerator(256)
    assert generator.psi.shape == (1, 256)
    assert (generator.psi == 0.1).all()
    assert generator.fc1.out_features == 16
    assert abs(generator().mean() - 0.5) < 0.05


def test_fold_maths_is_the_papers():
    norm = randomise(nn.Sequential(nn.BatchNorm2d(12, dtype=torch.float64)))[0]
    gate = torch.rand(1, 12, dtype=torch.float64)
    expected = fold_batchnorm(norm.weight.detach().clone(), norm.bias.detach().clone(), gate[0])
    scale_parameters(norm, Branch("", "drop_path", 12, 1, 1, affine=("weight", "bias")), gate)
    torch.testing.assert_close((norm.weight.data, norm.bias.data), tuple(expected), rtol=1e-15, atol=0)
    half = norm.bfloat16()
    scale_parameters(half, Branch("", "drop_path", 12, 1, 1, affine=("weight", "bias")), gate)
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("channels", [10, 64])
def test_every_generator_is_as_written(generator, channels):
    asr = randomise(ASR(channels, delta=2, generator=generator, dtype=torch.float64))
    gate = asr_gate([below(asr.state_dict(), f"generators.{j}.") for j in range(2)])
    torch.testing.assert_close(asr.gate()[0], gate, rtol=1e-12, atol=1e-14)
    assert gate.std() > 0.01


@pytest.mark.parametrize(("generator", "start"), [("ie", 0.2689), ("srm", 0.5), ("scale", 1.0)])
def test_generators_start_as_published(generator, start):
    torch.testing.assert_close(
        ASR(16, generator=generator).gate(), torch.full((1, 16), start), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("channels", "size"), [(16, 3), (64, 3), (256, 5), (512, 5), (2048, 7)])
def test_eca_kernel_grows_with_the_channels(channels, size):
    conv = GENERATORS["eca"](channels).conv
    assert conv.kernel_size == (size,) == timm.layers.EcaModule(channels).conv.kernel_size


@pytest.mark.parametrize(
    ("height", "width", "options", "patches"),
    [
        (8, 8, {}, (4, 4)),
        (12, 20, {}, (4, 4)),
        (164, 4, {}, (4, 4)),
        (7, 9, {}, (4, 4)),
        (2, 3, {}, (4, 4)),
        (9, 9, {"grid": 3, "temperature": 2.0}, (3, 3)),
        (8, 12, {"patch_size": 4, "reduction": 2}, (2, 3)),
        (8, 8, {"temperature": "sqrt"}, (4, 4)),
    ],
    ids=str,
)
def test_conam_is_the_papers(height, width, options, patches):
    torch.manual_seed(0)
    layer = ConAM(32, **options, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 32, height, width, dtype=torch.float64)
    temperature = 32**0.5 if options.get("temperature") == "sqrt" else options.get("temperature", 1.0)
    torch.testing.assert_close(layer(x), conam(x, layer.state_dict(), *patches, temperature))
    eta = layer.confidence(x)
    torch.testing.assert_close(eta.flatten(1), conam_eta(x, layer.state_dict(), *patches, temperature))
    assert (eta.flatten(1).std(1) > 1e-3).all()


def test_conam_puts_weights_where_the_patches_are():
    # A ramp from left to right: all rows of patches alike, no two columns.
    layer = ConAM(16)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 0.0, 0.2)
    ramp = torch.linspace(0, 1, 16).expand(1, 16, 16, 16)
    eta = layer.confidence(ramp)[0]
    torch.testing.assert_close(eta, eta[:1].expand(4, 4))
    assert (eta[0].diff() > 0).all()
    assert torch.equal(layer(ramp)[0, :, :, 0], layer(ramp)[0, :, :1, 0].expand(16, 16))


def test_fresh_conam_is_almost_uniform():
    torch.manual_seed(0)
    eta = ConAM(256).confidence(torch.rand(8, 256, 16, 16)).flatten(1)
    entropy = -(eta * eta.log()).sum(1) / torch.tensor(16.0).log()
    assert (entropy > 0.997).all()


def test_conam_leaves_its_input_alone():
    x = torch.randn(1, 16, 8, 8)
    before = x.clone()
    ConAM(16)(x)
    assert torch.equal(x, before)


def test_conam_names_a_patch_that_does_not_divide():
    with pytest.raises(AssertionError, match="ConAM patch_size 4 must divide the map's width: use grid"):
        ConAM(16, patch_size=4)(torch.rand(1, 16, 8, 10))


@pytest.mark.parametrize("mode", MODES)
def test_fmm_is_as_written(mode):
    f, s = torch.randn(2, 3, 8, 5, 5, dtype=torch.float64)
    layer = FMM(8, mode)
    torch.testing.assert_close(layer(layer.factor(f), s).relu(), fmm_merge(f, s, mode))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("mode", "start"), [("bn", 1.0), ("gate", 1.0), ("sigmoid", 1.5)])
def test_a_fresh_fmm_block_multiplies_by_a_constant(block, mode, start):
    layer = fmm_block(block, 8 * block.expansion, 8, mode=mode).eval()
    for parameter in last_norm(layer).parameters():
        nn.init.constant_(parameter, 7)  # as after to_empty
    layer.zero_init_last()
    x = torch.rand(2, 8 * block.expansion, 6, 6)
    expected = start * (layer.fmm.norm(x) if mode != "gate" else x)
    torch.testing.assert_close(layer(x), expected.relu())
    pinned = mode != "gate" and fmm_block(block, 8, 8 // block.expansion, mode=mode, pin_bias=True)
    if pinned:
        pinned_biases = [norm.bias for norm in pinned.factor_norms() if not isinstance(norm, nn.Identity)]
        assert len(pinned_biases) == (1 if mode == "sigmoid" else 2)
        assert not any(bias.requires_grad for bias in pinned_biases)
        assert (pinned.fmm.norm.bias == 1).all()


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_fresh_raw_product_is_alive(block):
    layer = fmm_block(block, 8 * block.expansion, 8, mode="raw").eval()
    layer.zero_init_last()
    assert layer(torch.rand(2, 8 * block.expansion, 6, 6)).sum() > 0


def test_an_fmm_shortcut_with_pooling_starts_with_mean_one():
    downsample = narrow("fmmnet18", avg_down=True).layer2[0].downsample
    assert (downsample[-1].bias == 1).all()


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_branch_is_timms_with_all_of_its_options(block):
    options = {
        "stride": 2,
        "downsample": torch.nn.Conv2d(8, 8 * block.expansion, 1, 2),
        "attn_layer": "se",
        "aa_layer": timm.layers.BlurPool2d,
        "drop_block": partial(timm.layers.DropBlock2d, drop_prob=0.5, block_size=3),
        "drop_path": timm.layers.DropPath(0.5),
    }
    theirs = block(8, 8, **options).train()
    ours = deepcopy(theirs)
    put_conam(None, [(ours, nn.Identity())])
    x = torch.randn(4, 8, 8, 8)
    outputs = []
    for layer in (theirs, ours):
        torch.manual_seed(0)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


def test_unfrozen_biases_are_pinned_again():
    model = narrow("fmmnet20", pin_bias=True)
    pinned = {name for name, p in model.named_parameters() if not p.requires_grad}
    timm.utils.unfreeze(model)
    model.train()
    assert pinned == {name for name, p in model.named_parameters() if not p.requires_grad} != set()


def check_dropped_path(block, mode: str) -> None:
    layer = fmm_block(block, 8 * block.expansion, 8, mode=mode, drop_path=timm.layers.DropPath(1.0)).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.rand(4, 8 * block.expansion, 6, 6)
    torch.testing.assert_close(layer(x), layer.fmm.norm(x).relu())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_dropped_path_multiplies_by_one(block, mode):
    check_dropped_path(block, mode)


def test_a_dropped_path_that_gives_zero_is_told_apart(monkeypatch):
    def forward(self, x):
        return self.act2(self.fmm(self.drop_path(self.fmm.factor(self.branch(x))), x))

    monkeypatch.setattr(_FMMBlock, "forward", forward)
    with pytest.raises(AssertionError):
        check_dropped_path(BasicBlock, "bn")


def test_under_float16_autocast_a_product_stays_finite():
    big = torch.full((1, 8, 2, 2), 1000.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        assert FMM(8, "raw")(big, big).dtype == torch.float32
        assert (FMM(8, "raw")(big, big) == 1e6).all()
    assert FMM(8, "raw")(big, big).dtype == torch.float16


@pytest.mark.parametrize("target", ["channel", "last", "spatial"])
def test_ssia_loss_is_as_written(target):
    torch.manual_seed(0)
    layer = SSIA([6, 10, 8], target, dtype=torch.float64)
    shapes = [(3, 6, 9, 9), (3, 10, 5, 5), (3, 8, 3, 2)]
    features = [torch.randn(shape, dtype=torch.float64).relu().requires_grad_() for shape in shapes]
    loss, expected = layer.loss(features), ssia_loss(features, layer.state_dict(), target)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, features[:2]) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(layer.loss(features), features[2], allow_unused=True) == (None,)


@pytest.mark.parametrize(("training", "scale"), [(True, 1.0), (True, 3.0), (False, 1.0)])
def test_spems_loss_is_in_the_gradient_of_its_weights(training, scale):
    layer = SPEM(4, aux_weight=0.7).double().train(training)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    plain = deepcopy(layer)
    plain.aux_weight = 0.0
    layer.aux_scale.fill_(scale)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    outputs = [network(x) for network in (layer, plain)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), plain.parameters(), strict=True):
        loss = scale * 0.7 * 2 * p.detach() if name == "p" and training else torch.zeros_like(p)
        torch.testing.assert_close(p.grad - q.grad, loss, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DIACell(8, 0), "DIA reduction must be at least 1, got 0"),
        (lambda: ASR(8, 0), "ASR delta must be at least 1, got 0"),
        (lambda: ASR(8, 1, 0), "ASR reduction must be at least 1, got 0"),
        (
            lambda: ASR(8, generator="cbam"),
            "ASR generator must be one of se, spa, ie, eca, srm, scale, got 'c",
        ),
        (lambda: ASR(8, reduction=4, generator="ie"), "generator 'ie' has no reduction, got 4"),
        (lambda: ConAM(8, grid=0), "ConAM grid must be at least 1, got 0"),
        (lambda: ConAM(8, patch_size=0), "ConAM patch_size must be at least 1, got 0"),
        (lambda: ConAM(8, reduction=0), "ConAM reduction must be at least 1, got 0"),
        (
            lambda: ConAM(8, grid=2, patch_size=2),
            "ConAM takes grid or patch_size, got grid=2 and patch_size=2",
        ),
        (
            lambda: ConAM(8, temperature=0),
            "ConAM temperature must be a finite number above 0 or 'sqrt', got 0",
        ),
        (lambda: FMM(8, "sum"), "FMM mode must be one of bn, sigmoid, gate, raw, got 'sum'"),
        (
            lambda: fmm_block(BasicBlock, 8, 8, mode="gate", pin_bias=True),
            "pin_bias needs an FMM mode .* got 'gate'",
        ),
        (lambda: SSIA([8, 8], "first"), "SSIA target must be one of channel, last, spatial, got 'first'"),
        (lambda: SSIA([8, 8], aux_weight=-1), "SSIA aux_weight must be a finite number of 0 or more, got -1"),
        (lambda: SSIA([8, 8], aux_weight=math.inf), "SSIA aux_weight must be a finite number .* got inf"),
        (lambda: SSIA([8]), "SSIA needs two stages or more, got 1"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DIACell(8, 4.0), "DIA reduction must be a whole number, got 4.0"),
        (lambda: ASR(8, 1.5), "ASR delta must be a whole number, got 1.5"),
        (lambda: ASR(8, generator=["se"]), r"ASR generator must be one of .* got \['se'\]"),
        (lambda: ConAM(8, grid=True), "ConAM grid must be a whole number, got True"),
        (lambda: ConAM(8, patch_size=4.0), "ConAM patch_size must be a whole number, got 4.0"),
        (lambda: ConAM(8, reduction=math.nan), "ConAM reduction must be a whole number, got nan"),
        (lambda: ConAM(8, temperature="1e-2"), "got '1e-2' .as YAML, write 1.0e-2"),
        (lambda: FMM(8, None), "FMM mode must be one of .* got None"),
        (lambda: fmm_block(BasicBlock, 8, 8, pin_bias="no"), "FMM pin_bias must be True or False, got 'no'"),
        (lambda: SSIA([8, 8], aux_weight="1e-2"), "SSIA aux_weight .* got '1e-2' .as YAML, write 1.0e-2"),
    ],
)
def test_options_of_the_wrong_type_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_options_may_be_numpys():
    assert DIACell(8, np.int64(2)).x_reduce.out_features == 4
    assert ConAM(8, temperature=np.float32(2)).temperature == 2.0
