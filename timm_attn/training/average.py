"""The moving average of a network's weights."""

from collections.abc import Collection

from timm.utils import ModelEmaV3
from torch import nn


class Average(ModelEmaV3):
    """timm's ModelEmaV3, for networks whose layers may be in several places.

    timm goes through the state dict, which names their tensors once for each place, and would average them
    as often.

    Args:
        network: The network, which is copied.
        decay: Of the average.
        use_warmup: As timm's.
        copied: Names of what cannot be averaged, as infinite bounds: an average of two infinities is NaN.
    """

    def __init__(self, network: nn.Module, decay: float, use_warmup: bool, copied: Collection[str]) -> None:
        super().__init__(network, decay, use_warmup=use_warmup)
        state = self.module.state_dict()
        self._copied = [key for key, t in state.items() if key in copied or not t.is_floating_point()]
        averaged = {t.data_ptr(): key for key, t in state.items() if key not in self._copied}
        self._averaged = list(averaged.values())

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Called by ``update``."""
        average, now = self.module.state_dict(), model.state_dict()
        mine, theirs = ([state[key] for key in self._averaged] for state in (average, now))
        self._foreach_lerp_(mine, theirs, weight=1.0 - decay)
        for key in self._copied:
            average[key].copy_(now[key])
