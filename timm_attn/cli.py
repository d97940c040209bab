"""The command ``timm-attn``."""

import errno
import io
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from .errors import UserError
from .fold import FoldError, NothingToFold, above_bound, example_input, fold, verify_fold
from .models import MECHANISMS, graft_tags, model_names, parse_name, register, stock_model
from .models import mechanism as row_of
from .training import Recipe, load_model, resume_seeds, train_seeds, validate
from .training import resume as resume_run
from .training import train as train_run
from .training.network import check_model
from .training.recipe_file import recipe_arguments
from .training.run import is_run, save_model
from .training.seeds import is_seeds
from .weights import INDEX, Checkpoint, WeightsError, check_chosen, checkpoints

app = SubcommandApp()
console = Console(soft_wrap=True, highlight=False)
if not console.is_terminal:
    console.width = 140  # a pipe has no width, and tables cut to 80 columns lose names


@app.command
def train(
    model: Positional[str | None] = None,
    /,
    recipe: str | None = None,
    attention: str | None = None,
    resume: Path | None = None,
    out: Path | None = None,
    seeds: tuple[int, ...] = (),
    options: OmitArgPrefixes[Recipe] = Recipe(),  # noqa: B008 (frozen)
) -> None:
    """Train a model and write a run folder, or go on with one.

    Under `accelerate launch scripts/train.py` with the same arguments it uses every process it is given.

    Args:
        model: Model name, e.g. resnet20_dia.
        recipe: Name of a recipe of the package, or a YAML file with any of the options below; options on the
            command line override it.
        attention: A mechanism to put into the model, any of timm's: asr, dia, ssia, sem, spem, se, eca, ….
        resume: Go on with this run folder. Takes no other argument but --data, where the data lies now.
        out: Run folder to make; runs/<model>_<data>_s<seed> by default.
        seeds: Train once with each of these, in seed-<seed> of the run folder.
    """
    if recipe is not None:
        raise UserError("give --recipe once")  # main() has put the fields of the first into the options
    if resume is not None:
        if model is not None or attention or out is not None or seeds or options != Recipe(data=options.data):
            raise UserError("--resume goes on with the recipe of the run: it takes --data and nothing else")
        run = resume
    else:
        if model is None:
            raise UserError("name a model to train, e.g. `timm-attn train resnet20_dia --data digits`")
        if attention is not None:
            check_model(model)
            try:
                model = register(model, attention)
            except ValueError as error:
                raise UserError(str(error)) from None
        data = Path(options.data).name or "data"
        run = out or Path("runs") / f"{model}_{data}{'' if seeds else f'_s{options.seed}'}"
    try:
        if model is None:
            moved = options.data or None
            results = resume_seeds(run, moved) if is_seeds(run) else resume_run(run, data=moved)
        elif seeds:
            results = train_seeds(model, options, run, seeds)
        else:
            results = train_run(model, options, run)
    except KeyboardInterrupt as reason:
        started = is_run(run) or is_seeds(run)
        hint = f"`timm-attn train --resume {run}` goes on" if started else "no run yet"
        if started and PartialState().num_processes > 1:
            hint += ", with the launcher that it was started with"
        why = f" by {reason}, a checkpoint is written" if str(reason) else ""
        raise Stopped(f"stopped{why}; {hint}") from None
    if PartialState().is_main_process:
        _print_results(run, results)


def _print_results(run: Path, results: dict[str, Any]) -> None:
    table = Table("run folder", "split", "epoch", "top-1", "top-5", "loss", "n", "best epoch")
    best = results.get("best_epoch")
    figures = [results[key] for key in ("top1", "top5", "loss")]
    table.add_row(
        str(run),
        results["split"],
        str(results["epoch"]),
        *(_figure(value, digits) for value, digits in zip(figures, (2, 2, 4), strict=True)),
        str(figures[0]["n"] if "seeds" in results else 1),
        f"{best['top1']:.2f} on {best['split']} in epoch {best['epoch']}" if best else "",
    )
    console.print(table)


def _figure(value: Any, digits: int) -> str:
    """A number, or mean ± standard deviation of several runs."""
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"


