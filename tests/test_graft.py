"""Grafting: a variant that computes what its stock backbone computes, and learns from there."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import BACKBONES, MECHANISMS, SMALL, parse_name, randomise
from timm.models.resnet import BasicBlock, Bottleneck
from timm.utils import ModelEmaV3

import timm_attn
from timm_attn.compare import BOUNDS, relative_difference
from timm_attn.models import graft_obstacle, grafting
from timm_attn.models.resnet_only import last_norm

GRAFTED = [name for name in SMALL if not graft_obstacle(name)]
OPTIONS = {
    "dia": [{"reduction": 2}, {"dia_light": True}],
    "asr": [
        {"delta": 2},
        {"generator": "spa"},
        {"generator": "ie"},
        {"generator": "eca"},
        {"generator": "srm"},
        {"generator": "scale"},
    ],
    "asr_se": [{"delta": 2}],
    "conam": [{"grid": 3}, {"reduction": 1}, {"temperature": "sqrt"}],
    "ssia": [{"target": "spatial"}, {"target": "last"}],
}


def sizes(name: str) -> dict:
    stages = len(BACKBONES[parse_name(name)[0]].layers)
    return {"channels": [8, 16, 24, 32][:stages], "layers": [2, 2, 2, 2][:stages]}


def stock_of(name: str, seed: int = 0, dtype=torch.float32, **kwargs):
    """The stock network of an architecture, small, with random statistics, affines and classifier."""
    backbone, mechanism = parse_name(name)
    stock, extra = MECHANISMS[mechanism].graft_source(backbone, {})
    torch.manual_seed(seed)
    model = timm.create_model(stock, **{**sizes(name), **extra, "num_classes": 10, **kwargs})
    return randomise(model, seed).to(dtype).eval()


def images(dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 1, 1, generator=g) + torch.randn(4, 3, 64, 64, generator=g)
    return x.to(dtype)


def smallest_branch(model, x) -> float:
    """The least norm of a residual branch ÷ norm of its block's output."""
    ratios, hooks = [], []

    def attach(block):
        norms = {}
        keep = lambda m, i, out: norms.__setitem__("branch", out.norm().item())  # noqa: E731
        hooks.append((block.se or last_norm(block)).register_forward_hook(keep))
        compare = lambda m, i, out: ratios.append(norms["branch"] / out.norm().item())  # noqa: E731
        hooks.append(block.register_forward_hook(compare))

    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            attach(module)
    model(x)
    for hook in hooks:
        hook.remove()
    return min(ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRAFTED)
def test_the_function_is_preserved(name, dtype):
    stock, x = stock_of(name, dtype=dtype), images(dtype)
    assert smallest_branch(stock, x) > 0.1  # else the mechanism's place would not matter
    variant = timm_attn.graft(name, stock, **sizes(name))
    assert variant.pretrained_cfg["architecture"] == name
    assert relative_difference(stock, variant, x) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("mechanism", "options"), [(m, o) for m, options in OPTIONS.items() for o in options]
)
def test_with_options_too(mechanism, options):
    name = f"resnet20_{mechanism}"
    stock, x = stock_of(name, dtype=torch.float64), images(torch.float64)
    variant = timm_attn.graft(name, stock, **sizes(name), **options)
    assert relative_difference(stock, variant, x) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("name", GRAFTED)
