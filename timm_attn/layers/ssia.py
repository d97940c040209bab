"""SSIA: a self-supervised auxiliary loss, in training only, by which each stage guides the one before it.

Paper: "Self-Supervised Implicit Attention: Guided Attention by The Model Itself", Wu, Gong, Zhang
https://arxiv.org/abs/2206.07434. No code is published; this is a re-implementation from the abstract, and
the loss is this package's interpretation of it: the channel means of a stage are what an attention module of
the stage before would have to compute.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .options import check_choice, check_number
from .pooling import channel_mean

TARGETS = ("channel", "last", "spatial")


class _AttachLoss(torch.autograd.Function):
    """Returns the logits; in the backward pass, the loss also gets a gradient, ``scale``."""

    generate_vmap_rule = True  # and a context of its own: both for torch.func

    @staticmethod
    def forward(logits: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return logits.clone()  # a loop may change them in place, which a view would refuse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return grads[0], scale.to(ctx.dtype), None


@torch.fx.wrap  # which would leave the function out of a graph, and the loss with it
def attach_loss(logits: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """``logits``, whose backward pass gives the scalar ``loss`` the gradient ``scale``."""
    return _AttachLoss.apply(logits, loss, scale)  # pyright: ignore[reportReturnType]


def _standardise(z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (z.std(1, correction=0, keepdim=True) + 1e-5)


def _energy(x: Tensor, size: Any) -> Tensor:
    """Mean square over channels, pooled to ``size`` and of unit norm over the pixels."""
    return F.normalize(F.adaptive_avg_pool2d(x.square().mean(1), size).flatten(1), dim=1)


@register_notrace_module
class SSIA(nn.Module):
    """Attaches the auxiliary loss λ · mean_s L_s to the logits, so that any training loop trains it::

        loss = criterion(model(images), labels)    # nothing else is needed
        loss.backward()

    The forward pass returns the logits unchanged; the backward pass adds the gradient of the auxiliary loss.
    With X_s the output of stage s, GAP the mean over pixels (global average pooling) and sg stop-gradient::

        channel   L_s = 1 − cos(n(head_s(GAP X_s)), n(sg GAP X_{s+1}))    n standardises over channels
        last      the same, with sg GAP X_S of the last stage as the target of all stages
        spatial   L_s = ‖a(X_s) − sg a(X_{s+1})‖²    a: energy over channels, unit norm over pixels; no heads

    If a loop multiplies its loss by a factor, the backward pass does not know it. Set the buffer
    ``aux_scale`` to the same factor before the forward pass: 1 / steps for gradient accumulation, the scale
    of the gradient scaler, or their product::

        model.ssia.aux_scale.fill_(scaler.get_scale() / steps)

    Changing it between the forward and the backward pass makes autograd raise RuntimeError (in eager mode).
    After folding or pruning, the model has no SSIA and no ``aux_scale``. The loss is attached in the
    network's ``forward``; ``forward_head(forward_features(x))`` gives the plain logits.

    Args:
        channels: Widths of the stages, from first to last.
        target: One of ``TARGETS``.
        aux_weight: Weight λ of the loss.

    Raises:
        TypeError: ``target`` is not a name, or λ not a number.
        ValueError: There is no such target, λ is negative, or there is only one stage.
    """

    aux_scale: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        target: str = "channel",
        aux_weight: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("SSIA target", target, TARGETS)
        check_number("SSIA aux_weight", aux_weight, "a finite number of 0 or more", zero=True)
        if len(channels) < 2:
            raise ValueError(f"SSIA needs two stages or more, got {len(channels)}")
        self.stages = len(channels)
        self.target = target
        self.aux_weight = aux_weight
        heads: list[nn.Module] = []
        if target != "spatial":
            above = channels[1:] if target == "channel" else [channels[-1]] * (len(channels) - 1)
            # Drawing the heads leaves the random stream as a plain network would.
            with torch.random.fork_rng(devices=[]):
                pairs = zip(channels, above, strict=False)
                heads = [nn.Linear(low, high, device=device, dtype=dtype) for low, high in pairs]
        self.heads = nn.ModuleList(heads)
        self.register_buffer("aux_scale", torch.ones((), device=device, dtype=dtype), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Set the buffer that checkpoints do not contain.

        Needed after building on the meta device and ``to_empty``; timm then calls it.
        """
        self.aux_scale.fill_(1.0)

    def loss(self, features: list[Tensor]) -> Tensor:
        """mean_s L_s, a scalar in float32 or higher, of the stage outputs X_1 … X_S (B × C_s × H_s × W_s)."""
        losses = []
        for s, x in enumerate(features[:-1]):
            dtype = torch.promote_types(x.dtype, torch.float32)
            above = features[-1 if self.target == "last" else s + 1].detach()
            if self.target == "spatial":
                difference = _energy(x.to(dtype), above.shape[2:]) - _energy(above.to(dtype), above.shape[2:])
                losses.append(difference.square().sum(1).mean())
            else:
                head: Any = self.heads[s]
                guess = head(channel_mean(x, dtype).to(head.weight.dtype)).to(dtype)
                wanted = above.mean((2, 3), dtype=dtype)
                losses.append(1 - F.cosine_similarity(_standardise(guess), _standardise(wanted)).mean())
        return torch.stack(losses).mean()

    def forward(self, logits: Tensor, features: list[Tensor]) -> Tensor:
        """``logits``, with λ · loss attached."""
        return attach_loss(logits, self.aux_weight * self.loss(features), self.aux_scale)

    def fuse(self) -> nn.Module:
        """What is left at inference: an identity. timm's ``reparameterize_model`` calls this."""
        return nn.Identity()
