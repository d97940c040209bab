"""A hub folder to a repository of the Hugging Face Hub, in one commit."""

from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from ..errors import UserError
from ..training import load_model
from ..training.run import CONFIG, WEIGHTS
from ..weights import INDEX, WeightsError, read_index

README = "README.md"
OWNER = "{ORG}"  # stands in a card for whoever publishes it


def publish(folder: Path, to: str, private: bool = False) -> CommitInfo:
    """Upload a hub folder as the repository ``<to>/<folder name>``, whole or not at all.

    The token is huggingface_hub's own (``hf auth login`` or HF_TOKEN). The repository is made if there is
    none; the files then arrive in one commit on top of the revision that was looked at before.

    Args:
        folder: A checkpoint of a hub folder.
        to: User or organisation.
        private: Make a new repository private.

    Raises:
        UserError: The folder is incomplete or its weights do not load, there is no right to write to ``to``,
            somebody else committed meanwhile, or the Hub cannot be reached.
        WeightsError: A file differs from the index of the folder's hub.
    """
    listed = _check(folder)
    repo_id = f"{to}/{folder.resolve().name}"
    files = sorted(
        p for p in folder.iterdir() if p.is_file() and (p.name in listed or (not listed and p.name[0] != "."))
    )
    content = {p.name: str(p) for p in files if p.name != README}
    card = (folder / README).read_text(encoding="utf-8").replace(OWNER, to)
    operations = [
        CommitOperationAdd(README, card.encode()),
        *(CommitOperationAdd(*f) for f in content.items()),
    ]
    api = HfApi(library_name="timm_attn")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        head = api.model_info(repo_id).sha
        message = f"Upload {folder.resolve().name}"
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=head)
    except Exception as error:  # HTTP errors, a missing token and a dead network are of unrelated types
        raise UserError(_explain(error, repo_id)) from error


def _check(folder: Path) -> list[str]:
    """Names of the files that the hub's index lists, after comparing them with it; none without an index."""
    listed: list[str] = []
    missing = [name for name in (CONFIG, WEIGHTS, README) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no hub folder: it has no {', '.join(missing)}. `timm-attn export` writes one"
        )
    index = folder.resolve().parent / INDEX
    if index.is_file():
        known = {c.name: c for c in read_index(index.parent)}
        if folder.resolve().name not in known:
            raise WeightsError(f"{index} does not list {folder.resolve().name}: export the run again")
        listed = list(known[folder.resolve().name].files)
        for name in listed:
            known[folder.resolve().name].verified(name)
    load_model(f"local-dir:{folder}")
    return listed


def _explain(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    fixes = {
        401: "log in with `hf auth login` or set HF_TOKEN",
        403: "your token has no right to write there: choose another --to, or a token that has it",
        412: "somebody else committed to the repository meanwhile: look at it, then run the command again",
    }
    fix = fixes.get(status or 0, "no file was committed; run the command again")
    return f"cannot publish {repo_id}: {fix} ({reason})"
