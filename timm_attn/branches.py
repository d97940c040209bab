"""The ends of residual branches: where attention can stand without touching a network's own keys.

timm's blocks end a residual branch in a slot for stochastic depth, ``drop_path``, ``drop_path1`` and so on:
what leaves it is added to the shortcut next. The slot owns no parameters.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from timm.models import get_model_traits
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .affine import Readers, consumers, scaling_parameters
from .compare import Inputs, call
from .tokens import grid_of_tokens

_SLOT = re.compile(r"(?:(\w+)_)?drop_path(\d*)")
#: Attention that ends a branch, in timm's ResNets and ByobNets. It does not let a scale of its input through.
ATTENTION = ("se", "attn_last")


@dataclass(frozen=True)
class Branch:
    """The end of a residual branch.

    Attributes:
        block: Path of the block.
        slot: Name of the slot in the block.
        channels: Width C of what leaves the branch.
        axis: Its axis of channels: 1 of B × C × H × W, −1 of B × N × C or B × H × W × C.
        pixels: H · W, or the number of tokens N.
        rows: Its first size B: a block may take the patches of an image for images.
        prefix: Of the tokens, how many of the first are no patches (class token, registers).
        grid: H and W of the map; of tokens, of those that are patches, if it is known.
        affine: Names, from the block, of the parameters and buffers that can absorb a factor per channel:
            scaling their first axis by v scales the branch's output by v, and nothing else. Empty if there
            are none.
        scaled: If ``affine`` is a LayerScale, what could absorb the factor if the LayerScale were removed.
        attention: Name of the attention module that ends the branch, after ``affine``.
        calls: How often the slot is passed in a forward pass.
    """

    block: str
    slot: str
    channels: int
    axis: int
    pixels: int
    rows: int = 1
    prefix: int = 0
    grid: tuple[int, int] | None = None
    affine: tuple[str, ...] = field(default=(), compare=False)
    scaled: tuple[str, ...] = field(default=(), compare=False)
    attention: str = ""
    calls: int = field(default=1, compare=False)

    @property
    def suffix(self) -> str:
        """What tells a block's branches apart in names: ``""``, ``"1"``, ``"2"``, ``"attn"`` …"""
        return "".join(filter(None, _SLOT.fullmatch(self.slot).groups()))  # pyright: ignore


def slots(module: nn.Module) -> list[str]:
    """Names of the slots of a block, also of those that are None."""
    names = {**module._modules, **vars(module)}
    return [n for n, v in names.items() if _SLOT.fullmatch(n) and (v is None or isinstance(v, nn.Module))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        model.train()  # which lets some networks drop what they keep between calls in eval mode
        for module, mode in modes.items():
            module.training = mode


def copied(model: Any) -> Any:
    """A deep copy, without the tensors that some networks keep between calls, which may have a graph.

    Raises:
        ValueError: The model holds something that cannot be copied.
    """
    with evaluating(model):
        pass
    try:
        return deepcopy(model)
    except Exception as error:  # torch.nn.utils.prune and the old weight_norm put results beside parameters
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): take out what it "
            "holds besides parameters, buffers and values. Weights that are computed anew at each call are "
            "made permanent, e.g. by torch.nn.utils.prune.remove(module, 'weight')"
        ) from error


def branches(model: nn.Module, images: Inputs) -> list[Branch]:
    """The ends of a network's residual branches in running order, by one pass in eval mode.

    The pass runs on the meta device, without arithmetic, unless images are small or the network cannot.

    Args:
        model: Left as it is.
        images: What it is called with, on its device or the meta device: B × C × H × W, or a tuple or
            dictionary of the model's arguments, of which the first of four dimensions are the images.

    Raises:
        ValueError: The network does not take them.
    """
    with taking(model, images):
        return _probe(model, images)


@contextmanager
def taking(model: nn.Module, images: Inputs) -> Iterator[None]:
    """Raise a ValueError that names the images for whatever a network raises on them."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{type(model).__name__} does not take images {tuple(images_of(images).shape)} "
            f"({type(error).__name__}: {reason}): give what it takes as images="
        ) from error


def runs(found: list[Branch]) -> list[list[Branch]]:
    """Neighbours of equal sizes: what one recurrent cell can serve."""
    return [list(run) for _, run in groupby(found, lambda b: (b.channels, b.pixels - b.prefix, b.rows))]


@contextmanager
def standing(model: nn.Module) -> Iterator[list[tuple[str, str, nn.Module]]]:
    """Slots and attention as (path of the block, name, module); what is None is an identity meanwhile."""
    found, empty = [], []
    for path, block in model.named_modules():
        names = slots(block)
        for name in names:
            if getattr(block, name) is None:
                setattr(block, name, nn.Identity())
                empty.append((block, name))
        attention = [
            name for name in ATTENTION if names and isinstance(getattr(block, name, None), nn.Module)
        ]
        found += [(path, name, getattr(block, name)) for name in (*attention, *names)]
    try:
        yield found
    finally:
        for block, name in empty:
            setattr(block, name, None)


@contextmanager
def leaves_of(model: nn.Module, device: torch.device | None) -> Iterator[dict[int, str]]:
    """Stand-ins for all parameters and buffers, which autograd follows, and their names by ``id``.

    Autograd is on meanwhile, also in ``torch.inference_mode``, in which a network may have been made.
    A module or a parameter may be in several places, with which ``torch.func.functional_call`` does not cope.
    """
    # Statistics of a norm layer have no gradient; frozen norms hold their affine in buffers, too.
    fixed = ("running_mean", "running_var")
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (store, name, tensor)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    leaves: dict[int, Any] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for _, name, tensor in places:
            leaf = (
                for_autograd(tensor).detach() if device is None else torch.empty_like(tensor, device=device)
            )
            leaves.setdefault(id(tensor), leaf.requires_grad_(leaf.is_floating_point() and name not in fixed))
        try:
            for store, name, tensor in places:
                store[name] = leaves[id(tensor)]
            yield {id(leaves[key]): name for key, name in names.items()}
        finally:
            for store, name, tensor in places:
                store[name] = tensor


def for_autograd(tensor: Tensor) -> Tensor:
    """The tensor, or where it was made in inference mode a copy that autograd can follow."""
    return tensor.clone() if tensor.is_inference() else tensor


def images_of(inputs: Any) -> Any:
    """The images among the arguments of a network: the first of four dimensions, or of the most."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return next((t for t in tensors if t.dim() == 4), max(tensors, key=Tensor.dim, default=None))


