"""The registry, parameter counts, and what timm's users do with a model."""

import json

import pytest
import timm
import torch
from forked import run_code
from helpers import IMAGENET, MECHANISMS, narrow, parameters, randomise

import timm_attn
from timm_attn.models.backbones import Backbone

#: Before any test, as some register names of their own.
NAMES, ATTACHED = timm_attn.model_names(), timm.list_models(module="attached")
#: Of other families, written out like IMAGENET.
OTHERS = [
    *("regnetx_008", "regnety_016", "efficientnet_b0", "efficientnet_b1", "tf_efficientnetv2_b0"),
    *("mobilenetv3_large_100", "mobilenetv4_conv_small", "convnext_atto", "convnext_nano", "convnext_tiny"),
    *("convnext_small", "convnextv2_nano", "vit_tiny_patch16_224", "vit_small_patch16_224"),
    *("vit_base_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "caformer_s18"),
    *("repvgg_a0", "repvgg_a2", "repvgg_b0", "mobileone_s0", "mobileone_s1", "starnet_s1", "mambaout_femto"),
]
COUNTS = {
    # Two ends in each of 12 blocks, of 192 channels: ASR's 192 + 193 · 12 + 13 · 192 for each, one DIA cell.
    ("vit_tiny_patch16_224_asr", 1000): 5_717_416 + 24 * 5_004,
    ("vit_tiny_patch16_224_dia", 1000): 5_717_416 + 2 * (193 * 9 + 10 * 4 * 192),
    # 2, 2, 6 and 2 blocks of 40, 80, 160 and 320 channels; one DIA cell for each stage.
    ("convnext_atto_asr", 1000): 3_695_520 + 2 * 242 + 2 * 965 + 6 * 3_530 + 2 * 13_460,
    ("convnext_atto_dia", 1000): 3_695_520 + 1_124 + 3_848 + 14_096 + 53_792,
    ("resnext101_8x32d_dia", 100): 33_006_020,
    ("preresnet164", 100): 1_726_388,
    ("preresnet164_dia", 100): 1_961_364,
    ("wrn52_4_dia", 100): 12_298_516,
    ("wrn28_10", 100): 36_536_884,
    ("resnet50_cifar", 10): 23_520_842,
    ("resnet50_cifar_conam", 10): 23_563_198,
    ("resnet50_sem", 1000): 28_163_678,
    ("resnet50_spem", 1000): 25_617_480,
    ("resnet164_sem", 100): 1_970_104,
    ("resnet164_spem", 100): 1_759_648,
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
    ("resnet164_asr_se", 100): 2_139_556,
    ("resnet50_conam", 1000): 25_599_388,
    ("resnet18_conam", 1000): 11_692_856,
    ("fmmnet50", 1000): 25_579_560,
    ("fmmnet18", 1000): 11_691_560,
    ("fmmnet164", 100): 1_742_516,
    ("resnet50_ssia", 1000): 28_313_128,
    ("resnet18_ssia", 1000): 11_862_440,
}


@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameter_counts(name, classes):
    assert parameters(timm.create_model(name, num_classes=classes, device="meta")) == COUNTS[name, classes]


#: Parameters with options: the papers' arithmetic, or the width of what an option adds.
OPTION_COUNTS = [
    ("resnet50_dia", {"reduction": 4}, 39_516_072),
    ("resnet50_dia", {"dia_light": True}, 26_458_272),
    ("resnet18_dia", {"dia_light": True}, 11_751_622),
    ("resnet164_dia", {"dia_light": True, "num_classes": 100}, 1_784_684),
    ("resnet50_conam", {"reduction": 1}, 26_222_248),
    ("resnet50_conam", {"patch_size": (14, 14, 7, 0)}, 25_599_388),
    ("resnet50_conam", {"patch_size": (0, 0, 0, 0)}, 25_557_032),
    ("fmmnet50", {"mode": "gate"}, 25_557_032),
    ("fmmnet50", {"mode": "raw"}, 25_557_032),
    ("fmmnet50", {"mode": "sigmoid"}, 25_579_560 - 2 * 15_104),  # no norm on the branch
    ("fmmnet50", {"pin_bias": True}, 25_579_560),
    ("resnet50_ssia", {"target": "spatial"}, 25_557_032),
    # heads from 256, 512 and 1024 channels to 2048
    ("resnet50_ssia", {"target": "last"}, 25_557_032 + (256 + 512 + 1024 + 3) * 2048),
    # 15,104 channels end the blocks of resnet50: 3 × 256 + 4 × 512 + 6 × 1024 + 3 × 2048
    ("resnet50_asr", {"generator": "ie"}, 25_557_032 + 3 * 15_104),
    ("resnet50_asr", {"generator": "srm"}, 25_557_032 + 4 * 15_104),
    # 20 further means of each channel for fc1 to read
    (
        "resnet50_asr",
        {"generator": "spa"},
        25_557_032 + 2_546_096 + 20 * (3 * 256**2 + 4 * 512**2 + 6 * 1024**2 + 3 * 2048**2) // 16,
    ),
    ("resnet50_asr", {"generator": "scale"}, 25_557_032 + 15_104),
    ("resnet50_asr", {"generator": "eca"}, 25_557_032 + 15_104 + 13 * 5 + 3 * 7),
    ("resnet50_asr", {"delta": 2}, 25_557_032 + 2 * 2_546_096),
    ("resnet50_asr", {"attention": "se"}, 30_634_120),
]


@pytest.mark.parametrize(("name", "options", "count"), OPTION_COUNTS)
def test_parameter_counts_with_options(name, options, count):
    assert parameters(timm.create_model(name, **options, device="meta")) == count


WRONG_OPTIONS = [
    ("resnet20_dia", {"reduction": 0}, "DIA reduction must be at least 1, got 0"),
    ("resnet20_dia", {"dia_light": True, "reduction": 8}, "leave out reduction=8"),
    ("resnet20_asr", {"generator": "cbam"}, "one of se, spa, ie, eca, srm, scale, got 'cbam'"),
    ("resnet20_asr_se", {"delta": 0}, "ASR delta must be at least 1, got 0"),
    ("resnet20_conam", {"patch_size": (8, 8)}, r"one entry for each of 3 stages, got \(8, 8\)"),
    ("resnet18_conam", {"patch_size": 0}, "ConAM patch_size must be at least 1, got 0"),
    ("resnet20_conam", {"patch_size": (0, 0, 0), "grid": 4}, r"grid=4 and patch_size=\(0, 0, 0\)"),
    ("resnet20_asr", {"where": "stem"}, "ASR where must be one of branches, norms, got 'stem'"),
    (
        "vit_tiny_patch16_224_asr",
        {"attention": "se"},
        "ASR has attention='se' on top in blocks of timm's ResNet only",
    ),
    ("fmmnet20", {"mode": "sum"}, "FMM mode must be one of bn, sigmoid, gate, raw, got 'sum'"),
    ("fmmnet20", {"mode": "raw", "pin_bias": True}, "pin_bias needs an FMM mode"),
    ("resnet20_ssia", {"target": "first"}, "one of channel, last, spatial, got 'first'"),
    ("resnet20_ssia", {"aux_weight": float("nan")}, "aux_weight must be a finite number .* got nan"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG_OPTIONS)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20_conam", {"patch_size": (8.0, 8, 4)}, "ConAM patch_size must be a whole number, got 8.0"),
        ("resnet20_conam", {"patch_size": (None, 8, 4)}, "ConAM patch_size must be a whole number, got None"),
        ("resnet20_dia", {"dia_light": "no"}, "dia_light must be True or False, got 'no'"),
        (
            "resnet20_dia",
            {"block": "basic"},
            "block='basic' cannot be set: resnet20_dia has blocks of its own",
        ),
    ],
)
def test_options_of_the_wrong_type_are_named(name, options, message):
    with pytest.raises(TypeError, match=message):
        timm.create_model(name, **options)


