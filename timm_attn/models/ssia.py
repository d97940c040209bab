"""Networks with SSIA (https://arxiv.org/abs/2206.07434): a loss in training, nothing at inference."""

# What a mixin finds in the network that it is mixed into has no static type.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import torch
from timm.layers import PatchDropout
from timm.layers.patch_dropout import PatchDropoutWithIndices
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..branches import evaluating, first_parameter, taking
from ..compare import BOUNDS, double, relative
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
            TypeError: In training, another argument than the images is not given by its name; or instead of
                images, a dictionary of patches, which form no maps.
        """
        if not isinstance(args, tuple):  # a tracer's stand-in for what nobody gives
            args, kwargs = (), {}
        if self.training and isinstance(self.ssia, SSIA):
            if args:
                raise TypeError("with SSIA, give what is beside the images by name: model(x, name=value)")
            if isinstance(x, dict):
                raise TypeError(
                    "SSIA compares maps: train on images, B × C × H × W, not on a dict of patches"
                )
            logits, features = self.logits_and_features(x, **kwargs)
            features = features[-self.ssia.stages :]  # pyright: ignore[reportOperatorIssue]
            if isinstance(logits, tuple):  # of distilled networks
                return self.ssia(logits[0], features), *logits[1:]
            return self.ssia(logits, features)
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportCallIssue]

    def logits_and_features(self, x: Tensor, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """What the network gives in training, and the maps on the way."""
        x, features = self.forward_intermediates(x, **kwargs)
        return self.forward_head(x), features

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """timm's; what is pruned gives feature maps and has no auxiliary loss."""
        take = super().prune_intermediate_layers(*args, **kwargs)
        self.ssia = nn.Identity()
        return take


@torch.no_grad()
def check_forward(model: Any, images: Tensor) -> None:
    """Compare what a network with SSIA gives in training with what it gave without.

    Raises:
        ValueError: Its ``forward`` does more than its parts.
    """
    outputs, devices = [], [images.device] if images.device.type == "cuda" else []
    with taking(model, images), evaluating(model), torch.random.fork_rng(devices):
        model.training = True  # its modules stay as they are
        for call in (super(SSIANetwork, model).forward, lambda x: model.logits_and_features(x)[0]):
            torch.manual_seed(0)
            outputs.append([double(y) for y in tree_leaves(call(images)) if torch.is_tensor(y)])
    shapes = [[y.shape for y in ys] for ys in outputs]
    name = type(model).__mro__[2].__name__
    if shapes[0] != shapes[1] or not max(map(relative, *outputs)) <= BOUNDS[images.dtype]:
        raise ValueError(
            f"ssia cannot be used with {name}: in training its forward gives something else than "
            "forward_head(forward_intermediates(images)): choose asr, dia or se"
        )


def _is_stem(model: nn.Module, name: str) -> bool:
    """Whether a feature map is a stem's: the module is called so, or is a layer outside of blocks."""
    module = dict(model.named_modules()).get(name)
    inside = [] if module is None else [m for m in module.modules() if m is not module]
    is_layer = module is not None and not any(isinstance(m, nn.Conv2d | nn.Linear) for m in inside)
    return "stem" in name or (is_layer and "block" not in name)


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
    drops = [m.prob for m in model.modules() if isinstance(m, PatchDropout | PatchDropoutWithIndices)]
    drops = [rate for rate in (*drops, getattr(model, "patch_drop_rate", 0)) if rate]  # the last of Hiera
    if drops:
        raise ValueError(f"ssia needs the maps of all patches: patch_drop_rate=0, not {drops[0]}")
    if _is_stem(model, info[0]["module"]):
        info = info[1:]
    parameter = first_parameter(model)
    widths = [stage["num_chs"] for stage in info]
    ssia = SSIA(widths, target, aux_weight, device=parameter.device, dtype=parameter.dtype)
    model.__class__ = mixed(SSIANetwork, type(model))
    model.ssia = ssia
