"""Training, timed: the parts of ``bench.py train``."""

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from bench_timing import synchronize
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch import nn

from timm_attn.training import Recipe
from timm_attn.training.batches import Batches, Shard
from timm_attn.training.network import build
from timm_attn.training.processes import recipe_accelerator
from timm_attn.training.recipe_file import load_recipe
from timm_attn.training.splits import load_splits
from timm_attn.training.trainer import Trainer

#: Training steps of these over the plain network's: (network, image size, batch size).
MECHANISMS = {
    "resnet20": (["resnet20", "resnet20_se", "resnet20_dia", "resnet20_asr", "resnet20_conam", "fmmnet20",
                  "resnet20_ssia"], 32, 128),
    "resnet50": (["resnet50", "seresnet50", "resnet50_dia", "resnet50_asr", "resnet50_conam", "fmmnet50",
                  "resnet50_ssia"], 128, 32),
}  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """A split as timm's loader wants it: PIL images through its transform."""

    def __init__(self, rows: Any, column: str, labels: torch.Tensor) -> None:
        self.rows, self.column, self.labels, self.transform = rows, column, labels, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.rows[index][self.column].convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def ours(data: str, precision: str, folder: Path) -> Iterator[None]:
    """A training step of this package at each turn, with all that the trainer does at a step."""
    recipe = Recipe(data=data, precision=precision, batch_size=128, epochs=10**6)
    accelerator = recipe_accelerator(recipe, folder)
    splits = load_splits(recipe, accelerator)
    network, recipe = build("resnet20", recipe, splits.train)
    trainer = Trainer(accelerator, "resnet20", network, recipe, folder, splits, None)
    trainer.model.train()
    batches = trainer.batches.train()
    while True:
        trainer._update(batches)
        trainer.step += 1
        trainer._check_trouble()
        yield


def timms(data: str, precision: str, channels_last: bool) -> Iterator[None]:
    """A training step of timm's: loader, transforms, mixed precision and step, with train.py's defaults."""
    import datasets

    rows = datasets.load_dataset(data)["train"]
    column = next(name for name, feature in rows.features.items() if isinstance(feature, datasets.Image))
    dataset = Rows(rows, column, torch.tensor(rows["label"]))
    loader = create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=128,
        is_training=True,
        color_jitter=0.4,
        num_workers=2,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model("resnet20", num_classes=10).to(memory_format=layout).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=2e-5)
    criterion, meter = LabelSmoothingCrossEntropy(0.1), AverageMeter()
    while True:
        for images, labels in loader:
            images = images.contiguous(memory_format=layout)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            meter.update(loss.item(), len(images))
            yield


def end_to_end(data: str, n: int, steps: int) -> dict[str, list[float]]:
    """Images per second of ResNet-20 on CIFAR-10, each way in turn, its loader started anew."""
    ways: dict[str, Callable[[], Iterator[None]]] = {
        "timm_attn bf16": lambda: ours(data, "bf16", Path(folder)),
        "timm bf16": lambda: timms(data, "bf16", channels_last=False),
        "timm bf16 channels_last": lambda: timms(data, "bf16", channels_last=True),
        "timm fp32": lambda: timms(data, "no", channels_last=False),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn, name in itertools.product(range(n + 1), ways):
            way = ways[name]()
            next(way), next(way)  # the workers have started
            started = time.perf_counter()
            for _ in range(steps):
                next(way)
            if turn:
                rates[name].append(128 * steps / (time.perf_counter() - started))
            way.close()
    return rates


def loader_alone(data: str, n: int) -> float:
    """Seconds that a batch of 128 small images takes, the median."""
    recipe = Recipe(data=data, batch_size=128)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = recipe_accelerator(recipe, Path(folder))
        train = load_splits(recipe, accelerator).train
    config = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    batches, times = Batches(train, recipe, config, Shard(torch.device("cpu"))).train(), []
    for _ in range(n):
        started = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def step_of(
    name: str, size: int, batch: int, precision: str, classes: int, device: torch.device
) -> Callable[[], None]:
    """One training step of a network on noise."""
    model = timm.create_model(name, num_classes=classes).train()
    model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,), device=device)
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def full_speed(
    data: str, recipe_name: str, model: str, device: torch.device, steps: int, n: int
) -> dict[str, Any]:
    """Images a second of the trainer with a recipe, and of the bare step of the same network on one batch.

    Both as the recipe says: precision, compiled or not, memory format. Asked on a GPU: 0.6 of the bare step.
    """
    recipe = dataclasses.replace(load_recipe(recipe_name), data=data, epochs=10**6)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = recipe_accelerator(recipe, Path(folder))
        if accelerator.device.type != device.type:
            raise RuntimeError(f"Accelerate takes {accelerator.device}, not {device}: set ACCELERATE_USE_CPU")
        splits = load_splits(recipe, accelerator)
        network, recipe = build(model, recipe, splits.train)
        bare: Any = deepcopy(network).to(device).train()  # before Accelerate wraps its forward method
        trainer = Trainer(accelerator, model, network, recipe, Path(folder), splits, None)
        trainer.model.train()
        batches = trainer.batches.train()
        images, labels, _ = next(batches)
        bare = torch.compile(bare) if recipe.compile else bare
        optimizer = create_optimizer_v2(bare, recipe.opt, lr=0.01)
        criterion = nn.CrossEntropyLoss()

        def bare_step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = criterion(bare(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def whole_step() -> None:
            trainer._update(batches)
            trainer.step += 1
            if trainer.step % recipe.log_every == 0:  # which waits for the GPU
                trainer._check_trouble()
                trainer._check_signal()

        ways = {"trainer": whole_step, "bare step": bare_step}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn, (name, step) in itertools.product(range(n + 1), ways.items()):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(device)
            if turn:  # the first compiles
                rates[name].append(recipe.batch_size * steps / (time.perf_counter() - started))
        batches.close()
    shares = [a / b for a, b in zip(rates["trainer"], rates["bare step"], strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"model": model, "recipe": recipe_name, "images_per_second": medians, "n": n} | {
        "trainer_over_bare": {"min": min(shares), "median": statistics.median(shares), "max": max(shares)}
    }


FIRST_STEP = """
import sys
from timm_attn.cli import main
from timm_attn.training import trainer
update = trainer.Trainer._update
def first(self, batches):
    update(self, batches)
    print("first step", flush=True)
    sys.exit()
trainer.Trainer._update = first
main(["train", "resnet20", "--data", sys.argv[1], "--precision", "bf16", "--out", sys.argv[2]])
"""


def start_up(data: str) -> float:
    """Seconds from the command to the end of the first step, with decoded images in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-c", FIRST_STEP, data, f"{folder}/run"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("first step"):
                    return time.perf_counter() - started
    raise RuntimeError("there was no first step")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``bench.py train``."""
    command.add_argument("--data", required=True, help="CIFAR-10: a folder or a Hub id")
    command.add_argument("--parts", nargs="+", choices=["end_to_end", "mechanisms", "start_up", "full_speed"])
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--recipe", default="cifar_gpu", help="of full_speed")
    command.add_argument("--model", default="resnet20_dia", help="of full_speed")
    command.add_argument("--steps", type=int, default=40, help="of a turn, end to end and full_speed")
    command.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
