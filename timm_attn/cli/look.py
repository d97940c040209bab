"""Commands that run a network on images: look, report and predict."""

import csv
import io
import warnings
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from tyro.conf import OmitArgPrefixes, Positional

from ..branches import copied
from ..errors import UserError
from ..files import link_target, replace_file
from ..images import DataError
from ..load import load_model
from ..predict import find_images, predict
from ..training.checkpoint import AVERAGE, MODEL, folders
from ..training.validation import evaluation_images
from .console import Images, app, console


@app.command(name="look")
def look_command(
    what: Positional[Literal["stripes", "correlation", "stiffness", "landscape", "importance", "maps"]],
    models: Positional[tuple[str, ...]],
    /,
    images: OmitArgPrefixes[Images],
    out: Path = Path("look"),
    gates: tuple[str, ...] = (),
    max_images: int = 512,
) -> None:
    """Measure what attention does in a trained network, and write a picture and a CSV.

    stripes: how little gates depend on the image. correlation: between the gates of a stage. stiffness: along
    the depth of the network. landscape: gradients, variation between images, and accuracy under noise.
    importance: whether gates are large where channels matter for the loss. maps: which patches and pixels the
    network weights most.

    Args:
        what: What to measure.
        models: Run folders, hub folders, model names with pretrained weights, or hf-hub:ORG/NAME. stripes,
            stiffness and landscape take several; for a single run folder, stripes shows all its checkpoints.
        out: Folder for <what>.png and <what>.csv.
        gates: Shell patterns of gates, e.g. 'layer3.*'; all by default.
        max_images: Maximum number of images used from the split, chosen at random, the same every time.
    """
    from ..report import COMPARING, OBSERVATIONS, OF_GATES

    if not models:
        raise UserError(f"name a model, e.g. `timm-attn look {what} resnet20_se --data DATA`")
    if len(models) > 1 and what not in COMPARING:
        raise UserError(f"{what} takes one model, got {len(models)}: {', '.join(models)}")
    if len(set(models)) < len(models):
        raise UserError(f"a model is named twice: {', '.join(models)}")
    check_folder(out)
    if gates and what not in OF_GATES:
        raise UserError(f"--gates is for {', '.join(OF_GATES)}: leave it out for {what}")
    if max_images < 2:
        raise UserError(f"--max-images must be at least 2, got {max_images}")
    loaded = {name: load_model(source) for name, source in zip(short_names(models), models, strict=True)}
    if what == "stripes" and len(models) == 1:
        loaded = {**_checkpoints(Path(models[0]), loaded), **loaded}
    first = next(iter(loaded.values()))
    sample = read_sample(next(iter(models)), first, images, max_images)
    for name, model in loaded.items():
        check_same_input(name, model, first, sample.names)
    observation = OBSERVATIONS[what](loaded, sample, **({"gates": gates} if gates else {}))
    picture, rows = observation.write(out)
    table = Table("", "here", "paper")
    for row in observation.summary:
        table.add_row(*row)
    console.print(table)
    console.print(f"{observation.images:,} images of {images.data}; {picture}, {rows}")


def check_file(path: Path, option: str) -> None:
    """Raise a UserError if a file cannot be written there, before the work is done."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file with {option}")
    folder = link_target(path).parent
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: make it, or choose another {option}")


def check_folder(path: Path) -> None:
    """Raise a UserError if files cannot be written into a folder of this name."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder with --out")


def short_names(sources: tuple[str, ...]) -> list[str]:
    """Short labels for models in a picture, all different."""
    names = [Path(source).name or source for source in sources]
    return names if len(set(names)) == len(names) else list(sources)


def read_sample(source: str, model: Any, images: Images, most: int) -> Any:
    """Images of the evaluation split for a model."""
    from ..report import Sample

    config: dict[str, Any] = resolve_model_data_config(model)
    x, y, names = evaluation_images(model, images.recipe(source), most, console.is_terminal, source)
    return Sample(x, y, names, config["mean"], config["std"])


