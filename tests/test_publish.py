"""Publishing to a Hub-compatible server: all or nothing, again and again, and read back."""

import json
import shutil
import time

import huggingface_hub
import pytest
import timm
import torch
from forked import run_code
from helpers import ROOT, flip_last_bit, use_hub
from hub_server import HubServer

from timm_attn import cli
from timm_attn.errors import UserError
from timm_attn.publish import publish
from timm_attn.publish.render import render
from timm_attn.weights import WeightsError, read_index

NAME = "resnet20_asr.cpu_c10"
FOLDED = "resnet20.asr_cpu_c10_folded"
TOKEN = "hf_alice0123456789"


@pytest.fixture
def server(monkeypatch):
    tokens = {TOKEN: {"name": "alice", "orgs": {"my-org": "write", "other-org": "read"}}}
    with HubServer(tokens=tokens) as hub_server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        use_hub(monkeypatch, hub_server.endpoint)
        yield hub_server


@pytest.fixture
def hub(tmp_path):
    """A copy of the hub folder that ships."""
    return shutil.copytree(ROOT / "hub", tmp_path / "hub", ignore=shutil.ignore_patterns("results"))


def entry(hub, name=NAME):
    return next(c for c in read_index(hub) if c.name == name)


def writes(server, part=""):
    return [path for method, path in server.requests if method in ("POST", "PUT") and part in path]


def test_publish_is_one_commit_that_is_tagged_read_back_and_noted(hub, server):
    (done,) = publish(hub / NAME, "my-org")
    repository = server.files(f"my-org/{NAME}")
    assert set(repository) - {".gitattributes"} == {
        *entry(hub).files,
        "README.md",
        ".eval_results/cifar10.yaml",
    }
    for name, content in repository.items():
        if name != ".gitattributes":
            # The local card names the repository, too, from now on.
            assert content == (hub / NAME / name).read_bytes(), name
    assert f"hf-hub:my-org/{NAME}" in repository["README.md"].decode()
    assert len(writes(server, "/commit/")) == 1
    assert server.files(f"my-org/{NAME}", "v1") == repository
    assert (done.tag, done.sent) == ("v1", True)
    assert (entry(hub).repo_id, entry(hub).revision) == (f"my-org/{NAME}", done.revision)
    assert all(c.revision is None for c in read_index(hub) if c.name != NAME)
    (items,) = [c["items"] for c in server._collections.values()]
    assert [item["id"] for item in items] == [f"my-org/{NAME}"]


def test_the_card_of_a_folded_form_names_what_it_was_folded_from(hub, server):
    publish([hub / NAME, hub / FOLDED], "my-org")
    card = huggingface_hub.ModelCard(server.files(f"my-org/{FOLDED}")["README.md"].decode())
    assert card.data.base_model == f"my-org/{NAME}"


def test_published_weights_load_by_plain_name(hub, server, tmp_path):
    publish(hub / NAME, "my-org")
    (hub / NAME / "model.safetensors").unlink()
    code = f"""
import timm, timm_attn, torch
model = timm.create_model("{NAME}", pretrained=True).eval()
torch.save(model.state_dict(), {str(tmp_path / "out.pt")!r})
"""
    env = {"HF_ENDPOINT": server.endpoint, "TIMM_ATTN_HUB": str(hub), "HF_HUB_CACHE": str(tmp_path / "cache")}
    result = run_code(code, env=env)
    assert result.returncode == 0, result.stderr
    shipped = timm.create_model(NAME, pretrained=True).state_dict()
    assert all(torch.equal(tensor, shipped[key]) for key, tensor in torch.load(tmp_path / "out.pt").items())


