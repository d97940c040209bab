"""Hub folders: exported, found by name, loaded by plain timm, published to a server on loopback."""

import contextlib
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module

import huggingface_hub
import pytest
import timm
import torch
from forked import run_code
from helpers import ONE_IMAGE, ROOT, python, same, use_hub
from hub_server import HubServer

import timm_attn
from timm_attn.errors import UserError
from timm_attn.load import load_model
from timm_attn.papers import paper_of
from timm_attn.publish import export, publish
from timm_attn.training import Recipe, train, train_seeds, validate
from timm_attn.weights import WeightsError, read_index, sha256, store

exports = import_module("timm_attn.publish.export")  # the package has the function under that name
folders, upload = (import_module(f"timm_attn.publish.{name}") for name in ("folders", "upload"))
RECIPE = Recipe(data="digits", img_size=16, crop_padding=2, batch_size=256, lr=0.1, epochs=1)
# Norm weights of zero would leave branches so small that folding them moves no bit of the logits on some CPUs.
NARROW = ("channels=[8,8,16,16]", "zero_init_last=False")


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
    names = {p.name for p in folder.iterdir()} - {"results.csv", ".index.lock"}
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
        assert set(checkpoint.files) | {"README.md"} == {p.name for p in checkpoint.folder.iterdir()}
        for name in checkpoint.files:
            assert checkpoint.verified(name).is_file()
        card = huggingface_hub.ModelCard.load(checkpoint.folder / "README.md")
        assert (card.data["library_name"], card.data.license) == ("timm", "apache-2.0")
        assert card.data.eval_results[0].metric_value == pytest.approx(checkpoint.metrics["top1"], abs=1e-4)
        assert f"| {checkpoint.metrics['top1']:.2f} |" in card.text and "(seed 0)" in card.text
        assert checkpoint.over_seeds["top1"]["n"] == 1 and checkpoint.dataset["license"] == "cc-by-4.0"
    for trained, folded in (
        ("resnet18_asr.sgd_digits", "resnet18.asr_sgd_digits_folded"),
        ("resnet20_dia.sgd_digits", "resnet20_dia.sgd_digits_folded"),
    ):
        trained, folded = checkpoints[trained], checkpoints[folded]
        assert folded.folded_from == trained.name
        assert folded.metrics["parameters"] < trained.metrics["parameters"]
        assert 0 <= folded.metrics["logit_difference"] <= 1e-5
        assert folded.metrics["top1"] == pytest.approx(trained.metrics["top1"], abs=ONE_IMAGE)
    assert checkpoints["resnet20_dia.sgd_digits_folded"].model_args["folded"] is True


def test_of_several_seeds_the_median_is_exported_and_all_are_measured(tmp_path):
    runs = tmp_path / "runs"
    recipe = dataclasses.replace(RECIPE, model_kwargs=("layers=[1,1,1]",))
    train_seeds("resnet20_asr", recipe, runs, (0, 1, 2))
    found = [validate(load_model(str(runs / f"seed-{seed}")), recipe)["top1"] for seed in range(3)]
    for n, place in ((3, 1), (2, 0)):  # of two the lower one
        tops = found[:n]
        (runs / "seeds.json").write_text(json.dumps({"model": "resnet20_asr", "seeds": [*range(n)]}))
        export(runs, f"of{n}", tmp_path / "hub")
        seed = sorted(range(n), key=tops.__getitem__)[place]
        forms = [c for c in read_index(tmp_path / "hub") if f"of{n}" in c.tag]
        assert len(forms) == 2
        for checkpoint in forms:
            assert (checkpoint.metrics["top1"], checkpoint.metrics["seed"]) == (tops[seed], seed)
            over = checkpoint.over_seeds
            assert over["seeds"] == [*range(n)] and over["top1"]["n"] == n
            assert over["top1"]["mean"] == pytest.approx(statistics.mean(tops))
            assert over["top1"]["std"] == pytest.approx(statistics.stdev(tops))
        kept = load_model(str(runs / f"seed-{seed}")).state_dict()
        assert same(kept, load_model(f"local-dir:{tmp_path}/hub/resnet20_asr.of{n}").state_dict())


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
    result = run_code(code, env={"TIMM_ATTN_HUB": str(folder)})
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
    result = run_code(code)
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
    result = run_code(code, env={"TIMM_ATTN_HUB": str(folder)})
    assert result.returncode != 0
    expected = {
        "bytes": "is damaged: its sha256",
        "missing": "is missing: restore it",
        "index": "index.json cannot be read",
    }
    assert expected[damage] in result.stderr
    if damage == "index":  # what ships is not taken in the stead of a folder that the user names
        code = "import timm, timm_attn; timm.create_model('resnet20_dia', pretrained=True)"
        for hub_folder in (folder, folder / "index.json", tmp_path / "nothing"):
            result = run_code(code, env={"TIMM_ATTN_HUB": str(hub_folder)})
            assert "WeightsError: " in result.stderr and str(hub_folder) in result.stderr
        code = f"import timm, timm_attn; timm.create_model('local-dir:{hub[1]}/dia', pretrained=True)"
        assert run_code(code, env={"TIMM_ATTN_HUB": str(folder)}).returncode == 0


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


