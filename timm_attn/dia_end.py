"""DIA's cell at the ends of a run of residual branches, and the state that it hands along them."""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Branch
from .ends import BranchEnd, hooked
from .layers import DIACell
from .layers.eager import eager
from .layers.pooling import channel_mean

#: Where a node of a graph keeps the state that it leaves, and the one that it has read if no node keeps that.
_STATE, _GIVEN = "timm_attn.dia", "timm_attn.dia.given"


class _State:
    """(h, c) of DIA, each B × C, and the channel means that the next step has read beside it.

    What steps without a graph have left is kept by the states that came of it.
    """

    def __init__(self, state: tuple[Tensor, Tensor], before: "_State | None" = None) -> None:
        self.state = state
        self.before = before
        self.read: Tensor | None = None
        self.taken = self.owned = False


class DIARun:
    """Hands DIA's state along a run of branches, within one forward pass.

    In a forward pass, a step takes what its thread has left for it last. A block that is run again, as under
    gradient checkpointing, finds what it read then: the graph of its pass keeps that, as long as it lives.

    ===============================  =================================  ================
    a step is run                    its state is held by               and found by
    ===============================  =================================  ================
    in a forward pass with a graph   the graph; ``_left`` is weak       ``_find``
    in one without a graph           ``_left``                          ``_find``
    again, in a backward pass        the graph; ``_alive`` is weak      ``_read_before``
    by a compiler or tracer          ``_traced``                        ``before``
    by another thread than the last  either, if nothing else is found   ``_of_another``
    ===============================  =================================  ================

    Args:
        steps: Number of branches of the run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # Left for a step by a thread, in a forward pass (-1) or a backward pass; weak if a graph keeps it.
        self._left: dict[tuple[int, int, int], list[Callable[[], _State | None]]] = {}
        # What a step may read again, by step and thread.
        self._alive: dict[int, dict[int, list[weakref.ref[_State]]]] = {}
        # Of tracers and compilers, by step and thread (None: compiled).
        self._traced: dict[tuple[int, int | None], _State] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DIARun":
        return DIARun(self.steps)

    def __reduce__(self) -> Any:
        return DIARun, (self.steps,)

    def before(self, step: int, g: Tensor) -> _State:
        """The state that the step before has left; zeros for the first.

        Raises:
            RuntimeError: There is none.
        """
        plain = eager(g)
        if step == 0:
            self._forget(plain)
            return _State((torch.zeros_like(g), torch.zeros_like(g)))
        entry = self._traced.get(_traced_key(step)) if not plain else None
        entry = entry or self._find(step, g) or self._of_another(step)
        if entry is None:
            raise RuntimeError(
                f"DIA's step {step} of {self.steps} has no state of the step before: call the whole network, "
                "compile the whole of it or nothing, and checkpoint gradients with use_reentrant=False"
            )
        if plain:
            entry.read, entry.taken = g.detach(), True
        return entry

    def after(self, step: int, state: tuple[Tensor, Tensor], x: Tensor, given: _State) -> None:
        """Keep the state for the next step; ``x`` is computed from it, and it from what ``before`` gave."""
        last = step == self.steps - 1
        if not eager(x):
            if last:
                self._forget(plain=False)
            else:
                self._traced[_traced_key(step + 1)] = _State(state)
            return
        if x.grad_fn is not None:
            entry = _State(state)
            entry.owned = True
            if not given.owned:
                x.grad_fn.metadata[_GIVEN] = given  # pyright: ignore[reportIndexIssue]
            if not last:
                x.grad_fn.metadata[_STATE] = entry  # pyright: ignore[reportIndexIssue]
                self._leave(step + 1, weakref.ref(entry), again=True)
        elif last:
            self._forget(plain=True)
        else:
            # Without a graph there is nothing to run again, unless later steps have one. Reentrant
            # checkpointing comes without, too: it would lose the gradient of the state.
            again = torch.is_grad_enabled()
            entry = _State(state, given if again else None)
            self._leave(step + 1, lambda: entry, again)

    def _leave(self, step: int, ref: Callable[[], _State | None], again: bool) -> None:
        thread, task = threading.get_ident(), _task()
        waiting = [r for r in self._left.get((step, thread, task), ()) if (s := r()) and not s.taken]
        self._left[step, thread, task] = [*waiting, ref]
        if again:
            mine, entry = self._alive.setdefault(step, {}), ref()
            assert entry is not None
            mine[thread] = [*(r for r in mine.get(thread, ()) if r()), weakref.ref(entry)]

    def _find(self, step: int, g: Tensor) -> _State | None:
        thread, task = threading.get_ident(), _task()
        left = [s for ref in self._left.get((step, thread, task), ()) if (s := ref()) and not s.taken]
        if task >= 0 or not left:
            return self._read_before(step, g, left, trusted=task >= 0)
        if len(left) > 1:  # of passes in step, or of one that was not finished
            return _nearest(g.grad_fn, {*left}) or left[-1]
        return left[0]

    def _read_before(self, step: int, g: Tensor, left: list[_State], trusted: bool) -> _State | None:
        """What a step read beside g when it ran before, maybe in another thread.

        Args:
            left: What was left for it since, in the same backward pass: by the step before, which was run
                again with it, or by one that was run again for another pass.
            trusted: Whether the step is known to be run again.
        """
        refs = [ref for by_thread in [*self._alive.get(step, {}).values()] for ref in by_thread]
        known = [s for ref in refs if (s := ref()) and s.read is not None and s.read.shape == g.shape]
        if trusted and len(known) < 2:
            return [*known, *left][-1] if known or left else None
        same = next((s for s in known if torch.equal(s.read, g)), None)  # pyright: ignore[reportArgumentType]
        return same or (left[-1] if left else None)

    def _of_another(self, step: int) -> _State | None:
        """What another thread has left, or a block that is compiled alone."""
        traced = [state for key, state in [*self._traced.items()] if key[0] == step]
        left = [s for key, refs in [*self._left.items()] if key[0] == step for ref in refs if (s := ref())]
        return next((s for s in reversed([*traced, *left]) if not s.taken), None)

    def _forget(self, plain: bool) -> None:
        """Drop what was left by passes without a graph that were not finished."""
        for step in range(1, self.steps):
            self._traced.pop(_traced_key(step), None)
            self._traced.pop((step, None), None)
        if not plain:
            return
        mine = threading.get_ident(), _task()
        for key, refs in [*self._left.items()]:
            if key[1:] == mine:
                self._left[key] = [ref for ref in refs if isinstance(ref, weakref.ref) and ref()]
            elif mine[1] < 0 <= key[2]:  # a backward pass that is over
                self._left.pop(key, None)


def _traced_key(step: int) -> tuple[int, int | None]:
    return step, None if torch.compiler.is_compiling() else threading.get_ident()


def _task() -> int:
    """Number of the backward pass that is running in this thread, or -1."""
    return torch._C._current_graph_task_id()


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


class NormEnd(nn.Module):
    """A norm of a block, applied at the end of its branch.

    Args:
        block: The block, which has the norm.
        name: Of the norm.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, it is no child
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """B × C × H × W to the same."""
        return self._block[0].get_submodule(self.name)(x)


class DIAEnd(BranchEnd):
    """One step of a cell that a run of branches shares, which the first of them owns.

    Args:
        block, branch, key, mechanism, home: Of ``BranchEnd``.
        run: Hands the state from step to step.
        step: Which one of them, from 0.
        new_norm: The branch's affine is that of a ``NormEnd`` before this.
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
        if self.branch.axis == 1:
            g = channel_mean(x)
        else:
            g = x[:, self.branch.prefix :].mean(1) if x.dim() == 3 else x.mean((1, 2))
        given = self.run.before(self.step, g)
        state = self.mechanism(g, *given.state)
        if self.may_overwrite(x) and x.dtype == state[0].dtype:
            x = x.mul_(state[0][:, :, None, None])
        elif self.branch.axis == 1:
            x = x * state[0][:, :, None, None]
        else:
            x = x * (state[0][:, None] if x.dim() == 3 else state[0][:, None, None])
        self.run.after(self.step, state, x, given)
        return x
