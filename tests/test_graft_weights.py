"""Graft tags: timm's own checkpoints, served by a Hub on loopback, become those of a variant."""

import pytest
import timm
import torch
from forked import run_code
from helpers import IMAGENET, MECHANISMS, parse_name, randomise
from hub_server import HubServer, nobody
from safetensors.torch import save

import timm_attn
from timm_attn.errors import UserError
from timm_attn.load import load_model

NAMES = [f"{backbone}_{mechanism}" for backbone in IMAGENET for mechanism in ("dia", "asr", "conam", "ssia")]
SMALL = {"channels": [32, 32, 64, 64], "layers": [2, 1, 1, 1]}
SCRIPT = f"""
import sys, timm, timm_attn, torch
SMALL = {SMALL!r}
x = torch.load("x.pt")
stock = stock_grey = None
for name in sys.argv[1:]:
    backbone = timm_attn.models.parse_name(name)[0]
    if stock is None or stock.pretrained_cfg["architecture"] != backbone:
        stock = timm.create_model(backbone, pretrained=True, **SMALL).eval()
        stock_grey = timm.create_model(backbone, pretrained=True, in_chans=1, **SMALL).eval()
    tag = stock.pretrained_cfg["tag"]
    model = timm.create_model(name, pretrained=True, **SMALL).eval()
    assert model.pretrained_cfg["tag"] == "graft_" + tag, model.pretrained_cfg
    assert model.pretrained_cfg["description"].startswith("Grafted from timm/" + backbone), model.pretrained_cfg
    assert not timm.create_model(name, **SMALL).pretrained_cfg.get("description")
    by_tag = timm.create_model(f"{{name}}.graft_{{tag}}", pretrained=True, **SMALL).eval()
    for field in ("mean", "std", "input_size", "crop_pct", "interpolation", "num_classes", "test_input_size"):
        assert model.pretrained_cfg[field] == stock.pretrained_cfg[field], field
    expected = stock(x)
    for other in (model, by_tag):
        assert (other(x) - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    print(name)
    if backbone not in ("resnet18", "resnet50"):
        continue  # whose blocks are those of the others, too
    five = timm.create_model(name, pretrained=True, num_classes=5, **SMALL).eval()
    assert five(x).shape == (4, 5)
    assert (five.forward_features(x) - stock.forward_features(x)).abs().max() < 1e-4 * stock.forward_features(x).abs().max()
    grey = timm.create_model(name, pretrained=True, in_chans=1, **SMALL).eval()
    assert (grey(x[:, :1]) - stock_grey(x[:, :1])).abs().max() <= 1e-5 * expected.abs().max()
    maps = timm.create_model(name, pretrained=True, features_only=True, **SMALL).eval()(x)
    for a, b in zip(maps, stock.forward_intermediates(x, intermediates_only=True), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
"""


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        for backbone in {parse_name(name)[0] for name in NAMES}:
            torch.manual_seed(0)
            stock = randomise(timm.create_model(backbone, **SMALL))
            repo = timm.get_pretrained_cfg(backbone).hf_hub_id
            hub.put_files(repo, {"model.safetensors": save(stock.state_dict())})
        yield hub


def test_every_backbone_and_mechanism_has_a_graft():
    tags = set(timm.list_models("*.graft_*", pretrained=True))
    assert {name.split(".")[0] for name in tags} >= set(NAMES)
    for tag in tags:
        stock = timm.get_pretrained_cfg(parse_name(tag.split(".")[0])[0])
        assert tag.endswith(f".graft_{stock.tag}")
        assert timm.get_pretrained_cfg(tag).hf_hub_id == stock.hf_hub_id


