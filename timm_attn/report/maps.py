"""Where a network looks: ConAM's confidence, and class-activation maps before and after folding.

Papers: "ConAM: Confidence Attention Module for Convolutional Neural Networks", Xue et al.
https://arxiv.org/abs/2110.14369; "Learning Deep Features for Discriminative Localization", Zhou et al.
https://arxiv.org/abs/1512.04150
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compare import FoldError
from ..errors import UserError
from ..fold import NothingToFold, fold
from ..layers import ConAM
from ..style import new_figure, short
from .observation import Observation, Sample, round_to


@torch.no_grad()
def activation_maps(model: Any, images: Tensor, classes: Tensor) -> Tensor | None:
    """Class activation maps of one class per image, N × H × W, in the resolution of the last feature map.

    None if the mean of the last feature map does not go into one linear layer: then the mean of a map and the
    bias are not the logit.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        return None
    weight = classifier.weight
    x = model.forward_features(images)
    logits = model.forward_head(x).gather(1, classes[:, None])[:, 0]
    if x.dim() != 4 or weight[0].numel() != weight.shape[1]:
        return None
    if x.shape[1] != weight.shape[1] and x.shape[-1] == weight.shape[1]:
        x = x.movedim(-1, 1)
    if x.shape[1] != weight.shape[1]:  # a head of its own stands between the two
        return None
    maps = torch.einsum("nchw,nc->nhw", x.float(), weight.flatten(1)[classes].float())
    bias = 0.0 if classifier.bias is None else classifier.bias[classes].float()
    off = (maps.mean((1, 2)) + bias - logits.float()).abs().max()
    return maps if off <= 1e-2 * logits.abs().max() else None


@torch.no_grad()
def confidences(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Confidence η of each ConAM module, N × rows × columns."""
    found: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        return lambda module, args, y: found.__setitem__(path, module.confidence(args[0]))

    hooks = [
        module.register_forward_hook(watch(path))
        for path, module in model.named_modules()
        if isinstance(module, ConAM)
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def maps(models: dict[str, Any], sample: Sample, images: int = 5) -> Observation:
    """Maps of what a network weights most, side by side for a few images.

    Args:
        models: One network, by its name.
        sample: Images, of which the first ``images`` are used.
        images: Number of images.

    Raises:
        UserError: There is neither a ConAM module nor a last feature map that goes into one linear layer.
    """
    ((name, model),) = models.items()
    sample = sample.first(images)
    x, _ = next(sample.batches(model, len(sample)))
    with torch.no_grad():
        classes = model(x).argmax(1)
    shown = {f"confidence\n{path}": eta for path, eta in confidences(model, x).items()}
    trained = activation_maps(model, x, classes)
    folded = None
    if trained is not None:
        shown["class activation"] = trained
        try:
            folded = activation_maps(fold(model), x, classes)
        except (NothingToFold, FoldError):
            folded = None
    if folded is not None:
        shown["class activation,\nfolded"] = folded
    if not shown:
        raise UserError(
            f"{name} has no ConAM module, and no last map that goes into one linear layer: there are no maps"
        )
    rows = [
        {
            "model": name,
            "image": i,
            "class": sample.names[int(sample.labels[i])],
            "predicted": sample.names[int(classes[i])],
            "map": what.replace("\n", " "),
            "least": round_to(values[i].min().item()),
            "greatest": round_to(values[i].max().item()),
        }
        for i in range(len(sample))
        for what, values in shown.items()
    ]

    scales = {}
    for what, values in shown.items():
        if what.startswith("confidence"):
            scales[what] = 0.0, max(2 / values[0].numel(), values.max().item())
        else:  # the same before and after folding
            both = torch.cat([v.flatten() for k, v in shown.items() if k.startswith("class")])
            scales[what] = both.min().item(), both.max().item()

    def draw() -> Any:
        pictures = sample.pixels()
        columns = len(shown) + 1
        figure, axes = new_figure(f"Where {name} looks", 1 + 1.45 * len(sample), len(sample), columns)
        for i, line in enumerate(axes):
            title = short(sample.names[int(sample.labels[i])])
            if classes[i] != sample.labels[i].to(classes.device):
                title += f",\ntaken for {short(sample.names[int(classes[i])])}"
            line[0].imshow(pictures[i].squeeze(), cmap="gray")
            line[0].set_title(title, fontsize=8)
            for axis, (what, values) in zip(line[1:], shown.items(), strict=True):
                size = pictures[i].shape[:2]
                mode = "nearest" if what.startswith("confidence") else "bilinear"
                large = F.interpolate(values[i][None, None].float().cpu(), size, mode=mode)[0, 0]
                axis.imshow(pictures[i].mean(2), cmap="gray", vmin=0, vmax=1.3)
                low, high = scales[what]
                overlay = axis.imshow(large, alpha=0.6, vmin=low, vmax=high)
                if i == 0:
                    axis.set_title(what, fontsize=8)
                if i == len(sample) - 1:
                    column = list(axes[:, list(shown).index(what) + 1])
                    bar = figure.colorbar(overlay, ax=column, location="bottom", fraction=0.04, pad=0.02)
                    bar.ax.tick_params(labelsize=7)
                    bar.locator.set_params(nbins=3)
            for axis in line:
                axis.set_axis_off()
        return figure

    summary = []
    for what, values in shown.items():
        if what.startswith("confidence"):
            patches = values[0].numel()
            share = (values.flatten(1).amax(1) * patches).mean().item()
            summary.append(
                (
                    f"{what.replace(chr(10), ' of ')}: largest weight ÷ mean weight, of {patches} patches",
                    f"{share:.2f}",
                    "–",
                )
            )
    if trained is not None and folded is not None:
        greatest = trained.abs().max().clamp_min(torch.finfo(trained.dtype).tiny)
        worst = ((trained - folded).abs().max() / greatest).item()
        summary.append(("class activation: largest change by folding ÷ largest value", f"{worst:.1e}", "0"))
    elif trained is not None:
        summary.append(("class activation after folding", "this network does not fold", "–"))
    return Observation("maps", rows, summary, draw, len(sample))
