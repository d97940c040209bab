"""Hub folders: exported, found by name, loaded by plain timm, published to a server on loopback."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from helpers import ROOT, flip_last_bit, python
from hub_server import HubServer

from timm_attn.errors import UserError
from timm_attn.publish import export, publish
from timm_attn.publish.card import card
from timm_attn.training import Recipe, load_model, train
from timm_attn.weights import WeightsError, read_index, sha256

RECIPE = Recipe(data="digits", img_size=16, crop_padding=2, batch_size=256, lr=0.1, epochs=1)
NARROW = ("channels=[8,8,16,16]",)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub folder with resnet20_dia and resnet18_asr, the latter folded too, and their runs."""
    folder = tmp_path_factory.mktemp("hub")
    runs = folder.parent / f"{folder.name}_runs"
    train("resnet20_dia", RECIPE, runs / "dia")
    train("resnet18_asr", Recipe(**{**RECIPE.__dict__, "model_kwargs": NARROW}), runs / "asr")
    export(runs / "dia", "sgd_digits", folder)
    export(runs / "asr", "sgd_digits", folder)
    return folder, runs


def test_export_lays_out_repositories(hub):
    folder, _ = hub
    names = {p.name for p in folder.iterdir()}
    folded = "resnet18.asr_sgd_digits_folded"
    fused = "resnet20_dia.sgd_digits_folded"
    assert names == {"resnet20_dia.sgd_digits", fused, "resnet18_asr.sgd_digits", folded, "index.json"}
    for name in names - {"index.json"}:
        assert {"config.json", "model.safetensors", "README.md", "curves.png"} <= {
            p.name for p in (folder / name).iterdir()
        }
    config = json.loads((folder / folded / "config.json").read_text())
    assert config["architecture"] == "resnet18"
    assert config["model_args"]["channels"] == [8, 8, 16, 16]
    assert "num_classes" not in config["model_args"]
    assert config["pretrained_cfg"]["tag"] == "asr_sgd_digits_folded"


def test_index_agrees_with_files_and_cards(hub):
    folder, _ = hub
    checkpoints = {c.name: c for c in read_index(folder)}
    assert len(checkpoints) == 4
    for checkpoint in checkpoints.values():
        assert set(checkpoint.files) == {p.name for p in checkpoint.folder.iterdir()}
        for name in checkpoint.files:
            assert checkpoint.verified(name).is_file()
        card = huggingface_hub.ModelCard.load(checkpoint.folder / "README.md")
        assert (card.data["library_name"], card.data.license) == ("timm", "apache-2.0")
        assert card.data.eval_results[0].metric_value == pytest.approx(checkpoint.metrics["top1"], abs=1e-4)
        assert f"| top-1 | {checkpoint.metrics['top1']:.2f} % |" in card.text
        assert "n = 1 (seed 0)" in card.text
    for trained, folded in (
        ("resnet18_asr.sgd_digits", "resnet18.asr_sgd_digits_folded"),
        ("resnet20_dia.sgd_digits", "resnet20_dia.sgd_digits_folded"),
    ):
        trained, folded = checkpoints[trained], checkpoints[folded]
        assert folded.folded_from == trained.name
        assert folded.metrics["parameters"] < trained.metrics["parameters"]
        assert 0 < folded.metrics["logit_difference"] <= 1e-5
        assert folded.metrics["top1"] == trained.metrics["top1"]
    assert checkpoints["resnet20_dia.sgd_digits_folded"].model_args["folded"] is True


def card_of(mechanism: str, *options: str, **changes) -> str:
    """The card of a checkpoint like the shipped resnet20_asr."""
    shipped = next(c for c in read_index(ROOT / "hub") if c.name == "resnet20_asr.sgd5_c10")
    recipe = yaml.safe_load((shipped.folder / "recipe.yaml").read_text())
    details = {**shipped.details, "mechanism": mechanism}
    return card(replace(shipped, details=details, **changes), {**recipe, "model_kwargs": list(options)})


def test_a_card_says_which_options_there_were_and_what_is_left():
    assert "Architecture `resnet20_asr` with `delta=2`, `generator=eca`, trained on" in card_of(
        "asr", "delta=2", "generator=eca"
    )
    folded = {"architecture": "resnet20", "folded_from": "resnet20_asr.x"}
    assert "form of `resnet20_asr.x` with `delta=2`, a plain network" in card_of("asr", "delta=2", **folded)
    for changes in (
        {"architecture": "resnet20_se", "folded_from": "resnet20_asr_se.x"},
        {**folded, "model_args": {"block_args": {"attn_layer": "eca"}}},
    ):
        text = card_of("asr_se", **changes)
        assert "a network with only the attention that stood on top" in text and "plain network" not in text
    assert "SE on top of it, which stays" in card_of("asr_se", architecture="resnet20_asr_se")


