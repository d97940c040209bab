"""Stock weights made into those of a variant that computes the same.

The gate of the variant is made constant, and the layer before or after it is scaled by its inverse. Each
function takes the stock state dict with the mechanism's parameters added, and the variant.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from ..algebra import graft_conam, graft_dia, graft_gate
from ..layers import ASR, ConAM
from ..layers.options import check_affine

State = dict[str, Tensor]
#: (stock state dict with the variant's new parameters added, variant) → state dict of the variant
Graft = Callable[[State, Any], State]


_COUNTER = "num_batches_tracked"


class GraftError(ValueError):
    """A variant cannot be made from these weights."""


def _blocks(model: Any) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, BasicBlock | Bottleneck)}


def _last_norm(path: str, block: Any) -> str:
    norm = "bn3" if isinstance(block, Bottleneck) else "bn2"
    try:
        check_affine("a graft", block.get_submodule(norm))
    except ValueError as error:
        raise GraftError(f"{path}.{norm} cannot be scaled: {error}") from None
    return f"{path}.{norm}"


def nothing_to_scale(state: State, model: Any) -> State:
    """What acts in training only is added and changes nothing."""
    return state


@torch.no_grad()
def asr(state: State, model: Any) -> State:
    """The gate does not depend on the image: the last norm's affine is divided by it."""
    for path, block in _blocks(model).items():
        if isinstance(block.se, ASR):
            state = graft_gate(state, _last_norm(path, block), block.se.gate()[0])
    return state


def dia(state: State, model: Any) -> State:
    """A cell that gives ¼ in every block."""
    for info in model.feature_info[1:]:
        stage = info["module"]
        blocks = {path: b for path, b in _blocks(model).items() if path.startswith(f"{stage}.")}
        norms = [_last_norm(path, block) for path, block in blocks.items()]
        state = graft_dia(state, f"{stage}.0.dia", norms)
    return state


def conam(state: State, model: Any) -> State:
    """Equal confidence in all patches, of which there must be a fixed number.

    Raises:
        GraftError: The patches have a literal size, so their number depends on the image.
    """
    for path, block in _blocks(model).items():
        if isinstance(block.conam, ConAM):
            if block.conam.patch_size is not None:
                raise GraftError(
                    f"ConAM with patch_size={block.conam.patch_size} cannot be grafted: the number of "
                    "patches depends on the image, so no scale undoes their weights. Use grid"
                )
            state = graft_conam(state, f"{path}.conam", f"{path}.conv1", block.conam.grid**2)
    return state


# Parameters that a stock network has too; attention on top of ASR is `se` in a stock network with attention.
_STOCK = re.compile(
    r"(conv1|bn1|maxpool|fc)\..+|layer\d\.\d+\.(conv\d|bn\d|downsample\.\d|se\.attention)\..+"
)


def key_difference(have: Iterable[str], want: Iterable[str]) -> str:
    """What is missing from and unexpected in the keys of a checkpoint, the classifier's aside, or ''."""
    differences = set(want) - set(have), set(have) - set(want)
    missing, unexpected = (sorted(k for k in keys if not k.startswith("fc.")) for keys in differences)
    if not missing and not unexpected:
        return ""
    counts = f"({len(missing)} in all)", f"({len(unexpected)} in all)"
    return f"missing {missing[:5]} {counts[0]}, unexpected {unexpected[:5]} {counts[1]}"


def graft_description(source: str) -> str:
    """What a grafted model's configuration says of it."""
    return f"Grafted from {source}, which was trained without this mechanism; the graft adds it untrained."


def graft_state(state: State, model: Any, graft: Graft | str) -> State:
    """Weights with which ``model`` computes what a stock network computes with ``state``.

    Args:
        state: State dict of the stock network; the classifier may be another one.
        model: The variant; gives shapes, options and initial values of what is new.
        graft: From the variant's row of the table of mechanisms.

    Raises:
        GraftError: The mechanism cannot be grafted, or a key outside the classifier is missing or unexpected.
    """
    if isinstance(graft, str):
        raise GraftError(f"{type(model).__name__} cannot be grafted: {graft}")
    own = model.state_dict()
    if "bn1.weight" not in own:
        raise GraftError(f"{type(model).__name__} has its norms fused: graft without folded=True, then fold")
    state = {re.sub(r"(layer\d\.\d+\.se)\.", r"\1.attention.", key): value for key, value in state.items()}

    # Frozen norms do not count their batches.
    stock = {key for key in own if _STOCK.fullmatch(key) and not key.endswith(_COUNTER)}
    misfit = key_difference([key for key in state if not key.endswith(_COUNTER)], stock)
    if misfit:
        raise GraftError(f"the weights are not those of the stock network: {misfit}")
    new = {key: value.clone() for key, value in own.items() if key not in stock}
    return graft({**new, **state}, model)
