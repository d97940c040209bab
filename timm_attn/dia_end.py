"""DIA's cell at the ends of a run of residual branches, and the state that it hands along them."""

import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Branch
from .ends import BranchEnd, hooked
from .layers import DIACell
from .layers.eager import eager
from .layers.pooling import channel_mean

#: Where a node of a graph keeps the state that it gives, and one that it was given and no other node keeps.
_STATE, _GIVEN = "timm_attn.dia", "timm_attn.dia.given"


class _State:
    """(h, c) of DIA, each B × C, and the channel means that the next step has read beside it."""

    def __init__(self, state: tuple[Tensor, Tensor]) -> None:
        self.state = state
        self.read: Tensor | None = None
        self.taken = False


class DIARun:
    """Hands DIA's state along a run of branches, within one forward pass.

    Every step has an entry for each pass whose graph is there, so that a block which is run again, as under
    gradient checkpointing, reads the same state again. The graph owns the entries, and they go when it goes.

    Args:
        steps: Number of branches of the run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # Owned by the graphs of passes, by step and thread.
        self._owned: dict[int, dict[int, list[weakref.ref[_State]]]] = {}
        # Of a pass without a graph, by step and thread (None: compiled).
        self._passing: dict[tuple[int, int | None], _State] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DIARun":
        return DIARun(self.steps)

    def __reduce__(self) -> Any:
        return DIARun, (self.steps,)

    def before(self, step: int, g: Tensor) -> tuple[Tensor, Tensor]:
        """The state that the step before has left; zeros for the first.

        Raises:
            RuntimeError: There is none.
        """
        if step == 0:
            self._forget()
            return torch.zeros_like(g), torch.zeros_like(g)
        entry = passing = self._passing.get(self._key(step))
        if passing is None or passing.taken:  # in this pass, or in one whose block is run again now
            entry = self._of_a_graph(step, g) or passing or self._of_another(step)
        if entry is None:
            raise RuntimeError(
                f"DIA's step {step} of {self.steps} has no state of the step before: call the whole network, "
                "compile the whole of it or nothing, and checkpoint gradients with use_reentrant=False"
            )
        if eager(g):
            entry.read, entry.taken = g.detach(), True
        return entry.state

    def after(self, step: int, state: tuple[Tensor, Tensor], x: Tensor) -> None:
        """Keep the state for the next step; ``x`` is computed from it."""
        last, entry = step == self.steps - 1, _State(state)
        if eager(x) and x.grad_fn is not None:
            given = self._passing.get(self._key(step))
            if given is not None:  # by a frozen block: when this one is run again, others may have passed
                self._own(step, given, x.grad_fn, _GIVEN)
            if not last:
                self._own(step + 1, entry, x.grad_fn, _STATE)
        elif last:
            self._forget()
        else:
            self._passing[self._key(step + 1)] = entry

    def _own(self, step: int, entry: _State, node: Any, name: str) -> None:
        """Let a node of the graph own what a step reads."""
        node.metadata[name] = entry
        mine, thread = self._owned.setdefault(step, {}), threading.get_ident()
        alive = [ref for ref in mine.get(thread, ()) if ref() is not None]
        mine[thread] = [*alive, weakref.ref(entry)]

    def _of_a_graph(self, step: int, g: Tensor) -> _State | None:
        """The state that the pass of g has left, of those whose graphs are there.

        A block may be run again by another thread, as autograd does on GPUs.
        """
        refs = [ref for by_thread in list(self._owned.get(step, {}).values()) for ref in by_thread]
        known = [*dict.fromkeys(state for ref in refs if (state := ref()) is not None)]
        if len(known) < 2:
            return known[0] if known else None
        found = _nearest(g.grad_fn, {*known})
        if found is not None:
            return found
        # What is run again may be cut from the graph: by what was read then.
        same = [s for s in known if s.read is not None and s.read.shape == g.shape]
        return next((s for s in same if torch.equal(s.read, g)), None)  # pyright: ignore[reportArgumentType]

    def _of_another(self, step: int) -> _State | None:
        """A state without a graph, of a block that is compiled alone, or of another thread."""
        for key, state in [*self._passing.items()]:
            if step == key[0]:
                return state
        return None

    def _forget(self) -> None:
        for step in range(1, self.steps):
            self._passing.pop(self._key(step), None)
            self._passing.pop((step, None), None)

    def _key(self, step: int) -> tuple[int, int | None]:
        return step, None if torch.compiler.is_compiling() else threading.get_ident()


def _nearest(node: Any, wanted: set[_State]) -> _State | None:
    """The first of some states that is met when a graph is walked back from a node."""
    queue, seen = deque([node]), {node, None}
    while queue and (node := queue.popleft()) is not None:
        state = node.metadata.get(_STATE)
        if state in wanted:
            return state
        new = {parent for parent, _ in node.next_functions} - seen
        queue.extend(new)
        seen |= new
    return None


class DIAEnd(BranchEnd):
    """One step of a cell that a run of branches shares, which the first of them owns.

    Args:
        block, branch, key, mechanism, home: Of ``BranchEnd``.
        run: Hands the state from step to step.
        step: Which one of them, from 0.
        new_norm: The branch's affine is that of a norm which is applied here, before the cell reads the map.
    """

    all_tokens = True

    def __init__(
        self,
        block: nn.Module,
        branch: Branch,
        key: str,
        mechanism: DIACell | None,
        home: nn.Module | None,
        run: DIARun,
        step: int,
        new_norm: bool = False,
    ) -> None:
        super().__init__(block, branch, key, mechanism, home)
        self.run = run
        self.step = step
        self.new_norm = new_norm
        self.norm = (
            branch.affine[0].rpartition(".")[0] if len(branch.affine) == 2 and not branch.attention else ""
        )

    def may_overwrite(self, x: Tensor) -> bool:
        """Whether x can take the product, which saves memory: only the slot has what the norm has made."""
        if type(self.block).__module__ != "timm.models.resnet":  # whose blocks read it nowhere else
            return False
        norm = self.block.get_submodule(self.norm)
        if torch.is_grad_enabled() or not isinstance(norm, nn.BatchNorm2d) or hooked(norm) or hooked(self):
            return False
        return eager(x)

    def attend(self, x: Tensor) -> Tensor:
        if self.new_norm:
            x = self.block.get_submodule(self.norm)(x)
        if self.branch.axis == 1:
            g = channel_mean(x)
        else:
            g = x[:, self.branch.prefix :].mean(1) if x.dim() == 3 else x.mean((1, 2))
        state = self.mechanism(g, *self.run.before(self.step, g))
        if self.may_overwrite(x) and x.dtype == state[0].dtype:
            x = x.mul_(state[0][:, :, None, None])
        elif self.branch.axis == 1:
            x = x * state[0][:, :, None, None]
        else:
            x = x * (state[0][:, None] if x.dim() == 3 else state[0][:, None, None])
        self.run.after(self.step, state, x)
        return x