def test_names_find_weights_without_network(hub):
    folder, runs = hub
    code = f"""
import socket
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
import timm, timm_attn, torch
x = torch.randn(2, 3, 16, 16)
for name, run in (("resnet20_dia", "dia"), ("resnet20_dia.sgd_digits", "dia"), ("resnet18_asr", "asr"), ("resnet18_asr.sgd_digits", "asr")):
    model = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(model(x), timm.create_model("local-dir:{runs}/" + run, pretrained=True).eval()(x))
    assert model.pretrained_cfg["input_size"] == [3, 16, 16] or model.pretrained_cfg["input_size"] == (3, 16, 16)
assert "resnet20_dia.sgd_digits" in timm.list_models("resnet20_dia*", pretrained=True)
assert timm.models.get_pretrained_cfg("resnet20_dia").tag == "sgd_digits"
fused = timm.create_model("resnet20_dia.sgd_digits_folded", pretrained=True).eval()
whole = timm.create_model("resnet20_dia", pretrained=True).eval()
assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
torch.testing.assert_close(fused(x), whole(x), rtol=1e-4, atol=1e-4)
ten, five = (timm.create_model("resnet20_dia", pretrained=True, **k) for k in ({{}}, dict(num_classes=5, in_chans=1)))
assert torch.equal(ten.layer3[2].conv2.weight, five.layer3[2].conv2.weight) and five(x[:, :1]).shape == (2, 5)
features = timm.create_model("resnet20_dia", pretrained=True, features_only=True)
assert torch.equal(features.layer3[2].conv2.weight, ten.layer3[2].conv2.weight)
"""
    result = python("-c", code, env={"TIMM_ATTN_HUB": str(folder)})
    assert result.returncode == 0, result.stderr


def test_folded_imagenet_network_needs_only_timm(hub):
    folder, runs = hub
    x = torch.randn(2, 3, 16, 16)
    torch.save(x, runs / "x.pt")
    code = f"""
import sys, timm, torch
model = timm.create_model("local-dir:{folder}/resnet18.asr_sgd_digits_folded", pretrained=True).eval()
assert not [m for m in sys.modules if m.startswith("timm_attn")]
torch.save(model(torch.load("{runs}/x.pt")), "{runs}/y.pt")
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    expected = load_model(str(runs / "asr"))(x)
    torch.testing.assert_close(
        torch.load(runs / "y.pt"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


@pytest.mark.parametrize("damage", ["bytes", "missing", "index"])
def test_damaged_weights_are_never_loaded(damage, hub, tmp_path):
    folder = shutil.copytree(hub[0], tmp_path / "hub")
    weights = folder / "resnet20_dia.sgd_digits" / "model.safetensors"
    if damage == "bytes":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "index.json").write_text("{")
    code = "import timm, timm_attn; timm.create_model('resnet20_dia.sgd_digits', pretrained=True)"
    result = python("-W", "ignore", "-c", code, env={"TIMM_ATTN_HUB": str(folder)})
    assert result.returncode != 0
    expected = {
        "bytes": "is damaged: its sha256",
        "missing": "is missing: restore it",
        "index": "no pretrained weights|Invalid",
    }
    assert any(part in result.stderr for part in expected[damage].split("|")), result.stderr


def test_a_checkpoint_that_does_not_fit_is_refused(hub, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(hub[0] / "resnet20_dia.sgd_digits" / "model.safetensors")
    del state["layer1.0.dia.x_reduce.weight"]
    save_file(state, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 10}
    for options in ({}, {"num_classes": 3}, {"features_only": True}, {"in_chans": 1}, {"num_classes": 0}):
        with pytest.raises(RuntimeError, match=r"missing \['layer1.0.dia.x_reduce.weight'\]"):
            timm.create_model("resnet20_dia", pretrained=True, pretrained_cfg_overlay=overlay, **options)


def test_no_weights_is_an_error_with_the_fix():
    with pytest.raises(WeightsError, match="no pretrained weights for fmmnet152 .*TIMM_ATTN_HUB"):
        timm.create_model("fmmnet152", pretrained=True)


def test_export_refuses_what_is_there_and_leaves_nothing_of_a_failure(hub, tmp_path, monkeypatch):
    folder, runs = hub
    with pytest.raises(UserError, match="is there already"):
        export(runs / "dia", "sgd_digits", folder)
    with pytest.raises(UserError, match="must be letters"):
        export(runs / "dia", "a/b", folder)
    with pytest.raises(UserError, match="not a folder"):
        export(runs / "dia", "x", tmp_path / "hub", data="./gone")
    assert not list((tmp_path / "hub").glob("*"))
    with pytest.raises(UserError, match="is not a run folder"):
        export(tmp_path, "x", folder)


# ----------------------------------------------------------------------------------------------- publish


@pytest.fixture
def server(monkeypatch):
    tokens = {"hf_alice": {"name": "alice", "orgs": {"my-org": "write", "other-org": "read"}}}
    with HubServer(tokens=tokens) as hub_server:
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.endpoint)
        yield hub_server


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_publish_is_one_commit_that_loads_back(hub, server):
    folder = hub[0] / "resnet20_dia.sgd_digits"
    info = publish(folder, "my-org")
    assert info.commit_url
    repository = server.files("my-org/resnet20_dia.sgd_digits")
    uploaded = {name: content for name, content in repository.items() if name != ".gitattributes"}
    expected = files(folder)
    card = expected.pop("README.md").replace(b"{ORG}", b"my-org")
    assert uploaded.pop("README.md") == card
    assert uploaded == expected
    commits = [path for method, path in server.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 1
    code = f"""
