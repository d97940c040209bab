"""How smooth a network is near real images.

Paper: "Towards Understanding the Effectiveness of Attention Mechanism", Ye et al.
https://arxiv.org/abs/2106.15067
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..style import new_figure
from .observation import Observation, Sample, round_to

#: Standard deviations of the noise, in pixels from 0 to 1.
NOISE = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)
#: Number of points on the line from one image to another.
STEPS = 11


@torch.enable_grad()
def gradient_norms(model: nn.Module, sample: Sample) -> Tensor:
    """‖∂p(y) / ∂x‖ of each image, N: gradient of the probability of its class by pixels from 0 to 1."""
    norms = []
    for x, y in sample.batches(model):
        x.requires_grad_()
        p = model(x).softmax(1).gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(p, x)
        std = torch.tensor(sample.std, device=x.device).view(1, -1, 1, 1)
        norms.append((gradient / std).flatten(1).norm(dim=1).cpu())
    return torch.cat(norms)


@torch.no_grad()
def path_variation(model: nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
    """Σ‖p(k+1) − p(k)‖₁ on the line from each image to the next, and number of class changes; each N − 1."""
    other = Sample(sample.images[1:], sample.labels[1:], sample.names, sample.mean, sample.std)
    first = sample.first(len(sample) - 1)
    variation, changes = [], []
    for (a, _), (b, _) in zip(first.batches(model), other.batches(model), strict=True):
        before, total, changed = None, torch.zeros(len(a)), torch.zeros(len(a))
        for t in torch.linspace(0, 1, STEPS):
            p = model(torch.lerp(a, b, t.to(a))).softmax(1).float().cpu()
            if before is not None:
                total += (p - before).abs().sum(1)
                changed += p.argmax(1) != before.argmax(1)
            before = p
        variation.append(total)
        changes.append(changed)
    return torch.cat(variation), torch.cat(changes)


@torch.no_grad()
def accuracy_under_noise(model: nn.Module, sample: Sample) -> list[float]:
    """Top-1 in % for each of ``NOISE``; every network gets the same noise."""
    right = torch.zeros(len(NOISE))
    generator = torch.Generator().manual_seed(0)
    std = torch.tensor(sample.std).view(1, -1, 1, 1)
    for x, y in sample.batches(model):
        noise = (torch.randn(x.shape, generator=generator) / std).to(x)
        for i, scale in enumerate(NOISE):
            right[i] += (model(x + scale * noise).argmax(1) == y).sum().item()
    return (100 * right / len(sample)).tolist()


def _error(values: Tensor) -> float:
    """Standard error of a mean."""
    return (values.std() / len(values) ** 0.5).item()


def landscape(models: dict[str, Any], sample: Sample) -> Observation:
    """Gradients at images, variation between them, and accuracy under noise.

    Args:
        models: Networks by name, to be compared.
        sample: Images, 2 or more.
    """
    norms = {name: gradient_norms(model, sample) for name, model in models.items()}
    paths = {name: path_variation(model, sample) for name, model in models.items()}
    noisy = {name: accuracy_under_noise(model, sample) for name, model in models.items()}
    rows = [
        {
            "model": name,
            "images": len(sample),
            "gradient_norm": round_to(norms[name].mean().item()),
            "gradient_norm_error": round_to(_error(norms[name])),
            "gradient_norm_median": round_to(norms[name].quantile(0.5).item()),
            "path_variation": round_to(paths[name][0].mean().item()),
            "class_changes": round_to(paths[name][1].mean().item()),
            **{f"top1_noise_{scale:g}": round_to(v) for scale, v in zip(NOISE, noisy[name], strict=True)},
        }
        for name in models
    ]

    def draw() -> Any:
        figure, axes = new_figure(f"Landscape near {len(sample):,} images", 3.2, 1, 3)
        for name in models:
            for axis, values in ((axes[0, 0], norms[name].log10()), (axes[0, 1], paths[name][0])):
                ordered = values.sort().values
                share = torch.arange(1, len(ordered) + 1) / len(ordered)
                axis.plot(ordered, share, label=name)
            axes[0, 2].plot(NOISE, noisy[name], marker="o", markersize=3, label=name)
        axes[0, 0].set(xlabel="log₁₀ ‖∂p(class) / ∂pixels‖", ylabel="share of images below")
        axes[0, 1].set(xlabel="variation of p from image to image", ylabel="share of pairs below")
        axes[0, 2].set(xlabel="std of the noise (pixels 0 to 1)", ylabel="top-1 (%)")
        axes[0, 2].legend(fontsize=8)
        return figure

    at = NOISE.index(0.1)
    claim = "smoother with products than with sums (no readable figure)"
    summary = []
    for name in models:
        variation, changes = (t.mean().item() for t in paths[name])
        clean, noise = noisy[name][0], noisy[name][at]
        summary += [
            (f"{name}: mean ‖∂p/∂x‖", f"{norms[name].mean():.2f} ± {_error(norms[name]):.2f}", claim),
            (f"{name}: variation of p between two images", f"{variation:.2f}", claim),
            (f"{name}: class changes between two images", f"{changes:.2f}", "–"),
            (f"{name}: top-1 without noise, and with noise of std 0.1", f"{clean:.1f} %, {noise:.1f} %", "–"),
        ]
    return Observation("landscape", rows, summary, draw, len(sample))
