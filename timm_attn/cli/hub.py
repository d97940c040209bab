"""Weights: export, publish and list."""

from functools import partial
from pathlib import Path

from rich.table import Column, Table
from tyro.conf import Positional

from ..errors import UserError
from ..models import MECHANISMS, STATUSES, graft_tags, model_names, parse_name, status
from ..models import mechanism as row_of
from ..weights import Checkpoint, check_chosen, checkpoints
from .console import app, console, figure


@app.command
def export(
    run: Positional[Path],
    /,
    tag: str,
    hub: Path = Path("hub"),
    dataset: str | None = None,
    data: str | None = None,
    onnx: bool = False,
    torch_export: bool = False,
    dataset_license: str | None = None,
) -> None:
    """Export a finished run to a hub folder, with model cards: the trained model and its folded form, if any.

    Args:
        run: A run folder; or a folder with the runs of several seeds, of which the median one is exported and
            all are evaluated; or the output of `timm-attn freeze` for a checkpoint of the hub folder.
        tag: Tag of the weights, which names recipe and data, e.g. sgd_c10.
        hub: Hub folder to write to.
        dataset: Name of the dataset in the model cards, e.g. uoft-cs/cifar10.
        data: Location of the data, if it has moved since the run.
        onnx: Also write model.onnx, with a dynamic batch size, compared in onnxruntime.
        torch_export: Also write model.pt2, for torch.export.load.
        dataset_license: Licence of the images, e.g. cc-by-4.0, if this package does not know it.
    """
    from ..publish import export as export_run
    from ..publish import export_frozen, is_frozen_folder

    if is_frozen_folder(run):
        if onnx or torch_export or dataset or dataset_license:
            raise UserError("a network with frozen gates takes --tag, --hub and --data; leave the others out")
        exported = [export_frozen(run, tag, hub, data)]
    else:
        exported = export_run(run, tag, hub, dataset, data, onnx, torch_export, dataset_license)
    table = Table("folder", "parameters", "top-1", "mean", "n", "logit difference")
    for checkpoint in exported:
        metrics, over = checkpoint.metrics, checkpoint.over_seeds["top1"]
        table.add_row(
            str(checkpoint.folder),
            f"{metrics['parameters']:,}",
            f"{metrics['top1']:.2f}",
            figure(over, 2),
            str(over["n"]),
            f"{metrics['logit_difference']:.1e}",
        )
    console.print(table)


@app.command
def publish(
    folders: Positional[tuple[Path, ...]],
    /,
    to: str,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    sign: str | None = None,
) -> None:
    """Upload checkpoints of a hub folder to the Hugging Face Hub, one commit each, verified before and after.

    Args:
        folders: Checkpoints of a hub folder, e.g. hub/resnet20_dia.sgd_c10.
        to: User or organisation.
        private: Make new repositories private.
        create_pr: Open a pull request in an existing repository instead.
        dry_run: Show what would be uploaded, and upload nothing.
        sign: Sign config.json and model.safetensors first: PEM file of a private elliptic-curve key, or
            sigstore.
    """
    from rich.progress import track

    from ..publish import publish as publish_folders

    if not folders:
        raise UserError("name the folders to publish, e.g. hub/resnet20_dia.sgd_c10")
    bar = partial(track, description="publishing", console=console)
    done = publish_folders(folders, to, private, create_pr, dry_run, sign, bar)
    if dry_run:
        table = Table("repository", "file", "bytes", title="to be uploaded, except for files already there")
        for repository in done:
            for path, size in repository.files.items():
                table.add_row(repository.repo_id, path, f"{size:,}")
    else:
        table = Table("repository", "version", "", "page")
        for repository in done:
            state = "uploaded" if repository.sent else "already there"
            table.add_row(repository.repo_id, repository.tag or "", state, repository.url)
    console.print(table)


@app.command(name="list")
def list_command(
    pattern: Positional[str] = "*",
    /,
    mechanism: str | None = None,
    data: str | None = None,
    weights: bool = False,
) -> None:
    """List the models and the weights available for them.

    Args:
        pattern: Shell pattern of model names, e.g. '*dia*'.
        mechanism: Only this mechanism: plain, se, dia, asr, asr_se, conam, fmm, ssia, sem or spem.
        data: Only weights trained on this dataset, e.g. uoft-cs/cifar10.
        weights: Only models with weights.
    """
    from fnmatch import fnmatch

    choices = ["plain", *filter(None, MECHANISMS)]
    if mechanism not in (None, *choices):
        raise UserError(f"--mechanism is {mechanism!r}: choose one of {', '.join(choices)}")
    check_chosen()
    trained_on = sorted({str(c.dataset.get("id")) for c in checkpoints()})
    if data not in (None, *trained_on):
        raise UserError(f"there are no weights trained on {data!r}: choose one of {', '.join(trained_on)}")
    by_architecture: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints():
        by_architecture.setdefault(checkpoint.architecture, []).append(checkpoint)
    names = (
        Column(title, overflow="fold")
        for title in ("model", "backbone", "mechanism", "folds", "status", "weights")
    )
    table = Table(*names, "data", "top-1", "mean", "n", "location")
    for name in [*model_names(), *(name for name in by_architecture if name not in model_names())]:
        backbone, key = parse_name(name) if name in model_names() else (name, "")
        if mechanism not in (None, key or "plain"):
            continue
        found = [
            c
            for c in by_architecture.get(name, [])
            if (fnmatch(c.name, pattern) or fnmatch(name, pattern)) and data in (None, c.dataset.get("id"))
        ]
        grafts = [tag for tag in graft_tags(name) if fnmatch(f"{name}.{tag}", pattern) and data is None]
        row = (name, backbone, key or "plain", "yes" if row_of(key).folds else "", status(name))
        if not found and not grafts and fnmatch(name, pattern) and not weights and data is None:
            table.add_row(*row, "", "", "", "", "", "")
        for tag in grafts:
            table.add_row(*row, tag, "grafted, not trained with attention", "", "", "", "timm's repository")
        for checkpoint in found:
            over = checkpoint.over_seeds.get("top1")
            table.add_row(
                *row,
                checkpoint.tag,
                checkpoint.dataset.get("id", ""),
                f"{checkpoint.metrics['top1']:.2f}" if "top1" in checkpoint.metrics else "",
                *((figure(over, 2), str(over["n"])) if over else ("", "")),
                "here" if checkpoint.here else str(checkpoint.repo_id or "missing"),
            )
    if not table.row_count:
        hint = "leave a filter out" if mechanism or data or weights else "quote the pattern, e.g. '*dia*'"
        raise UserError(f"nothing matches {pattern!r} and the filters: {hint}")
    console.print(table)
    for name, meaning in STATUSES.items():
        console.print(f"{name}: {meaning}")