import timm, timm_attn, torch
x = torch.randn(2, 3, 16, 16)
model = timm.create_model("hf-hub:my-org/resnet20_dia.sgd_digits", pretrained=True).eval()
assert torch.equal(model(x), timm.create_model("local-dir:{folder}", pretrained=True).eval()(x))
"""
    result = python("-c", code, env={"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_alice"})
    assert result.returncode == 0, result.stderr


def test_a_folded_repository_needs_only_timm(hub, server):
    publish(hub[0] / "resnet18.asr_sgd_digits_folded", "my-org")
    code = "import timm; print(timm.create_model('hf-hub:my-org/resnet18.asr_sgd_digits_folded', pretrained=True).num_classes)"
    result = python("-c", code, env={"HF_ENDPOINT": server.endpoint})
    assert result.stdout == "10\n", result.stderr


@pytest.mark.parametrize(
    ("to", "message"), [("other-org", "no right to write there"), ("nobody", "no right to write")]
)
def test_publishing_without_rights_leaves_nothing(to, message, hub, server):
    with pytest.raises(UserError, match=f"cannot publish {to}/resnet20_dia.sgd_digits: .*{message}"):
        publish(hub[0] / "resnet20_dia.sgd_digits", to)
    assert not [path for method, path in server.requests if "/commit/" in path]


def test_publishing_without_a_token(hub, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="log in with"):
        publish(hub[0] / "resnet20_dia.sgd_digits", "my-org")


def test_a_concurrent_commit_stops_the_upload(hub, server):
    name = "my-org/resnet20_dia.sgd_digits"
    server.put_files(name, {"README.md": b"---\nlicense: mit\n---\nolder"})

    def meanwhile(repo_id: str) -> None:
        server.before_commit = None
        server.put_files(repo_id, {"note.txt": b"hello"})

    server.before_commit = meanwhile
    with pytest.raises(UserError, match="somebody else committed"):
        publish(hub[0] / "resnet20_dia.sgd_digits", "my-org")
    assert set(server.files(name)) - {".gitattributes"} == {"README.md", "note.txt"}
    publish(hub[0] / "resnet20_dia.sgd_digits", "my-org")
    assert "model.safetensors" in server.files(name)


def test_a_failing_commit_uploads_no_part(hub, server):
    server.fail_at(1, 500, match="/commit/")
    with pytest.raises(UserError, match="no file was committed"):
        publish(hub[0] / "resnet20_dia.sgd_digits", "my-org")
    assert set(server.files("my-org/resnet20_dia.sgd_digits")) <= {".gitattributes"}


@pytest.mark.parametrize("damage", ["weights", "config", "card"])
def test_a_damaged_folder_is_not_published(damage, hub, server, tmp_path):
    folder = shutil.copytree(hub[0], tmp_path / "hub") / "resnet20_dia.sgd_digits"
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(flip_last_bit((folder / "model.safetensors").read_bytes()))
    elif damage == "config":
        (folder / "config.json").unlink()
    else:
        (folder / "README.md").write_text("changed")
    with pytest.raises((UserError, WeightsError), match=r"damaged|no config\.json"):
        publish(folder, "my-org")
    assert not server.requests


# ------------------------------------------------------------------------------------------------- wheel


def test_wheel_carries_the_shipped_weights(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "timm_attn/py.typed" in names and not [n for n in names if n.startswith(("tests/", "scripts/"))]
    shipped = read_index(ROOT / "hub")
    for checkpoint in shipped:
        assert (
            sha256(site / "timm_attn/hub" / checkpoint.name / "model.safetensors")
            == (checkpoint.files["model.safetensors"]["sha256"])
        )
    code = """
import sys, timm, timm_attn
assert timm_attn.__file__.startswith(sys.argv[1]), timm_attn.__file__
for name in sys.argv[2:]:
    model = timm.create_model(name, pretrained=True)
    assert model.pretrained_cfg["file"].startswith(sys.argv[1])
"""
    own = [c.name for c in shipped]
    result = python(
        "-c", code, str(site), *own, env={"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
