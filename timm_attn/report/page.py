"""An HTML report on a model: accuracy, mistakes, calibration, gates, folding and speed."""

import base64
import contextlib
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor, nn

from ..compare import FoldError
from ..errors import UserError
from ..files import replace_file
from ..fold import NothingToFold, example_input, fold, foldable, verify_fold
from ..load import load_model
from ..models import model_names, parse_name, stock_model
from ..papers import PAPERS
from ..style import SEQUENTIAL, new_figure, png, short, style
from ..training import Recipe
from ..training.curves import curves_figure
from ..training.freezing import REPORT as FREEZE_REPORT
from ..training.run import METRICS, hardware, read_metrics
from ..training.validation import Evaluated, evaluated
from .correlation import correlation
from .observation import Sample
from .stripes import stripes

_PAGE = Path(__file__).with_name("report.html.jinja")
#: Number of images on which gates are measured.
_OBSERVED = 512
_BINS = 15


def calibration(
    probabilities: Tensor, labels: Tensor, bins: int = _BINS
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (ECE), and the figures of each bin of confidence.

    Source: "On Calibration of Modern Neural Networks", Guo et al., https://arxiv.org/abs/1706.04599

    Args:
        probabilities: B × classes.
        labels: B.
        bins: Number of bins, of equal width.

    Returns:
        ECE between 0 and 1; and edges, share of images, confidence and accuracy of each non-empty bin.
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for i in range(bins):
        rows = which == i
        if rows.any():
            values = (rows.double().mean(), confidence[rows].mean(), right[rows].mean())
            share, mean, accuracy = (v.item() for v in values)
            edges = {"low": i / bins, "high": (i + 1) / bins}
            found.append({**edges, "share": share, "confidence": mean, "accuracy": accuracy})
    return sum(b["share"] * abs(b["confidence"] - b["accuracy"]) for b in found), found


def write_report(source: str, recipe: Recipe, out: Path, show: bool = False) -> Path:
    """Write a report on a model as one self-contained HTML file.

    Args:
        source: As for ``load_model``.
        recipe: Data, split, columns, batch size.
        out: The file.
        show: Show a progress bar.

    Raises:
        UserError: The model or the data cannot be used. Nothing is written.
    """
    model = load_model(source)
    seen = evaluated(model, recipe, show, source)
    folder = Path(source.removeprefix("local-dir:"))
    name = folder.name or source
    folded = _deployed(model)
    sections = [
        _curves(folder, name),
        _accuracy(seen),
        _confusion(seen),
        _calibration(seen),
        _mistakes(seen, model),
        *_gates(model, name, seen),
        _folded(model, folded),
        _frozen(folder),
        _speed(model, folded),
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        name=name,
        facts=_facts(model, recipe, seen),
        sections=[section for section in sections if section],
    )
    replace_file(out, page.encode())
    return out


def _section(
    title: str, text: str = "", picture: Callable[[], Any] | None = None, **parts: Any
) -> dict[str, Any]:
    """A section of the page: heading, text, a picture in a light and a dark version, table, images."""
    pictures = {}
    if picture is not None:
        for dark in (False, True):
            with style(dark):
                pictures["dark" if dark else "light"] = _data_uri(png(picture()))
    return {"title": title, "text": text, "pictures": pictures, **parts}


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _facts(model: Any, recipe: Recipe, seen: Evaluated) -> list[tuple[str, str]]:
    cfg = model.pretrained_cfg
    architecture = cfg["architecture"]
    mechanism = parse_name(architecture)[1] if architecture in model_names() else ""
    p = seen.logits.softmax(1)
    top = seen.logits.topk(min(5, p.shape[1])).indices == seen.labels[:, None]
    loss = nn.functional.cross_entropy(seen.logits, seen.labels).item()
    facts = [
        ("architecture", architecture),
        ("parameters", f"{sum(t.numel() for t in model.parameters()):,}"),
        ("input", " × ".join(map(str, cfg["input_size"]))),
        ("data", f"{recipe.data}, {seen.split.name} split, {len(seen.labels):,} images"),
        ("top-1", f"{100 * top[:, 0].double().mean():.2f} %"),
        ("top-5", f"{100 * top.any(1).double().mean():.2f} %"),
        ("cross-entropy", f"{loss:.4f} nats"),
        ("calibration error (ECE)", f"{100 * calibration(p, seen.labels)[0]:.2f} %"),
    ]
    if mechanism in PAPERS:
        facts.insert(1, ("mechanism", f"{PAPERS[mechanism].summary} ({PAPERS[mechanism].title})"))
    return facts


def _curves(folder: Path, name: str) -> dict[str, Any] | None:
    lines = read_metrics(folder) if (folder / METRICS).is_file() else []
    return _section("Training", picture=lambda: curves_figure(lines, name)) if lines else None


def _accuracy(seen: Evaluated) -> dict[str, Any]:
    right = (seen.logits.argmax(1) == seen.labels).double()
    by_class = [(100 * right[seen.labels == i].mean().item(), n) for i, n in enumerate(seen.names)]
    by_class = sorted((a, n) for a, n in by_class if a == a)

    def draw() -> Any:
        few = len(by_class) <= 40
        figure, axes = new_figure("Top-1 by class", 0.9 + 0.19 * len(by_class) if few else 3.2)
        axis = axes[0, 0]
        values = [a for a, _ in by_class]
        if few:
            bars = axis.barh(range(len(values)), values)
            axis.set_yticks(range(len(values)), [short(n) for _, n in by_class])
            axis.bar_label(bars, fmt="%.1f", padding=3)
            axis.set(xlabel="top-1 (%)", xlim=(0, 108))
            axis.grid(False, axis="y")
        else:
            axis.plot(range(1, len(values) + 1), values)
            axis.set(xlabel="class, worst first", ylabel="top-1 (%)", ylim=(0, 102))
        return figure

    if len(by_class) <= 40:
        return _section("Accuracy by class", picture=draw)
    rows = [(n, f"{a:.1f}") for a, n in by_class[:10]]
    text = "The table lists the ten worst classes."
    return _section("Accuracy by class", text, draw, table=[("class", "top-1 (%)"), *rows])


def _confusion(seen: Evaluated) -> dict[str, Any]:
    classes = len(seen.names)
    predicted = seen.logits.argmax(1)
    pairs = Counter(
        (true, guess)
        for true, guess in zip(seen.labels.tolist(), predicted.tolist(), strict=True)
        if true != guess
    )
    table = [("true class", "predicted class", "images")]
    for (true, guess), count in pairs.most_common(10):
        table.append((seen.names[true], seen.names[guess], f"{count:,}"))
    some = len(table) > 1
    if classes > 30:
        text = "The most frequent confusions:" if some else "There are none."
        return _section("Confusion", text, table=table)
    counts = torch.bincount(seen.labels * classes + predicted, minlength=classes**2).view(classes, classes)

    def draw() -> Any:
        figure, axes = new_figure("Confusion matrix", 2 + 0.27 * classes)
        axis = axes[0, 0]
        share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
        picture = axis.imshow(share.numpy(), vmin=0, vmax=100, cmap=SEQUENTIAL, aspect="auto")
        names = [short(n) for n in seen.names]
        axis.set_xticks(range(classes), names, rotation=45, ha="right")
        axis.set_yticks(range(classes), names)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.grid(False)
        for i in range(classes):
            for j in range(classes):
                if counts[i, j]:
                    ink = "black" if share[i, j] > 55 else "white"
                    text = f"{share[i, j]:.0f}" if share[i, j] >= 0.95 else "<1"
                    axis.text(j, i, text, ha="center", va="center", color=ink, fontsize=7)
        figure.colorbar(picture, label="% of the true class")
        return figure

    text = "The table lists the most frequent confusions." if some else "There are no confusions."
    return _section("Confusion matrix", text, draw, table=table)


def _calibration(seen: Evaluated) -> dict[str, Any]:
    error, bins = calibration(seen.logits.softmax(1), seen.labels)

    def draw() -> Any:
        figure, axes = new_figure(f"Calibration: ECE {100 * error:.2f} %", 3.2, 1, 2)
        centres = [(b["low"] + b["high"]) / 2 for b in bins]
        width = 0.9 / _BINS
        axes[0, 0].bar(centres, [b["accuracy"] for b in bins], width, label="accuracy")
        axes[0, 0].plot([0, 1], [0, 1], color="0.5", linestyle="--", label="perfect calibration")
        axes[0, 0].set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        axes[0, 0].legend(loc="upper left")
        axes[0, 1].bar(centres, [100 * b["share"] for b in bins], width, color="C1")
        axes[0, 1].set(xlabel="confidence", ylabel="images (%)", xlim=(0, 1))
        return figure

    return _section(
        "Calibration",
        f"Confidence is the probability of the predicted class, in {_BINS} bins. Bars below the line mean "
        "overconfidence.",
        draw,
    )


def _mistakes(seen: Evaluated, model: Any, most: int = 24) -> dict[str, Any] | None:
    p = seen.logits.softmax(1)
    confidence, predicted = p.max(1)
    wrong = (predicted != seen.labels).nonzero().flatten()
    rows = wrong[confidence[wrong].argsort(descending=True)][:most]
    if not len(rows):
        return None
    x, _ = seen.images(rows)
    cfg = seen.config
    pixels = Sample(x, seen.labels[rows], seen.names, cfg["mean"], cfg["std"]).pixels()
    figures = []
    for picture, row in zip(pixels, rows.tolist(), strict=True):
        label, guess = int(seen.labels[row]), int(predicted[row])
        figures.append(
            {
                "image": _data_uri(_thumbnail(picture)),
                "class": seen.names[label],
                "guess": seen.names[guess],
                "sure": f"{100 * p[row, guess]:.0f}\u00a0%",
                "rest": f"{100 * p[row, label]:.1f}\u00a0%",
            }
        )
    text = f"The {len(rows)} most confident of {len(wrong):,} wrong predictions."
    return _section("Worst mistakes", text, mistakes=figures)


def _thumbnail(pixels: Any, side: int = 160) -> bytes:
    image = Image.fromarray((255 * pixels.squeeze()).round().astype("uint8"))
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _gates(model: Any, name: str, seen: Evaluated) -> list[dict[str, Any] | None]:
    rows = torch.randperm(len(seen.labels), generator=torch.Generator().manual_seed(0))[:_OBSERVED]
    x, y = seen.images(rows.sort().values)
    sample = Sample(x, y, seen.names, seen.config["mean"], seen.config["std"])
    sections = []
    titles = "Dependence of gates on the image", "Correlation between gates"
    for title, observe in zip(titles, (stripes, correlation), strict=True):
        try:
            found = observe({name: model}, sample)
        except UserError:  # no gates, or no two that could be compared
            continue
        table = [("", "here", "paper"), *found.summary]
        sections.append(_section(title, f"Measured on {len(sample):,} images.", found.draw, table=table))
    return sections


def _deployed(model: Any) -> Any:
    """The plain network that a model folds into, or None."""
    if foldable(model):
        with contextlib.suppress(NothingToFold, FoldError):
            return stock_model(model, fold(model))
    return None


def _folded(model: Any, folded: Any) -> dict[str, Any] | None:
    if folded is None:
        return None
    report = verify_fold(model, folded, example_input(model, 8))
    costs = (
        ("parameters", report.parameters),
        ("multiply-adds", report.multiply_adds),
        ("bytes", report.bytes),
    )
    table = [("", "original", f"folded: {folded.pretrained_cfg['architecture']}")]
    table += [(what, *(f"{cost:,}" for cost in pair)) for what, pair in costs]
    text = f"Folding changes the logits by at most {report.max_relative:.0e} of the largest logit."
    return _section("Folding", text, table=table)


def _frozen(folder: Path) -> dict[str, Any] | None:
    path = folder / FREEZE_REPORT
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    table = [("gate", "kind", "variance due to the image", "KL if frozen alone (nats)", "")]
    for gate in report["gates"]:
        what = f"frozen, {gate['where']}" if gate["frozen"] else f"stays: {gate['where']}"
        share = f"{100 * gate['image_share']:.0f} %"
        table.append((gate["path"], gate["kind"], share, f"{gate['kl']:.4f}", what))
    before, after = report["before"], report["after"]
    text = f"Frozen from {report['source']}. "
    if before["top1"] is not None:
        n = report["images"][-1]
        text += f"Top-1 went from {before['top1']:.2f} to {after['top1']:.2f} % on {n:,} images not used to "
        text += "choose the gates."
    return _section("Frozen gates", text, table=table)


@torch.no_grad()
def _speed(model: Any, folded: Any, rounds: int = 7) -> dict[str, Any]:
    """Median milliseconds of the original and the folded network, timed in turn."""
    networks = {"original": model} if folded is None else {"original": model, "folded": folded}
    table = [("batch", *(f"{name}, ms" for name in networks), *(["ratio"] if len(networks) > 1 else []))]
    for batch in (1, 32):
        x = example_input(model, batch)
        taken: dict[str, list[float]] = {name: [] for name in networks}
        for i in range(rounds + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                if i:
                    taken[name].append(1000 * (time.perf_counter() - start))
        medians = [statistics.median(times) for times in taken.values()]
        ratio = [f"{medians[1] / medians[0]:.2f}"] if len(medians) > 1 else []
        table.append((str(batch), *(f"{m:.1f}" for m in medians), *ratio))
    text = f"Time per batch: median of {rounds} runs, in float32 and eager mode, on {hardware(x.device)}."
    return _section("Speed", text, table=table)
