"""Folding: exact, verified on the spot, and impossible to get wrong unnoticed."""

import sys
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from helpers import SMALL, narrow, parameters, randomise, small_names
from timm.utils import reparameterize_model

import timm_attn
from timm_attn import cli, ends
from timm_attn.compare import BOUNDS, relative_difference
from timm_attn.fold import example_input, verify_fold
from timm_attn.layers import ASR
from timm_attn.load import load_model
from timm_attn.models import MECHANISMS, deployed, model_names, parse_name, stock_model

fold_module = sys.modules["timm_attn.fold"]  # the name timm_attn.fold is the function's

FOLDABLE = [name for name in SMALL if MECHANISMS[parse_name(name)[1]].folds]
GATED = [name for name in FOLDABLE if "_asr" in name]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.float64),
        ({"delta": 2}, torch.float64),
        ({"generator": "spa"}, torch.float64),
        ({"generator": "ie"}, torch.float64),
        ({"generator": "eca"}, torch.float64),
        ({"generator": "srm"}, torch.float64),
        ({"generator": "scale"}, torch.float64),
    ],
    ids=str,
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
def test_what_folds_leaves_the_stock_network(architecture):
    check_fold(randomise(narrow(architecture)).eval(), torch.float32)


def test_other_attention_in_the_blocks_stays():
    check_fold(randomise(narrow("resnet18_ssia", block_args={"attn_layer": "eca"})).eval(), torch.float32)


@pytest.mark.parametrize("architecture", small_names("ssia"))
def test_what_acts_in_training_only_folds_bit_for_bit(architecture):
    model = randomise(narrow(architecture)).eval()
    x = example_input(model)
    assert torch.equal(timm_attn.fold(model)(x), model(x))
    assert not any("ssia" in key for key in timm_attn.fold(model).train().state_dict())
    assert timm_attn.fold(model).train()(x).shape == (2, 10)


def folds(module) -> bool:
    return hasattr(module, "fuse")


def check_fold(model, dtype):
    """Folding keeps the output and the original, and leaves the stock network."""
    assert any(folds(m) for m in model.modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = timm_attn.fold(model)
    assert relative_difference(model, folded, example_input(model, 4)) <= BOUNDS[dtype]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(folds(m) for m in folded.modules())
    stock = stock_model(model, folded)  # loads strictly
    assert torch.equal(stock(example_input(model)), folded(example_input(model)))
    by_timm = reparameterize_model(model)
    assert all(torch.equal(v, by_timm.state_dict()[k]) for k, v in folded.state_dict().items())


#: One network of a kind: every block, stem and head.
BACKBONES = (
    *("resnet18", "resnet50", "resnet26t", "resnext50_32x4d", "resnet164", "wrn52_4", "preresnet164"),
    *("regnety_016", "efficientnet_b0", "mobilenetv4_conv_small", "convnext_atto", "convnextv2_nano"),
    *("vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "repvgg_a0"),
)
FOLDS = [n for n in model_names() if parse_name(n)[0] in BACKBONES and MECHANISMS[parse_name(n)[1]].folds]
# SSIA is in no block.
FOLDS = [n for n in FOLDS if "_ssia" not in n or n.startswith(("resnet18", "wrn52_4", "vit_tiny"))]


@pytest.mark.parametrize("architecture", FOLDS)
def test_folded_keys_and_shapes_are_the_stock_networks(architecture):
    backbone, mechanism = parse_name(architecture)
    name, arguments = MECHANISMS[mechanism].stock_network(backbone, {})
    assert name in timm.list_models()
    # Of the deep ones, a block that changes the shape and one that does not.
    sizes = {"layers": (2, 2, 2)} if backbone in ("resnet164", "wrn52_4", "preresnet164") else {}
    with torch.device("meta"):
        folded = fold_module.fuse_gates(timm.create_model(architecture, **sizes))
        stock = timm.create_model(name, **arguments, **sizes)
    shapes = {k: v.shape for k, v in folded.state_dict().items()}
    assert shapes == {k: v.shape for k, v in stock.state_dict().items()}
    assert parameters(folded) == parameters(stock)


def test_resnet50_asr_folds_into_timms_resnet50():
    model = randomise(timm.create_model("resnet50_asr", layers=[1, 1, 1, 1])).eval()
    stock = timm.create_model("resnet50", layers=[1, 1, 1, 1])
    stock.load_state_dict(timm_attn.fold(model, torch.randn(1, 3, 64, 64)).state_dict(), strict=True)
    assert relative_difference(model, stock, torch.randn(2, 3, 64, 64)) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"attention": "eca"}], ids=str)
