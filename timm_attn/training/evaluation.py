"""Accuracy and loss over a whole split."""

import time

import torch
from accelerate import Accelerator
from torch import nn

from .batches import Batches
from .progress import track


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of running sums on a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, accelerator: Accelerator, show: bool = False
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (%), cross-entropy (nats) and images per second over a whole split.

    Every image counts once, however many processes there are. Corrupt images that are skipped do not count;
    their number is returned. With fewer than five classes, top-5 is top-k for all of them. ``show`` shows a
    progress bar.
    """
    model.eval()
    sums = torch.zeros(5, dtype=sum_dtype(accelerator.device), device=accelerator.device)
    started = time.perf_counter()
    for images, labels, skipped in track(batches.evaluate(), batches.evaluation_steps, show):
        if not len(labels):  # all were skipped
            sums[4] += skipped
            continue
        with accelerator.autocast():
            logits = model(images)
        logits = logits.to(sums.dtype)
        ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        n = torch.tensor(len(labels), device=loss.device)
        sums += torch.stack([ranks[:, 0].sum(), ranks.sum(), loss, n, n.new_tensor(skipped)])
    sums = accelerator.reduce(sums)
    assert torch.is_tensor(sums)
    top1, top5, loss, n, skipped = sums.tolist()
    seconds = time.perf_counter() - started
    return {
        "top1": 100 * top1 / n,
        "top5": 100 * top5 / n,
        "loss": loss / n,
        "images": int(n),
        **({"skipped": int(skipped)} if skipped else {}),
        "eval_images_per_second": n / seconds,
    }
