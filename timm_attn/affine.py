"""Which parameters scale the channels of a tensor, read off the graph that autograd recorded."""

import re
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

#: Which nodes read a node of the graph, and at which place.
Readers = dict[Any, list[tuple[Any, int]]]

#: Nodes of one input that pass a positive scale of channels on. A pooled or moved channel keeps its scale.
_PASS = re.compile(
    r"(Unsafe)?View|_?ReshapeAlias|Permute|Transpose|T|Squeeze|Unsqueeze|Expand|Clone|Alias|(To)?Copy|ToCopy|"
    r"AsStrided|Slice|Select|Roll|NativeDropout|Relu|LeakyRelu|AvgPool2D|AdaptiveAvgPool2D|"
    r"MkldnnAdaptiveAvgPool2D|Mean|UpsampleBilinear2D|UpsampleNearest2D|UpsampleBicubic2D|MaxPool2DWithIndices"
)
#: Position of input, weight and bias among the inputs of a node that has them.
_LAYER = {
    "Convolution": (0, 1, 2),
    "NativeBatchNorm": (0, 1, 2),
    "CudnnBatchNorm": (0, 1, 2),
    "NativeLayerNorm": (0, 1, 2),
    "NativeGroupNorm": (0, 1, 2),
    "FusedRmsNorm": (0, 1),
    "Addmm": (1, 2, 0),
    "Mm": (0, 1),
    "Linear": (0, 1, 2),
}
_NORMALISES = {"NativeBatchNorm", "CudnnBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"}
_LEAF = "torch::autograd::AccumulateGrad"
_CHANNELS_LAST = {"NativeLayerNorm", "FusedRmsNorm", "Addmm", "Mm", "Linear"}


@cache
def _plain(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name).lstrip("_")


def _kind(node: Any) -> str:
    return _plain(node.name())


def scaling_parameters(
    x: Tensor, names: dict[int, str], readers: Readers, skipped: str | None = None
) -> tuple[int, list[str]]:
    """Axis of the channels of x, and the leaves that scale them when each is scaled along its first axis.

    Args:
        x: B × C × H × W, B × N × C or B × H × W × C, as a network has computed it from leaves.
        names: Names of the leaves, by their ``id``.
        readers: From ``consumers``, of a graph that x is in.
        skipped: Name of one that is not to be chosen.

    Returns:
        −1 or 1; and the names of leaves such that x is multiplied by v along that axis if they are, for
        every positive v. None of them if there is no such choice.
    """
    axis = -1 if x.dim() == 3 or _channels_last(x) else 1
    skip = next((key for key, name in names.items() if name == skipped), None)
    chosen = _nearest(x.grad_fn, x.shape[axis], skip)
    if not chosen or _degree(x.grad_fn, chosen, readers) != 1:
        return axis, []
    return axis, [names[id(leaf)] for leaf in chosen if id(leaf) in names]


def _inputs(node: Any) -> list[Any]:
    return [source for source, _ in node.next_functions]


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of x, of four dimensions, are the last."""
    node, moved = x.grad_fn, False
    while node is not None and _kind(node) not in _LAYER:
        moved ^= _moves_last_axis(node)
        node = next((source for source in _inputs(node) if _comes_from_layer(source)), None)
    if node is None:
        return False
    width = _width(_inputs(node)[_LAYER[_kind(node)][1]])
    if (x.shape[1] == width) != (x.shape[-1] == width):
        return x.shape[-1] == width
    return moved != (_kind(node) in _CHANNELS_LAST)


def _comes_from_layer(node: Any) -> bool:
    """Whether a node is no parameter, nor computed from parameters alone."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if _kind(node) in _LAYER:
                return True
            seen.add(node)
            waiting += reversed(_inputs(node))
    return False


def _moves_last_axis(node: Any) -> bool:
    """Whether a node puts another axis in the place of the last. Windows of an image keep it where it is."""
    kind = _kind(node)
    if kind not in ("Permute", "Transpose"):
        return False
    count = len(node._input_metadata[0].shape)
    saved = node._saved_dims if kind == "Permute" else (node._saved_dim0, node._saved_dim1)
    axes = [(axis if axis < count else axis - 2**64) % count for axis in saved]  # those below 0 are unsigned
    return axes[-1] != count - 1 if kind == "Permute" else count - 1 in axes


def _width(node: Any) -> int | None:
    """Number of output channels of a layer, from the node of its weight."""
    while node is not None and _kind(node) != _LEAF:
        node = _inputs(node)[0] if _inputs(node) else None
    return None if node is None else node.variable.shape[0]


def _leaf(node: Any, channels: int, skip: int | None) -> Any:
    """The parameter that a node gives in another shape or times a constant, if it has one row a channel."""
    while node is not None:
        if _kind(node) == _LEAF:
            fits = node.variable.dim() and channels in (node.variable.shape[0], node.variable.numel())
            return node.variable if fits and id(node.variable) != skip else None
        sources = [source for source in _inputs(node) if source is not None]
        if len(sources) != 1 or not (_PASS.fullmatch(_kind(node)) or _kind(node) in ("Mul", "Div")):
            return None
        node = sources[0]
    return None


