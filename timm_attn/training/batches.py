"""Batches on the device: order and augmentation as functions of (seed, epoch, step or image).

They are drawn for the global batch and then cut by process and by accumulation step, so that a run resumes
exactly and depends neither on the number of processes nor on accumulation.
"""

import atexit
import itertools
import multiprocessing.util
import os
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor

from ..errors import UserError
from ..images import DataError
from .augment import AutoAugment, crop_and_flip, erase, generator, seed_everything
from .data import Split
from .recipe import Recipe
from .signals import blocked


class Batch(NamedTuple):
    """Images B × 3 × H × W and labels (B,) on the device, and how many images stand in for corrupt ones."""

    images: Tensor
    labels: Tensor
    skipped: int = 0


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


class Key(NamedTuple):
    """What a part of a batch is made from; ``epoch`` is None in evaluation."""

    epoch: int | None
    indices: Tensor
    flip: Tensor | None = None
    offsets: Tensor | None = None


class Batches:
    """Normalised batches of one split for one process.

    Args:
        split: What to read. Small images are moved to the device whole.
        recipe: Batch size, seed, augmentation, workers.
        config: timm's data configuration of the model: input size, mean, std, interpolation, crop.
        shard: This process among the processes of the run.
    """

    def __init__(self, split: Split, recipe: Recipe, config: dict[str, Any], shard: Shard) -> None:
        self.split = split
        self.recipe = recipe
        self.config = config
        self.shard = shard
        self.labels = split.labels.to(shard.device)
        self.mean = torch.tensor(config["mean"], device=shard.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(config["std"], device=shard.device).view(1, 3, 1, 1) * 255
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self._order = -1, torch.empty(0)  # epoch and permutation

    @cached_property
    def pixels(self) -> Tensor | None:
        """Those of the split, on the device, which they may fill."""
        return None if self.split.pixels is None else self.split.pixels.to(self.shard.device)

    @property
    def steps(self) -> int:
        """Steps of an epoch; the incomplete last batch is dropped."""
        if len(self.split) < self.recipe.batch_size:
            raise UserError(
                f"batch_size {self.recipe.batch_size} is larger than the {len(self.split)} images of "
                f"{self.split.data} ({self.split.name}): lower --batch-size"
            )
        return len(self.split) // self.recipe.batch_size

    def train(self, step: int = 0) -> Generator[Batch, None, None]:
        """Training batches of this process from a step of the run on, without end.

        Every step is ``accumulation`` batches.
        """
        keys = itertools.chain.from_iterable(map(self._keys, itertools.count(step)))
        if self.split.pixels is None:
            yield from self._loader(_Rows(self.split, self.recipe, self.config, training=True), keys)
        elif self.recipe.aa:
            dataset = _Pixels(self.split, self.recipe, self.config)
            # Keys are read ahead by the workers' queue, and again here.
            keys, again = itertools.tee(keys)
            for key, batch in zip(again, self._loader(dataset, keys), strict=False):
                yield batch._replace(images=self._augment(batch.images, key))
        else:
            assert self.pixels is not None
            for key in keys:
                index = key.indices.to(self.shard.device, non_blocking=True)
                yield Batch(self._augment(self.pixels[index], key), self.labels[index])

    def _keys(self, step: int) -> Iterator[Key]:
        """What the parts of a step's batch are made from."""
        recipe, (epoch, place) = self.recipe, divmod(step, self.steps)
        if self._order[0] != epoch:
            g = generator(recipe.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self.split), generator=g)
        indices = self._order[1][place * recipe.batch_size : (place + 1) * recipe.batch_size]
        g = generator(recipe.seed, "augment", epoch, place)
        offsets = torch.randint(0, 2 * recipe.crop_padding + 1, (recipe.batch_size, 2), generator=g)
        flip = torch.rand(recipe.batch_size, generator=g) < (0.5 if recipe.hflip else 0.0)
        parts = (self.shard.cut(t).chunk(recipe.accumulation) for t in (indices, flip, offsets))
        return (Key(epoch, *part) for part in zip(*parts, strict=True))

    @property
    def evaluation_steps(self) -> int:
        """Batches of ``evaluate``."""
        return len(self._evaluation_indices())

    def _evaluation_indices(self) -> tuple[Tensor, ...]:
        indices = torch.arange(len(self.split))[self.shard.rank :: self.shard.processes]
        return indices.split(
            max(1, self.recipe.batch_size // self.shard.processes // self.recipe.accumulation)
        )

    def evaluate(self) -> Iterator[Batch]:
        """This process's share of the split, each image once, in order and without augmentation.

        Corrupt images that are skipped are left out, and counted.
        """
        batches = self._evaluation_indices()
        if self.pixels is None:
            dataset = _Rows(self.split, self.recipe, self.config, training=False)
            yield from self._loader(dataset, (Key(None, b) for b in batches))
            return
        for index in batches:
            index = index.to(self.shard.device, non_blocking=True)
            yield Batch(self._normalise(self.pixels[index]), self.labels[index])

    def _augment(self, images: Tensor, key: Key) -> Tensor:
        assert key.flip is not None and key.offsets is not None
        flip, offsets = (t.to(self.shard.device, non_blocking=True) for t in (key.flip, key.offsets))
        images = self._normalise(crop_and_flip(images, self.recipe.crop_padding, flip, offsets))
        if self.recipe.reprob:
            erase(images, key.indices, self.recipe.reprob, self.recipe.remode, self.recipe.seed, key.epoch)
        return images

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std)
        return images.contiguous(memory_format=self.format)

    def _loader(self, dataset: "_Rows | _Pixels", keys: Iterable[Key]) -> Iterator[Batch]:
        device = self.shard.device
        # More only wait for each other, and PyTorch warns of them.
        workers = min(self.recipe.workers, _cpus())
        loader = torch.utils.data.DataLoader(
            dataset,
            # Lists: each tensor on its way to a worker would take a file descriptor.
            sampler=((key.epoch, key.indices.tolist()) for key in keys),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_init_worker,
        )
        # Launchers send signals to all processes, also to one that starts and does not yet ignore them.
        with blocked():
            items = iter(loader)
        if workers:
            _OPEN[items] = os.getpid()
            _end_workers_at_exit(os.getpid())
        for item in items:
            if isinstance(item, DataError):
                raise item
            images, labels, skipped = item
            # First to the device: a copy in another layout would not be in pinned memory.
            images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
            if images.dtype != torch.uint8:
                images = images.contiguous(memory_format=self.format)
            yield Batch(images, labels, int(skipped))