def test_a_missing_or_broken_index_of_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "shipped_folder", lambda: tmp_path)
    monkeypatch.setattr(store, "candidates", cache(store.candidates.__wrapped__))
    monkeypatch.setattr(store, "_chosen", lambda: (None, None))
    with pytest.raises(WeightsError, match=f"looked in .*{tmp_path}, which has no index.json"):
        store.resolve("resnet20_dia", {})
    (tmp_path / "index.json").write_text('{"checkpoints"')
    store.candidates.cache_clear()
    with pytest.warns(UserWarning, match="ignored"), pytest.raises(WeightsError, match="cannot be read"):
        store.resolve("resnet20_dia", {})


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


def test_two_exports_at_once_keep_each_others_work(hub, tmp_path, monkeypatch):
    _, runs = hub
    folder, waiting = tmp_path / "hub", []

    def late(*arguments, original=folders.add):  # all is measured, then another one ends
        if waiting:
            with monkeypatch.context() as another_process:
                another_process.setattr(folders.os, "getpid", lambda: 1)
                export(runs / "dia", waiting.pop(), folder)
        return original(*arguments)

    monkeypatch.setattr(exports, "add", late)
    waiting.append("b")
    export(runs / "dia", "a", folder)
    waiting.append("c")
    with pytest.raises(UserError, match=r"resnet20_dia\.c has been written meanwhile: choose another --tag"):
        export(runs / "dia", "c", folder)
    names = {f"resnet20_dia.{tag}{form}" for tag in "abc" for form in ("", "_folded")}
    assert {c.name for c in read_index(folder)} == names
    assert {p.name for p in folder.iterdir() if p.is_dir()} == names


@pytest.fixture
def copied_hub(hub, tmp_path, monkeypatch):
    """A hub folder, and a function that adds a checkpoint of a tag to it."""
    source, folder = hub[0], tmp_path / "hub"
    shutil.copytree(source, folder)

    def add(tag):
        name = f"resnet20_dia.{tag}"
        with folders.new_folders(folder, [name]) as (new,):
            for path in (source / "resnet20_dia.sgd_digits").iterdir():
                if path.is_file():
                    shutil.copy(path, new)
            (entry,) = (c for c in read_index(source) if c.name == "resnet20_dia.sgd_digits")
            place = {"name": name, "tag": tag, "folder": folder / name}
            folders.add(folder, {new: dataclasses.replace(entry, **place)})

    return folder, add


def meeting(read, both):
    """``read_index`` that waits for the other reader, unless a lock has that wait."""

    def together(folder):
        found = read(folder)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)
        return found

    return together


def test_an_index_is_extended_by_one_at_a_time(copied_hub, monkeypatch):
    folder, add = copied_hub
    monkeypatch.setattr(folders, "read_index", meeting(folders.read_index, threading.Barrier(2)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(add, ("a", "b")))
    assert {"resnet20_dia.a", "resnet20_dia.b"} < {c.name for c in read_index(folder)}


def test_publishing_notes_its_revision_beside_an_export(copied_hub, monkeypatch):
    folder, add = copied_hub
    both = threading.Barrier(2)
    for module in (folders, upload):
        monkeypatch.setattr(module, "read_index", meeting(module.read_index, both))
    published = next(c for c in read_index(folder) if c.name == "resnet20_dia.sgd_digits")
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(add, "a"), pool.submit(upload._note, published, "us/net", "f" * 40)]
        [one.result() for one in done]
    found = {c.name: c for c in read_index(folder)}
    assert "resnet20_dia.a" in found and found["resnet20_dia.sgd_digits"].revision == "f" * 40


def test_a_neighbour_that_differs_is_found_before_anything_is_added(copied_hub, hub):
    folder, add = copied_hub
    path = folder / "resnet18_asr.sgd_digits" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.5
    path.write_text(json.dumps(config))
    before = {p.name for p in folder.iterdir()} | {".index.lock"}
    for call in (lambda: add("a"), lambda: export(hub[1] / "dia", "t", folder)):
        with pytest.raises(UserError, match=r"resnet18_asr.sgd_digits/config.json differs from the index"):
            call()
        assert {p.name for p in folder.iterdir()} == before