@app.command(name="validate")
def validate_command(
    model: Positional[str],
    /,
    data: str,
    split: str | None = None,
    data_config: str | None = None,
    data_revision: str | None = None,
    batch_size: int = 128,
    precision: Literal["no", "bf16", "fp16"] = "no",
    image_column: str | None = None,
    label_column: str | None = None,
    on_corrupt: Literal["stop", "skip"] = "stop",
    workers: int = 2,
) -> None:
    """Print top-1, top-5, loss and images per second of a model.

    Args:
        model: A model name with pretrained weights, a run folder, a hub folder, or hf-hub:ORG/NAME.
        data: A folder of parquet files or images, a Hugging Face dataset id, or digits.
        split: Split to measure on; test by default, validation where there is no test.
        data_config: Configuration of a data set that has several.
        data_revision: Branch, tag or commit of a data set on the Hub.
        batch_size: Images per batch.
        precision: no (fp32), bf16 or fp16.
        image_column: Image column; found by its type by default.
        label_column: Label column; found by its type by default.
        on_corrupt: Stop at a corrupt image, or skip and count it.
        workers: Processes that decode larger images.
    """
    recipe = Recipe(
        data=data,
        data_config=data_config,
        data_revision=data_revision,
        on_corrupt=on_corrupt,
        eval_split=split,
        batch_size=batch_size,
        precision=precision,
        image_column=image_column,
        label_column=label_column,
        workers=workers,
    )
    figures = validate(load_model(model), recipe, show=console.is_terminal)
    table = Table("model", "data", "images", "top-1", "top-5", "loss", "images/s")
    table.add_row(
        model,
        data,
        f"{figures['images']:,}",
        f"{figures['top1']:.2f}",
        f"{figures['top5']:.2f}",
        f"{figures['loss']:.4f}",
        f"{figures['eval_images_per_second']:.0f}",
    )
    console.print(table)
    if figures.get("skipped"):
        console.print(f"{figures['skipped']:,} corrupt images are left out")


@app.command(name="fold")
def fold_command(source: Positional[str], /, out: Path | None = None, layer_scale: bool = False) -> None:
    """Write a model's deployed form: the plain network, or the same one with norms fused.

    Args:
        source: A run folder, a hub folder or a model name with pretrained weights.
        out: Folder to write; <run>/folded by default, of a hub folder or a name there is none.
        layer_scale: Multiply LayerScales into the layers before them, too, and write model.pt2, a program of
            torch.export, as no name of timm's stands for such a network.
    """
    model = load_model(source)
    try:
        folded = fold(model, layer_scale=layer_scale)
    except NothingToFold as reason:
        console.print(str(reason))
        return
    stock: Any = folded if layer_scale else stock_model(model, folded)
    images = example_input(model, 8)
    report = verify_fold(model, stock, images)
    excess = above_bound(report.max_relative, images.dtype)
    if excess:
        raise FoldError(f"the folded {source} does not compute what it computes: {excess}")
    if out is None:
        if not Path(source).is_dir() or (Path(source).parent / INDEX).is_file():
            raise UserError(f"name a folder for the folded {source} with --out")
        out = Path(source) / "folded"
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    if layer_scale:
        from .publish.deploy import write_program

        write_program(stock, out / "model.pt2")
    else:
        save_model(stock, out, list(model.pretrained_cfg.get("label_names") or []))
    table = Table("", "architecture", "parameters", "multiply-adds", "bytes")
    for i, (name, network) in enumerate((("as it was", model), ("folded", stock))):
        costs = (report.parameters[i], report.multiply_adds[i], report.bytes[i])
        table.add_row(name, network.pretrained_cfg["architecture"], *(f"{cost:,}" for cost in costs))
    console.print(table)
    if report.separate_norms:
        console.print(f"{len(report.separate_norms)} norms stay: no convolution stands before them")
    console.print(
        f"max|Δlogit| = {report.max_absolute:.1e}, max|Δlogit| / max|logit| = {report.max_relative:.1e}, "
        f"the same class for {report.top1_agreement:g} % of {report.images} random images; written to {out}"
    )