def test_the_stock_network_has_the_head_that_the_model_has_now(options):
    model = randomise(narrow("resnet18_asr", **options)).eval()
    model.reset_classifier(3, "max")
    x = example_input(model)
    folded = timm_attn.fold(model)
    assert torch.equal(stock_model(model, folded)(x), folded(x))


def test_a_model_in_training_is_left_in_training():
    model = randomise(narrow("resnet20_asr")).train()
    folded = timm_attn.fold(model)
    assert model.training
    assert not any(m.training for m in folded.modules())


@pytest.mark.parametrize("architecture", GATED)
def test_leaving_out_any_gate_breaks_the_bound(architecture, monkeypatch):
    model = randomise(narrow(architecture)).eval()  # in float32, whose bound is the wider one
    gates = sum(isinstance(m, ASR) for m in model.modules())
    scale = ends.scale_parameters
    for left_out in range(gates):
        calls = iter(range(gates))
        monkeypatch.setattr(
            ends,
            "scale_parameters",
            lambda *given, calls=calls, k=left_out: None if next(calls) == k else scale(*given),
        )
        with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\| / max\|logit\| = "):
            timm_attn.fold(model)


def test_an_unscaled_bias_breaks_the_bound(monkeypatch):
    def scale(block, branch, gate):
        weight = next(name for name in branch.affine if name.endswith("weight"))
        block.get_parameter(weight).data.mul_(gate[0])

    monkeypatch.setattr(ends, "scale_parameters", scale)
    with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\|"):
        timm_attn.fold(randomise(narrow("resnet20_asr")))


def test_a_gate_per_image_breaks_the_bound(monkeypatch):
    monkeypatch.setattr(
        ends.GateEnd,
        "attend",
        lambda self, x: x * (self.mechanism.gate() * (1 + x.mean((2, 3))))[:, :, None, None],
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


@pytest.mark.parametrize("architecture", ["resnet20", "resnet164"])
def test_what_does_not_fold_says_so(architecture):
    with pytest.raises(timm_attn.NothingToFold, match=architecture):
        timm_attn.fold(narrow(architecture))


def test_a_gate_outside_a_foldable_block_is_an_error():
    model = narrow("resnet20_asr")
    model.fc = torch.nn.Sequential(model.fc, torch.nn.Unflatten(1, (10, 1, 1)), ASR(10), torch.nn.Flatten())
    with pytest.raises(timm_attn.FoldError, match="1 of 6 gates"):
        timm_attn.fold(model)


def test_an_empty_model_is_named():
    with pytest.raises(ValueError, match="meta device"):
        timm_attn.fold(timm.create_model("resnet20_asr", device="meta"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(1, 3, 8, 8).double(), r"of torch.float32, .* got \(1, 3, 8, 8\) of torch.float64"),
        (torch.ones(0, 3, 8, 8), r"one image or more, .* got \(0, 3, 8, 8\)"),
        (torch.ones(3, 8, 8), r"B × C × H × W .* got \(3, 8, 8\)"),
        ([], "got list"),
    ],
)
def test_inputs_that_are_no_images_are_named(inputs, message):
    model = narrow("resnet20_asr")
    fold = timm_attn.fold
    for check in (fold, partial(fold, layer_scale=True), lambda m, inputs: verify_fold(m, m, inputs)):
        with pytest.raises(ValueError, match=message):
            check(model, inputs)


def test_verifying_leaves_the_modes_and_takes_wrapped_models():
    model = randomise(narrow("resnet20_dia")).train()
    folded = timm_attn.fold(torch.nn.DataParallel(model))
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    report = verify_fold(model, torch.compile(folded, backend="eager"), example_input(model))
    assert report.max_relative <= BOUNDS[torch.float32] and not report.separate_norms
    with pytest.raises(ValueError, match="inputs must be"):
        verify_fold(model, folded, example_input(model)[0])
    with pytest.raises(ValueError, match="of torch.float64, .* got"):
        verify_fold(model, deepcopy(folded).double(), example_input(model))
    with pytest.raises(timm_attn.FoldError, match="own output is not finite"):
        verify_fold(model, folded, torch.full((1, 3, 32, 32), torch.nan))
    assert [m.training for m in model.modules()] == modes


def test_a_compiled_model_folds():
    model = randomise(narrow("resnet20_asr")).eval()
    timm_attn.fold(torch.compile(model, backend="eager"))


# ------------------------------------------------------------------ mechanisms that depend on the image