def test_what_is_new_learns_within_three_steps(name):
    torch.manual_seed(0)
    # Of one or two hidden units all may be dead.
    options = {"reduction": 1} if "reduction" in MECHANISMS[parse_name(name)[1]].options else {}
    wide = {"channels": [128] * 3} if parse_name(name)[1] == "se" else {}  # SE has a sixteenth of them
    stock = stock_of(name, **wide)
    variant = timm_attn.graft(name, stock, **{**sizes(name), **wide, **options}).train()
    optimizer = torch.optim.SGD(variant.parameters(), lr=0.05)
    learnt = set()
    x, y = images(), torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(variant(x), y).backward()
        learnt |= {
            key for key, p in variant.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        optimizer.step()
    assert {key for key, _ in variant.named_parameters()} - learnt == set()


@pytest.mark.parametrize("name", ["resnet20_dia", "resnet20_asr", "resnet20_conam"])
def test_a_scale_left_out_breaks_the_bound(name, monkeypatch):
    equal = grafting._equal_patches
    monkeypatch.setattr(grafting, "scale_parameters", lambda block, branch, gate: None)
    monkeypatch.setattr(grafting, "_equal_patches", lambda layer: equal(layer) * 0 + 1)
    with pytest.raises(
        timm_attn.GraftError, match=r"does not compute what its source computes: max\|Δlogit\|"
    ):
        timm_attn.graft(name, stock_of(name), **sizes(name))


def test_every_kind_of_source(tmp_path):
    name = "resnet18_dia"
    stock, x = stock_of(name), images()
    timm.models.save_for_hf(stock, tmp_path, safe_serialization=True)
    for source in (stock, stock.state_dict(), f"local-dir:{tmp_path}", torch.compile(stock, backend="eager")):
        variant = timm_attn.graft(name, source, **sizes(name))
        assert relative_difference(stock, variant, x) <= BOUNDS[torch.float32]
    shipped = timm_attn.graft("resnet20_asr", "resnet20.cpu_c10")
    assert (
        shipped.training and shipped.pretrained_cfg["std"] == timm.get_pretrained_cfg("resnet20.cpu_c10").std
    )


def test_averaged_weights_are_a_source():
    stock = randomise(timm.create_model("resnet20", **sizes("resnet20_dia"))).eval()
    model = timm_attn.graft("resnet20_dia", ModelEmaV3(stock), **sizes("resnet20_dia"))
    assert relative_difference(stock, model, torch.randn(2, 3, 32, 32)) < BOUNDS[torch.float32]


def test_a_deep_stem_and_another_attention():
    stem = {"stem_type": "deep", "stem_width": 4, "replace_stem_pool": True, "avg_down": True}
    stock = stock_of("resnet18_asr", **stem, block_args={"attn_layer": "eca"})
    options = {**sizes("resnet18_asr"), **stem, "attention": "eca"}
    for source in (stock, stock.state_dict()):
        variant = timm_attn.graft("resnet18_asr", source, **options)
        assert relative_difference(stock, variant, images()) <= BOUNDS[torch.float32]


def test_the_configuration_says_what_it_is():
    stock = stock_of("resnet18_asr")
    cfg = timm_attn.graft("resnet18_asr", stock, **sizes("resnet18_asr")).pretrained_cfg
    # Those of timm's own checkpoint, which these weights are not.
    assert cfg["tag"] is None and not {"hf_hub_id", "origin_url", "paper_ids"} & cfg.keys()
    assert cfg["description"].startswith("Grafted from a resnet18, which was trained without")
    digits = stock_of("resnet20_dia", num_classes=10)
    digits.pretrained_cfg = {"mean": (0.5,) * 3, "input_size": (3, 16, 16), "label_names": list("0123456789")}
    cfg = timm_attn.graft("resnet20_dia", digits, **sizes("resnet20_dia")).pretrained_cfg
    assert cfg["label_names"] == list("0123456789") and "std" not in cfg
    assert "untrained" in timm_attn.graft("resnet20_asr", "resnet20.cpu_c10").pretrained_cfg["description"]


def test_another_number_of_classes_and_of_channels():
    stock = stock_of("resnet20_dia", in_chans=1)
    variant = timm_attn.graft("resnet20_dia", stock, num_classes=3, **sizes("resnet20_dia"))
    assert variant(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert torch.equal(variant.conv1.weight, stock.conv1.weight)


def test_the_source_is_left_as_it_is():
    stock = stock_of("resnet20_asr").train()
    before = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    assert timm_attn.graft("resnet20_asr", stock, **sizes("resnet20_asr")).training and stock.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in stock.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "fmmnet20",
            {},
            r"fmmnet20 cannot be grafted: a product of feature maps cannot represent the sum x \+ F\(x\)",
        ),
        (
            "resnet20_conam",
            {"patch_size": (8, 8, 4)},
            "ConAM with patch_size=8 cannot be grafted: the number of patches",
        ),
        ("resnet20", {}, "resnet20 cannot be grafted: it is the stock network"),
        ("resnet20_dia", {"folded": True}, "norms fused: graft without folded=True, then fold"),
    ],
)
def test_what_cannot_be_grafted_says_why(name, options, message):
    with pytest.raises(timm_attn.GraftError, match=message):
        timm_attn.graft(name, stock_of("resnet20_dia"), **sizes(name), **options)