def test_publishing_again_sends_nothing_and_a_change_is_the_next_version(hub, server):
    first = publish(hub / NAME, "my-org")[0]
    sent = len(writes(server, "/commit/"))
    again = publish(hub / NAME, "my-org")[0]
    assert (again.revision, again.tag, again.sent) == (first.revision, "v1", False)
    assert len(writes(server, "/commit/")) == sent
    server.put_files(f"my-org/{NAME}", {"README.md": b"---\nlicense: mit\n---\nolder"})
    stale = ("model.onnx", "model.sig", ".eval_results/other.yaml")  # of other weights, perhaps
    server.put_files(f"my-org/{NAME}", dict.fromkeys(stale, b"old"))
    third = publish(hub / NAME, "my-org")[0]
    assert (third.tag, third.sent) == ("v2", True)
    assert not {*stale} & server.files(f"my-org/{NAME}").keys()
    assert entry(hub).revision == third.revision


def test_interrupted_at_any_request_and_run_again_it_ends_in_the_same_state(hub, server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
    for other in hub.iterdir():  # of many publications, what is no part of them takes most of the time
        if other.is_dir() and other.name not in (NAME, FOLDED):
            shutil.rmtree(other)
    index = json.loads((hub / "index.json").read_text())
    index["checkpoints"] = {name: index["checkpoints"][name] for name in (NAME, FOLDED)}
    (hub / "index.json").write_text(json.dumps(index))
    render(hub)
    untouched = shutil.copytree(hub, hub.with_name("untouched"))
    publish(hub / NAME, "my-org")
    expected = server.files(f"my-org/{NAME}")
    methods = [method for method, _ in server.requests]
    stopped = 0
    for n, method in enumerate(methods, 1):
        if n > 4 and not {*methods[n - 5 : n]} - {"GET", "HEAD"}:
            continue  # one more file is read, like those before it
        for applied in (False, True)[: 1 + (method in ("POST", "PUT"))]:  # reading has no effect
            organisation = f"org{n}{'a' if applied else 'b'}"
            server.tokens[TOKEN]["orgs"][organisation] = "write"
            folder = shutil.copytree(untouched, hub.with_name(organisation)) / NAME
            server.requests.clear()
            # What the client repeats of itself must fail for good: the process is gone.
            server.stop_after(n, applied)
            try:
                publish(folder, organisation)
            except UserError:
                stopped += 1
                noted = entry(folder.parent).revision  # only of what is whole
                assert noted is None or server.files(f"{organisation}/{NAME}", "v1").keys() == expected.keys()
            server.go_on()
            (done,) = publish(folder, organisation)
            files = server.files(f"{organisation}/{NAME}")
            assert files.keys() == expected.keys()
            assert files["model.safetensors"] == expected["model.safetensors"]
            assert server.files(f"{organisation}/{NAME}", "v1") == files and done.tag == "v1"
            assert entry(folder.parent).revision == done.revision
            shutil.rmtree(folder.parent)
    assert stopped >= len(methods) / 2


def test_a_dry_run_asks_for_nothing(hub, server, capsys):
    cli.main(["publish", str(hub / NAME), str(hub / FOLDED), "--to", "my-org", "--dry-run"])
    output = capsys.readouterr().out
    for part in (f"my-org/{NAME}", f"my-org/{FOLDED}", "model.safetensors", ".eval_results/cifar10.yaml"):
        assert part in output
    assert not server.requests
    assert entry(hub).revision is None


def test_a_pull_request_leaves_main_and_the_index_alone(hub, server):
    with pytest.raises(UserError, match="there is no such repository"):
        publish(hub / NAME, "my-org", create_pr=True)
    name = f"my-org/{NAME}"
    server.put_files(name, {"README.md": b"---\nlicense: mit\n---\nolder"})
    before = server.files(name)
    (done,) = publish(hub / NAME, "my-org", create_pr=True)
    assert done.url.endswith("/discussions/1") and done.tag is None
    assert server.files(name) == before
    assert "model.safetensors" in server.files(name, "refs/pr/1")
    assert entry(hub).revision is None
    assert publish(hub / NAME, "my-org", create_pr=True)[0].url == done.url  # not a second one
    server.close_pull_request(name, 1)
    for _ in range(2):
        assert publish(hub / NAME, "my-org", create_pr=True)[0].url.endswith("/discussions/2")


@pytest.mark.parametrize("to", ["other-org", "nobody"])
def test_publishing_without_rights_leaves_nothing(to, hub, server):
    with pytest.raises(UserError, match=f"cannot publish {to}/{NAME}: .*no right to write there"):
        publish(hub / NAME, to)
    assert not writes(server, "/commit/")


def test_publishing_without_a_token(hub, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="log in with"):
        publish(hub / NAME, "my-org")
    with pytest.raises(UserError, match="--to must be one user or organisation"):
        publish(hub / NAME, "my org/x")
    server.__exit__()
    with pytest.raises(UserError, match=f"check the connection and HF_ENDPOINT, {server.endpoint}, then run"):
        publish(hub / NAME, "my-org")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
        publish(hub / NAME, "my-org")


def test_a_concurrent_commit_stops_the_upload(hub, server):
    name = f"my-org/{NAME}"
    server.put_files(name, {"README.md": b"---\nlicense: mit\n---\nolder"})

    def meanwhile(repo_id: str) -> None:
        server.before_commit = None
        server.put_files(repo_id, {"note.txt": b"hello"})

    server.before_commit = meanwhile
    with pytest.raises(UserError, match="somebody else committed"):
        publish(hub / NAME, "my-org")
    assert set(server.files(name)) - {".gitattributes"} == {"README.md", "note.txt"}
    assert entry(hub).revision is None
    publish(hub / NAME, "my-org")
    assert {"model.safetensors", "note.txt"} <= set(server.files(name))


def test_a_failing_commit_uploads_no_part(hub, server):
    server.fail_at(1, 500, match="/commit/")
    with pytest.raises(UserError, match="run the command again"):
        publish(hub / NAME, "my-org")
    assert set(server.files(f"my-org/{NAME}")) <= {".gitattributes"}


def test_an_upload_that_breaks_in_the_middle(hub, server):
    server.cut_at(1, match="/_lfs/", methods=("PUT",))
    (done,) = publish(hub / NAME, "my-org")  # the client sends it again
    assert (
        server.files(f"my-org/{NAME}", done.revision)["model.safetensors"]
        == (hub / NAME / "model.safetensors").read_bytes()
    )


def test_what_arrives_damaged_is_not_noted(hub, server):
    server.corrupt(f"my-org/{NAME}", "model.safetensors")
    with pytest.raises(UserError, match="is not what was sent"):
        publish(hub / NAME, "my-org")
    assert entry(hub).revision is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("weights", "is damaged"),
        ("config", "no config.json"),
        ("another config", "is damaged"),
        ("card", "README.md does not say what the index says"),
        ("metrics", "README.md does not say what the index says"),
        ("sibling", "is damaged|differ"),
        ("licence", "names no licence"),
        ("index", "does not list"),
    ],
)
def test_a_damaged_folder_is_not_published(damage, message, hub, server):
    folder, index = hub / NAME, json.loads((hub / "index.json").read_text())
    about = index["checkpoints"][NAME]
    if damage in ("weights", "sibling"):
        path = (folder if damage == "weights" else hub / FOLDED) / "model.safetensors"
        path.write_bytes(flip_last_bit(path.read_bytes()))
    elif damage == "config":
        (folder / "config.json").unlink()
    elif damage == "another config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_classes": 9}))
    elif damage == "card":
        (folder / "README.md").write_text("changed")
    elif damage == "metrics":
        about["metrics"]["top1"] += 1
    elif damage == "licence":
        about["dataset"]["license"] = ""
    else:
        del index["checkpoints"][NAME]
    (hub / "index.json").write_text(json.dumps(index))
    with pytest.raises((UserError, WeightsError), match=message):
        publish([hub / "resnet20.cpu_c10", folder], "my-org")
    assert not server.requests


def test_the_token_is_never_shown_or_kept(hub, server, capsys, tmp_path):
    server.fail_at(1, 500, match="/commit/")
    for arguments in (["publish", str(hub / NAME), "--to", "my-org"],) * 2:
        try:
            cli.main(arguments)
        except SystemExit as stop:
            assert stop.code == 2
    captured = capsys.readouterr()
    assert "cannot publish" in captured.err and f"my-org/{NAME}" in captured.out
    assert TOKEN not in captured.out + captured.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
