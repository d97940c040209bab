"""Classifies images."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from .branches import evaluating
from .errors import UserError
from .images import DataError, decode, plain


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, in descending order.

    Attributes:
        source: Path of the image, or its index.
        classes: Class names, or class indices if the model has no names.
        probabilities: Probabilities between 0 and 1.
    """

    source: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def class_names(model: Any) -> list[str]:
    """Names of a model's classes: its own, those of the ImageNet variant it was trained on, or indices."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    count = int(getattr(model, "num_classes", 0) or cfg.get("num_classes") or 0)
    names = cfg.get("label_names")
    if names and len(names) == count:
        return list(names)
    subset = infer_imagenet_subset({"num_classes": count})
    if subset and cfg.get("num_classes") == count:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]


def predict(
    model: nn.Module,
    images: Tensor | Iterable[str | Path | Image.Image],
    topk: int = 5,
    batch_size: int = 64,
    on_corrupt: str = "stop",
) -> list[Prediction]:
    """Predict the most probable classes of images.

    Args:
        model: A network of timm or this package. It runs in eval mode; its own mode is restored.
        images: Paths or Pillow images, which go through the model's timm transform; or a normalised tensor
            B × C × H × W.
        topk: Number of classes for each image.
        batch_size: Images per batch.
        on_corrupt: "stop" at an image that cannot be read, or "skip" it with a warning.

    Raises:
        DataError: An image cannot be read.
        UserError: The model takes no RGB images, and ``images`` are no tensor.
        ValueError: There are no images; an argument is out of range.
    """
    if topk < 1 or batch_size < 1:
        raise ValueError(f"topk and batch_size must be at least 1, got {topk} and {batch_size}")
    if on_corrupt not in ("stop", "skip"):
        raise ValueError(f"on_corrupt must be 'stop' or 'skip', got {on_corrupt!r}")
    if isinstance(images, str | Path | Image.Image):
        images = [images]
    names = class_names(model)
    transform: Any = None
    if not isinstance(images, Tensor):
        channels = getattr(model, "in_chans", 3)
        if channels != 3:
            raise UserError(
                f"the model takes images of {channels} channels, and files are read as RGB: give predict a "
                "tensor"
            )
        config: dict[str, Any] = resolve_model_data_config(model)
        transform = create_transform(**config, is_training=False)
        images = list(images)
    if not len(images):
        raise ValueError("there are no images to predict")
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(
            f"a tensor of images is B × C × H × W, got shape {tuple(images.shape)}: one has B = 1"
        )
    like = next(model.parameters())
    predictions: list[Prediction] = []
    with evaluating(model):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            if isinstance(part, Tensor):
                sources, batch = [str(start + i) for i in range(len(part))], part
            else:
                sources, batch = _prepared(part, start, transform, on_corrupt)
            if len(sources):
                with torch.no_grad():
                    p = model(batch.to(like)).float().softmax(1).cpu()
                names = names if len(names) == p.shape[1] else [str(i) for i in range(p.shape[1])]
                values, indices = p.topk(min(topk, p.shape[1]))
                predictions += [
                    Prediction(source, tuple(names[i] for i in row), tuple(v))
                    for source, row, v in zip(sources, indices.tolist(), values.tolist(), strict=True)
                ]
    return predictions


def _prepared(
    part: Sequence[str | Path | Image.Image], start: int, transform: Any, on_corrupt: str
) -> tuple[list[str], Tensor]:
    """Names and normalised pixels of images that can be read."""
    sources, tensors = [], []
    for i, image in enumerate(part, start):
        source = str(i) if isinstance(image, Image.Image) else str(image)
        try:
            shown = _opened(image, source) if isinstance(image, Image.Image) else read_image(Path(image))
        except DataError as error:
            if on_corrupt == "stop":
                raise
            warnings.warn(f"left out: {error}", stacklevel=3)
            continue
        sources.append(source)
        tensors.append(transform(shown))
    return sources, torch.stack(tensors) if tensors else torch.empty(0)


def _opened(image: Image.Image, source: str) -> Image.Image:
    try:
        return plain(image)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read image {source}: {error}") from None


def read_image(path: Path) -> Image.Image:
    """An RGB image from a file, upright and opaque.

    Raises:
        DataError: It cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    try:
        return decode({"bytes": content, "path": None}, str(path))
    except DataError as error:
        reason = str(error).partition(": ")[2].partition(". Repair")[0]
        raise DataError(f"cannot read {path}: {reason}") from None


def find_images(places: Iterable[Path]) -> list[Path]:
    """The images at some paths; folders are searched recursively, in order of name.

    Raises:
        UserError: A path does not exist, or there is no image.
    """
    from timm.data import get_img_extensions

    extensions = {*get_img_extensions(), ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place} does not exist: name images or folders of images")
        if place.is_dir():
            inside = (
                p for p in sorted(place.rglob("*")) if p.suffix.lower() in extensions and not p.is_dir()
            )
            found += inside
        else:
            found.append(place)
    if not found:
        raise UserError(
            f"no images in {', '.join(map(str, places))}: they end in {', '.join(sorted(extensions))}"
        )
    return found