def test_options_of_another_mechanism_are_refused():
    for name, options in (
        ("resnet20", {"reduction": 4}),
        ("resnet20_asr", {"grid": 4}),
        ("fmmnet20", {"delta": 1}),
        ("resnet20_asr_se", {"attention": "eca"}),
        ("fmmnet20", {"block_args": {"mode": "gate"}}),
    ):
        given = options.get("block_args", options)
        with pytest.raises(TypeError, match=next(iter(given))):
            timm.create_model(name, **options)


def test_asr_with_se_on_top_is_the_option_by_name():
    for name in ("resnet20_asr", "resnet18_asr"):
        shapes = {k: v.shape for k, v in timm.create_model(name, attention="se").state_dict().items()}
        assert shapes == {k: v.shape for k, v in timm.create_model(f"{name}_se").state_dict().items()}


def test_pinned_biases_stay_where_they_are():
    model = narrow("fmmnet20", pin_bias=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    pinned = [p for p in model.parameters() if not p.requires_grad]
    assert len(pinned) == 2 * sum(len(stage) for stage in (model.layer1, model.layer2, model.layer3))
    assert all((p == 1).all() for p in pinned)


def test_what_folds_what_fuses_and_what_is_grafted():
    """Written out, as other tests ask the table which mechanisms they have to look at."""
    found = {key: (row.folds, row.fuses, not row.graft) for key, row in MECHANISMS.items()}
    expected = {"": (False, False, False), "fmm": (False, True, False)}
    expected |= dict.fromkeys(("asr", "asr_se", "ssia"), (True, False, True))
    expected |= dict.fromkeys(("se", "dia", "conam", "sem", "spem"), (False, True, True))
    assert found | expected == found


def test_every_mechanism_is_on_every_backbone():
    cifar = [f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 164)]
    cifar += ["resnext101_8x32d", "resnet18_cifar", "resnet50_cifar"]
    own = {"_dia", "_asr", "_ssia", "_sem", "_spem"}
    own |= {f"_{key}" for key, row in MECHANISMS.items() if row.on(Backbone()) and not row.name}
    resnets = [*IMAGENET, "resnet26t", "resnet50d", *cifar]
    preact = ["preresnet164", "wrn52_4", "wrn28_10"]
    expected = {b + m for b in resnets for m in own | {"_asr_se", "_conam"}}
    expected |= {b + m for b in preact for m in own | {"_conam"}}
    expected |= {b + m for b in cifar + preact for m in ("", "_se")} | {b + m for b in OTHERS for m in own}
    expected |= {b.replace("resn", "fmmn") for b in resnets}
    expected |= {"prefmmnet164", "wrn52_4_fmm", "wrn28_10_fmm"}
    assert set(NAMES) == set(ATTACHED) == expected
    assert expected <= set(timm.list_models())
    assert not expected & set(timm.list_models(module="resnet"))


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
    result = run_code(code)
    assert result.returncode == 0, result.stderr