@app.command(name="freeze")
def freeze_command(
    source: Positional[str],
    /,
    data: str,
    out: Path,
    budget: float = 0.1,
    all: bool = False,
    keep: tuple[str, ...] = (),
    recover: int = 0,
    images: int = 10_000,
    split: str | None = None,
    batch_size: int = 128,
    lr: float = 0.01,
    precision: Literal["no", "bf16", "fp16"] = "no",
    workers: int = 2,
) -> None:
    """Turn channel gates (SE, ECA, DIA …) into constants, as many as a budget of top-1 allows.

    The means come from the training split, where there is one. One half of the images decides which gates
    go, the other half gives the figures.

    Args:
        source: A run folder, a hub folder, a model name with pretrained weights, or hf-hub:ORG/NAME.
        data: A folder of parquet files or images, a Hugging Face dataset id, or digits.
        out: Folder to write, which timm loads as local-dir:FOLDER.
        budget: Points of top-1 that may be lost. Less than one standard error is never told from no loss.
        all: Freeze every gate, whatever it costs.
        keep: Shell patterns of gates that stay, e.g. 'layer3.*'.
        recover: Steps of distillation from the original, by SGD on the training split; resumed where they
            stopped.
        images: Most images of the split.
        split: Split to measure on; test by default, validation where there is no test.
        batch_size: Images per batch.
        lr: Peak learning rate of the distillation.
        precision: Of the distillation: no (fp32), bf16 or fp16.
        workers: Processes that decode larger images.
    """
    from .training.freezing import freeze_trained

    recipe = Recipe(
        data=data,
        eval_split=split,
        batch_size=batch_size,
        workers=workers,
        lr=lr,
        weight_decay=0.0,
        warmup_epochs=0.0,
        precision=precision,
    )
    try:
        report = freeze_trained(
            source, recipe, out, budget, all, keep, recover, images, console.print, console.is_terminal
        )
    except KeyboardInterrupt as reason:
        why = f" by {reason}" if str(reason) else ""
        raise Stopped(f"stopped{why}; the same command goes on with what it has trained") from None
    table = Table(
        *("gate", "kind", "channels", "due to the image", "between classes", "KL alone", "ms"),
        Column("", overflow="fold"),
    )
    for gate in report.gates:
        table.add_row(
            gate.path,
            gate.kind,
            f"{gate.channels:,}",
            *(f"{100 * share:.0f} %" for share in (gate.image_share, gate.class_share)),
            f"{gate.kl:.4f}",
            f"{gate.milliseconds:.2f}",
            f"frozen, {gate.where}" if gate.frozen else f"stays: {gate.where}",
        )
    console.print(table)
    for path, reason in report.unknown.items():
        console.print(f"{path}: {reason}")
    totals = Table("", "top-1", "same class", "KL", f"ms, batch of {report.batch_size}", "parameters")
    for name, figures in (("original", report.before), ("frozen", report.after)):
        totals.add_row(
            name,
            f"{figures.top1:.2f}",
            f"{figures.agreement:.2f} %",
            f"{figures.kl:.4f}",
            f"{figures.milliseconds:.1f}",
            f"{figures.parameters:,}",
        )
    console.print(totals)
    if not report.frozen:
        console.print(f"no gate goes within {budget:g} points; nothing is written")
        return
    console.print(
        f"{report.frozen} of {len(report.gates)} gates are constants; figures of {report.images[2]:,} images "
        f"that decided nothing. timm.create_model('local-dir:{out}', pretrained=True) is a "
        f"{report.model.pretrained_cfg['architecture']}"  # pyright: ignore
    )


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
    """Write a finished run as hub folders, with cards: the trained form and, where it folds, the folded one.

    Args:
        run: A run folder, or one with the runs of several seeds: the median one is written, all are measured.
            Or what `timm-attn freeze` has written of a checkpoint of the hub folder.
        tag: Name of recipe and data, e.g. sgd_c10.
        hub: Hub folder to write into.
        dataset: What cards call the data set, e.g. uoft-cs/cifar10.
        data: Where the data lies, if it is not where the run had it.
        onnx: Write model.onnx too, with a dynamic batch size, compared in onnxruntime.
        torch_export: Write model.pt2 too, for torch.export.load.
        dataset_license: Licence of the images, e.g. cc-by-4.0, where it is not known here.
    """
    from .publish import export as export_run
    from .publish import export_frozen, is_frozen_folder

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
            _figure(over, 2),
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
) -> None:
    """Upload checkpoints of a hub folder to the Hugging Face Hub: checked, one commit each, and read back.

    Args:
        folders: Checkpoints of a hub folder, e.g. hub/resnet20_dia.sgd_c10.
        to: User or organisation.
        private: Make new repositories private.
        create_pr: Open a pull request in an existing repository.
        dry_run: Show what would be sent, and send nothing.
    """
    from rich.progress import track

    from .publish import publish as publish_folders

    if not folders:
        raise UserError("name the folders to publish, e.g. hub/resnet20_dia.sgd_c10")
    bar = partial(track, description="publishing", console=console)
    done = publish_folders(folders, to, private, create_pr, dry_run, bar)
    if dry_run:
        table = Table("repository", "file", "bytes", title="to be sent, but for what is there already")
        for repository in done:
            for path, size in repository.files.items():
                table.add_row(repository.repo_id, path, f"{size:,}")
    else:
        table = Table("repository", "version", "", "page")
        for repository in done:
            state = "sent" if repository.sent else "was there"
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
    """Show the models, and the weights that are found for them.

    Args:
        pattern: Shell pattern of names, e.g. '*dia*'.
        mechanism: Only these: plain, se, dia, asr, asr_se, conam, fmm, ssia, sem, spem.
        data: Only weights trained on this data set, e.g. uoft-cs/cifar10.
        weights: Only weights, no architectures without.
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
        Column(title, overflow="fold") for title in ("model", "backbone", "mechanism", "folds", "weights")
    )
    table = Table(*names, "data", "top-1", "mean", "n", "lies")
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
        row = (name, backbone, key or "plain", "yes" if row_of(key).folds else "")
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
                *((_figure(over, 2), str(over["n"])) if over else ("", "")),
                "here" if checkpoint.here else str(checkpoint.repo_id or "missing"),
            )
    if not table.row_count:
        hint = "leave a filter out" if mechanism or data or weights else "quote the pattern, e.g. '*dia*'"
        raise UserError(f"nothing matches {pattern!r} and the filters: {hint}")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; wrong input ends with one message and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every encoding has a Δ
            stream.reconfigure(errors="replace")
    try:
        app.cli(prog="timm-attn", args=_expand_recipe(arguments), sort_subcommands=False)
    except Stopped as reason:
        _complain("", str(reason))
        sys.exit(130)  # what a shell expects after Ctrl-C
    except (UserError, WeightsError, FoldError) as error:
        _complain("error: ", str(error))
        sys.exit(2)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and arguments[:1] == ["train"]
        hint = ": make room on the disk, then go on with `timm-attn train --resume RUN`" if full else ""
        _complain("error: ", f"{error}{hint}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(error):  # PyTorch's, on CPUs
            raise
        detail = str(error).partition("\n")[0]
        _complain("error: ", f"out of memory ({detail}): lower --batch-size or raise --accumulation")
        sys.exit(2)


def _complain(kind: str, message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]{kind}[/]{escape(message)}")


class Stopped(Exception):
    """A command was stopped by the user."""


def _expand_recipe(arguments: list[str]) -> list[str]:
    """Put the fields of ``--recipe FILE`` before the other options, which then override them."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--recipe=") else [a])]
    if arguments[:1] != ["train"] or "--recipe" not in arguments[:-1]:
        return arguments
    at = arguments.index("--recipe")
    fields = recipe_arguments(arguments[at + 1])
    rest = arguments[1:at] + arguments[at + 2 :]
    # The model's name stays in front: an option that takes several values would swallow it.
    name = 0 if not rest or rest[0].startswith("-") else 1
    return ["train", *rest[:name], *fields, *rest[name:]]
