"""Hub folders to repositories of the Hugging Face Hub: checked, in one commit each, and read back."""

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
)
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from ..compare import BOUNDS, relative_difference
from ..errors import UserError
from ..fold import example_input
from ..load import load_model
from ..weights import (
    CONFIG,
    INDEX,
    SIGNATURE,
    WEIGHTS,
    Checkpoint,
    WeightsError,
    read_index,
    sha256,
    without_tokens,
    write_index,
)
from ..weights import sign as write_signature
from .deploy import ONNX, PROGRAM
from .folders import locked
from .render import check_config, render, rendered

COLLECTION = "timm_attn"


@dataclass(frozen=True)
class Published:
    """What became of a folder.

    Args:
        repo_id: ``ORG/NAME``.
        files: ``{path: bytes}`` of what is there now, or would be.
        url: Page of the commit or of the pull request; None after a dry run.
        revision: Commit id; None after a dry run.
        tag: Version, ``v1`` and so on; None for a pull request and a dry run.
        sent: Whether there was anything to send.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    revision: str | None = None
    tag: str | None = None
    sent: bool = False


def publish(
    folders: Path | Sequence[Path],
    to: str,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    sign: str | None = None,
    track: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> list[Published]:
    """Upload checkpoints of a hub folder as repositories ``<to>/<folder name>``.

    All folders are checked before anything is uploaded. Each is uploaded in one commit on top of the revision
    that was checked, tagged with the next version, then downloaded again and compared; only then are the
    repository and its revision written into the index. Files that are already there are not uploaded again,
    so that an interrupted call can be repeated. The repositories are added to a collection. The token is that
    of huggingface_hub (``hf auth login`` or HF_TOKEN).

    Args:
        folders: Checkpoints of hub folders.
        to: User or organisation.
        private: Make new repositories, and the collection, private.
        create_pr: Open a pull request in an existing repository; the index stays as it is.
        dry_run: Check, and return what would be uploaded; no request is made, and nothing is signed.
        sign: Sign each folder first, see ``timm_attn.weights.sign``.
        track: Iterates over the folders, e.g. with a progress bar.

    Raises:
        UserError: A folder is incomplete, its card or its other form does not match it, there is no write
            access to ``to``, somebody else committed in the meantime, the download differs from the upload,
            or the Hub cannot be reached.
        WeightsError: A file differs from the index.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    checkpoints = [_check(folder, resigned=sign is not None) for folder in folders]
    for hub in {checkpoint.folder.parent for checkpoint in checkpoints}:
        # What a neighbour lacks must not be found when the first are sent.
        with locked(hub):
            render(hub, write=not dry_run)
    if dry_run:
        return [_plan(checkpoint, to) for checkpoint in checkpoints]
    if sign:
        for checkpoint in checkpoints:
            _sign(checkpoint, sign)
        checkpoints = [_check(folder) for folder in folders]
    by_folder = dict(zip(folders, checkpoints, strict=True))
    api = HfApi(library_name="timm_attn")
    published = []
    for folder in track(folders):
        published.append(_publish(api, by_folder[folder], to, private, create_pr))
    if not create_pr:
        with _explained(f"the collection of {to}"):
            slug = api.create_collection(COLLECTION, namespace=to, private=private, exists_ok=True).slug
            for done in published:
                api.add_collection_item(slug, done.repo_id, "model", exists_ok=True)
    return published


def _content(checkpoint: Checkpoint, to: str) -> dict[str, bytes | Path]:
    """What the repository holds: the files of the index and what is rendered from it."""
    files: dict[str, bytes | Path] = {name: checkpoint.folder / name for name in checkpoint.files}
    known = read_index(checkpoint.folder.parent)
    return files | {path: text.encode() for path, text in rendered(checkpoint, known, to).items()}


