"""Reference for the SSIA loss between the stages of a network (arXiv 2206.07434), one image at a time."""

import torch
from torch import Tensor

from .conam import regions


def _normalise(z: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-5) of one vector (C,), with the population standard deviation."""
    centred = z - z.mean()
    return centred / (torch.sqrt((centred * centred).mean()) + 1e-5)


def _channel_loss(source: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over the batch of 1 - cos(n(W l + b), n(t)), l and t the pooled source and target."""
    losses = []
    for a, b in zip(source, target, strict=True):
        pooled = a.mean(dim=(1, 2))
        q = torch.stack([torch.dot(row, pooled) + shift for row, shift in zip(weight, bias, strict=True)])
        q, t = _normalise(q), _normalise(b.mean(dim=(1, 2)).detach())
        losses.append(1 - torch.dot(q, t) / torch.sqrt(torch.dot(q, q) * torch.dot(t, t)))
    return sum(losses[1:], start=losses[0]) / len(losses)


def _spatial_loss(source: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of the unit-length maps of squared activations."""
    _, _, height, width = target.shape
    losses = []
    for a, b in zip(source, target, strict=True):
        energy = (a * a).mean(dim=0)
        pooled = []
        for top, bottom in regions(energy.shape[0], height):
            for left, right in regions(energy.shape[1], width):
                pooled.append(energy[top:bottom, left:right].mean())
        p = torch.stack(pooled)
        t = (b * b).mean(dim=0).detach().flatten()
        difference = p / torch.sqrt((p * p).sum()) - t / torch.sqrt((t * t).sum())
        losses.append((difference * difference).sum())
    return sum(losses[1:], start=losses[0]) / len(losses)


def ssia_loss(features: list[Tensor], params: dict[str, Tensor], target: str) -> Tensor:
    """The loss (arXiv 2206.07434), without its factor lambda: the mean over s = 1..S-1 of L_s, a scalar.

    ``features`` are the outputs X_1..X_S of the stages after their last ReLU, each (B, C_s, H_s, W_s).
    X_s learns from X_{s+1} for the targets "channel" and "spatial" and from X_S for "last"; no gradient
    reaches the side learnt from. ``params`` holds ``heads.{s-1}.{weight,bias}`` (C_{s+1} x C_s, C_{s+1}
    for "channel"; C_S x C_s, C_S for "last"; nothing for "spatial").
    """
    if target not in ("channel", "last", "spatial"):
        raise ValueError(f"unknown target {target!r}")
    losses = []
    for k, source in enumerate(features[:-1]):
        if target == "spatial":
            losses.append(_spatial_loss(source, features[k + 1]))
            continue
        goal = features[k + 1] if target == "channel" else features[-1]
        weight, bias = params[f"heads.{k}.weight"], params[f"heads.{k}.bias"]
        losses.append(_channel_loss(source, goal, weight.to(source.dtype), bias.to(source.dtype)))
    return sum(losses[1:], start=losses[0]) / len(losses)