FUSED = [name for name in SMALL if MECHANISMS[parse_name(name)[1]].fuses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", FUSED)
def test_norms_are_fused_exactly(architecture, dtype):
    model = randomise(narrow(architecture).to(dtype)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = example_input(model, 4)
    folded = fuse(model)
    assert relative_difference(model, folded, x) <= BOUNDS[dtype]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = narrow(architecture, folded=True).to(dtype).eval()
    again.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(again(x), folded(x))
    norms = [path for path, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(path.endswith("fmm.norm") for path in norms)
    assert bool(norms) == architecture.startswith("fmm")
    assert verify_fold(model, folded, x).separate_norms == tuple(norms)


@pytest.mark.parametrize(
    "options",
    [{"pin_bias": True}, {"mode": "sigmoid", "pin_bias": True}, {"mode": "gate"}, {"mode": "raw"}],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["fmmnet18", "fmmnet20"])
def test_every_mode_of_fmm_folds(architecture, options):
    model = randomise(narrow(architecture, **options).double()).eval()
    folded = timm_attn.fold(model)
    again = narrow(architecture, **options, folded=True).double().train().eval()
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again(example_input(model)), folded(example_input(model)))


def test_the_patches_of_the_conam_paper_are_saved_and_folded(tmp_path):
    model = randomise(narrow("resnet18_conam", patch_size=(4, 4, 2, 0))).eval()
    timm.models.save_for_hf(timm_attn.fold(model), str(tmp_path), safe_serialization=True)
    again = load_model(str(tmp_path))
    assert relative_difference(model, again, example_input(model)) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("architecture", ["resnet18_asr", "resnet18_ssia", "resnet20_asr", "resnet18_dia"])
def test_a_folded_network_is_saved_as_what_it_is(architecture, tmp_path):
    model = randomise(narrow(architecture)).eval()
    model.pretrained_cfg["tag"] = "graft_a1_in1k"  # by which the saved one must not be grafted again
    folded = timm_attn.fold(model)
    timm.models.save_for_hf(folded, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(example_input(model)), folded(example_input(model)))
    assert set(again.state_dict()) == set(folded.state_dict())


def test_norms_of_a_deep_stem_and_frozen_norms_are_fused():
    stem = {"stem_type": "deep", "stem_width": 4, "replace_stem_pool": True, "avg_down": True}
    model = randomise(narrow("resnet50_dia", **stem)).eval()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in timm_attn.fold(model).modules())
    timm.utils.freeze(model)
    folded = timm_attn.fold(model)
    narrow("resnet50_dia", **stem, folded=True).load_state_dict(folded.state_dict(), strict=True)


def test_norms_that_do_more_are_left():
    model = randomise(narrow("resnet18_dia", norm_layer=timm.layers.BatchNormAct2d)).eval()
    with pytest.raises(timm_attn.NothingToFold):
        timm_attn.fold(model)


def fuse(model):
    return fold_module._fold(model)[1]


@pytest.mark.parametrize("architecture", ["resnet18_dia", "resnet20_conam", "resnet164_se", "fmmnet20"])
def test_fold_fuses_and_verifies(architecture, monkeypatch):
    model = randomise(narrow(architecture)).eval()
    folded = timm_attn.fold(model)
    stock = stock_model(model, folded)
    assert stock.pretrained_cfg["architecture"] == architecture and stock._model_args["folded"] is True
    assert torch.equal(stock(example_input(model)), folded(example_input(model)))
    with pytest.raises(timm_attn.NothingToFold):
        timm_attn.fold(folded)
    monkeypatch.setattr(
        deployed,
        "fuse_conv_bn_weights",
        lambda w, b, mean, var, eps, weight, bias: fuse_without_mean(w, var, eps, weight, bias),
    )
    with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\|"):
        timm_attn.fold(model)


def fuse_without_mean(w, var, eps, weight, bias):
    return w * (weight / (var + eps).sqrt())[:, None, None, None], bias


def test_fused_convolution_is_the_pair():
    conv, norm = torch.nn.Conv2d(6, 8, 3, groups=2).double(), torch.nn.BatchNorm2d(8).double()
    randomise(torch.nn.Sequential(norm))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    pair = torch.nn.Sequential(conv, norm)
    weight, bias = deployed.fuse_state(pair.state_dict(), [("0", "1", norm.eps)]).values()
    expected = norm.eval()(conv(x))
    torch.testing.assert_close(torch.nn.functional.conv2d(x, weight, bias, groups=2), expected)


def test_no_second_form_where_folding_leaves_the_stock_network():
    for name, stock in (
        ("resnet20_asr", "resnet20"),
        ("resnet50_asr_se", "seresnet50"),
        ("resnet20", "resnet20"),
    ):
        with pytest.raises(ValueError, match=f"{name} has no folded form of its own: folded, it is {stock}"):
            timm.create_model(name, folded=True)
    with pytest.raises(ValueError, match="needs batch norms"):
        timm.create_model("resnet18_dia", folded=True, norm_layer="groupnorm")


# ------------------------------------------------------------------------------------------- verification


def test_the_command_writes_nothing_that_is_above_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.deploy, "load_model", lambda source: randomise(narrow("resnet20_asr")).eval())
    monkeypatch.setattr(
        cli.deploy, "stock_model", lambda model, folded: randomise(narrow("resnet20"), seed=3).eval()
    )
    with pytest.raises(timm_attn.FoldError, match=r"max\|Δlogit\| / max\|logit\| = .*, allowed 1e-05"):
        cli.deploy.fold_command("resnet20_asr", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("architecture", FOLDABLE)
def test_random_states_fold(architecture):
    model = randomise(narrow(architecture), 1).eval()  # all others have 0
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 48, 48)}
    timm_attn.fold(model, torch.randn(2, 3, 32, 32))


