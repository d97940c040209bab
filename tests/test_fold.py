"""Folding: exact, verified on the spot, and impossible to get wrong unnoticed."""

import pytest
import timm
import torch
from helpers import SMALL, narrow, parameters, randomise
from timm.utils import reparameterize_model

import timm_attn
from timm_attn.fold import BOUNDS, example_input, relative_difference
from timm_attn.layers import ASR, SSIA, asr
from timm_attn.models import MECHANISMS, model_names, parse_name, stock_model

FOLDABLE = [name for name in SMALL if MECHANISMS[parse_name(name)[1]].folds]
GATED = [name for name in FOLDABLE if "_asr" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"delta": 2}, {"generator": "ie"}, {"generator": "eca"}, {"generator": "srm"}], ids=str
)
@pytest.mark.parametrize("architecture", GATED)
def test_gates_fold_exactly(architecture, options, dtype):
    model = randomise(narrow(architecture, **options).to(dtype)).eval()
    gates = torch.cat([m.gate().flatten() for m in model.modules() if isinstance(m, ASR)])
    assert gates.std() > 0.05
    check_fold(model, dtype)


@pytest.mark.parametrize("attention", ["eca", "cbam"])
def test_another_attention_on_top_stays(attention):
    model = randomise(narrow("resnet18_asr", attention=attention))
    check_fold(model, torch.float32)
    assert any(type(m).__name__.lower().startswith(attention) for m in timm_attn.fold(model).modules())


@pytest.mark.parametrize("architecture", [name for name in FOLDABLE if name not in GATED])
def test_what_acts_in_training_only_leaves_the_stock_network(architecture):
    model = randomise(narrow(architecture)).eval()
    check_fold(model, torch.float32)
    x = example_input(model)
    assert torch.equal(timm_attn.fold(model)(x), model(x))
    assert not any("ssia" in key for key in timm_attn.fold(model).train().state_dict())
    assert timm_attn.fold(model).train()(x).shape == (2, 10)


def check_fold(model, dtype):
    """Folding keeps the output and the original, and leaves the stock network."""
    gates = sum(isinstance(m, ASR | SSIA) for m in model.modules())
    assert gates
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = timm_attn.fold(model)
    assert relative_difference(model, folded, example_input(model, 4)) <= BOUNDS[dtype]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, ASR | SSIA) for m in folded.modules())
    stock = stock_model(model, folded)  # loads strictly
    assert torch.equal(stock(example_input(model)), folded(example_input(model)))
    by_timm = reparameterize_model(model)
    assert all(torch.equal(v, by_timm.state_dict()[k]) for k, v in folded.state_dict().items())


@pytest.mark.parametrize("architecture", [n for n in model_names() if MECHANISMS[parse_name(n)[1]].folds])
def test_folded_keys_and_shapes_are_the_stock_networks(architecture):
    backbone, mechanism = parse_name(architecture)
    name, arguments = MECHANISMS[mechanism].stock(backbone, {})
    assert name in timm.list_models()
    with torch.device("meta"):
        folded = reparameterize_model(timm.create_model(architecture))
        stock = timm.create_model(name, **arguments)
    shapes = {k: v.shape for k, v in folded.state_dict().items()}
    assert shapes == {k: v.shape for k, v in stock.state_dict().items()}
    assert parameters(folded) == parameters(stock)


def test_resnet50_asr_folds_into_timms_resnet50():
    model = randomise(timm.create_model("resnet50_asr", layers=[1, 1, 1, 1])).eval()
    stock = timm.create_model("resnet50", layers=[1, 1, 1, 1])
    stock.load_state_dict(timm_attn.fold(model, torch.randn(1, 3, 64, 64)).state_dict(), strict=True)
    assert relative_difference(model, stock, torch.randn(2, 3, 64, 64)) <= 1e-5


def test_a_model_in_training_is_left_in_training():
    model = randomise(narrow("resnet20_asr")).train()
    folded = timm_attn.fold(model)
    assert model.training
    assert not any(m.training for m in folded.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", GATED)
def test_leaving_out_any_gate_breaks_the_bound(architecture, dtype, monkeypatch):
    model = randomise(narrow(architecture).to(dtype)).eval()
    gates = sum(isinstance(m, ASR) for m in model.modules())
    fold_into = ASR.fold_into
    for left_out in range(gates):
        calls = iter(range(gates))
        monkeypatch.setattr(
            ASR,
            "fold_into",
            lambda asr, norm, calls=calls, k=left_out: (
                asr.attention if next(calls) == k else fold_into(asr, norm)
            ),
        )
        with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\| / max\|logit\| = "):
            timm_attn.fold(model)


def test_an_unscaled_bias_breaks_the_bound(monkeypatch):
    monkeypatch.setattr(asr, "scale_affine", lambda weight, bias, gate: (weight * gate, bias))
    with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\|"):
        timm_attn.fold(randomise(narrow("resnet20_asr")))


def test_a_gate_per_image_breaks_the_bound(monkeypatch):
    monkeypatch.setattr(
        ASR, "forward", lambda self, x: x * self.gate()[:, :, None, None] * (1 + x.mean((2, 3), True))
    )
    with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\|"):
        timm_attn.fold(randomise(narrow("resnet20_asr")))


@pytest.mark.parametrize("seed", range(5))
def test_bf16_stays_within_its_bound(seed):
    model = randomise(narrow("resnet20_asr"), seed).bfloat16().eval()
    timm_attn.fold(model)


def test_other_norm_layers_fold_too():
    model = randomise(narrow("resnet18_asr", norm_layer="groupnorm", channels=[32, 32, 32, 32])).eval()
    timm_attn.fold(model)


@pytest.mark.parametrize("architecture", [name for name in SMALL if name not in FOLDABLE])
def test_what_does_not_fold_says_so(architecture):
    with pytest.raises(timm_attn.NothingToFold, match=architecture):
        timm_attn.fold(narrow(architecture))


def test_a_gate_outside_a_foldable_block_is_an_error():
    model = narrow("resnet20_asr")
    model.fc = torch.nn.Sequential(model.fc, torch.nn.Unflatten(1, (10, 1, 1)), ASR(10), torch.nn.Flatten())
    with pytest.raises(timm_attn.FoldError, match="1 of 6 gates"):
        timm_attn.fold(model)


def test_other_outputs_and_empty_models_are_named():
    with pytest.raises(ValueError, match="meta device"):
        timm_attn.fold(timm.create_model("resnet20_asr", device="meta"))
    with pytest.raises(ValueError, match="must be one tensor, got list"):
        timm_attn.fold(narrow("resnet20_asr", features_only=True))


def test_a_compiled_model_folds():
    model = randomise(narrow("resnet20_asr")).eval()
    timm_attn.fold(torch.compile(model, backend="eager"))