def _plan(checkpoint: Checkpoint, to: str) -> Published:
    sizes = {path: _size(content) for path, content in _content(checkpoint, to).items()}
    return Published(f"{to}/{checkpoint.name}", sizes)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _publish(api: HfApi, checkpoint: Checkpoint, to: str, private: bool, create_pr: bool) -> Published:
    repo_id = f"{to}/{checkpoint.name}"
    content = _content(checkpoint, to)
    with _explained(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        head = api.model_info(repo_id, files_metadata=True)
        if create_pr:
            published = _open_request(api, repo_id, content)
        else:
            page = f"{api.endpoint}/{repo_id}/commit/{head.sha}"
            published = (str(head.sha), page) if _same(head, content) else None
        if published is None:
            info = api.create_commit(
                repo_id,
                _operations(head, content),
                commit_message=f"Upload {checkpoint.name}",
                parent_commit=head.sha,
                create_pr=create_pr,
            )
            revision, url = info.oid, info.pr_url or info.commit_url
        else:
            revision, url = published
        _verify(api, repo_id, revision, content, checkpoint)
        tag = None if create_pr else _tag(api, repo_id, revision)
    if not create_pr:
        _note(checkpoint, repo_id, revision)
    sizes = {path: _size(data) for path, data in content.items()}
    return Published(repo_id, sizes, url, revision, tag, sent=published is None)


def _same(info: ModelInfo, content: dict[str, bytes | Path]) -> bool:
    """Whether a repository holds all of the content, and nothing stale."""
    digests = {
        sibling.rfilename: (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        for sibling in info.siblings or []
    }
    return not _stale(digests, content) and all(
        digests.get(path) in _digests(data) for path, data in content.items()
    )


def _digests(content: bytes | Path) -> tuple[str, str]:
    """sha256, and git's sha1, of a file."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _operations(
    info: ModelInfo, content: dict[str, bytes | Path]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    files = {sibling.rfilename for sibling in info.siblings or []}
    adds = [
        CommitOperationAdd(path, data if isinstance(data, bytes) else str(data))
        for path, data in content.items()
    ]
    return [*adds, *(CommitOperationDelete(path) for path in sorted(_stale(files, content)))]


def _stale(files: Iterable[str], content: dict[str, bytes | Path]) -> set[str]:
    """Files of a repository that belong to other weights than the content."""
    ours = (ONNX, PROGRAM, SIGNATURE)
    return {path for path in files if path in ours or path.startswith(".eval_results/")} - content.keys()


def _open_request(api: HfApi, repo_id: str, content: dict[str, bytes | Path]) -> tuple[str, str] | None:
    """Commit and page of an open pull request that has the content already."""
    for request in api.get_repo_discussions(repo_id, discussion_type="pull_request"):
        if request.status not in ("open", "draft"):
            continue
        info = api.model_info(repo_id, revision=request.git_reference, files_metadata=True)
        if _same(info, content):
            return str(info.sha), request.url
    return None


def _tag(api: HfApi, repo_id: str, revision: str) -> str:
    """The version of a commit: the tag ``v<number>`` that it has, or else the next one."""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    versions = {name: target for name, target in tags.items() if name[:1] == "v" and name[1:].isdigit()}
    for name, target in versions.items():
        if target == revision:
            return name
    tag = f"v{1 + max((int(name[1:]) for name in versions), default=0)}"
    api.create_tag(repo_id, tag=tag, revision=revision)
    return tag


def _verify(
    api: HfApi, repo_id: str, revision: str, content: dict[str, bytes | Path], checkpoint: Checkpoint
) -> None:
    """Download into an empty folder; compare every file, and the logits."""
    with tempfile.TemporaryDirectory() as folder:
        for path, data in content.items():
            arrived = api.hf_hub_download(repo_id, path, revision=revision, local_dir=folder)
            if sha256(arrived) != _digests(data)[0]:
                raise UserError(
                    f"{path} of {repo_id} at {revision} is not what was sent: the index is left as it was; "
                    "run the command again, and delete that commit if it stays so"
                )
        ours, theirs = load_model(f"local-dir:{checkpoint.folder}"), load_model(f"local-dir:{folder}")
        images = example_input(ours, 2)
        with torch.no_grad():
            if not torch.equal(ours(images), theirs(images)):
                raise UserError(f"{repo_id} at {revision} computes other logits than {checkpoint.folder}")


def _note(checkpoint: Checkpoint, repo_id: str, revision: str) -> None:
    """Write repository and revision into the index, and render anew what names them."""
    with locked(checkpoint.folder.parent):
        _change(checkpoint, lambda c: dataclasses.replace(c, repo_id=repo_id, revision=revision))
        render(checkpoint.folder.parent)


def _sign(checkpoint: Checkpoint, key: str) -> None:
    """Sign a checkpoint, and name the signature in the index."""
    path = write_signature(checkpoint.folder, key)
    table = {path.name: {"sha256": sha256(path), "size": path.stat().st_size}}
    with locked(checkpoint.folder.parent):
        _change(checkpoint, lambda c: dataclasses.replace(c, files={**c.files, **table}))


def _change(checkpoint: Checkpoint, change: Callable[[Checkpoint], Checkpoint]) -> None:
    """Change the entry of a checkpoint in the index of its hub folder, which is locked."""
    hub = checkpoint.folder.parent
    write_index(hub, [change(c) if c.name == checkpoint.name else c for c in read_index(hub)])


def _check(folder: Path, resigned: bool = False) -> Checkpoint:
    """The entry of a folder in the index, after everything that can be checked without the Hub.

    A signature that is about to be replaced may be any.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: name a checkpoint of a hub folder, e.g. hub/resnet20.sgd_c10"
        )
    folder = folder.resolve()
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no hub folder: it has no {', '.join(missing)}. `timm-attn export` writes one"
        )
    known = {c.name: c for c in read_index(folder.parent)}
    if folder.name not in known:
        raise WeightsError(f"{folder.parent / INDEX} does not list {folder.name}: export the run again")
    checkpoint = known[folder.name]
    for name in checkpoint.files:
        if not (resigned and name == SIGNATURE):
            checkpoint.verified(name)
    check_config(checkpoint)
    if not checkpoint.pretrained_cfg.get("license") or not checkpoint.dataset.get("license"):
        raise UserError(
            f"{folder} names no licence of weights and data: export the run with --dataset-license"
        )
    for path, text in rendered(checkpoint, known.values()).items():
        if (folder / path).is_file() and (folder / path).read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder / path} does not say what the index says: remove it, and it is written anew"
            )
    model = load_model(f"local-dir:{folder}")
    sibling = checkpoint.folded or checkpoint.folded_from
    if sibling:
        if sibling not in known:
            raise UserError(f"{folder.name} has no {sibling} beside it: export the run again")
        other = load_model(f"local-dir:{known[sibling].folder}")
        difference = relative_difference(model, other, example_input(model, 8))
        if not difference <= BOUNDS[torch.float32]:
            raise UserError(f"{folder.name} and {sibling} differ by {difference:.3g}: export the run again")
    return checkpoint


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the Hub client raises into one message with the fix."""
    try:
        yield
    except (UserError, WeightsError):
        raise
    except Exception as error:  # HTTP errors, a missing token and a dead network are of unrelated types
        raise UserError(_explain(error, what)) from None


def _explain(error: Exception, what: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = without_tokens(error).strip().splitlines() or [type(error).__name__]
    fixes = {
        401: "log in with `hf auth login` or set HF_TOKEN",
        403: "your token has no right to write there: choose another --to, or a token that has it",
        412: "somebody else committed to the repository meanwhile: look at it, then run the command again",
    }
    fix = fixes.get(status or 0, "run the command again; what has arrived is not sent twice")
    if isinstance(error, HFValidationError):
        fix = "--to must be one user or organisation"
    elif isinstance(error, OfflineModeIsEnabled):
        fix = "unset HF_HUB_OFFLINE"
    elif status is None:
        fix = f"check the connection and HF_ENDPOINT, {without_tokens(constants.ENDPOINT)}, then {fix}"
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        fix = "there is no such repository: publish it without --create-pr, or check --to"
    return f"cannot publish {what}: {fix} ({lines[0]})"
