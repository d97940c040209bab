"""Stiffness along depth: the blocks of a residual network as steps that solve a differential equation.

Paper: "Understanding Self-attention Mechanism via Dynamical System Perspective", Huang et al., ICCV 2023
https://arxiv.org/abs/2308.09939
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..branches import branches, standing
from ..errors import UserError
from ..style import new_figure
from .observation import Observation, Sample, round_to


@torch.no_grad()
def stiffness_of(model: nn.Module, sample: Sample) -> dict[str, Tensor]:
    """‖f(t+1) − f(t)‖ ÷ ‖x(t+1) − x(t)‖ of each image, N, by block.

    x(t) is the input of block t, and f(t) the output of its residual branch, or the sum of those of several
    branches. A block is left out if its shapes differ from those of the next.
    """
    x, _ = next(sample.batches(model, 2))
    ends = branches(model, x)
    slots: dict[str, list[str]] = {}
    for end in ends:
        slots.setdefault(end.block, []).append(end.slot)
    found: dict[str, list[Tensor]] = {}
    last: dict[str, Any] = {}
    added: dict[str, Tensor] = {}
    given: dict[str, Any] = {}

    def on_slot(path: str) -> Any:
        return lambda module, args, y: added.__setitem__(path, y.clone())  # blocks add in place

    def before_block(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            given[path] = args[0].clone() if args and torch.is_tensor(args[0]) else None

        return hook

    def on_block(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            x = given.pop(path)
            if x is None or not torch.is_tensor(y):
                last.clear()
                return
            f = added.get(path) if len(slots[path]) == 1 else y - x if y.shape == x.shape else None
            if f is not None and last and last["f"].shape == f.shape and last["x"].shape == x.shape:
                rise = (f - last["f"]).flatten(1).float().norm(dim=1)
                step = (x - last["x"]).flatten(1).float().norm(dim=1)
                found.setdefault(last["path"], []).append((rise / step).cpu())
            last.clear()
            if f is not None:
                last.update(path=path, f=f, x=x)

        return hook

    with ExitStack() as stack, standing(model) as modules:
        for path, name, module in modules:
            if name in slots.get(path, ()):
                stack.callback(module.register_forward_hook(on_slot(path)).remove)
        for path in slots:
            block = model.get_submodule(path)
            stack.callback(block.register_forward_pre_hook(before_block(path)).remove)
            stack.callback(block.register_forward_hook(on_block(path)).remove)
        for x, _ in sample.batches(model):
            last.clear()
            model(x)
    indices = {path: torch.cat(values) for path, values in found.items()}
    # Where x does not change at all, as behind branches that are zero, the index is not finite.
    return {path: values[values.isfinite()] for path, values in indices.items() if values.isfinite().any()}


def stiffness(models: dict[str, Any], sample: Sample) -> Observation:
    """The stiffness index along depth.

    Args:
        models: Networks with residual branches, by name.
        sample: Images.

    Raises:
        UserError: A network has no two neighbouring residual blocks of the same shape.
    """
    found = {name: stiffness_of(model, sample) for name, model in models.items()}
    for name, blocks in found.items():
        if not blocks:
            raise UserError(
                f"{name} has no two neighbouring residual blocks of one shape whose branches are not zero"
            )
    rows = [
        {
            "model": name,
            "block": path,
            "stiffness": round_to(values.mean().item()),
            "std_over_images": round_to(values.std().item()),
        }
        for name, blocks in found.items()
        for path, values in blocks.items()
    ]

    def draw() -> Any:
        figure, axes = new_figure(f"Stiffness along depth, {len(sample):,} images", 3.4)
        axis = axes[0, 0]
        for name, blocks in found.items():
            depth = range(1, len(blocks) + 1)
            means = [v.mean().item() for v in blocks.values()]
            stds = [v.std().item() for v in blocks.values()]
            (line,) = axis.plot(depth, means, marker="o", markersize=4, label=name)
            low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axis.fill_between(depth, low, high, alpha=0.15, color=line.get_color())
        names = {tuple(blocks) for blocks in found.values()}
        if len(names) == 1 and len(next(iter(names))) <= 16:
            (paths,) = names
            axis.set_xticks(range(1, len(paths) + 1), paths, rotation=30, ha="right")
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(y=0.1)
        axis.set(xlabel="block and the next", ylabel="‖f(t+1) − f(t)‖ ÷ ‖x(t+1) − x(t)‖")
        axis.set_ylim(bottom=0)
        axis.legend()
        return figure

    summary = []
    for name, blocks in found.items():
        means = torch.stack([values.mean() for values in blocks.values()])
        highest = list(blocks)[int(means.argmax())]
        summary.append(
            (
                f"stiffness of {name}, mean over {len(blocks)} pairs of blocks; largest",
                f"{means.mean():.2f}; {means.max():.2f} at {highest}",
                "varies along depth (no figure)",
            )
        )
    return Observation("stiffness", rows, summary, draw, len(sample))