def test_grafts_compute_what_timms_checkpoints_compute(server, tmp_path):
    torch.save(torch.randn(4, 3, 1, 1) + torch.randn(4, 3, 64, 64), tmp_path / "x.pt")
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    result = run_code(SCRIPT, *NAMES, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == NAMES


def test_a_tag_says_which_of_timms_weights_are_grafted(server, tmp_path):
    torch.manual_seed(1)
    stock = randomise(timm.create_model("resnet18", **SMALL))
    server.put_files("timm/resnet18.gluon_in1k", {"model.safetensors": save(stock.state_dict())})
    code = f"""
import timm, timm_attn, torch
x = torch.randn(2, 3, 64, 64)
model = timm_attn.create_model("resnet18.gluon_in1k", attention="asr", pretrained=True, **{SMALL!r}).eval()
stock = timm.create_model("resnet18.gluon_in1k", pretrained=True, **{SMALL!r}).eval()
default = timm_attn.create_model("resnet18", attention="asr", pretrained=True, **{SMALL!r}).eval()
expected = stock(x)
assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
assert (default(x) - expected).abs().max() > 1e-2 * expected.abs().max()
assert model.pretrained_cfg["tag"] == "graft_gluon_in1k" and default.pretrained_cfg["tag"] == "graft_a1_in1k"
"""
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    result = run_code(code, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    # Another process knows the name, too.
    check = (
        "from timm_attn.load import source_name as s; print(s('resnet18_asr.graft_gluon_in1k')); import timm"
    )
    check += "; print(timm.get_pretrained_cfg('resnet18_asr.graft_gluon_in1k').hf_hub_id)"
    assert run_code(check, cwd=tmp_path).stdout.split()[-1] == "timm/resnet18.gluon_in1k"


def test_a_tag_that_cannot_be_grafted_is_refused_by_its_name():
    with pytest.raises(ValueError, match="resnet50 has no weights 'nope': choose from a1_in1k, "):
        timm_attn.create_model("resnet50.nope", attention="asr")
    trained = (
        r"create_model\('resnet20_asr.cpu_c10', pretrained=True\) was trained with asr, timm_attn.graft\("
    )
    with pytest.raises(ValueError, match=trained):
        timm_attn.create_model("resnet20.cpu_c10", attention="asr")
    with pytest.raises(ValueError, match=r"grows from seresnet50, not resnet50: take timm_attn.graft\("):
        timm_attn.create_model("resnet50.a1_in1k", attention="asr_se")
    with pytest.raises(timm_attn.GraftError, match="fmmnet50 cannot be grafted"):
        timm_attn.create_model("resnet50.a2_in1k", attention="fmm", pretrained=True)
    assert timm_attn.create_model("resnet50.a2_in1k", attention="fmm", **SMALL).num_classes == 1000
    with pytest.raises(UserError, match="resnet50 has no weights 'nope'"):
        load_model("resnet50_asr.graft_nope")


def test_a_grafted_model_that_was_trained_on_loads_back(server, tmp_path):
    code = f"""
import timm, timm_attn, torch
model = timm.create_model("resnet18_dia", pretrained=True, num_classes=5, **{SMALL!r})
with torch.no_grad():
    model.layer1[0].dia.x_expand.weight.normal_()
timm.models.save_for_hf(model.eval(), "saved", safe_serialization=True)
again = timm.create_model("local-dir:saved", pretrained=True).eval()
x = torch.randn(2, 3, 64, 64)
assert torch.equal(model(x), again(x))
"""
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    result = run_code(code, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_graft_of_somebodys_repository_folds_back_and_says_what_it_is(server, tmp_path):
    stock = randomise(timm.create_model("resnet18", num_classes=7, **SMALL))
    timm.models.save_for_hf(stock, tmp_path / "stock", safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    server.put_files("somebody/their.net", files)
    code = f"""
import json, timm, timm_attn, torch
from timm_attn.cli import main
x = torch.randn(2, 3, 64, 64)
expected = timm.create_model("local-dir:stock", pretrained=True).eval()(x)
for name in ("resnet18_asr", "resnet18_conam"):
    model = timm_attn.graft(name, "hf-hub:somebody/their.net", **{SMALL!r})
    saved = "saved_" + name
    timm.models.save_for_hf(model.eval(), saved, safe_serialization=True)
    main(["fold", saved])
    for folder in (saved, saved + "/folded"):
        again = timm.create_model("local-dir:" + folder, pretrained=True).eval()
        assert (again(x) - expected).abs().max() <= 1e-5 * expected.abs().max(), folder
        cfg = json.load(open(folder + "/config.json"))["pretrained_cfg"]
        assert cfg["description"].startswith("Grafted from hf-hub:somebody/their.net, which"), cfg
        assert "a1_in1k" not in str(cfg), cfg
timm_attn.graft("resnet18_dia", "local-dir:saved_resnet18_asr/folded", **{SMALL!r})
"""
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    result = run_code(code, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "trained" not in result.stdout


@pytest.mark.parametrize("way", [{}, {"num_classes": 5}, {"features_only": True}, {"in_chans": 1}])
def test_weights_of_another_network_are_refused(way, tmp_path):
    from safetensors.torch import save_file

    state = timm.create_model("resnet18", **SMALL).state_dict()
    del state["layer1.0.bn2.bias"]
    save_file(state, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    with pytest.raises(timm_attn.GraftError, match=r"missing \['layer1.0.bn2.bias'\]"):
        timm.create_model(
            "resnet18_asr.graft_a1_in1k", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **way
        )


def test_mechanisms_that_cannot_be_grafted_have_no_tag():
    assert isinstance(MECHANISMS["fmm"].graft, str)
    grafted = {name for name in timm.list_models(pretrained=True) if ".graft_" in name}
    assert "resnet50_asr.graft_a1_in1k" in grafted
    assert not any(name.startswith("fmmnet") for name in grafted)


def test_weights_of_timm_that_cannot_be_had_end_in_one_error(server, tmp_path):
    code = """
import timm, timm_attn
from timm_attn.load import load_model
for make in (
    lambda: timm.create_model("resnet50_dia", pretrained=True),
    lambda: timm_attn.graft("resnet50_asr", "resnet50.a1_in1k"),
    lambda: load_model("resnet50.a1_in1k"),
):
    try:
        make()
    except timm_attn.WeightsError as error:
        print(error)
"""
    home = {"HF_HOME": str(tmp_path / "home")}
    with nobody() as nowhere:
        gone = run_code(code, cwd=tmp_path, env={"HF_ENDPOINT": nowhere, **home})
    assert gone.returncode == 0, gone.stderr[-2000:]
    message, *others = gone.stdout.splitlines()
    assert len(others) == 2 and "Retrying" not in gone.stderr
    assert all("run `hf download timm/resnet50.a1_in1k model.safetensors`" in other for other in others)
    for part in (
        "resnet50_dia.graft_a1_in1k is made from timm's weights of resnet50",
        "hf download timm/resnet50.a1_in1k model.safetensors",
        "TIMM_ATTN_HUB",
        "timm_attn.graft('resnet50_dia', safetensors.torch.load_file(FILE))",
        str(tmp_path / "home"),
    ):
        assert part in message
    with HubServer() as other:
        other.put_files("timm/resnet50.a1_in1k", {"model.safetensors": save({"a": torch.zeros(9)})})
        other.corrupt("timm/resnet50.a1_in1k", "model.safetensors")
        damaged = run_code(code, cwd=tmp_path, env={"HF_ENDPOINT": other.endpoint, **home})
    assert damaged.stdout.count("model.safetensors is damaged") == 3, damaged.stderr[-2000:]