def test_the_report_counts():
    model = randomise(narrow("resnet20_asr")).eval()
    folded = timm_attn.fold(model)
    report = verify_fold(model, folded, example_input(model, 8))
    assert report.parameters == (parameters(model), parameters(folded))
    assert report.images == 8 and report.top1_agreement == 100
    assert report.max_relative <= 1e-5
    size = sum(v.numel() * v.element_size() for v in folded.state_dict().values())
    assert report.bytes[1] == size < report.bytes[0]
    assert report.multiply_adds[1] < report.multiply_adds[0]
    for parameter in folded.fc.parameters():
        parameter.data.neg_()
    assert verify_fold(model, folded, example_input(model, 8)).top1_agreement == 0


def test_multiply_adds_of_resnet20():
    model = timm.create_model("resnet20_asr")
    report = verify_fold(model, timm_attn.fold(model), example_input(model))
    # 3 × 3 convolutions, the two 1 × 1 on the shortcuts, and the classifier
    stem, one, two, three = 1024 * 9 * 3 * 16, 1024 * 9 * 16**2, 256 * 9 * 32**2, 64 * 9 * 64**2
    first = 256 * 9 * 16 * 32 + 256 * 16 * 32 + 64 * 9 * 32 * 64 + 64 * 32 * 64
    assert report.multiply_adds[1] == stem + 6 * one + 5 * two + 5 * three + first + 640


def test_inputs_of_the_caller_are_compared_too(monkeypatch):
    model = randomise(narrow("resnet20_asr")).eval()
    seen = []
    real = fold_module.relative_difference
    monkeypatch.setattr(fold_module, "relative_difference", lambda a, b, x: seen.append(x) or real(a, b, x))
    mine = torch.randn(3, 3, 40, 40)
    timm_attn.fold(model, mine)
    assert len(seen) == 2 and torch.equal(seen[1], mine)


def test_averaged_weights_fold_to_the_fold_of_the_average():
    model = randomise(narrow("resnet20_asr")).train()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    randomise(model, seed=1)
    average.update(model)
    by_hand = narrow("resnet20_asr").eval()
    by_hand.load_state_dict(average.module.state_dict())
    folded, expected = timm_attn.fold(average.module), timm_attn.fold(by_hand)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in folded.state_dict().items())
    of_the_last = timm_attn.fold(model)
    assert not torch.equal(folded.layer1[0].bn2.weight, of_the_last.layer1[0].bn2.weight)


@pytest.mark.parametrize("weights", ["resnet20_dia", "resnet20_dia.cpu_c10", "resnet20_dia.cpu_c10_folded"])
def test_pretrained_weights_are_folded_where_asked_for(weights):
    folded = timm.create_model(weights, pretrained=True, folded=True).eval()
    trained = timm.create_model("resnet20_dia", pretrained=True).eval()
    assert relative_difference(trained, folded, example_input(trained)) <= BOUNDS[torch.float32]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    grey = timm.create_model(weights, pretrained=True, folded=True, in_chans=1, num_classes=3)
    assert torch.equal(grey.layer3[0].conv2.weight, folded.layer3[0].conv2.weight)


def test_the_folded_weights_of_what_becomes_a_stock_network_are_named():
    with pytest.raises(ValueError, match=r"it is resnet20, whose weights are resnet20\.asr_cpu_c10_folded"):
        timm.create_model("resnet20_asr", pretrained=True, folded=True)
