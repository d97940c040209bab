"""A file of a Hub repository: out of the cache, or downloaded and compared with its sha256."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..files import sha256 as sha256_of
from ..version import __version__
from .schema import WeightsError

#: Seconds that the Hub may take to say what a file is; there is no second try.
PATIENCE = 5.0
_SECRET = re.compile(r"(?<=hf_)[\w.-]{8,}|(?<=://)[^/@\s]+(?=@)")


class NotOnHub(WeightsError):
    """The Hub answers, and shows no such repository."""


class NoSuchFile(WeightsError):
    """The Hub answers, and the repository has no such file."""


def without_tokens(message: object) -> str:
    """A message in which no Hub token and no password of an address is left."""
    return _SECRET.sub("…", str(message))


def fetch(repo_id: str, filename: str, revision: str | None = None, sha256: str | None = None) -> Path:
    """Path of a file of a model repository.

    A file of a commit, or of known content, is taken from the cache without a request. Otherwise one request,
    of at most five seconds and not repeated, asks what the file is before it is downloaded, and the cache
    answers if the Hub does not.

    Args:
        repo_id: ``ORG/NAME``.
        filename: Its path in the repository.
        revision: A commit id, branch or tag; None stands for the main branch.
        sha256: What the file must have; with None, what the Hub says that it has, where it says so.

    Raises:
        NotOnHub: There is no such repository, or it is private.
        NoSuchFile: The repository has no such file.
        WeightsError: The file cannot be had, or is damaged.
    """
    cached = try_to_load_from_cache(repo_id, filename, revision=revision)
    cached = Path(cached) if isinstance(cached, str) else None
    damaged = cached is not None and sha256 is not None and sha256_of(cached) != sha256
    pinned = sha256 is not None or re.fullmatch("[0-9a-f]{40}", revision or "")
    if cached and not damaged and (pinned or constants.is_offline_mode()):
        return cached
    if constants.is_offline_mode():
        raise WeightsError(_advice(repo_id, filename, revision, "HF_HUB_OFFLINE is set", damaged))
    try:
        metadata = get_hf_file_metadata(
            hf_hub_url(repo_id, filename, revision=revision, endpoint=constants.ENDPOINT),
            timeout=PATIENCE,
            library_name="timm_attn",
            library_version=__version__,
        )
    except Exception as error:  # the HTTP library's errors are no public types
        if _says_no(error):
            absent = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            kind = NotOnHub if absent else WeightsError
            if isinstance(error, EntryNotFoundError):
                kind = NoSuchFile
            raise kind(_missing(repo_id, filename, revision, error)) from None
        if cached and not damaged:
            return cached
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            server = without_tokens(constants.ENDPOINT)
            raise WeightsError(
                f"{server} refuses your token for {repo_id}: log in with `hf auth login`, or unset HF_TOKEN"
            ) from None
        raise WeightsError(_advice(repo_id, filename, revision, _reason(error), damaged)) from None
    want = sha256 or (metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None)
    try:
        path = Path(
            hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                endpoint=constants.ENDPOINT,
                force_download=damaged,
                etag_timeout=PATIENCE,
                library_name="timm_attn",
                library_version=__version__,
            )
        )
    except Exception as error:
        raise WeightsError(_advice(repo_id, filename, revision, _reason(error), damaged)) from None
    if want and sha256_of(path) != want:
        _forget(path)
        raise WeightsError(
            f"{repo_id} {filename} is damaged: what was downloaded has not the sha256 {want}. It is not "
            "kept; run the command again, and if that does not help report it"
        )
    return path


def hub_unreachable() -> str:
    """Why nothing can be had from the Hub at present, or '' if it answers, whatever it says."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set (unset it)"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # the HTTP library's errors are no public types
        return f"{without_tokens(constants.ENDPOINT)} does not answer ({_reason(error)})"
    return ""


def _forget(path: Path) -> None:
    """Take a file out of the cache: the entry of the revision and the content that it links to."""
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


def _says_no(error: Exception) -> bool:
    answered = getattr(error, "response", None) is not None  # what says that nobody does is of this family
    kinds = RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError
    return answered and isinstance(error, kinds)


def _missing(repo_id: str, filename: str, revision: str | None, error: Exception) -> str:
    at = f"{repo_id}@{revision}" if revision else repo_id
    if isinstance(error, EntryNotFoundError):
        if filename.endswith(".safetensors"):
            return f"{at} has no {filename}. Pickled weights are not read: ask its owner for safetensors"
        return f"{at} has no {filename}: ask its owner for it"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}: leave the revision out, or look at its history"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: log in with `hf auth login`, and ask for access on its page on the Hub"
    return (
        f"{without_tokens(constants.ENDPOINT)} has no repository {repo_id}, or does not show it to "
        "you: check the name, or log in with `hf auth login`"
    )


def _reason(error: Exception) -> str:
    lines: Any = without_tokens(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _advice(repo_id: str, filename: str, revision: str | None, reason: str, damaged: bool) -> str:
    at = f" --revision {revision}" if revision else ""
    found = "holds a damaged copy" if damaged else "does not hold it"
    return (
        f"cannot get {filename} of {repo_id} ({reason}). Tried: the cache {constants.HF_HUB_CACHE}, which "
        f"{found}; {without_tokens(constants.ENDPOINT)}. With a connection run `hf download {repo_id} "
        f"{filename}{at}` (the cache then serves it offline), or name a hub folder in TIMM_ATTN_HUB"
    )