def test_scripts_run_with_the_models_registered(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\nassert __name__ == '__main__'\nprint(timm.is_model('resnet50_dia'), sys.argv)"
    )
    code = "import runpy\nrunpy.run_module('timm_attn', run_name='__main__', alter_sys=True)"
    result = run_code(code, str(script), "--flag", "1")
    assert result.stdout.split(maxsplit=1) == ["True", f"{[str(script), '--flag', '1']}\n"], result.stderr


@pytest.mark.parametrize("name", ["resnet20_dia", "resnet18_asr"])
def test_a_second_attention_stands_in_timms_own_place(name):
    model = randomise(narrow(name, block_args={"attn_layer": "se"})).eval()
    assert "layer1.0.se.fc1.weight" in model.state_dict()
    assert not any("generators" in key for key in timm_attn.fold(model).state_dict())


def test_an_index_of_another_timm_is_no_obstacle(tmp_path):
    entry = {"architecture": "resnet20", "tag": "x", "pretrained_cfg": {"num_classes": 10, "new_field": 1}}
    (tmp_path / "index.json").write_text(json.dumps({"checkpoints": {"resnet20.x": entry}}))
    code = "import timm, timm_attn; print(timm.models.get_pretrained_cfg('resnet20').tag)"
    result = run_code(code, env={"TIMM_ATTN_HUB": str(tmp_path)})
    assert result.stdout == "x\n", result.stderr
