"""Weights from a Hub-compatible server: found by plain name, pinned, hashed, and quick to say no."""

import json
from importlib import import_module

import huggingface_hub
import pytest
import timm
import torch
from forked import run_code
from helpers import flip_last_bit, narrow, randomise, use_hub
from hub_server import HubServer, nobody
from safetensors.torch import save
from test_pretrained import write_hub

from timm_attn.load import load_model
from timm_attn.weights import CONFIG, NoSuchFile, WeightsError, fetch_folder, sha256, shipped_folder
from timm_attn.weights.fetch import NotOnHub, fetch

REPO = "some-org/resnet20_dia.x"
SHIPPED = shipped_folder() / "resnet20_dia.cpu_c10"
CREATE = "import sys, timm, timm_attn, torch; torch.save(timm.create_model(sys.argv[1], pretrained=True).state_dict(), sys.argv[2])"


@pytest.fixture
def server():
    with HubServer(tokens={"hf_alice0000": {"name": "alice", "orgs": {"my-org": "write"}}}) as hub_server:
        yield hub_server


@pytest.fixture
def client(server, monkeypatch, tmp_path):
    """This process talks to the server, with an empty cache."""
    use_hub(monkeypatch, server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return server


@pytest.fixture
def nowhere():
    """An address without a server."""
    with nobody() as endpoint:
        yield endpoint


@pytest.fixture
def state():
    return randomise(narrow("resnet20_dia")).state_dict()


@pytest.fixture
def hub(server, state, tmp_path):
    """A hub folder whose index names a repository, without the weights."""
    content = save(state)
    revision = server.put_files(REPO, {"model.safetensors": content})
    folder = write_hub(tmp_path / "hub", ["resnet20_dia"], states={"resnet20_dia": state})
    index = json.loads((folder / "index.json").read_text())
    entry = index["checkpoints"]["resnet20_dia.x"]
    entry |= {"repo_id": REPO, "revision": revision}
    (folder / "index.json").write_text(json.dumps(index))
    weights = folder / "resnet20_dia.x" / "model.safetensors"
    assert sha256(weights) == entry["files"]["model.safetensors"]["sha256"]
    weights.unlink()
    return folder


def create(hub, out, cache, endpoint, name="resnet20_dia.x", **env):
    env = {"TIMM_ATTN_HUB": str(hub), "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), **env}
    return run_code(CREATE, name, str(out), env=env)


def test_a_plain_name_is_downloaded_once_and_then_served_offline(server, hub, state, tmp_path):
    out, cache = tmp_path / "out.pt", tmp_path / "cache"
    # What is newest in the repository is not what the index names.
    server.put_files(REPO, {"model.safetensors": save({"x": torch.zeros(1)})})
    result = create(hub, out, cache, server.endpoint)
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(tensor, state[key]) for key, tensor in torch.load(out).items())
    asked = len(server.requests)
    assert [method for method, _ in server.requests].count("GET") == 1
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        out.unlink()
        result = create(hub, out, cache, server.endpoint, "resnet20_dia", **env)
        assert result.returncode == 0 and out.is_file(), result.stderr
    assert len(server.requests) == asked


def test_without_network_and_cache_it_fails_soon_and_says_how_to_get_the_file(hub, nowhere, tmp_path):
    for env, reason in (({}, "Connect"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        result = create(hub, tmp_path / "out.pt", tmp_path / "cache", nowhere, **env)
        assert result.returncode and not (tmp_path / "out.pt").exists()
        message = result.stderr.splitlines()[-1]
        assert message.startswith("timm_attn.weights.schema.WeightsError: cannot get model.safetensors of"), (
            message
        )
        for part in (
            reason,
            REPO,
            nowhere,
            f"hf download {REPO} model.safetensors --revision",
            "TIMM_ATTN_HUB",
        ):
            assert part in message, (part, message)
        assert "Retrying" not in result.stderr  # which the client does for a minute


def test_a_slow_hub_is_not_waited_for(client, monkeypatch):
    module = import_module("timm_attn.weights.fetch")  # the package has the function under that name
    assert module.PATIENCE == 5
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    client.put_files(REPO, {"model.safetensors": b"x"})
    client.slow_down(3, match="/resolve/")  # one who waited would have the file
    with pytest.raises(WeightsError, match="Timeout"):
        fetch(REPO, "model.safetensors")
    assert len(client.requests) == 1


@pytest.mark.parametrize("status", [500, 503, None])
def test_a_failing_hub_is_asked_once(status, client):
    client.put_files(REPO, {"model.safetensors": b"x"})
    client.fail_reads(status)
    with pytest.raises(WeightsError, match="cannot get model.safetensors of"):
        fetch(REPO, "model.safetensors")
    assert len(client.requests) == 1


def test_wrong_bytes_of_the_right_size_are_not_used_and_not_kept(client, tmp_path):
    revision = client.put_files(REPO, {"model.safetensors": bytes(1000)})
    client.corrupt(REPO, "model.safetensors")
    for pinned in (revision, None):
        digest = sha256_of(bytes(1000)) if pinned else None
        with pytest.raises(WeightsError, match="is damaged: what was downloaded"):
            fetch(REPO, "model.safetensors", pinned, digest)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size == 1000]


def test_a_branch_is_asked_for_each_time_and_a_commit_once(client):
    revision = client.put_files(REPO, {"model.safetensors": b"old"})
    assert fetch(REPO, "model.safetensors", "main").read_bytes() == b"old"
    assert fetch(REPO, "model.safetensors", revision).read_bytes() == b"old"
    client.put_files(REPO, {"model.safetensors": b"new"})
    assert fetch(REPO, "model.safetensors", "main").read_bytes() == b"new"
    asked = len(client.requests)
    assert fetch(REPO, "model.safetensors", revision).read_bytes() == b"old"
    assert len(client.requests) == asked
    client.fail_reads(None)
    assert fetch(REPO, "model.safetensors", "main").read_bytes() == b"new"


def sha256_of(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_a_damaged_cache_is_downloaded_anew_and_refused_offline(client, monkeypatch):
    revision = client.put_files(REPO, {"model.safetensors": bytes(1000)})
    digest = sha256_of(bytes(1000))
    path = fetch(REPO, "model.safetensors", revision, digest)
    path.resolve().write_bytes(flip_last_bit(bytes(1000)))
    assert fetch(REPO, "model.safetensors", revision, digest).read_bytes() == bytes(1000)
    path.resolve().write_bytes(flip_last_bit(bytes(1000)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="holds a damaged copy"):
        fetch(REPO, "model.safetensors", revision, digest)


def test_a_connection_that_breaks_in_the_middle_of_a_download(client):
    content = bytes(range(256)) * 4000
    revision = client.put_files(REPO, {"model.safetensors": content})
    client.cut_at(1, match="/resolve/")
    assert fetch(REPO, "model.safetensors", revision, sha256_of(content)).read_bytes() == content
    assert [method for method, _ in client.requests].count("GET") == 2  # the client goes on where it was


@pytest.mark.parametrize(
    ("repo", "filename", "revision", "message", "kind"),
    [
        ("some-org/none", "model.safetensors", None, "has no repository some-org/none", NotOnHub),
        ("some-org/gated", "model.safetensors", None, "some-org/gated is gated: log in", WeightsError),
        (REPO, "model.safetensors", "v9", f"{REPO} has no revision v9", WeightsError),
        (
            REPO,
            "other.safetensors",
            None,
            f"{REPO} has no other.safetensors. Pickled weights are not read",
            NoSuchFile,
        ),
        (REPO, "config.json", None, f"{REPO} has no config.json: ask", NoSuchFile),
    ],
)
def test_what_is_not_there(repo, filename, revision, message, kind, client):
    client.put_files(REPO, {"model.safetensors": b"x"})
    client.put_files("some-org/gated", {"model.safetensors": b"x"})
    client.gate("some-org/gated")
    with pytest.raises(WeightsError, match=message) as raised:
        fetch(repo, filename, revision)
    assert raised.type is kind


def test_a_repository_with_only_pickles_is_refused(client, tmp_path):
    files = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."}
    client.put_files(REPO, files)
    with pytest.raises(WeightsError, match="has no model.safetensors. Pickled weights are not read"):
        load_model(f"hf-hub:{REPO}")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match="pytorch_model.bin is not read, as pickles can run code"):
        load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["../x", "x", "a/b/c", "some-org/..", "/etc"])
def test_names_that_are_no_repositories(name, client):
    with pytest.raises(WeightsError, match="must be ORG/NAME"):
        fetch_folder(name)
    assert not client.requests


def test_an_organisation_takes_the_place_of_the_index(server, nowhere, tmp_path):
    own = timm.create_model("resnet20_dia", pretrained=True).state_dict()
    theirs = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in own.items()}
    files = {"model.safetensors": save(theirs), "config.json": (SHIPPED / CONFIG).read_bytes()}
    server.put_files("other-org/resnet20_dia.cpu_c10", files)
    out, cache = tmp_path / "out.pt", tmp_path / "cache"
    # Theirs, at its newest; what ships where they have nothing.
    for name, expected in (("resnet20_dia", theirs), ("resnet20_asr", None)):
        result = create("other-org", out, cache, server.endpoint, name)
        assert result.returncode == 0, result.stderr
        warned = f"is taken for an organisation of the Hub; as it has no {name}.cpu_c10, the package's own"
        assert (warned in result.stderr) == (expected is None), result.stderr
        expected = expected or timm.create_model(name, pretrained=True).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in torch.load(out).items())
    # Without a connection the cache answers, and what ships is not taken in its stead.
    result = create("other-org", out, cache, nowhere, "resnet20_dia")
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(out)["fc.bias"], theirs["fc.bias"])
    result = create("other-org", out, cache, nowhere, "resnet20_asr")
    assert "cannot get config.json of other-org/resnet20_asr.cpu_c10" in result.stderr


