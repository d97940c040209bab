"""The stand-in Hub, driven by the real ``huggingface_hub`` client."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, check_card
from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "alice/model"
CARD = b"---\nlicense: apache-2.0\nlibrary_name: timm\ntags:\n- image-classification\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
TOKENS = {
    "hf_alice": {"name": "alice", "orgs": {"my-org": "write", "other-org": "read"}},
    "hf_bob": {"name": "bob"},
    "hf_reader": {"name": "alice", "role": "read"},
}


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment is read when huggingface_hub is imported, which another test may have done before; the
    # client looks these up at every call.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # What the client adds to its user agent needs a request to huggingface.co, whatever `endpoint` says.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


def add(path: str = "README.md", data: bytes = CARD) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def publish(api: HfApi, **options: Any) -> str:
    operations = [add(), add("model.safetensors", WEIGHTS)]
    return api.create_commit(REPO, operations, commit_message="Publish", **options).oid


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# ---- publishing ----


def test_create_and_commit(hub: HubServer, api: HfApi) -> None:
    assert api.create_repo(REPO).repo_id == REPO
    oid = publish(api, commit_description="All of it.")
    files = hub.files(REPO)
    assert files["README.md"] == CARD and files["model.safetensors"] == WEIGHTS
    assert ".gitattributes" in files  # made by the Hub itself, so that there is a head to compare with
    writes = [path for method, path in hub.requests if method in ("POST", "PUT")]
    oid_of_weights = hashlib.sha256(WEIGHTS).hexdigest()
    assert writes == [
        "/api/repos/create",
        "/api/validate-yaml",
        f"/api/models/{REPO}/preupload/main",
        f"/{REPO}.git/info/lfs/objects/batch",
        f"/_lfs/{REPO}/{oid_of_weights}",
        f"/_lfs/{REPO}/{oid_of_weights}/verify",
        f"/api/models/{REPO}/commit/main",
    ]
    last, first = api.list_repo_commits(REPO)
    assert (last.commit_id, last.title, last.message, last.authors) == (
        oid,
        "Publish",
        "All of it.",
        ["alice"],
    )
    assert first.title == "initial commit"


def test_existing_repository(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(REPO)
    assert status_of(error) == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_upload_folder_is_one_commit(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_bytes(CARD)
    (tmp_path / "sub" / "a.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "sub" / "b.safetensors").write_bytes(WEIGHTS + b"b")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert len(api.list_repo_commits(REPO)) == 2
    assert hub.files(REPO)["sub/b.safetensors"] == WEIGHTS + b"b"
    assert hub.files(REPO)["empty.safetensors"] == b""


def test_unchanged_files_and_known_objects_are_not_sent_again(hub: HubServer, api: HfApi) -> None:
    hub.put_files(REPO, {"README.md": CARD, "model.safetensors": WEIGHTS})
    publish(api)  # the client notices that there is nothing to commit
    api.create_commit(REPO, [add("copy.safetensors", WEIGHTS)], commit_message="Copy")
    assert not [method for method, _ in hub.requests if method == "PUT"]
    assert [path for _, path in hub.requests].count(f"/api/models/{REPO}/commit/main") == 1
    assert hub.files(REPO)["copy.safetensors"] == WEIGHTS


def test_deletions(hub: HubServer, api: HfApi) -> None:
    hub.put_files(REPO, {"a.txt": b"a", "dir/b.txt": b"b", "dir/c.txt": b"c", "directory.txt": b"d"})
    operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("dir/")]
    api.create_commit(REPO, operations, commit_message="Clean")
    assert set(hub.files(REPO)) == {".gitattributes", "directory.txt"}
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("a.txt", REPO)


def test_stale_parent(hub: HubServer, api: HfApi) -> None:
    old = hub.put_files(REPO, {"a.txt": b"a"})
    new = hub.put_files(REPO, {"a.txt": b"b"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        publish(api, parent_commit=old)
    assert status_of(error) == 412
    assert "README.md" not in hub.files(REPO)
    publish(api, parent_commit=new[:7])  # the client allows short ids here


def test_pull_request(hub: HubServer, api: HfApi) -> None:
    base = hub.put_files(REPO, {"a.txt": b"a"})
    hub.put_files(REPO, {"a.txt": b"b"})
    info = api.create_commit(REPO, [add()], commit_message="Propose", create_pr=True, parent_commit=base)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.files(REPO, "refs/pr/1")["README.md"] == CARD
    assert hub.files(REPO, "refs/pr/1")["a.txt"] == b"a"  # starts from the given parent
    assert "README.md" not in hub.files(REPO)
    api.create_commit(REPO, [add("b.txt", b"b")], commit_message="More", revision="refs/pr/1")
    assert api.file_exists(REPO, "b.txt", revision="refs/pr/1")
    assert not api.file_exists(REPO, "b.txt")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]


def test_pull_request_from_a_stranger(hub: HubServer) -> None:
    hub.put_files(REPO, {"a.txt": b"a"})
    bob = HfApi(endpoint=hub.endpoint, token="hf_bob")
    with pytest.raises(HfHubHTTPError, match="pass `create_pr=1`") as error:
        bob.create_commit(REPO, [add()], commit_message="Push")
    assert status_of(error) == 403
    assert bob.create_commit(REPO, [add()], commit_message="Propose", create_pr=True).pr_num == 1
    with pytest.raises(HfHubHTTPError) as error:
        publish(bob, create_pr=True)  # the Hub does not let strangers upload LFS files
    assert status_of(error) == 403


def test_tags_and_pins(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = hub.put_files(REPO, {"config.json": b"1"})
    api.create_tag(REPO, tag="v1", revision=first)
    second = hub.put_files(REPO, {"config.json": b"2"})
    for revision, content in (("v1", b"1"), (first, b"1"), ("main", b"2"), (second, b"2")):
        path = api.hf_hub_download(REPO, "config.json", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content
    refs = api.list_repo_refs(REPO)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    assert [(branch.ref, branch.target_commit) for branch in refs.branches] == [("refs/heads/main", second)]
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(REPO, tag="v1")
    assert status_of(error) == 409
    api.create_tag(REPO, tag="v1", exist_ok=True)
    assert api.model_info(REPO, revision="v1").sha == first


def test_model_card_is_checked(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.create_commit(REPO, [add(data=b"---\nlicense mit\n---\n")], commit_message="Broken")
    assert hub.requests[-1] == ("POST", "/api/validate-yaml")  # refused before anything is uploaded
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit(REPO, [add(data=b"# No header\n")], commit_message="Bare")
    assert check_card(CARD.decode()) == ([], [])
    assert check_card("---\nlicense: mit\n# never closed")[0]
    assert check_card("---\na: 1\n\tb: 2\n---\n")[0]
    nested = "---\nmodel-index:\n- name: x\n  results:\n  - task:\n      type: image-classification\n---\n"
    assert check_card(nested) == ([], [])


def test_commit_of_an_object_that_was_not_uploaded(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    operation = add("model.safetensors", WEIGHTS)
    operation._is_uploaded, operation._upload_mode = True, "lfs"
    with pytest.raises(BadRequestError, match=r"does not exist: model\.safetensors"):
        api.create_commit(REPO, [operation, add()], commit_message="Cheat")
    assert set(hub.files(REPO)) == {".gitattributes"}  # all or nothing


# ---- downloading ----


def test_download(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    oid = hub.put_files(REPO, {"README.md": CARD, "a/model.safetensors": WEIGHTS, "a b+c.txt": b"odd"})
    for name, content in hub.files(REPO).items():
        path = Path(api.hf_hub_download(REPO, name, cache_dir=tmp_path / "one"))
        assert path.read_bytes() == content and path.is_relative_to(tmp_path / "one")
    snapshot = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "all"))
    assert snapshot.name == oid
    found = {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()}
    assert found == hub.files(REPO)


def test_model_info(hub: HubServer, api: HfApi) -> None:
    oid = hub.put_files(REPO, {"README.md": CARD, "model.safetensors": WEIGHTS})
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.private, info.author) == (REPO, oid, False, "alice")
    lfs = {file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings or []}
    assert lfs["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert lfs["README.md"] is None
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "model.safetensors"]


def test_ranges(hub: HubServer) -> None:
    hub.put_files(REPO, {"model.safetensors": WEIGHTS})

    def get(value: str) -> tuple[int, str | None, bytes]:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
        connection.request("GET", f"/{REPO}/resolve/main/model.safetensors", headers={"Range": value})
        response = connection.getresponse()
        return response.status, response.headers["Content-Range"], response.read()

    size = len(WEIGHTS)
    assert get("bytes=3-9") == (206, f"bytes 3-9/{size}", WEIGHTS[3:10])
    assert get("bytes=100-") == (206, f"bytes 100-{size - 1}/{size}", WEIGHTS[100:])
    assert get("bytes=-5") == (206, f"bytes {size - 5}-{size - 1}/{size}", WEIGHTS[-5:])
    assert get(f"bytes={size}-")[:2] == (416, f"bytes */{size}")


def test_corruption_keeps_the_size(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.put_files(REPO, {"model.safetensors": WEIGHTS})
    hub.corrupt(REPO, "model.safetensors")
    data = Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes()
    assert len(data) == len(WEIGHTS)
    assert sum(a != b for a, b in zip(data, WEIGHTS, strict=True)) == 1
    info = api.model_info(REPO, files_metadata=True)
    sha256 = {file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings or []}
    assert (
        sha256["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest() != hashlib.sha256(data).hexdigest()
    )


# ---- refusals ----


def test_whoami(hub: HubServer, api: HfApi) -> None:
    answer = api.whoami()
    assert answer["name"] == "alice"
    assert {org["name"]: org["roleInOrg"] for org in answer["orgs"]} == TOKENS["hf_alice"]["orgs"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        HfApi(endpoint=hub.endpoint, token="hf_unknown").whoami()
    assert status_of(error) == 401


def test_no_write_rights(hub: HubServer, api: HfApi) -> None:
    assert api.create_repo("my-org/model").repo_id == "my-org/model"
    reader = HfApi(endpoint=hub.endpoint, token="hf_reader")
    for client, namespace in ((api, "other-org"), (api, "bob"), (reader, "alice")):
        with pytest.raises(HfHubHTTPError, match=f'under the namespace "{namespace}"') as error:
            client.create_repo(f"{namespace}/model")
        assert status_of(error) == 403
    hub.put_files("other-org/model", {"a.txt": b"a"})
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: Forbidden: pass") as error:
        api.create_tag("other-org/model", tag="v1")
    assert status_of(error) == 403


def test_no_token(hub: HubServer) -> None:
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    hub.put_files(REPO, {"a.txt": b"a"})
    hub.create_repo("alice/secret", private=True)
    assert anonymous.model_info(REPO).id == REPO
    with pytest.raises(HfHubHTTPError) as error:
        anonymous.create_repo("alice/new")
    assert status_of(error) == 401
    for repo_id in ("alice/secret", "alice/missing"):
        with pytest.raises(RepositoryNotFoundError) as error:
            anonymous.model_info(repo_id)
        assert status_of(error) == 401
    with pytest.raises(RepositoryNotFoundError) as error:
        anonymous.create_commit(REPO, [add("b.txt")], commit_message="Push")
    assert status_of(error) == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        HfApi(endpoint=hub.endpoint, token="hf_unknown").model_info(REPO)
    assert status_of(error) == 401 and not isinstance(error.value, RepositoryNotFoundError)


def test_private(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO, private=True)
    assert api.model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError) as error:
        HfApi(endpoint=hub.endpoint, token="hf_bob").model_info(REPO)
    assert status_of(error) == 404


def test_missing_things(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.put_files(REPO, {"a.txt": b"a"})
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("alice/missing", "a.txt", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "a.txt", revision="v9", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "b.txt", cache_dir=tmp_path)
    assert try_to_load_from_cache(REPO, "b.txt", cache_dir=tmp_path) is _CACHED_NO_EXIST
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download(REPO, revision="v9", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, [add()], commit_message="Push", revision="dev")
    assert not api.repo_exists("alice/missing") and not api.revision_exists(REPO, "v9")
    with pytest.raises(HfHubHTTPError, match="Not modelled by this server: GET /api/datasets/a/b") as error:
        api.dataset_info("a/b")
    assert status_of(error) == 501


# ---- collections ----


def test_collections(hub: HubServer, api: HfApi) -> None:
    hub.create_repo(REPO)
    collection = api.create_collection("My Models!", namespace="my-org", description="All of them")
    assert re.fullmatch(r"my-org/my-models-[0-9a-f]{24}", collection.slug)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_collection("My Models!", namespace="my-org")
    assert status_of(error) == 409
    assert api.create_collection("My Models!", namespace="my-org", exists_ok=True).slug == collection.slug

    api.add_collection_item(collection.slug, REPO, "model", note="the best")
    with pytest.raises(HfHubHTTPError) as error:
        api.add_collection_item(collection.slug, REPO, "model")
    assert status_of(error) == 409
    again = api.add_collection_item(collection.slug, REPO, "model", exists_ok=True)
    assert [(item.item_id, item.note) for item in again.items] == [(REPO, "the best")]
    with pytest.raises(HfHubHTTPError) as error:
        api.add_collection_item(collection.slug, "alice/missing", "model")
    assert status_of(error) == 404
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(endpoint=hub.endpoint, token="hf_bob").add_collection_item(collection.slug, REPO, "model")
    assert status_of(error) == 403
    private = api.create_collection("Mine", private=True)
    assert private.owner == "alice" and api.get_collection(private.slug).private
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(endpoint=hub.endpoint, token="hf_bob").get_collection(private.slug)
    assert status_of(error) == 404


# ---- instruments ----


def test_failing_upload_is_repeated_by_the_client(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    hub.fail_at(4)  # validate-yaml, preupload, batch, PUT
    publish(api)
    assert [method for method, _ in hub.requests].count("PUT") == 2
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("status", [500, None])
def test_failing_commit_reaches_the_caller(hub: HubServer, api: HfApi, status: int | None) -> None:
    api.create_repo(REPO)
    hub.fail_at(1, status, match="/commit/")
    with pytest.raises(Exception, match="Injected fault" if status else "disconnected"):
        publish(api)
    assert set(hub.files(REPO)) == {".gitattributes"}
    publish(api)  # only once, and what was uploaded before is still there
    assert [method for method, _ in hub.requests].count("PUT") == 1


def test_lost_answer(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    hub.fail_at(1, None, match="/commit/", applied=True)
    with pytest.raises(Exception, match="disconnected"):
        publish(api)
    assert hub.files(REPO)["README.md"] == CARD


def test_concurrent_commit(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    head = api.model_info(REPO).sha
    hub.before_commit = lambda repo_id: hub.put_files(repo_id, {"theirs.txt": b"t"}, "Theirs")
    with pytest.raises(HfHubHTTPError) as error:
        publish(api, parent_commit=head)
    assert status_of(error) == 412
    hub.before_commit = None
    publish(api, parent_commit=api.model_info(REPO).sha)
    assert {"theirs.txt", "README.md"} <= set(hub.files(REPO))


def test_hook_may_use_the_server(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    seen = []
    hub.before_commit = lambda repo_id: seen.append(api.model_info(repo_id).sha)
    publish(api)
    assert len(seen) == 1


def test_upload_with_a_wrong_hash_is_refused(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    operation = add("model.safetensors", WEIGHTS)
    operation.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'") as error:
        api.create_commit(REPO, [operation], commit_message="Push")
    assert "another size or sha256" in str(error.value.__cause__)


def test_stopped_server_is_gone(tmp_path: Path) -> None:
    with HubServer(TOKENS) as hub:
        hub.put_files(REPO, {"a.txt": b"a"})
        api = HfApi(endpoint=hub.endpoint, token=False)
        assert api.file_exists(REPO, "a.txt")
    with pytest.raises(Exception, match="refused"):
        api.file_exists(REPO, "a.txt")


def test_command_line() -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("hub_server.py")),
        "--port",
        "0",
        "--token",
        "hf_me",
    ]
    command += ["--user", "me", "--org", "mine", "--org", "ours"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            printed = "".join(process.stdout.readline() for _ in range(3))
            environment = dict(re.findall(r"(\w+)=(\S+)", printed))
            assert environment["HF_HUB_DISABLE_XET"] == "1"
            # A fresh interpreter shows that the printed settings are all that a client needs.
            code = "import json, huggingface_hub as h; print(json.dumps(h.whoami()), h.create_repo('ours/m'))"
            env = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
            output = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
            who, url = output.strip().rsplit(" ", 1)
            assert [org["name"] for org in json.loads(who)["orgs"]] == ["mine", "ours"]
            assert url == f"{environment['HF_ENDPOINT']}/ours/m"
        finally:
            process.terminate()
