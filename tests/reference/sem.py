"""SEM (arXiv 2209.05680) and SPEM (arXiv 2208.10322) gates, written out from flat state dicts."""

import torch
from torch import Tensor


def sem_gate(state: dict[str, Tensor], f: Tensor) -> Tensor:
    """B × C: three gates whose logits a switch of three numbers scales."""
    batch, channels = f.shape[:2]
    g = f.sum(dim=(2, 3)) / (f.shape[2] * f.shape[3])
    w = 1 / (1 + torch.exp(-(g @ state["switch.weight"].T + state["switch.bias"])))
    hidden = (g @ state["fc1.weight"].T + state["fc1.bias"]).clamp(min=0)
    squeezed = hidden @ state["fc2.weight"].T + state["fc2.bias"]
    kernel = state["conv.weight"].flatten()
    half = len(kernel) // 2
    padded = torch.cat([g.new_zeros(batch, half), g, g.new_zeros(batch, half)], dim=1)
    local = sum(kernel[k] * padded[:, k : k + channels] for k in range(len(kernel)))
    enhanced = state["weight"] * g + state["bias"]
    gate = torch.ones_like(g)
    for j, logit in enumerate((squeezed, local, enhanced)):
        gate = gate / (1 + torch.exp(-w[:, j][:, None] * logit))
    return gate


def spem_gate(state: dict[str, Tensor], f: Tensor) -> Tensor:
    """B × C: from the largest and the smallest value of each channel."""
    flat = f.flatten(2)
    high = flat.max(dim=2).values * state["weight2"] + state["bias2"]
    low = flat.min(dim=2).values * state["weight2"] + state["bias2"]
    p0, p1 = state["p"] ** 2
    z = (p0 * high + p1 * low) / (p0 + p1) * state["weight1"] + state["bias1"]
    return 1 / (1 + torch.exp(-(high + low))) / (1 + torch.exp(-z))
