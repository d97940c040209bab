"""Augmentation of small images by the batch; every draw is a function of (seed, epoch, step or image)."""

import hashlib
import random
import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from a tuple of numbers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generator(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by ``derive_seed``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(*parts: Any) -> None:
    """Seed the global generators that timm and PyTorch draw from."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def crop_and_flip(images: Tensor, padding: int, flip: Tensor, offsets: Tensor) -> Tensor:
    """Shift each image inside a border of zeros and mirror some.

    Args:
        images: B × H × W × 3, any dtype.
        padding: Width of the border, in pixels.
        flip: bool, shape (B,): which images are mirrored left to right.
        offsets: int64, B × 2, from 0 to 2 · padding: row and column of the crop in the padded image.
    """
    height, width = images.shape[1:3]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding)) if padding else images
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = offsets[:, 1:] + torch.where(flip[:, None], width - 1 - columns, columns)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]]


def _check_policy(policy: str) -> None:
    """timm asserts what a policy must be, which ``python -O`` leaves out."""
    kind, *settings = policy.split("-")
    kinds = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
    if kind not in kinds:
        raise ValueError(f"it must begin with one of {', '.join(kinds)}")
    names = {"rand": "mstd|mmax|inc|m|n|p", "augmix": "mstd|m|w|d|a|b"}.get(kind, "mstd")
    for setting in settings:
        if not re.fullmatch(rf"({names})\d.*", setting) and not (kind == "rand" and setting[:1] == "t"):
            raise ValueError(f"{setting!r} is no setting of {kind}")


class AutoAugment:
    """timm's AutoAugment, RandAugment or AugMix on uint8 images, seeded for each image.

    Args:
        policy: As timm writes it, e.g. ``rand-m9-mstd0.5-inc1``.
        mean: Channel means in [0, 1], the colour that shifted images are filled with.
        size: Shorter side in pixels.
    """

    def __init__(self, policy: str, mean: tuple[float, ...], size: int) -> None:
        _check_policy(policy)
        colour = tuple(min(255, round(255 * m)) for m in mean)
        if policy.startswith("rand"):
            make = rand_augment_transform
        else:
            make = augment_and_mix_transform if policy.startswith("augmix") else auto_augment_transform
        settings: dict[str, Any] = {"translate_const": int(size * 0.45), "img_mean": colour}
        if policy.startswith("augmix"):
            settings["translate_pct"] = 0.3  # as in timm's create_transform
        self.transform = make(policy, settings)

    def __call__(self, image: np.ndarray, *seed: Any) -> np.ndarray:
        seed_everything(*seed)
        return np.asarray(self.transform(Image.fromarray(image)))


def erase(images: Tensor, indices: Tensor, probability: float, mode: str, *seed: Any) -> None:
    """timm's random erasing in place, drawn for each image.

    Args:
        images: Normalised, B × 3 × H × W.
        indices: Numbers of the images in their split, shape (B,).
        probability: Share of the images of which a rectangle is erased.
        mode: ``pixel`` for noise, ``rand`` for a random colour, ``const`` for zeros.
        seed: Seed and epoch.
    """
    transform = RandomErasing(probability, mode=mode, device=images.device)  # pyright: ignore[reportArgumentType]
    for image, index in zip(images, indices.tolist(), strict=True):
        seed_everything(*seed, "erase", index)
        transform(image)