def _probe(model: nn.Module, inputs: Inputs) -> list[Branch]:
    images = images_of(inputs)
    if images.device.type == "cpu" and images.shape[-1] <= 64:  # arithmetic takes less time than its absence
        return _observed(model, inputs, None)
    if images.device.type != "meta":
        try:
            return _observed(model, inputs, torch.device("meta"))
        except Exception:  # whatever a network raises that looks at values
            return _observed(model, inputs, None)
    return _observed(model, inputs, images.device)


def _observed(model: nn.Module, inputs: Inputs, device: torch.device | None) -> list[Branch]:
    """The branches that a pass on the device shows, or on the tensors' own."""
    with standing(model) as places, evaluating(model), leaves_of(model, device) as names:
        observer = _Observer(model, names, images_of(inputs).shape[-2:])
        hooks = [
            slot.register_forward_pre_hook(partial(observer.slot_reached, path, name))
            for path, name, slot in places
        ]
        try:
            call(model, tree_map_only(Tensor, lambda t: for_autograd(t).to(device or t.device), inputs))
        finally:
            for hook in hooks:
                hook.remove()
    found = observer.found
    last = {path: (name, found.pop((path, name))) for path, name in list(found) if name in ATTENTION}
    for (path, name), branch in found.items():
        attention, given = last.get(path, ("", None))
        if not branch.affine and given and given.affine and given.channels == branch.channels:
            found[path, name] = replace(branch, affine=given.affine, attention=attention)
    return list(found.values())


class _Observer:
    """Collects branches during a forward pass, by block and slot.

    Args:
        model: The network.
        names: Names of the leaves, by their ``id``.
        size: Height and width of the images.
    """

    def __init__(self, model: nn.Module, names: dict[int, str], size: Sequence[int]):
        self.model, self.names, self.size = model, names, size
        self.found: dict[tuple[str, str], Branch] = {}
        self.readers: Readers = {}
        self.holders = _holders(model)

    def slot_reached(self, path: str, name: str, slot: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook of a slot."""
        x = args[0]
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            return
        branch, before = self.branch(path, name, x), self.found.get((path, name))
        if before:  # one gate serves both if they are alike, and both take it in
            both = branch == before and branch.affine and before.affine
            affine = tuple(sorted({*branch.affine, *before.affine})) if both else ()
            branch = replace(branch, affine=affine, calls=before.calls + 1)
        self.found[path, name] = branch

    def branch(self, path: str, name: str, x: Tensor) -> Branch:
        """The branch that x leaves."""
        prefix = f"{path}." if path else ""
        consumers([x.grad_fn] if x.grad_fn else [], self.readers)
        axis, leaves = scaling_parameters(x, self.names, self.readers)
        affine = _within(prefix, leaves)
        if _shared(self.model.get_submodule(path), affine, self.holders):
            affine = ()
        scaled: list[str] = []
        if len(leaves) == 1:
            _, scaled = scaling_parameters(x, self.names, self.readers, leaves[0])
        if x.dim() == 3:
            tokens = grid_of_tokens(self.model, path, x.shape[1], self.size)
        else:
            height, width = x.shape[2:] if axis == 1 else x.shape[1:3]
            tokens = 0, (height, width)
        channels = x.shape[axis]
        pixels = x[0].numel() // channels
        inner = _within(prefix, scaled)
        return Branch(path, name, channels, axis, pixels, x.shape[0], *tokens, affine, inner)


def _holders(model: nn.Module) -> Counter[int]:
    """In how many places each module, parameter and buffer stands, by ``id``."""
    stores = [s for m in model.modules() for s in (m._modules, m._parameters, m._buffers)]
    return Counter(id(held) for store in stores for held in store.values())


def _shared(block: nn.Module, names: tuple[str, ...], holders: Counter[int]) -> bool:
    """Whether parameters of a block, or the layers that hold them, stand in another place, too."""
    for name in names:
        layer: Any = block
        for part in name.split("."):
            layer = getattr(layer, part)
            if holders[id(layer)] > 1:
                return True
    return False


def _within(prefix: str, names: list[str]) -> tuple[str, ...]:
    """Names from a block; none if one of them is outside."""
    within = all(name.startswith(prefix) for name in names)
    return tuple(sorted(name.removeprefix(prefix) for name in names)) if within else ()


def first_parameter(model: nn.Module) -> Tensor:
    """The one whose device and dtype are taken for the network's."""
    return next(p for p in model.parameters() if p.is_floating_point())


def example_input(model: nn.Module, batch_size: int = 2) -> Tensor:
    """Fixed standard normal images for a timm model, on its device and in its dtype.

    A model that is no network of timm gets those for the first network in it that is one.
    """
    parameter = first_parameter(model)
    network = next((m for m in model.modules() if getattr(m, "pretrained_cfg", None)), model)
    channels, *size = getattr(network, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)
    size = get_model_traits(network).get("img_size") or size
    channels = getattr(network, "in_chans", channels)
    images = torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)
