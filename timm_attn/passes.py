"""Passes of networks over images: what they say, and how long it takes."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gates import Gate
from .record import held

#: Images on which the damage of each gate alone is measured.
ALONE = 2048


@dataclass(frozen=True)
class Figures:
    """Figures of one network, on the images that were not used for choosing.

    Attributes:
        top1: Top-1 in %; NaN without labels.
        agreement: Images with the same predicted class as the original, in %.
        kl: Mean Kullback–Leibler divergence from the original's class probabilities, in nats.
        milliseconds: Median time of a batch.
        parameters: Number of parameters.
    """

    top1: float
    agreement: float
    kl: float
    milliseconds: float
    parameters: int


class Passes:
    """Passes over the parts of the images, with the original's logits remembered."""

    def __init__(
        self, model: Any, gates: list[Gate], parts: list[tuple[Tensor, Tensor | None]], batch_size: int
    ) -> None:
        self.model = model
        self.gates = gates
        self.parts = parts
        self.batch_size = batch_size
        self.like = next(model.parameters())
        self.known: dict[tuple[int, int | None], Tensor] = {}

    def batches(self, part: int, most: int | None = None) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Images on the network's device, and their labels."""
        images, labels = self.parts[part]
        if most is not None and most < len(images):  # at random, as data sets are sorted by class
            few = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
            images, labels = images[few], None if labels is None else labels[few]
        for i in range(0, len(images), self.batch_size):
            end = i + self.batch_size
            yield images[i:end].to(self.like), None if labels is None else labels[i:end].to(self.like.device)

    def few(self, n: int) -> Tensor:
        """Some images, for what is only compared."""
        return self.parts[0][0][:n].to(self.like)

    @torch.no_grad()
    def logits(self, network: nn.Module, part: int, most: int | None = None) -> Tensor:
        """B × classes in float64 on the CPU."""
        return torch.cat([network(x).cpu().double() for x, _ in self.batches(part, most)])

    def original(self, part: int, most: int | None = None) -> Tensor:
        """Those of the original."""
        if (part, most) not in self.known:
            self.known[part, most] = self.logits(self.model, part, most)
        return self.known[part, most]

    def damage(self, constants: dict[Gate, Tensor]) -> float:
        """Divergence of the original's classes from those with some gates constant, nats."""
        with held(self.model, constants):
            logits = self.logits(self.model, 0, ALONE)
        return divergence(self.original(0, ALONE), logits)

    def right(self, logits: Tensor, part: int) -> Tensor:
        """Which images get their class, or without labels the original's."""
        labels = self.parts[part][1]
        return logits.argmax(1) == (self.original(part).argmax(1) if labels is None else labels.cpu())

    def loss(self, constants: dict[Gate, Tensor]) -> tuple[float, float]:
        """Points of top-1 lost on the images for choosing, and their standard error."""
        self.original(1)  # before its gates are held
        with held(self.model, constants):
            return self.loss_of(self.model)

    def loss_of(self, network: nn.Module) -> tuple[float, float]:
        """The same of another network."""
        before = self.right(self.original(1), 1).double()
        difference = before - self.right(self.logits(network, 1), 1).double()
        return 100 * difference.mean().item(), 100 * difference.std().item() / len(difference) ** 0.5

    def figures(self, network: nn.Module, milliseconds: float) -> Figures:
        """On the images that were not used for choosing."""
        logits, original = self.logits(network, 2), self.original(2)
        labels = self.parts[2][1]
        return Figures(
            100 * self.right(logits, 2).double().mean().item() if labels is not None else math.nan,
            100 * (logits.argmax(1) == original.argmax(1)).double().mean().item(),
            divergence(original, logits),
            milliseconds,
            sum(p.numel() for p in network.parameters()),
        )

    @torch.no_grad()
    def times(self, networks: list[nn.Module], rounds: int = 9) -> list[float]:
        """Median milliseconds of a batch of each network, taken in turn."""
        x = next(iter(self.batches(0)))[0]
        taken: list[list[float]] = [[] for _ in networks]
        for i in range(rounds + 1):
            for network, seconds in zip(networks, taken, strict=True):
                start = self._clock()
                network(x)
                if i:  # the first warms up
                    seconds.append(1000 * (self._clock() - start))
        return [torch.tensor(seconds).median().item() for seconds in taken]

    def _clock(self) -> float:
        if self.like.device.type != "cpu":  # its work goes on while this process measures
            torch.accelerator.synchronize(self.like.device)
        return time.perf_counter()

    @torch.no_grad()
    def gate_times(self, rounds: int = 5) -> dict[Gate, float]:
        """Median milliseconds that each gate takes of a batch, in its place."""
        x = next(iter(self.batches(0)))[0]
        started: dict[str, float] = {}
        taken: dict[str, list[float]] = {gate.path: [] for gate in self.gates}
        hooks = []
        for gate in self.gates:
            module = self.model.get_submodule(gate.path)
            path = gate.path
            hooks.append(
                module.register_forward_pre_hook(lambda *_, p=path: started.__setitem__(p, self._clock()))
            )
            hooks.append(
                module.register_forward_hook(
                    lambda *_, p=path: taken[p].append(1000 * (self._clock() - started[p]))
                )
            )
        try:
            for _ in range(rounds + 1):
                self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {gate: torch.tensor(taken[gate.path][1:]).median().item() for gate in self.gates}

    def curve(self, build: Any, order: list[Gate]) -> list[tuple[int, float, float]]:
        """Gates frozen, top-1 (or agreement) and milliseconds, as the gates are frozen in an order."""
        points, base = [], self.times([self.model])[0]
        for n in range(len(order) + 1):
            network = build(order[:n])[0]
            right = 100 * self.right(self.logits(network, 1), 1).double().mean().item()
            original, now = self.times([self.model, network])
            points.append((n, right, base * now / original))
        return points


def divergence(original: Tensor, logits: Tensor) -> float:
    return F.kl_div(
        logits.log_softmax(1), original.log_softmax(1), reduction="batchmean", log_target=True
    ).item()
