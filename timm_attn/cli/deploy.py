"""Networks for inference: fold, and freeze."""

from pathlib import Path
from typing import Any, Literal

from rich.table import Column, Table
from tyro.conf import OmitArgPrefixes, Positional

from ..compare import FoldError, above_bound
from ..errors import UserError
from ..fold import NothingToFold, example_input, fold, verify_fold
from ..load import load_model
from ..models import stock_model
from ..training.run import save_model
from ..weights import INDEX
from .console import Images, Stopped, app, console


@app.command(name="fold")
def fold_command(source: Positional[str], /, out: Path | None = None, layer_scale: bool = False) -> None:
    """Fold a model for inference: into the plain network, or into the same network with norms fused.

    Args:
        source: A run folder, a hub folder or a model name with pretrained weights.
        out: Folder to write; <run>/folded by default. Required if the source is a hub folder or a name.
        layer_scale: Also multiply LayerScales into the layers before them. The result is written as
            model.pt2, a torch.export program, as timm has no name for such a network.
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
        raise FoldError(f"the folded {source} does not compute what the original computes: {excess}")
    if out is None:
        if not Path(source).is_dir() or (Path(source).parent / INDEX).is_file():
            raise UserError(f"name a folder for the folded {source} with --out")
        out = Path(source) / "folded"
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    if layer_scale:
        from ..publish.deploy import write_program

        write_program(stock, out / "model.pt2")
    else:
        save_model(stock, out, list(model.pretrained_cfg.get("label_names") or []))
    table = Table("", "architecture", "parameters", "multiply-adds", "bytes")
    for i, (name, network) in enumerate((("original", model), ("folded", stock))):
        costs = (report.parameters[i], report.multiply_adds[i], report.bytes[i])
        table.add_row(name, network.pretrained_cfg["architecture"], *(f"{cost:,}" for cost in costs))
    console.print(table)
    if report.separate_norms:
        console.print(f"{len(report.separate_norms)} norms stay: there is no convolution before them")
    console.print(
        f"max|Δlogit| = {report.max_absolute:.1e}, max|Δlogit| / max|logit| = {report.max_relative:.1e}, "
        f"the same class for {report.top1_agreement:g} % of {report.images} random images; written to {out}"
    )


@app.command(name="freeze")
def freeze_command(
    source: Positional[str],
    /,
    images: OmitArgPrefixes[Images],
    out: Path,
    budget: float = 0.1,
    all: bool = False,
    keep: tuple[str, ...] = (),
    recover: int = 0,
    max_images: int = 10_000,
    lr: float = 0.01,
    precision: Literal["no", "bf16", "fp16"] = "no",
) -> None:
    """Replace channel gates (SE, ECA, DIA …) by constants, as many as a budget of top-1 allows.

    The constants are the means of the gates over images of the training split, if there is one. One half of
    the evaluation images is used to choose the gates, the other half for the final figures.

    Args:
        source: A run folder, a hub folder, a model name with pretrained weights, or hf-hub:ORG/NAME.
        out: Folder to write; timm loads it as local-dir:FOLDER.
        budget: Points of top-1 that may be lost. A loss below one standard error cannot be told from zero and
            is always allowed.
        all: Freeze every gate, whatever the loss.
        keep: Shell patterns of gates that are not frozen, e.g. 'layer3.*'.
        recover: Steps of distillation from the original, with SGD on the training split. If interrupted, they
            are resumed.
        max_images: Maximum number of images used from the split.
        lr: Peak learning rate of the distillation.
        precision: Precision of the distillation: no (fp32), bf16 or fp16.
    """
    from ..training.freezing import freeze_trained

    recipe = images.recipe(source, lr=lr, weight_decay=0.0, warmup_epochs=0.0, precision=precision)
    try:
        report = freeze_trained(
            source, recipe, out, budget, all, keep, recover, max_images, console.print, console.is_terminal
        )
    except KeyboardInterrupt as reason:
        why = f" by {reason}" if str(reason) else ""
        raise Stopped(f"stopped{why}; run the same command again to resume") from None
    table = Table(
        *("gate", "kind", "channels", "due to the image", "between classes", "KL if frozen alone", "ms"),
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
        console.print(f"no gate can be frozen within {budget:g} points; nothing is written")
        return
    console.print(
        f"{report.frozen} of {len(report.gates)} gates are frozen; the figures are from {report.images[2]:,} "
        f"images not used to choose them. timm.create_model('local-dir:{out}', pretrained=True) is a "
        f"{report.model.pretrained_cfg['architecture']}"  # pyright: ignore
    )
