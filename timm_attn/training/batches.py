"""Batches on the device: order and augmentation as functions of (seed, epoch, step or image).

They are drawn for the global batch and then cut by process, so that a run resumes exactly and does not depend
on the number of processes.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor

from ..errors import UserError
from .data import Split
from .recipe import Recipe

Batch = tuple[Tensor, Tensor]


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from a tuple of numbers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generator(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class Shard:
    """This process's place among the processes of a run, and its device."""

    device: torch.device
    rank: int = 0
    processes: int = 1

    def cut(self, batch: Tensor) -> Tensor:
        """This process's equal part of a global batch."""
        part = len(batch) // self.processes
        return batch[self.rank * part : (self.rank + 1) * part]


def crop_and_flip(images: Tensor, padding: int, flip: Tensor, offsets: Tensor) -> Tensor:
    """Shift each image inside a border of zeros and mirror some.

    Args:
        images: B × C × H × W, any dtype.
        padding: Width of the border, in pixels.
        flip: bool, shape (B,): which images are mirrored left to right.
        offsets: int64, B × 2, from 0 to 2 · padding: row and column of the crop in the padded image.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4) if padding else images
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = offsets[:, 1:] + torch.where(flip[:, None], width - 1 - columns, columns)
    # Channels last while gathering: one index then moves a whole pixel.
    pixels = padded.permute(0, 2, 3, 1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return pixels[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Batches:
    """Normalised batches of one split for one process.

    Args:
        split: What to read. Small images are moved to the device whole.
        recipe: Batch size, seed, augmentation, workers.
        config: timm's data configuration of the model: input size, mean, std, interpolation, crop.
        shard: This process among the processes of the run.
    """

    def __init__(self, split: Split, recipe: Recipe, config: dict[str, Any], shard: Shard) -> None:
        self.split, self.recipe, self.config, self.shard = split, recipe, config, shard
        self.labels = split.labels.to(shard.device)
        self.pixels = None if split.pixels is None else split.pixels.to(shard.device)
        self.mean = torch.tensor(config["mean"], device=shard.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(config["std"], device=shard.device).view(1, 3, 1, 1) * 255
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format

    @property
    def steps(self) -> int:
        """Steps of an epoch; the incomplete last batch is dropped."""
        if len(self.split) < self.recipe.batch_size:
            raise UserError(
                f"batch_size {self.recipe.batch_size} is larger than the {len(self.split)} images of "
                f"{self.split.data} ({self.split.name}): lower --batch-size"
            )
        return len(self.split) // self.recipe.batch_size

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This process's training batches of an epoch, from step ``first`` on."""
        seed, size = self.recipe.seed, self.recipe.batch_size
        order = torch.randperm(len(self.split), generator=generator(seed, "order", epoch))
        batches = order[: self.steps * size].view(self.steps, size)[first:]
        if self.pixels is None:
            yield from self._loader([self.shard.cut(b) for b in batches], epoch)
            return
        for step, indices in enumerate(batches, start=first):
            flip, offsets = self._draw(epoch, step)
            index = self.shard.cut(indices).to(self.shard.device)
            images = crop_and_flip(self.pixels[index], self.recipe.crop_padding, flip, offsets)
            yield self._normalise(images), self.labels[index]

    @property
    def evaluation_steps(self) -> int:
        """Batches of :meth:`evaluate`."""
        return len(self._evaluation_indices())

    def _evaluation_indices(self) -> tuple[Tensor, ...]:
        indices = torch.arange(self.shard.rank, len(self.split), self.shard.processes)
        return indices.split(max(1, self.recipe.batch_size // self.shard.processes))

    def evaluate(self) -> Iterator[Batch]:
        """This process's share of the split, each image once, in order and without augmentation."""
        batches = self._evaluation_indices()
        if self.pixels is None:
            yield from self._loader(list(batches), epoch=None)
            return
        for index in batches:
            index = index.to(self.shard.device)
            yield self._normalise(self.pixels[index]), self.labels[index]

    def _draw(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        g = generator(recipe.seed, "augment", epoch, step)
        offsets = torch.randint(0, 2 * recipe.crop_padding + 1, (recipe.batch_size, 2), generator=g)
        flip = torch.rand(recipe.batch_size, generator=g) < (0.5 if recipe.hflip else 0.0)
        return tuple(self.shard.cut(t).to(self.shard.device, non_blocking=True) for t in (flip, offsets))  # pyright: ignore[reportReturnType]

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.format)

    def _loader(self, batches: list[Tensor], epoch: int | None) -> Iterator[Batch]:
        device = self.shard.device
        loader = torch.utils.data.DataLoader(
            _Rows(self.split, self.recipe, self.config, epoch),
            batch_sampler=[b.tolist() for b in batches],
            num_workers=self.recipe.workers,
            pin_memory=device.type == "cuda",
        )
        for images, labels in loader:
            images = images.to(device, memory_format=self.format, non_blocking=True)
            yield images, labels.to(device, non_blocking=True)


class _Rows(torch.utils.data.Dataset):
    """Larger images through timm's transforms, seeded for each image."""

    def __init__(self, split: Split, recipe: Recipe, config: dict[str, Any], epoch: int | None) -> None:
        self.split, self.seed, self.epoch = split, recipe.seed, epoch
        self.transform: Any = create_transform(
            **config,
            is_training=epoch is not None,
            hflip=0.5 if recipe.hflip else 0.0,
            color_jitter=None,  # pyright: ignore[reportArgumentType]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.epoch is not None:
            seed = derive_seed(self.seed, "image", self.epoch, index)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        return self.transform(self.split.image(index)), int(self.split.labels[index])
