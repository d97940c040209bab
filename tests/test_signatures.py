"""Weights that are signed, by whom, and what is refused where a signer is asked for."""

import shutil

import huggingface_hub
import pytest
import timm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from forked import run_code
from helpers import ROOT, flip_last_bit, use_hub
from hub_server import HubServer

from timm_attn import cli
from timm_attn.errors import UserError
from timm_attn.load import load_model
from timm_attn.weights import SIGNATURE, SIGNER, WeightsError, read_index, sign

NAME = "resnet20.cpu_c10"


def make_key(folder, name):
    """The files of a private key and of its public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    plain = serialization.NoEncryption()
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return make_key(tmp_path, "ours"), make_key(tmp_path, "theirs")


def test_a_folder_with_the_right_signature_loads_and_no_other(tmp_path, keys, monkeypatch):
    (private, public), (_, stranger) = keys
    folder = tmp_path / "net"
    shutil.copytree(ROOT / "hub" / NAME, folder)
    monkeypatch.setenv(SIGNER, str(public))
    with pytest.raises(WeightsError, match=f"has no {SIGNATURE}, and {SIGNER} asks for one"):
        load_model(str(folder))
    signature = sign(folder, str(private)).read_bytes()
    load_model(str(folder))
    assert sign(folder, str(private)).read_bytes() == signature  # another would be another version
    monkeypatch.setenv(SIGNER, str(stranger))
    with pytest.raises(WeightsError, match="does not carry the signature of"):
        load_model(str(folder))
    monkeypatch.setenv(SIGNER, str(public))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(flip_last_bit(weights))
    with pytest.raises(WeightsError, match=r"Hash mismatch for 'model.safetensors'"):
        load_model(str(folder))
    monkeypatch.delenv(SIGNER)
    load_model(str(folder))
    (folder / "model.safetensors").write_bytes(weights)
    (tmp_path / "my keys").mkdir()
    monkeypatch.setenv(SIGNER, str(shutil.copy(public, tmp_path / "my keys")))
    load_model(str(folder))
    monkeypatch.delenv(SIGNER)
    load_model("resnet20")  # what ships is exempt
    with pytest.raises(UserError, match="cannot sign"):
        sign(folder, str(tmp_path / "no.pem"))


def test_published_with_a_signature_and_loaded_by_name_and_repository(tmp_path, keys, monkeypatch):
    (private, public), (_, stranger) = keys
    hub = shutil.copytree(ROOT / "hub", tmp_path / "hub", ignore=shutil.ignore_patterns("results"))
    with HubServer(tokens={"hf_a": {"name": "alice", "orgs": {}}}) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_a")
        use_hub(monkeypatch, server.endpoint)
        cli.main(["publish", str(hub / NAME), "--to", "alice", "--sign", str(private)])
        assert SIGNATURE in server.files(f"alice/{NAME}")
        (entry,) = (c for c in read_index(hub) if c.name == NAME)
        assert SIGNATURE in entry.files and entry.revision
        (hub / NAME / SIGNATURE).write_bytes(b"of a run that broke off")
        cli.main(["publish", str(hub / NAME), "--to", "alice", "--sign", str(private)])
        cli.main(["publish", str(hub / NAME), "--to", "alice", "--sign", str(private)])
        refs = huggingface_hub.HfApi().list_repo_refs(f"alice/{NAME}")
        assert sorted(tag.name for tag in refs.tags) == ["v1", "v2"]
        shutil.rmtree(hub / NAME)  # as the index travels without weights
        code = f"""
import sys, timm, timm_attn
from timm_attn.load import load_model
for name in ("{NAME}", "hf-hub:alice/{NAME}"):
    try:
        load_model(name)
        print("loaded")
    except timm_attn.WeightsError as error:
        print(error)
"""
        env = {"HF_ENDPOINT": server.endpoint, "TIMM_ATTN_HUB": str(hub), "HF_TOKEN": "hf_a"}
        for signer, part in ((public, "loaded"), (stranger, "does not carry the signature")):
            env |= {SIGNER: str(signer), "HF_HOME": str(tmp_path / f"home of {signer.name}")}
            done = run_code(code, cwd=tmp_path, env=env)
            lines = done.stdout.splitlines()
            assert len(lines) == 2 and all(part in line for line in lines), (lines, done.stderr[-2000:])
    assert timm.is_model("resnet20")
