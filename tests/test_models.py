"""The registry, parameter counts, and what timm's users do with a model."""

import json
from copy import deepcopy

import pytest
import timm
import torch
from helpers import SMALL, narrow, parameters, python, randomise
from safetensors.torch import load_file, save_file

import timm_attn
from timm_attn.models import BACKBONES, parse_name

COUNTS = {
    ("resnet50_dia", 1000): 28_358_052,
    ("resnet50_asr", 1000): 28_103_128,
    ("resnet18_dia", 1000): 11_865_604,
    ("resnet101_dia", 1000): 47_350_180,
    ("resnet18_asr", 1000): 11_780_512,
    ("resnet34_asr", 1000): 21_962_644,
    ("resnet101_asr", 1000): 49_359_384,
    ("resnet20", 10): 272_474,
    ("resnet56", 10): 855_770,
    ("resnet110", 10): 1_730_714,
    ("resnet20_dia", 10): 286_866,
    ("resnet164", 100): 1_727_284,
    ("resnet164_se", 100): 1_929_388,
    ("resnet164_dia", 100): 1_946_132,
    ("resnet164_asr", 100): 1_937_452,
}


@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameter_counts(name, classes):
    assert parameters(timm.create_model(name, num_classes=classes, device="meta")) == COUNTS[name, classes]


def test_dia_with_the_reduction_of_the_cifar_runs():
    assert parameters(timm.create_model("resnet50_dia", reduction=4, device="meta")) == 39_516_072


def test_every_mechanism_is_on_every_backbone():
    imagenet = [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "wide_resnet50_2",
    ]
    cifar = [f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 164)]
    expected = {f"{b}_{m}" for b in imagenet for m in ("dia", "asr")}
    expected |= {b + m for b in cifar for m in ("", "_se", "_dia", "_asr")}
    assert set(timm_attn.model_names()) == expected
    assert expected <= set(timm.list_models())
    assert set(timm.list_models(module="resnet_attn")) == expected
    assert not expected & set(timm.list_models(module="resnet"))


@pytest.mark.parametrize("name", timm_attn.model_names())
def test_every_model_is_registered_as_timm_wants_it(name):
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg.architecture == name
    model = timm.create_model(name, device="meta")
    model.get_submodule(cfg.first_conv)
    model.get_submodule(cfg.classifier)
    assert model.num_classes == cfg.num_classes
    state = model.state_dict(keep_vars=True)
    assert len({id(tensor) for tensor in state.values()}) == len(state), "aliases in the state dict"
    assert getattr(timm_attn.models.resnet_attn, name).__name__ == name


@pytest.mark.parametrize("name", SMALL)
def test_safetensors_round_trip(name, tmp_path):
    model = randomise(narrow(name)).eval()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    other = narrow(name).eval()
    other.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    # Two blocks a stage: DIA's weights on the hidden state see zeros in the first.
    stages = 3 if BACKBONES[parse_name(name)[0]].cifar else 4
    options = {"reduction": 2} if parse_name(name)[1] in ("asr", "dia") else {}  # enough hidden units
    model = randomise(narrow(name, layers=[2] * stages, **options)).train()
    model(torch.randn(8, 3, 64, 64)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_changes_nothing(name):
    x = torch.randn(2, 3, 64, 64)
    plain = randomise(narrow(name)).train()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert torch.equal(plain(x), checkpointed(x))
    plain(x).sum().backward()
    checkpointed(x).sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", SMALL)
def test_features(name):
    model = narrow(name, features_only=True)
    reductions = model.feature_info.reduction()
    assert reductions == ([1, 1, 2, 4] if len(reductions) == 4 else [2, 4, 8, 16, 32])
    x = torch.randn(1, 3, 64, 64)
    for feature, channels, reduction in zip(model(x), model.feature_info.channels(), reductions, strict=True):
        assert feature.shape == (1, channels, 64 // reduction, 64 // reduction)
    last = narrow(name, features_only=True, out_indices=(-1,))
    assert len(last(x)) == 1
    whole = randomise(narrow(name)).eval()
    final, maps = whole.forward_intermediates(x)
    assert torch.equal(final, whole.forward_features(x))
    assert len(maps) == len(reductions)
    assert torch.equal(whole.forward_head(final), whole(x))


@pytest.mark.parametrize("name", SMALL)
def test_head_and_input_options(name):
    x = torch.randn(2, 3, 32, 32)
    model = narrow(name, num_classes=0)
    assert model(x).shape == (2, model.num_features)
    model = narrow(name, num_classes=0, global_pool="")
    assert model(x).shape[:2] == (2, model.num_features) and model(x).ndim == 4
    assert narrow(name, in_chans=1)(x[:, :1]).shape == (2, 10)
    model = narrow(name)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", [n for n in SMALL if parse_name(n)[1] in ("dia", "asr")])
def test_compile_export_script_and_bf16(name):
    model, x = randomise(narrow(name)).eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(exported.module()(torch.cat([x, x])), torch.cat([expected, expected]))
    with pytest.warns(FutureWarning):
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["resnet20_dia", "resnet18_asr", "resnet20", "resnet18_dia"])
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match="nonsense"):
        timm.create_model(name, nonsense=1)


@pytest.mark.parametrize("name", ["resnet20", "resnet20_dia", "resnet20_asr"])
def test_cifar_networks_have_no_output_stride(name):
    with pytest.raises(TypeError, match="output_stride"):
        timm.create_model(name, output_stride=8)


@pytest.mark.parametrize("name", ["resnet20_dia", "resnet20"])
def test_pruning_keeps_what_is_asked_for(name):
    model = narrow(name).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model(x), expected)


def test_import_needs_no_network_and_nothing_heavy():
    code = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
import timm
before = set(sys.modules)
import timm_attn
new = {m.split(".")[0] for m in set(sys.modules) - before}
heavy = new & {"datasets", "accelerate", "matplotlib", "sklearn", "tyro", "rich", "pandas", "pyarrow"}
assert not heavy, heavy
assert timm.is_model("resnet50_dia")
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_scripts_run_with_the_models_registered(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\nassert __name__ == '__main__'\nprint(timm.is_model('resnet50_dia'), sys.argv)"
    )
    result = python("-m", "timm_attn", str(script), "--flag", "1")
    assert result.stdout.split(maxsplit=1) == ["True", f"{[str(script), '--flag', '1']}\n"], result.stderr


@pytest.mark.parametrize("name", ["resnet20_dia", "resnet18_asr"])
def test_a_second_attention_is_refused(name):
    with pytest.raises(ValueError, match="attn_layer 'se' has no place"):
        timm.create_model(name, block_args={"attn_layer": "se"})


def test_an_index_of_another_timm_is_no_obstacle(tmp_path):
    entry = {"architecture": "resnet20", "tag": "x", "pretrained_cfg": {"num_classes": 10, "new_field": 1}}
    (tmp_path / "index.json").write_text(json.dumps({"checkpoints": {"resnet20.x": entry}}))
    code = "import timm, timm_attn; print(timm.models.get_pretrained_cfg('resnet20').tag)"
    result = python("-c", code, env={"TIMM_ATTN_HUB": str(tmp_path)})
    assert result.stdout == "x\n", result.stderr