def check_same_input(name: str, model: Any, first: Any, classes: list[str]) -> None:
    """Raise a UserError if a model takes other images than the first, or has other classes than the data."""
    one, other = ({k: _plain(v) for k, v in resolve_model_data_config(m).items()} for m in (first, model))
    apart = [key for key in one if one[key] != other.get(key)]
    if apart:
        raise UserError(
            f"{name} takes other images than the first model ({apart[0]} {other.get(apart[0])}, not "
            f"{one[apart[0]]}): compare models with one preparation"
        )
    if model.num_classes != len(classes):
        raise UserError(f"{name} has {model.num_classes} classes, {len(classes)} are in the data")
    names = model.pretrained_cfg.get("label_names")
    if names and list(names) != classes:
        raise UserError(f"{name} has other classes than the first model, or another order of them")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _checkpoints(run: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    """The networks of a run at its checkpoints but for the last, which is the run's end; the oldest first."""
    ((_, model),) = loaded.items()
    found = {}
    for step, folder in folders(run)[:-1] if run.is_dir() else ():
        network = copied(model)
        weights = folder / AVERAGE  # which the run's end is, if there is one
        network.load_state_dict(load_file(weights if weights.is_file() else folder / MODEL))
        found[f"step {step}"] = network
    return found


@app.command(name="report")
def report_command(
    model: Positional[str],
    /,
    images: OmitArgPrefixes[Images],
    out: Path = Path("report.html"),
) -> None:
    """Write an HTML report on a model: accuracy, calibration, mistakes, gates, folding and speed.

    Args:
        model: A run folder, a hub folder, a model name with pretrained weights, or hf-hub:ORG/NAME.
        out: HTML file to write; it is self-contained.
    """
    from ..report.page import write_report

    if images.on_corrupt == "skip":
        raise UserError("report needs every image that it counts: leave --on-corrupt skip out")
    check_file(out, "--out")
    write_report(model, images.recipe(model), out, console.is_terminal)
    console.print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")


@app.command(name="predict")
def predict_command(
    model: Positional[str],
    places: Positional[tuple[Path, ...]],
    /,
    topk: int = 5,
    out: Path | None = None,
    show: Path | None = None,
    batch_size: int = 64,
) -> None:
    """Classify images.

    Args:
        model: A model name with pretrained weights, a run folder, a hub folder, or hf-hub:ORG/NAME.
        places: Images, or folders of images.
        topk: Number of classes to show for each image.
        out: CSV file to write, with one row per image and class.
        show: PNG file to write, with the images and their classes.
        batch_size: Images per batch.
    """
    if not places:
        raise UserError("name images or folders of images")
    if topk < 1 or batch_size < 1:
        raise UserError(f"--topk and --batch-size must be at least 1, got {topk} and {batch_size}")
    for path, option in ((out, "--out"), (show, "--show")):
        if path is not None:
            check_file(path, option)
    files = find_images(places)
    network = load_model(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predictions = predict(network, files, topk, batch_size, on_corrupt="skip")
    for warning in caught:
        console.print(str(warning.message), style="yellow")
    if not predictions:
        raise DataError(f"none of {len(files):,} images can be read")
    table = Table("image", *(f"{i + 1}." for i in range(len(predictions[0].classes))))
    for prediction in predictions[:50]:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        table.add_row(prediction.source, *(f"{name} {100 * p:.1f} %" for name, p in pairs))
    console.print(table)
    if len(predictions) > 50:
        console.print(f"and {len(predictions) - 50:,} more{'' if out else ': --out FILE.csv has them all'}")
    if out is not None:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image", "rank", "class", "probability"))
        for prediction in predictions:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            for rank, (name, p) in enumerate(pairs, 1):
                writer.writerow((prediction.source, rank, name, f"{p:.6f}"))
        replace_file(out, stream.getvalue().encode(errors="surrogateescape"))  # names as they are on the disk
    if show is not None:
        from ..report.sheet import contact_sheet
        from ..style import style, write_png

        with style():
            write_png(contact_sheet(predictions, model), show)
