"""Folding: exact, verified on the spot, and impossible to get wrong unnoticed."""

import pytest
import timm
import torch
from helpers import SMALL, narrow, parameters, randomise
from timm.utils import reparameterize_model

import timm_attn
from timm_attn.fold import BOUNDS, example_input, relative_difference
from timm_attn.layers import ASR
from timm_attn.models import blocks, model_names, parse_name, stock_model

FOLDABLE = [name for name in SMALL if name.endswith("_asr")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [1, 2])
@pytest.mark.parametrize("architecture", FOLDABLE)
def test_fold_is_exact(architecture, delta, dtype):
    model = randomise(narrow(architecture, delta=delta).to(dtype)).eval()
    gates = torch.cat([m.gate().flatten() for m in model.modules() if isinstance(m, ASR)])
    assert gates.std() > 0.05
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = timm_attn.fold(model)
    assert relative_difference(model, folded, example_input(model, 4)) <= BOUNDS[dtype]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, ASR) for m in folded.modules())
    stock = stock_model(model, folded)  # loads strictly
    assert torch.equal(stock(example_input(model)), folded(example_input(model)))
    by_timm = reparameterize_model(model)
    assert all(torch.equal(v, by_timm.state_dict()[k]) for k, v in folded.state_dict().items())


@pytest.mark.parametrize("architecture", [n for n in model_names() if n.endswith("_asr")])
def test_folded_keys_and_shapes_are_the_stock_backbones(architecture):
    backbone = parse_name(architecture)[0]
    with torch.device("meta"):
        folded = reparameterize_model(timm.create_model(architecture))
        stock = timm.create_model(backbone)
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
@pytest.mark.parametrize("architecture", FOLDABLE)
def test_leaving_out_any_gate_breaks_the_bound(architecture, dtype, monkeypatch):
    model = randomise(narrow(architecture).to(dtype)).eval()
    gates = sum(isinstance(m, ASR) for m in model.modules())
    fold_gate = blocks.fold_gate
    for left_out in range(gates):
        calls = iter(range(gates))
        monkeypatch.setattr(
            blocks,
            "fold_gate",
            lambda n, a, calls=calls, k=left_out: None if next(calls) == k else fold_gate(n, a),
        )
        with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\| / max\|logit\| = "):
            timm_attn.fold(model)


def test_an_unscaled_bias_breaks_the_bound(monkeypatch):
    monkeypatch.setattr(blocks, "scale_affine", lambda weight, bias, gate: (weight * gate, bias))
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


@pytest.mark.parametrize("architecture", ["resnet20", "resnet20_se", "resnet20_dia", "resnet18_dia"])
def test_what_does_not_fold_says_so(architecture):
    with pytest.raises(timm_attn.NothingToFold, match=architecture):
        timm_attn.fold(narrow(architecture))


def test_a_gate_outside_a_foldable_block_is_an_error():
    model = narrow("resnet20_asr")
    model.fc = torch.nn.Sequential(model.fc, torch.nn.Unflatten(1, (10, 1, 1)), ASR(10), torch.nn.Flatten())
    with pytest.raises(timm_attn.FoldError, match="1 of 6 ASR gates"):
        timm_attn.fold(model)


def test_other_outputs_and_empty_models_are_named():
    with pytest.raises(ValueError, match="meta device"):
        timm_attn.fold(timm.create_model("resnet20_asr", device="meta"))
    with pytest.raises(ValueError, match="must be one tensor, got list"):
        timm_attn.fold(narrow("resnet20_asr", features_only=True))


def test_a_compiled_model_folds():
    model = randomise(narrow("resnet20_asr")).eval()
    timm_attn.fold(torch.compile(model, backend="eager"))
