"""Feature maps of the networks for which timm has a class of their own, as of EfficientNets."""

# What a mixin finds in the network that it is mixed into has no static type.
# pyright: reportAttributeAccessIssue=false

from typing import Any

from timm.models._features import _get_feature_info
from torch import Tensor

from ..ends import mixed, without_mixin
from .ssia import SSIANetwork


class FeatureMaps:
    """Mixed into a network: it gives feature maps, and has the keys that it had."""

    out_indices: list[int]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images B × C × H × W to one map for each of ``out_indices``."""
        return self.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)


def feature_maps(model: Any, out_indices: Any, **_: Any) -> Any:
    """A network without its head, which gives feature maps. Blocks stay, as in timm's classes."""
    model.prune_intermediate_layers(1, prune_norm=True)
    if isinstance(model, SSIANetwork):  # whose loss acts on logits
        del model.ssia
        without_mixin(model)
    model.feature_info = _get_feature_info(model, out_indices)
    model.out_indices = list(model.feature_info.out_indices)
    model.__class__ = mixed(FeatureMaps, type(model))
    return model