def _cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: Loaders at work, or held by somebody, perhaps by the traceback of an error, with their processes.
_OPEN: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


@cache
def _end_workers_at_exit(process: int) -> None:
    """Let a process end its workers before `multiprocessing` waits for them; they ignore its signal."""

    def end() -> None:
        if os.getpid() != process:  # a child that was forked shares the parent's workers
            return
        for items in [items for items, owner in _OPEN.items() if owner == process]:
            items._shutdown_workers()
            for worker in items._workers:  # that were still starting, say
                worker.kill()

    atexit.register(end)
    multiprocessing.util.Finalize(None, end, exitpriority=1)  # of one that `multiprocessing` has started


def _init_worker(worker: int) -> None:
    """Leave signals, which launchers send to all processes, to the main one; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Rows(torch.utils.data.Dataset):
    """Batches of larger images through timm's transforms, seeded for each image."""

    def __init__(self, split: Split, recipe: Recipe, config: dict[str, Any], training: bool) -> None:
        self.split = split
        self.seed = recipe.seed
        self.skip = recipe.on_corrupt == "skip"
        training_only: dict[str, Any] = {
            "scale": recipe.crop_scale,
            "auto_augment": recipe.aa,
            "re_prob": recipe.reprob,
            "re_mode": recipe.remode,
            "hflip": 0.5 if recipe.hflip else 0.0,
            "color_jitter": recipe.color_jitter,
        }
        self.transform: Any = create_transform(
            **config, is_training=training, **(training_only if training else {})
        )

    def __getitem__(self, key: tuple[int | None, list[int]]) -> tuple[Tensor, Tensor, int] | DataError:
        epoch, indices = key
        images, labels, skipped = [], [], 0
        for index in indices:
            try:
                row, image = self._image(index, replace=epoch is not None)
            except DataError as error:
                if not self.skip:
                    return error  # raised by the main process, without the worker's traceback
                skipped += 1
                continue
            skipped += row != index
            seed_everything(self.seed, "image", epoch, index)
            images.append(self.transform(image))
            labels.append(self.split.labels[row])
        if not images:
            return torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.int64), skipped
        return torch.stack(images), torch.stack(labels), skipped

    def _image(self, index: int, replace: bool) -> tuple[int, Any]:
        """An image, or where it is corrupt and training goes on without it, the next that is not."""
        tries = len(self.split) if self.skip and replace else 1
        while True:
            row = index % len(self.split)
            try:
                return row, self.split.image(row)
            except DataError:
                index, tries = index + 1, tries - 1
                if not tries:
                    raise


class _Pixels(torch.utils.data.Dataset):
    """Batches of small images through AutoAugment, uint8."""

    def __init__(self, split: Split, recipe: Recipe, config: dict[str, Any]) -> None:
        assert recipe.aa is not None and split.pixels is not None
        self.pixels = split.pixels
        self.labels = split.labels
        self.seed = recipe.seed
        self.augment = AutoAugment(recipe.aa, config["mean"], min(split.pixels.shape[1:3]))

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[Tensor, Tensor, int]:
        epoch, indices = key
        images = [self.augment(self.pixels[i].numpy(), self.seed, "image", epoch, i) for i in indices]
        return torch.from_numpy(np.stack(images)), self.labels[indices], 0