def _nearest(node: Any, channels: int, skip: int | None) -> list[Any]:
    """The last parameters that every summand of a node went through, or none."""
    if node is None:
        return []
    kind, sources = _kind(node), _inputs(node)
    if kind in _LAYER:
        _, *places = _LAYER[kind]
        given = [sources[place] for place in places if place < len(sources) and sources[place] is not None]
        leaves = [_leaf(source, channels, skip) for source in given]
        gains = [_gain(source, channels, skip) for source in given]
        leaves = [gain if leaf is None else leaf for leaf, gain in zip(leaves, gains, strict=True)]
        return leaves if leaves and all(leaf is not None for leaf in leaves) else []
    if kind in ("Mul", "Div"):
        for source in sources:
            leaf = _leaf(source, channels, skip)
            if leaf is not None and (kind == "Mul" or source is sources[0]):
                return [leaf]
        return next((found for source in sources if (found := _nearest(source, channels, skip))), [])
    if kind in ("Add", "Sub"):
        sources = [source for source in sources if source is not None]  # Sums often start from the number 0.
        parts = [
            [leaf] if (leaf := _leaf(s, channels, skip)) is not None else _nearest(s, channels, skip)
            for s in sources
        ]
        return list({id(leaf): leaf for part in parts for leaf in part}.values()) if all(parts) else []
    return _nearest(sources[0], channels, skip) if _PASS.fullmatch(kind) else []


def _gain(node: Any, channels: int, skip: int | None) -> Any:
    """The gain of a standardised weight, which a scale of the weight itself would not survive."""
    while node is not None and _PASS.fullmatch(_kind(node)):
        node = _inputs(node)[0]
    if node is None or _kind(node) not in _LAYER:
        return None
    return _leaf(_inputs(node)[1], channels, skip)


def _degree(root: Any, chosen: list[Any], readers: Readers) -> int | None:
    """With which power a scale of the chosen leaves comes out of a node; None if with none of its own."""
    waiting = [get_gradient_edge(leaf).node for leaf in chosen]
    reached = set(waiting)  # the rest of the graph, most of it, has the power 0
    while waiting:
        above = {reader for reader, _ in readers.get(waiting.pop(), [])} - reached
        reached |= above
        waiting += above
    ids = {id(leaf) for leaf in chosen}
    known: dict[Any, int | None] = {}
    waiting = [root]
    while waiting:
        node = waiting[-1]
        missing = [source for source in _inputs(node) if source in reached and source not in known]
        if missing:
            waiting += missing
        else:
            waiting.pop()
            known[node] = _power(node, [known.get(source, 0) for source in _inputs(node)], ids)
    return known[root]


def _power(node: Any, powers: list[int | None], chosen: set[int]) -> int | None:
    """The same of one node, from those of its inputs."""
    kind, sources = _kind(node), _inputs(node)
    if kind == _LEAF:
        return int(id(node.variable) in chosen)
    if None in powers:
        return None
    if not any(powers):
        return 0
    if kind in ("Add", "Sub"):
        summands = {power for power, source in zip(powers, sources, strict=True) if source is not None}
        return summands.pop() if len(summands) == 1 else None
    if kind == "Mul":
        return sum(power or 0 for power in powers)
    if kind == "Div":
        return powers[0] if not any(powers[1:]) else None
    if kind in _LAYER:
        given, weight, *bias = (place for place in _LAYER[kind] if place < len(sources))
        if kind in _NORMALISES and powers[given]:
            return None
        power = powers[given] + powers[weight]  # pyright: ignore[reportOptionalOperand]
        return power if all(powers[place] == power for place in bias if sources[place] is not None) else None
    return powers[0] if _PASS.fullmatch(kind) else None


def consumers(roots: list[Any], found: Readers | None = None) -> Readers:
    """Which nodes read each node of the graph of some outputs, and at which place.

    Args:
        roots: Nodes of the outputs.
        found: Of other outputs of the same graph; those of these are added.
    """
    found = {} if found is None else found
    waiting = [root for root in dict.fromkeys(roots) if root not in found]
    found |= {root: [] for root in waiting}
    while waiting:
        node = waiting.pop()
        for place, source in enumerate(_inputs(node)):
            if source is None:
                continue
            if source not in found:
                found[source] = []
                waiting.append(source)
            found[source].append((node, place))
    return found


def reading_weights(node: Any, channels: int, readers: Readers) -> list[tuple[Any, int]]:
    """The weights that a node's channels are multiplied by next, if every reader of it is a layer.

    Args:
        node: Of a map with this many channels.
        readers: From ``consumers``.

    Returns:
        Leaves, with their number of groups: O × C / groups (× kernel). To scale them by v along their inputs
        is to scale the map. None of them if something else reads the map.
    """
    found = []
    for reader, place in readers.get(node, []):
        kind = _kind(reader)
        if kind in ("Convolution", "Addmm", "Mm", "Linear") and place == _LAYER[kind][0]:
            weight = _inputs(reader)[_LAYER[kind][1]]
            while weight is not None and _kind(weight) in ("T", "Transpose"):
                weight = _inputs(weight)[0]
            groups = reader._saved_groups if kind == "Convolution" else 1
            if weight is None or _kind(weight) != _LEAF or weight.variable.shape[1] * groups != channels:
                return []
            found.append((weight.variable, groups))
        elif _PASS.fullmatch(kind) and place == 0:
            beyond = reading_weights(reader, channels, readers)
            if not beyond:
                return []
            found += beyond
        else:
            return []
    return found