def test_images_of_another_place_are_compared_with_the_runs(hub, tmp_path):
    _, runs = hub
    run = shutil.copytree(runs / "dia", tmp_path / "run")
    environment = json.loads((run / "environment.json").read_text())
    environment["fingerprints"]["test"] = "0" * 32
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.warns(
        UserWarning, match=r"test of digits is not, byte for byte, what .*run was evaluated on"
    ):
        export(run, "t", tmp_path / "hub", data="digits")
    with warnings.catch_warnings(action="error"):
        exports._evaluation(runs / "dia", "digits")


@pytest.mark.parametrize(
    ("architecture", "mechanism", "caveat"),
    [
        ("vit_tiny_patch16_224_dia", "dia", "in vit_tiny_patch16_224 is this package's choice"),
        ("convnext_atto_ssia", "ssia", "Re-implemented from the abstract"),
        ("preresnet164_dia", "dia", ""),
        ("resnet26_dia", "dia", ""),  # in no table of this package
        ("resnetv2_50_asr", "asr", ""),
        ("efficientnet_b0_se", "se", ""),
        ("resnet50_eca", "eca", ""),
        ("convnext_atto", "timm", ""),
    ],
)
def test_a_card_says_what_is_not_the_papers(architecture, mechanism, caveat):
    if mechanism != "timm":
        timm_attn.register(architecture.removesuffix(f"_{mechanism}"), mechanism)
    found = exports._caveats(architecture, paper_of(mechanism))
    assert len(found) == bool(caveat) and caveat in "".join(found)
    assert paper_of("eca").summary == "timm's `eca` at the end of every residual branch, as a baseline."


def test_an_index_of_other_software_is_none_of_ours(hub, tmp_path):
    folder, _ = hub
    shutil.copytree(folder / "resnet20_dia.sgd_digits", tmp_path / "site" / "model")
    (tmp_path / "site" / "index.json").write_text('{"pages": []}')
    timm.create_model(f"local-dir:{tmp_path / 'site' / 'model'}", pretrained=True)
    load_model(str(tmp_path / "site" / "model"))


# ------------------------------------------------------------------------------- loaded by other libraries


@pytest.fixture
def server(hub, monkeypatch, tmp_path):
    """A server with the folded ResNet-18 and the ResNet-20 with DIA."""
    with HubServer(tokens={"hf_alice0000": {"name": "alice", "orgs": {"my-org": "write"}}}) as hub_server:
        monkeypatch.setenv("HF_TOKEN", "hf_alice0000")
        use_hub(monkeypatch, hub_server.endpoint)
        copy = shutil.copytree(hub[0], tmp_path / "hub")
        publish([copy / "resnet18.asr_sgd_digits_folded", copy / "resnet20_dia.sgd_digits"], "my-org")
        yield hub_server


def test_a_folded_repository_needs_only_timm(server):
    code = """
import sys, timm
assert timm.create_model('hf-hub:my-org/resnet18.asr_sgd_digits_folded', pretrained=True).num_classes == 10
assert not [m for m in sys.modules if m.startswith("timm_attn")]
"""
    result = run_code(code, env={"HF_ENDPOINT": server.endpoint})
    assert result.returncode == 0, result.stderr


def test_a_published_repository_loads_with_the_plugin(hub, server):
    code = f"""
import timm, timm_attn, torch
x = torch.randn(2, 3, 16, 16)
model = timm.create_model("hf-hub:my-org/resnet20_dia.sgd_digits", pretrained=True).eval()
assert torch.equal(model(x), timm.create_model("local-dir:{hub[0]}/resnet20_dia.sgd_digits", pretrained=True).eval()(x))
"""
    result = run_code(code, env={"HF_ENDPOINT": server.endpoint})
    assert result.returncode == 0, result.stderr


TRANSFORMERS = """
import sys, torch, timm
name, plugin = sys.argv[1:]
if plugin:
    import timm_attn
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
x = torch.randn(2, 3, 16, 16)
model = AutoModelForImageClassification.from_pretrained(name).eval()
expected = timm.create_model("hf-hub:" + name, pretrained=True).eval()
with torch.no_grad():
    assert torch.equal(model(x).logits, expected(x))
assert plugin or not [m for m in sys.modules if m.startswith("timm_attn")]
found = pipeline("image-classification", model=name)(Image.new("RGB", (16, 16)))
assert {row["label"] for row in found} <= set("0123456789"), found
"""


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("name", "plugin"), [("resnet18.asr_sgd_digits_folded", ""), ("resnet20_dia.sgd_digits", "plugin")]
)
def test_transformers_reads_it(name, plugin, server, tmp_path):
    pytest.importorskip("transformers")
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
    result = run_code(TRANSFORMERS, f"my-org/{name}", plugin, env=env)
    assert result.returncode == 0, result.stderr


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
