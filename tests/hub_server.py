"""A small in-memory stand-in for the Hugging Face Hub, for tests that publish and download models.

It speaks the part of the HTTP API that the ``huggingface_hub`` 2.x client uses for model repositories and
collections, needs only the standard library, listens on the loopback interface and forgets everything when
it stops. Status codes, error headers and messages are the ones the client expects. The real Hub checks more
(all of YAML and ``model-index``, quotas, gating): a test that passes here shows that the client is driven
rightly, not that huggingface.co would accept the upload.

    with HubServer(tokens={"hf_alice": {"name": "alice", "orgs": {"my-org": "write"}}}) as hub:
        HfApi(endpoint=hub.endpoint, token="hf_alice").create_repo("alice/model")

By hand: ``python tests/hub_server.py --port 8765 --token hf_x --user alice --org my-org``. There is no Xet
storage here, so clients need ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

LFS_SIZE = 5 * 1024 * 1024  # files of at least this size go through LFS, and weights always do
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".ckpt")
GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES).encode()
MAIN = "refs/heads/main"

CARD_HEADER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|$)", re.DOTALL)
CARD_LINE = re.compile(r"""[ #]|-(?:\s|$)|[\w."'-]+\s*:(?:\s|$)""")  # nested, comment, list item, `key:`
PLACEHOLDERS = {"REPO": "([^/]+/[^/]+)", "REV": "([^/]+)", "PATH": "(.+)", "OID": "([0-9a-f]{64})"}

Json = dict[str, Any]
Reply = tuple[int, dict[str, str], bytes]  # status, headers, body
Handler = Callable[..., Any]  # returns a Reply, or what shall be sent as JSON
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


class HubError(Exception):
    """An error answer; the client turns ``code``, sent as X-Error-Code, into an exception class."""

    def __init__(self, status: int, message: str, code: str = "", extra: Json | None = None, **headers: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **(extra or {})}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass(frozen=True)
class Blob:
    """One file: its content and whether it is kept in LFS."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.data).hexdigest()

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def lfs_info(self, oid_key: str) -> Json:
        return {"lfs": {oid_key: self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of a repository."""

    oid: str
    parent: Commit | None
    files: Mapping[str, Blob]
    title: str
    date: str
    description: str = ""
    author: str = "system"


@dataclass
class Repo:
    """A model repository. Keys of ``refs`` are full names: refs/heads/main, refs/tags/v1, refs/pr/1."""

    repo_id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)  # refs of pull requests that are no longer open
    announced: dict[str, int] = field(default_factory=dict)  # LFS oid -> size of the uploads agreed on
    unverified: dict[str, bytes] = field(default_factory=dict)  # uploaded, verify request not seen yet
    lfs: dict[str, bytes] = field(default_factory=dict)  # complete, may be named in a commit

    def full_ref(self, revision: str) -> str:
        """The full name of a branch, tag or pull request; anything else comes back as it is."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), revision)

    def resolve(self, revision: str) -> Commit:
        ref = self.full_ref(revision)
        commit = self.commits.get(self.refs.get(ref, ref))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def add_commit(
        self, ref: str, parent: Commit | None, files: dict[str, Blob], title: str, **more: str
    ) -> str:
        tree = [(path, blob.git_oid) for path, blob in sorted(files.items())]
        # The number of commits keeps two commits of the same content apart.
        seed = repr((self.repo_id, len(self.commits), parent and parent.oid, title, tree))
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, MappingProxyType(files), title, now(), **more)
        self.refs[ref] = oid
        return oid


@dataclass
class Request:
    """One request; ``user`` stays None for an anonymous one."""

    method: str
    target: str
    headers: Message
    body: bytes
    user: Json | None = None

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query))

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Fault:
    """A failure to come: see `HubServer.fail_at`."""

    n: int
    status: int | None = 503
    match: str = ""
    applied: bool = False
    methods: tuple[str, ...] = ("POST", "PUT")
    delay: float = 0.0
    cut: bool = False
    lasting: bool = False
    then_all: bool = False


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def is_lfs(path: str, size: int) -> bool:
    # The client commits an empty file as a regular one whatever it is told.
    return size > 0 and (size >= LFS_SIZE or path.endswith(LFS_SUFFIXES))


def as_reply(answer: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    if isinstance(answer, tuple):
        return answer
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(answer).encode()


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for a model card. Finds a missing or broken header, but is no YAML parser."""
    header = CARD_HEADER.match(text)
    if header is None and re.match(r"\s*---[\r\n]+(?!---)", text):
        return ["the metadata header is opened with '---' but not closed"], []
    if header is None:
        return [], ["empty or missing yaml metadata in repo card"]
    lines = [line for line in header[1].splitlines() if line.strip()]
    return [f"bad metadata line: {line!r}" for line in lines if not CARD_LINE.match(line)], []


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a handler, which gets the request and the unquoted value of each placeholder."""
    for name, regex in PLACEHOLDERS.items():
        pattern = pattern.replace(name, regex)

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class HubServer:
    """The stand-in: entering it as a context manager starts serving, leaving it stops.

    ``tokens`` maps a token to ``{"name": user, "orgs": {org: role}, "role": "write" or "read"}``. Users may
    write into their own namespace and into organizations where their role is write or admin.

    For tests: ``requests`` lists (method, path) of what was served, in order, without query strings.
    ``before_commit``, when set, is called with the repository id when a commit request arrives, before that
    is compared with the head, so that it can slip in another commit with `put_files`.
    """

    def __init__(self, tokens: Mapping[str, Json] | None = None, port: int = 0, verbose: bool = False):
        self.tokens = dict(tokens or {})
        self.verbose = verbose
        self.requests: list[tuple[str, str]] = []
        self.before_commit: Callable[[str], object] | None = None
        self._repos: dict[str, Repo] = {}
        self._collections: dict[str, Json] = {}
        self._corrupted: set[tuple[str, str]] = set()
        self._faults: list[Fault] = []
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._http = _HttpServer(("127.0.0.1", port), _HttpHandler)
        self._http.hub = self
        # The default poll interval would make every stop last half a second.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    # ---- instruments for tests ----

    def create_repo(self, repo_id: str, private: bool = False) -> None:
        """Add a repository, with the initial commit that the Hub makes."""
        with self._lock:
            repo = self._repos[repo_id] = Repo(repo_id, private)
            repo.add_commit(MAIN, None, {".gitattributes": Blob(GITATTRIBUTES, False)}, "initial commit")

    def put_files(self, repo_id: str, files: Mapping[str, bytes], message: str = "") -> str:
        """Commit files to main past all checks and return the commit id; a missing repository is created."""
        with self._lock:
            if repo_id not in self._repos:
                self.create_repo(repo_id)
            repo = self._repos[repo_id]
            head = repo.resolve("main")
            new = {path: Blob(data, is_lfs(path, len(data))) for path, data in files.items()}
            repo.lfs |= {blob.sha256: blob.data for blob in new.values() if blob.lfs}
            return repo.add_commit(MAIN, head, {**head.files, **new}, message or "Add files")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository at a branch, tag, refs/pr/N or commit id."""
        with self._lock:
            return {path: blob.data for path, blob in self._repos[repo_id].resolve(revision).files.items()}

    def gate(self, repo_id: str) -> None:
        """From now on only members may read files, as where the owner asks for an agreement first."""
        self._repos[repo_id].gated = True

    def close_pull_request(self, repo_id: str, number: int) -> None:
        """Close it; its ref stays, as on the Hub."""
        self._repos[repo_id].closed.add(f"refs/pr/{number}")

    def corrupt(self, repo_id: str, path: str) -> None:
        """From now on serve this file with its middle byte changed; size, headers and listings stay right."""
        self._corrupted.add((repo_id, path))

    def fail_at(self, n: int, status: int | None = 503, *, match: str = "", applied: bool = False) -> None:
        """Make the ``n``-th further write request (POST or PUT, 1 is the next one) fail with ``status``.

        ``status=None`` closes the connection without an answer. With ``match`` only requests whose path
        contains it count. The request has no effect, unless ``applied`` asks for the case where the work was
        done and only the answer got lost. Beware that the client repeats preupload, batch, PUT and verify
        requests (after one second) when they fail with 408, 429, 5xx or a closed connection; it never repeats
        validate-yaml, commit, tag, repository and collection requests.
        """
        with self._lock:
            self._faults.append(Fault(n, status, match, applied))

    def fail_reads(self, status: int | None = 500, *, match: str = "") -> None:
        """From now on answer every GET and HEAD whose path contains ``match`` with ``status``, or hang up."""
        self._faults.append(Fault(1, status, match, methods=("GET", "HEAD"), lasting=True))

    def cut_at(self, n: int, *, match: str = "", methods: tuple[str, ...] = ("GET",)) -> None:
        """Break the connection in the middle of the ``n``-th further request of these methods.

        Of a GET, half of the content is sent; of a POST or PUT, half of the content is read.
        """
        self._faults.append(Fault(n, None, match, methods=methods, cut=True))

    def stop_after(self, n: int, applied: bool = False) -> None:
        """Hang up at the ``n``-th further request and at all after it, as if the client were gone.

        With ``applied`` the first of them has its effect, and only the answer is lost.
        """
        methods = ("GET", "HEAD", "POST", "PUT")
        self._faults.append(Fault(n, None, applied=applied, methods=methods, then_all=True))

    def go_on(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def slow_down(self, seconds: float, *, match: str = "") -> None:
        """From now on wait so long before every answer to a request whose path contains ``match``."""
        methods = ("GET", "HEAD", "POST", "PUT")
        self._faults.append(Fault(1, None, match, applied=True, methods=methods, delay=seconds, lasting=True))

    # ---- from a request to an answer ----

    def fault(self, method: str, path: str) -> Fault | None:
        """Note a request, and say what is to go wrong with it."""
        found = None
        with self._lock:
            self.requests.append((method, path))
            for pending in [f for f in self._faults if f.match in path and method in f.methods]:
                pending.n -= not pending.lasting
                found = pending if pending.lasting or not pending.n else found
            self._faults = [f for f in self._faults if f.n]
            if found and found.then_all:
                self._faults.append(Fault(1, None, methods=found.methods, lasting=True))
        return found

    def answer(self, request: Request, fault: Fault | None = None) -> Reply | None:
        """Answer one request; None means to hang up."""
        reply = None
        if fault is None or fault.applied or fault.cut:
            try:
                reply = as_reply(self._handle(request))
            except HubError as error:
                reply = as_reply(error.body, error.status, error.headers)
            except (KeyError, TypeError, ValueError) as error:
                reply = as_reply({"error": f"Malformed request: {error!r}"}, 400)
        if fault and not fault.cut and not fault.delay:
            reply = as_reply({"error": "Injected fault"}, fault.status) if fault.status else None
        return reply

    def _handle(self, request: Request) -> Any:
        method = "GET" if request.method == "HEAD" else request.method
        found = [(h, pattern.fullmatch(request.path)) for verb, pattern, h in ROUTES if verb == method]
        handler, match = next((pair for pair in found if pair[1]), (None, None))
        if handler is None or match is None:
            # Not 404, which callers may take for a plain "there is no such thing".
            raise HubError(501, f"Not modelled by this server: {method} {request.path}")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        request.user = self.tokens.get(token)
        values = [unquote(value) for value in match.groups()]
        if handler is HubServer._commit and self.before_commit:
            self.before_commit(values[0])  # outside of the lock: the hook may use this server over HTTP
        with self._lock:
            return handler(self, request, *values)

    # ---- rights ----

    @staticmethod
    def _role(user: Json | None, repo_id_or_slug: str) -> str:
        """The role of a user in the namespace of a repository or collection, or an empty string."""
        namespace = repo_id_or_slug.split("/")[0]
        if user is None:
            return ""
        return "admin" if user["name"] == namespace else user.get("orgs", {}).get(namespace, "")

    @staticmethod
    def _signed_in(request: Request) -> Json:
        if request.user is None:
            # Over https the client takes any 401 on these paths for a missing repository, over http only one
            # with this code.
            code = "RepoNotFound" if re.match(r"/api/models/|/.+/resolve/", request.path) else ""
            raise HubError(401, "Invalid username or password.", code)
        return request.user

    def _check_write(self, request: Request, repo_id_or_slug: str, refusal: str) -> None:
        user = self._signed_in(request)
        if user.get("role") == "read" or self._role(user, repo_id_or_slug) not in ("write", "admin"):
            raise HubError(403, refusal)

    def _readable(self, request: Request, repo_id: str) -> Repo:
        repo = self._repos.get(repo_id)
        if repo and (not repo.private or self._role(request.user, repo_id)):
            return repo
        self._signed_in(request)  # an anonymous user is not told whether the repository exists
        raise HubError(404, "Repository not found", "RepoNotFound")

    def _writable(self, request: Request, repo_id: str) -> Repo:
        self._signed_in(request)
        repo = self._readable(request, repo_id)
        if request.query.get("create_pr") != "1":  # whoever can read may propose a pull request
            refusal = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            self._check_write(request, repo_id, refusal)
        return repo

    # ---- accounts and repositories ----

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Json:
        user = self._signed_in(request)
        orgs = [{"type": "org", "name": org, "roleInOrg": role} for org, role in user.get("orgs", {}).items()]
        token = {"displayName": "test", "role": user.get("role", "write")}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": user["name"], "fullname": user["name"], "orgs": orgs, "auth": auth}

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Json:
        spec = request.json
        if spec.get("type") not in (None, "model"):
            raise HubError(501, "This server models no other repositories than models")
        namespace = spec.get("organization") or self._signed_in(request)["name"]
        repo_id = f"{namespace}/{spec['name']}"
        refusal = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        self._check_write(request, repo_id, refusal)
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self._repos:  # with exist_ok=True the client takes the url from the refusal
            raise HubError(409, "You already created this model repo", extra=answer)
        self.create_repo(repo_id, private=spec.get("visibility") == "private")
        return answer

    @route("GET", "/api/models/REPO/revision/REV")
    @route("GET", "/api/models/REPO")
    def _model_info(self, request: Request, repo_id: str, revision: str = "main") -> Json:
        repo = self._readable(request, repo_id)
        commit = repo.resolve(revision)
        siblings: list[Json] = []
        for path, blob in sorted(commit.files.items()):
            details = {"size": blob.size, "blobId": blob.git_oid, **blob.lfs_info("sha256")}
            siblings.append({"rfilename": path, **(details if "blobs" in request.query else {})})
        info = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "private": repo.private}
        info |= {"gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return info | {"sha": commit.oid, "lastModified": commit.date, "siblings": siblings}

    @route("GET", "/api/models/REPO/tree/REV")
    def _tree(self, request: Request, repo_id: str, revision: str) -> list[Json]:
        files = self._readable(request, repo_id).resolve(revision).files
        if request.query.get("recursive") != "true":
            raise HubError(501, "This server lists trees with recursive=true only")
        return [
            {"type": "file", "path": path, "oid": blob.git_oid, "size": blob.size, **blob.lfs_info("oid")}
            for path, blob in sorted(files.items())
        ]

    @route("GET", "/api/models/REPO/refs")
    def _refs(self, request: Request, repo_id: str) -> Json:
        answer: Json = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in self._readable(request, repo_id).refs.items():
            _, kind, name = ref.split("/", 2)
            kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[kind]
            answer[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        return answer

    @route("GET", "/api/models/REPO/discussions")
    def _discussions(self, request: Request, repo_id: str) -> Json:
        """Pull requests only, one a page: the client must ask for all pages."""
        repo = self._readable(request, repo_id)
        found = [
            {
                "num": int(ref.rpartition("/")[2]),
                "title": repo.commits[oid].title,
                "author": {"name": repo.commits[oid].author},
                "createdAt": repo.commits[oid].date,
                "status": "closed" if ref in repo.closed else "open",
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for ref, oid in repo.refs.items()
            if ref.startswith("refs/pr/")
        ]
        start = int(request.query.get("p", "0"))
        return {"discussions": found[start : start + 1], "start": start, "count": len(found)}

    @route("GET", "/api/models/REPO/commits/REV")
    def _commits(self, request: Request, repo_id: str, revision: str) -> list[Json]:
        answer, commit = [], self._readable(request, repo_id).resolve(revision)
        while commit:
            entry = {"id": commit.oid, "title": commit.title, "message": commit.description}
            answer.append(entry | {"authors": [{"user": commit.author}], "date": commit.date})
            commit = commit.parent
        return answer

    @route("POST", "/api/models/REPO/tag/REV")
    def _tag(self, request: Request, repo_id: str, revision: str) -> Json:
        repo = self._writable(request, repo_id)
        commit, ref = repo.resolve(revision), f"refs/tags/{request.json['tag']}"
        if ref in repo.refs:
            raise HubError(409, f"Tag reference exists already: {ref}")
        repo.refs[ref] = commit.oid
        return {"success": True}

    # ---- committing ----

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Reply:
        found = check_card(request.json["content"])
        errors, warnings = ([{"message": message} for message in messages] for messages in found)
        # The client looks at the status to see whether there are errors, not at the list.
        return as_reply({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    @route("POST", "/api/models/REPO/preupload/REV")
    def _preupload(self, request: Request, repo_id: str, revision: str) -> Json:
        present = self._writable(request, repo_id).resolve(revision).files
        files = []
        for spec in request.json["files"]:
            path, mode = spec["path"], "lfs" if is_lfs(spec["path"], spec["size"]) else "regular"
            oid = present[path].etag if path in present else None  # lets the client leave out unchanged files
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", "/REPO.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo_id: str) -> Json:
        # Nothing here tells a pull request, so the Hub refuses one with LFS files from a user without rights.
        repo = self._writable(request, repo_id)
        objects = []
        for spec in request.json["objects"]:
            answer: Json = {"oid": spec["oid"], "size": spec["size"]}
            if spec["oid"] not in repo.lfs:  # without actions the client skips the upload
                repo.announced[spec["oid"]] = spec["size"]
                href = f"{self.endpoint}/_lfs/{repo_id}/{spec['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/_lfs/REPO/OID")
    def _lfs_put(self, request: Request, repo_id: str, oid: str) -> Reply:
        # The client sends no token here, as with a signed storage URL: the batch request settled the rights.
        repo = self._repos[repo_id]
        if oid not in repo.announced:
            raise HubError(403, "No batch request has announced this upload")
        repo.unverified[oid] = request.body
        return 200, {}, b""

    @route("POST", "/_lfs/REPO/OID/verify")
    def _lfs_verify(self, request: Request, repo_id: str, oid: str) -> Json:
        repo = self._writable(request, repo_id)
        data, size = repo.unverified.pop(oid), repo.announced[oid]
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise HubError(422, "The uploaded object has another size or sha256 than announced")
        repo.lfs[oid] = data
        return {"message": "OK"}

    @route("POST", "/api/models/REPO/commit/REV")
    def _commit(self, request: Request, repo_id: str, revision: str) -> Json:
        repo = self._writable(request, repo_id)
        parent, ref = repo.resolve(revision), repo.full_ref(revision)
        if not ref.startswith(("refs/heads/", "refs/pr/")):
            raise HubError(404, f"Invalid rev id: {revision} is not a branch", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in request.body.splitlines() if line)
        header, as_pr = header["value"], request.query.get("create_pr") == "1"
        expected = header.get("parentCommit", "")
        if as_pr and expected:
            parent = repo.resolve(expected)  # a pull request starts from there, so nothing can be stale
        elif not parent.oid.startswith(expected):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self._apply(repo, files, operation["key"], operation["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref = f"refs/pr/{number}" if as_pr else ref
        more = {"description": header.get("description", ""), "author": self._signed_in(request)["name"]}
        oid = repo.add_commit(ref, parent, files, header["summary"], **more)
        url = f"{self.endpoint}/{repo_id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if as_pr else {})

    @staticmethod
    def _apply(repo: Repo, files: dict[str, Blob], key: str, value: Json) -> None:
        """Apply one operation of a commit to ``files``; nothing is stored before all of them have passed."""
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
            errors = check_card(files[path].data.decode())[0] if path == "README.md" else []
            if errors:
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        elif key == "lfsFile":
            data = repo.lfs.get(value["oid"])
            if data is None or value.get("size", len(data)) != len(data):
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(data, lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if (p == path if key == "deletedFile" else p.startswith(f"{path}/"))]
            if not gone:  # the client looks for this wording
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for p in gone:
                del files[p]
        else:
            raise HubError(400, f"Unknown operation {key!r}")

    # ---- downloading ----

    @route("GET", "/REPO/resolve/REV/PATH")
    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        repo = self._readable(request, repo_id)
        if repo.gated and not self._role(request.user, repo_id):
            raise HubError(403, f"Access to model {repo_id} is restricted", "GatedRepo")
        commit = repo.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        blob = commit.files[path]
        data, size = blob.data, blob.size
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:  # the Hub redirects to a storage host with these; the client is content with a plain 200
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{blob.sha256}"'}
        if (repo_id, path) in self._corrupted and size:
            middle = size // 2
            data = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if not wanted or wanted.groups() == ("", ""):
            return 200, headers, data
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            raise HubError(416, "Range Not Satisfiable", Content_Range=f"bytes */{size}")
        return 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, data[start:stop]

    # ---- collections (a slug looks like a repository id: namespace/title-number) ----

    @route("POST", "/api/collections")
    def _create_collection(self, request: Request) -> Json:
        spec = request.json
        title, namespace = spec["title"], spec["namespace"]
        refusal = f'You don\'t have the rights to create a collection under the namespace "{namespace}"'
        self._check_write(request, namespace, refusal)
        for slug, known in self._collections.items():
            if known["owner"] == namespace and known["title"] == title:
                raise HubError(409, "This collection already exists", extra={"slug": slug})  # for exists_ok
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{namespace}/{words}-{next(self._numbers):024x}"
        new = {"slug": slug, "title": title, "owner": namespace, "description": spec.get("description")}
        new |= {"private": spec.get("private", False), "items": [], "lastUpdated": now()}
        self._collections[slug] = new | {"position": 0, "theme": "blue", "upvotes": 0}
        return self._collections[slug]

    @route("GET", "/api/collections/REPO")
    def _collection(self, request: Request, slug: str) -> Json:
        collection = self._collections.get(slug)
        if collection is None or (collection["private"] and not self._role(request.user, slug)):
            raise HubError(404, "Collection not found")
        return collection

    @route("POST", "/api/collections/REPO/items")
    def _add_collection_item(self, request: Request, slug: str) -> Json:
        collection, spec = self._collection(request, slug), request.json
        self._check_write(request, slug, "You don't have the rights to edit this collection")
        item = {"id": spec["item"]["id"], "type": spec["item"]["type"]}
        if item["type"] == "model":
            self._readable(request, item["id"])
        if any(item.items() <= known.items() for known in collection["items"]):
            raise HubError(409, "This item is already in the collection")
        item |= {"_id": f"{next(self._numbers):024x}", "position": len(collection["items"])}
        item["note"] = {"text": spec["note"]} if spec.get("note") else None
        collection["items"].append(item)
        return collection


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """An address at which nobody listens, nor begins to meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


class _HttpServer(ThreadingHTTPServer):
    hub: HubServer
    request_queue_size = 128  # the default of 5 stalls a client that downloads with many threads


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def _serve(self) -> None:
        fault = self.server.hub.fault(self.command, urlsplit(self.path).path)
        self.close_connection = True
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.cut and length:
            self.rfile.read(length // 2)
            return
        # Read the body even where it is refused: otherwise the client may get a broken pipe, not the answer.
        body = self.rfile.read(length)
        if fault and fault.delay:
            time.sleep(fault.delay)
        reply = self.server.hub.answer(Request(self.command, self.path, self.headers, body), fault)
        if reply is None:
            return
        status, headers, data = reply
        self.send_response(status)
        # A connection for each request, so that none outlives the server in the client's pool.
        for name, value in {**headers, "Content-Length": str(len(data)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault and fault.cut else data)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: object) -> None:
        if self.server.hub.verbose:
            super().log_message(format, *args)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an in-memory stand-in for the Hugging Face Hub.")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--token", default="hf_x", help="the token that is accepted (%(default)s)")
    parser.add_argument("--user", default="alice", help="the user it belongs to (%(default)s)")
    parser.add_argument("--org", action="append", default=[], help="an organization with write rights")
    args = parser.parse_args()
    tokens = {args.token: {"name": args.user, "orgs": dict.fromkeys(args.org, "write")}}
    with HubServer(tokens, port=args.port, verbose=True) as hub:
        print(f"Serving at {hub.endpoint}, in memory, until Ctrl-C. To point a client at it:\n")
        print(
            f"    export HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1 HF_TOKEN={args.token}\n", flush=True
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped.")


if __name__ == "__main__":
    main()
