"""Networks with SSIA (https://arxiv.org/abs/2206.07434): a loss in training, nothing at inference."""

# What a mixin finds in the network that it is mixed into has no static type.
# pyright: reportAttributeAccessIssue=false

from typing import Any

from timm.layers import PatchDropout
from timm.layers.patch_dropout import PatchDropoutWithIndices
from torch import Tensor, nn

from ..ends import mixed
from ..layers import SSIA


class SSIANetwork:
    """In training mode, attaches SSIA's loss to the output of the network that it is mixed into.

    In eval mode the network is the stock one.
    """

    ssia: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits; what is attached to them, or to the first of several, acts in the backward pass.

        Raises:
            TypeError: In training, another argument than the images is not given by its name.
        """
        if not isinstance(args, tuple):  # a tracer's stand-in for what nobody gives
            args, kwargs = (), {}
        if self.training and isinstance(self.ssia, SSIA):
            if args:
                raise TypeError("with SSIA, give what is beside the images by name: model(x, name=value)")
            x, features = self.forward_intermediates(x, **kwargs)  # pyright: ignore[reportCallIssue]
            stages: Any = self.ssia.stages
            logits = self.forward_head(x)
            if isinstance(logits, tuple):  # of distilled networks
                return self.ssia(logits[0], features[-stages:]), *logits[1:]
            return self.ssia(logits, features[-stages:])
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportCallIssue]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """timm's; what is pruned gives feature maps and has no auxiliary loss."""
        take = super().prune_intermediate_layers(*args, **kwargs)
        self.ssia = nn.Identity()
        return take


def put_ssia(model: Any, target: str, aux_weight: float) -> None:
    """Give a network SSIA's loss between the feature maps that its ``feature_info`` names, stems aside.

    Raises:
        ValueError: It is no network of timm that gives feature maps and takes them to logits, or it drops
            patches.
    """
    info = list(getattr(model, "feature_info", None) or [])
    if not info or not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head"):
        raise ValueError(
            f"ssia needs a network of timm with feature_info, forward_intermediates and forward_head, and "
            f"{type(model).__name__} lacks one: choose asr, dia or se"
        )
    if getattr(model, "aux_logits", False):
        raise ValueError(
            f"ssia does not go with the auxiliary head of {type(model).__name__}: aux_logits=False"
        )
    drops = [
        m.prob for m in model.modules() if isinstance(m, PatchDropout | PatchDropoutWithIndices) and m.prob
    ]
    if drops:
        raise ValueError(f"ssia needs the maps of all patches: patch_drop_rate=0, not {drops[0]}")
    modules = dict(model.named_modules())
    first = modules.get(info[0]["module"])
    if first is not None and not list(first.parameters()):  # the activation that ends a stem
        info = info[1:]
    parameter = next(model.parameters())
    widths = [stage["num_chs"] for stage in info]
    ssia = SSIA(widths, target, aux_weight, device=parameter.device, dtype=parameter.dtype)
    model.__class__ = mixed(SSIANetwork, type(model))
    model.ssia = ssia