def test_an_organisations_weights_go_with_its_own_configuration(server, tmp_path):
    own = json.loads((SHIPPED / CONFIG).read_text())
    arguments = {"channels": [8, 16, 24], "layers": [2, 1, 2], "reduction": 2}
    theirs = randomise(timm.create_model("resnet20_dia", num_classes=7, **arguments))
    changed = {"num_classes": 7, "label_names": None}
    config = own | changed | {"model_args": arguments}
    config["pretrained_cfg"] = own["pretrained_cfg"] | changed | {"mean": [0.1, 0.2, 0.3]}
    name = "other-org/resnet20_dia.cpu_c10"
    files = {"model.safetensors": save(theirs.state_dict()), "config.json": json.dumps(config).encode()}
    server.put_files(name, files)
    out, cache = tmp_path / "out.pt", tmp_path / "cache"
    code = """
import sys, timm, timm_attn, torch
model = timm.create_model("resnet20_dia", pretrained=True)
torch.save((model.state_dict(), model.pretrained_cfg["mean"]), sys.argv[1])
"""
    env = {"TIMM_ATTN_HUB": "other-org", "HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(cache)}
    result = run_code(code, str(out), env=env)
    assert result.returncode == 0, result.stderr
    state, mean = torch.load(out)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in state.items())
    assert list(mean) == [0.1, 0.2, 0.3]
    # By a tag of theirs that the package's index does not have, too.
    server.put_files("other-org/resnet20_dia.their_own", files)
    result = create("other-org", out, cache, server.endpoint, "resnet20_dia.their_own", HF_TOKEN="")
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(out)["fc.bias"], theirs.state_dict()["fc.bias"])
    result = create("other-org", out, cache, server.endpoint, "resnet20_dia.nobodys")
    assert "has no repository other-org/resnet20_dia.nobodys" in result.stderr
    result = create(
        "other-org", out, tmp_path / "empty", server.endpoint, "resnet20_dia", HF_TOKEN="hf_wrong"
    )
    assert "refuses your token for other-org/resnet20_dia.cpu_c10" in result.stderr
    # What is no such network, or lacks a file, is not replaced by what ships.
    server.put_files(name, {"config.json": json.dumps(config | {"architecture": "resnet20_asr"}).encode()})
    result = create("other-org", out, cache, server.endpoint, "resnet20_dia")
    assert f"{name} holds a resnet20_asr: unset TIMM_ATTN_HUB" in result.stderr
    server.put_files("other-org/resnet20_asr.cpu_c10", {"config.json": (SHIPPED / CONFIG).read_bytes()})
    result = create("other-org", out, cache, server.endpoint, "resnet20_asr")
    assert "has no model.safetensors. Pickled weights are not read" in result.stderr


def test_a_folder_can_be_registered_later(state, tmp_path):
    folder = write_hub(tmp_path / "hub", ["resnet20_dia"], states={"resnet20_dia": state})
    code = f"""
import warnings; warnings.simplefilter("error", UserWarning)
import timm, timm_attn, torch
assert timm_attn.register_folder({str(folder)!r}) == ["resnet20_dia.x"]
assert timm.models.get_pretrained_cfg("resnet20_dia").tag == "x"
assert "resnet20_dia.x" in timm.list_models("resnet20_dia*", pretrained=True)
model = timm.create_model("resnet20_dia", pretrained=True)
torch.save(model.state_dict(), {str(tmp_path / "out.pt")!r})
shipped = timm.create_model("resnet20_dia.cpu_c10", pretrained=True)
assert shipped.num_classes == 10
try:
    timm_attn.register_folder({str(tmp_path)!r})
except timm_attn.WeightsError as error:
    assert "is no hub folder" in str(error)
else:
    raise AssertionError
"""
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(tensor, state[key]) for key, tensor in torch.load(tmp_path / "out.pt").items())
