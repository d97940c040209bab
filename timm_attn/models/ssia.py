"""Networks with SSIA (https://arxiv.org/abs/2206.07434): a loss in training, nothing at inference."""

# What a mixin finds in the network that it is mixed into has no static type.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..layers import SSIA
from .cifar import CifarResNet


class SSIAMixin:
    """In training mode, attaches SSIA's loss to the output of the ResNet that it is mixed into.

    In eval mode the network is the stock backbone.

    Args:
        target: Of :class:`timm_attn.layers.SSIA`.
        aux_weight: λ, the weight of the auxiliary loss.
    """

    def __init__(
        self, *args, target: str = "channel", aux_weight: float = 1.0, device=None, dtype=None, **kwargs
    ) -> None:
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        channels = [info["num_chs"] for info in self.feature_info[1:]]
        self.ssia = SSIA(channels, target, aux_weight, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; what is attached to them acts in the backward pass."""
        if self.training and not torch.jit.is_scripting() and isinstance(self.ssia, SSIA):
            # forward_features would run all stages as one sequence under gradient checkpointing.
            x, features = self.forward_intermediates(x)
            return self.ssia(self.forward_head(x), features[1:])
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        """timm's; what is pruned gives feature maps and has no auxiliary loss."""
        take = super().prune_intermediate_layers(*args, **kwargs)
        self.ssia = nn.Identity()
        return take


class SSIAResNet(SSIAMixin, ResNet):
    """timm's ResNet with SSIA."""


class SSIACifarResNet(SSIAMixin, CifarResNet):
    """The CIFAR ResNet with SSIA."""
