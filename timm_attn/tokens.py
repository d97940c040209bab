"""Tokens as a map: how many are no patches, how the others lie, and which layers that matters to."""

import math
from collections.abc import Sequence
from typing import Any

from timm.layers import BatNonLocalAttn, GatherExcite
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn, SimpleCoordAttn
from timm.layers.halo_attn import HaloAttn
from torch import nn

#: Attention of timm's that reads neighbours, or rows of a map, without convolutions of more than a pixel.
_ON_MAPS = (CoordAttn, SimpleCoordAttn, EfficientLocalAttn, BottleneckAttn, HaloAttn, BatNonLocalAttn)


def grid_of_tokens(
    model: nn.Module, path: str, tokens: int, size: Sequence[int]
) -> tuple[int, tuple[int, int] | None]:
    """Number of tokens that are no patches, and the grid of the others if it is known.

    As the innermost network around a block says, which is called with images of this height and width. Some
    networks let the class token in only at the end.
    """
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        network: Any = model.get_submodule(".".join(parts[:end]))
        count = getattr(network, "num_prefix_tokens", None)
        if isinstance(count, int):
            grid = _own_grid(getattr(network, "patch_embed", None), size)
            if grid and tokens - math.prod(grid) in (0, count):
                return tokens - math.prod(grid), grid
            for prefix in dict.fromkeys((count, 0)):
                grid = _grid(tokens - prefix, size)
                if grid:
                    return prefix, grid
            return count if count < tokens else 0, None
        if hasattr(network, "unroll"):  # Hiera's tokens follow one another by window, not by row
            return 0, None
    for prefix in (0, 1, 2):  # there may be class tokens that the network does not count
        grid = _grid(tokens - prefix, size)
        if grid:
            return prefix, grid
    return 0, None


def _own_grid(patch_embed: Any, size: Sequence[int]) -> tuple[int, int] | None:
    """The grid of patches by a network's own account."""
    if hasattr(patch_embed, "dynamic_feat_size") and not getattr(patch_embed, "strict_img_size", True):
        return patch_embed.dynamic_feat_size(tuple(size))
    grid = getattr(patch_embed, "grid_size", None)
    return tuple(grid) if grid else None


def _grid(patches: int, size: Sequence[int]) -> tuple[int, int] | None:
    """The grid of so many square patches of an image, if there is one; patches of a square may overlap."""
    if patches < 1:
        return None
    for side in range(1, min(size) + 1):
        for rounded in (math.floor, math.ceil):
            height, width = (rounded(length / side) for length in size)
            if height * width == patches:
                return height, width
    side = math.isqrt(patches)
    return (side, side) if size[0] == size[1] and side * side == patches else None


def map_size(grid: tuple[int, int] | None, patches: int) -> tuple[int, int] | None:
    """H and W of a map of so many patches; None if that is not known.

    If it can be, it is taken for a known grid, or for one of that shape.
    """
    if grid is None or math.prod(grid) == patches:
        return grid
    height, width = grid
    rows = math.isqrt(patches * height // width)
    columns = patches // max(rows, 1)
    return (rows, columns) if rows * columns == patches and rows * width == columns * height else None


def reads_neighbours(module: nn.Module) -> bool:
    """Whether a layer on maps looks at neighbouring pixels or at rows, and not at each pixel or at all."""
    layers = [*module.modules()]
    convolutions = (m for m in layers if isinstance(m, nn.Conv2d | nn.Conv3d))
    if any(max(convolution.kernel_size) > 1 for convolution in convolutions):
        return True
    return any(isinstance(m, _ON_MAPS) or (isinstance(m, GatherExcite) and m.extent > 0) for m in layers)
