"""Which gates of a network may be constants: the means, the damage, the time, and the choice."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .absorb import build_frozen, named_network
from .gates import Gate, matching
from .passes import Figures, Passes
from .record import record

#: From a network with constant gates to one that has been trained since, of the same architecture.
Recover = Callable[[Any], Any]


class Frozen(NamedTuple):
    """A network some of whose gates are constants.

    Attributes:
        model: In eval mode.
        where: What took in the constant of each gate, or "a multiplication".
        loads: Whether ``timm.create_model`` builds it by name.
    """

    model: nn.Module
    where: dict[Gate, str]
    loads: bool


class Choice(NamedTuple):
    """Gates that may be constants together.

    Attributes:
        chosen: Those, in the order in which they were tried.
        staying: Gates that cannot go, and why.
        losses: Points of top-1 that each of the others would have cost, with those chosen before it.
        order: All that may go at all, the chosen first, then the next best.
    """

    chosen: list[Gate]
    staying: dict[Gate, str]
    losses: dict[Gate, float]
    order: list[Gate]


class GateSearch:
    """The gates of a network held at their means, and what that costs. Nothing of it depends on a budget.

    Args:
        original: A network in eval mode, that nobody changes meanwhile.
        gates: Of it, in running order.
        parts: Images and labels for the means, for choosing and for the final figures.
        batch_size: Of all passes, and of the times.
        keep: Shell patterns of paths of gates that stay.
        note: Called with the name of each step of the work.

    Attributes:
        statistics: Of each gate, by path.
        damage: Divergence from the original when a gate alone is constant, nats.
        milliseconds: Of a batch that each gate takes in the original.
        staying: Gates that are kept, and those that feed them, with the reason.
        orders: The other gates by damage for the time that they take, and by damage alone: a gate that takes
            long may use up the budget for several others.
        depth: The same in running order.
    """

    def __init__(
        self,
        original: Any,
        gates: list[Gate],
        parts: list[tuple[Tensor, Tensor | None]],
        batch_size: int,
        keep: Sequence[str] = (),
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.original = original
        self.gates = gates
        self.work = work = Passes(original, gates, parts, batch_size)
        self.staying = _staying(gates, keep)
        note("means")
        with torch.no_grad(), record(original, gates, correlation=False) as recorded:
            for x, y in work.batches(0):
                recorded.labels = y
                original(x)
        self.statistics = recorded.statistics
        self.constants = {gate: self.statistics[gate.path].mean for gate in gates}
        note("damage and time of each gate")
        self.milliseconds = work.gate_times()
        self.damage = {gate: work.damage({gate: self.constants[gate]}) for gate in gates}
        free = [gate for gate in gates if gate not in self.staying]
        rates = {gate: self.damage[gate] / max(self.milliseconds[gate], 1e-6) for gate in free}
        self.orders = [_in_order(free, cost) for cost in (rates, self.damage)]
        self.depth = _in_order(free, {gate: gates.index(gate) for gate in free})
        self._few = work.few(4)
        self._losses: dict[frozenset[Gate], tuple[float, float]] = {}

    def choose(self, budget: float) -> Choice:
        """The gates that may be constants together: of two greedy choices that which saves more time.

        Args:
            budget: Points of top-1; infinite for all.
        """
        choices = [self._greedy(order, budget) for order in self.orders]
        return max(choices, key=lambda choice: sum(self.milliseconds[gate] for gate in choice.chosen))

    def _greedy(self, order: list[Gate], budget: float) -> Choice:
        chosen: list[Gate] = []
        staying = dict(self.staying)
        losses: dict[Gate, float] = {}
        for gate in order:
            stays = [path for path in gate.later if path not in {g.path for g in chosen}]
            if stays:
                staying[gate] = _read_by(stays[0])
                continue
            loss, error = (0.0, 0.0) if math.isinf(budget) else self._loss((*chosen, gate))
            if loss <= max(budget, error):
                chosen.append(gate)
            else:
                losses[gate] = loss
        return Choice(chosen, staying, losses, [*chosen, *(gate for gate in order if gate not in chosen)])

    def _loss(self, some: Iterable[Gate]) -> tuple[float, float]:
        gates = frozenset(some)
        if gates not in self._losses:
            self._losses[gates] = self.work.loss({gate: self.constants[gate] for gate in gates})
        return self._losses[gates]

    def network(self, some: Sequence[Gate]) -> Frozen:
        """The network with some gates constant, as an architecture with a name where there is one."""
        network, where = self._build(some)
        named = named_network(network, self.original, some, where, self._few)
        return Frozen(network if named is None else named, where, named is not None)

    def _build(self, some: Sequence[Gate]) -> tuple[Any, dict[Gate, str]]:
        return build_frozen(self.original, {gate: self.constants[gate] for gate in some}, self._few)

    def recovered(self, recover: Recover, choice: Choice, budget: float) -> tuple[Frozen, list[Gate]] | None:
        """The network with the most gates constant that keeps the budget when trained, or None; by bisection.

        Args:
            recover: Trains a network.
            choice: What may go without training.
            budget: Points of top-1; infinite for all.
        """
        order = choice.order

        def trained(count: int) -> tuple[Frozen, list[Gate]] | None:
            frozen = self.network(order[:count])
            frozen = frozen._replace(model=recover(frozen.model).eval().to(self.work.like))
            loss, error = self.work.loss_of(frozen.model)
            return (frozen, order[:count]) if loss <= max(budget, error) else None

        if math.isinf(budget):
            return trained(len(order))
        low, high, best = len(choice.chosen), len(order), None
        while low < high:
            count = (low + high + 1) // 2
            found = trained(count)
            if found:
                low, best = count, found
            else:
                high = count - 1
        if best is None and low:  # no more than may go without training, which it may still help
            best = trained(low)
        return best

    def figures(self, network: nn.Module) -> tuple[Figures, Figures]:
        """Of the original and of a network made from it, timed in turn, on the images that decide nothing."""
        networks = (self.original, network)
        before, after = (
            self.work.figures(n, taken)
            for n, taken in zip(networks, self.work.times(list(networks)), strict=True)
        )
        return before, after

    def curve(self, order: list[Gate]) -> list[tuple[int, float, float]]:
        """Gates frozen, top-1 (or agreement) and milliseconds, as the gates are frozen in an order."""
        return self.work.curve(self._build, order)


def _staying(gates: list[Gate], keep: Sequence[str]) -> dict[Gate, str]:
    """The gates that are kept, and those that feed them, with the reason.

    Raises:
        ValueError: A pattern names no gate.
    """
    kept = matching([gate.path for gate in gates], keep, "keep")
    reasons = {}
    for gate in gates:
        reading = [path for path in gate.later if path in kept]
        if gate.path in kept:
            reasons[gate] = "named by keep"
        elif reading:
            reasons[gate] = _read_by(reading[0])
    return reasons


def _read_by(path: str) -> str:
    return f"{path}, which stays, reads its cell"


def _in_order(gates: Iterable[Gate], cost: dict[Gate, float]) -> list[Gate]:
    """By cost; of gates that share a cell, later ones first, as the earlier ones feed them."""
    gates, order = list(gates), []
    names = {gate.path for gate in gates}
    while gates:
        ready = [gate for gate in gates if names.isdisjoint(gate.later)]
        best = min(ready, key=lambda gate: cost[gate])
        order.append(best)
        gates.remove(best)
        names.remove(best.path)
    return order