@pytest.mark.parametrize(
    "options",
    [{"in_chans": 1}, {"pretrained": True}, {"dtype": torch.float64}, {"device": "meta"}],
    ids=str,
)
def test_what_the_source_decides_is_refused(options):
    with pytest.raises(TypeError, match=f"graft takes no {next(iter(options))}="):
        timm_attn.graft("resnet20_dia", stock_of("resnet20_dia"), **sizes("resnet20_dia"), **options)


def test_timms_own_attention_is_grafted_where_its_start_is_known():
    for backbone, mechanism in (("resnet20", "eca"), ("resnet18", "se")):
        stock = stock_of(f"{backbone}_dia")
        name = timm_attn.register(backbone, mechanism)
        variant = timm_attn.graft(name, stock, **sizes(f"{backbone}_dia"))
        assert relative_difference(stock, variant, images()) <= BOUNDS[torch.float32]
    with pytest.raises(timm_attn.GraftError, match="how timm's cbam starts as a constant gate"):
        timm_attn.graft(timm_attn.register("resnet20", "cbam"), stock_of("resnet20_dia"))


def test_a_plain_network_is_no_variant():
    with pytest.raises(timm_attn.GraftError, match="resnet18 is no model of this package"):
        timm_attn.graft("resnet18", stock_of("resnet18_dia"))
    with pytest.raises(timm_attn.GraftError, match="own output is not finite"):
        stock = stock_of("resnet18_dia")
        torch.nn.init.constant_(stock.fc.weight, torch.nan)
        timm_attn.graft("resnet18_dia", stock, **sizes("resnet18_dia"))


def test_a_source_with_frozen_norms_is_grafted():
    stock = stock_of("resnet18_dia")
    expected = timm_attn.graft("resnet18_dia", stock, **sizes("resnet18_dia"))
    timm.utils.freeze(stock)
    grafted = timm_attn.graft("resnet18_dia", stock, **sizes("resnet18_dia"))
    assert torch.equal(grafted.eval()(images()), expected.eval()(images()))


def test_weights_of_another_network_are_refused():
    stock = stock_of("resnet20_dia")
    with pytest.raises(timm_attn.GraftError, match="resnet20_dia cannot take these weights: .*missing"):
        timm_attn.graft("resnet20_dia", stock)  # three blocks a stage, not two
    with pytest.raises(timm_attn.GraftError, match="those of a resnet20, and it is made from a resnet32"):
        timm_attn.graft("resnet32_dia", stock)
    state = {k: v for k, v in stock.state_dict().items() if k != "layer1.0.bn2.bias"}
    with pytest.raises(timm_attn.GraftError, match="not that of resnet20: (?s:.*)layer1.0.bn2.bias"):
        timm_attn.graft("resnet20_dia", state, **sizes("resnet20_dia"))
    for source in ({"conv1.weight": torch.ones(8, 3, 3, 3)}, timm.create_model("resnet18", num_classes=0)):
        with pytest.raises(timm_attn.GraftError, match="the source has no fc.weight: give a whole resnet20"):
            timm_attn.graft("resnet20_dia", source)
    with pytest.raises(timm_attn.GraftError, match="on the meta device"):
        timm_attn.graft("resnet20_dia", timm.create_model("resnet20", device="meta"))
    with pytest.raises(TypeError, match="source must be a name, a network or a state dict, got None"):
        timm_attn.graft("resnet20_dia", None)
    with pytest.raises(timm_attn.GraftError, match="the source has no conv1.weight"):
        timm_attn.graft("resnet20_dia", torch.nn.Linear(2, 2))
    with pytest.raises(timm_attn.GraftError, match="of a resnet20, and it is made from a resnet20_se"):
        timm_attn.graft("resnet20_asr_se", stock_of("resnet20_asr"), **sizes("resnet20_asr"))
