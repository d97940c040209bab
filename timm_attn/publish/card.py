"""Model cards: what a checkpoint is, how to load it, and what was measured."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models import MECHANISMS, model_names, parse_name
from ..papers import TIMM, Paper
from ..weights import Checkpoint

TEMPLATE = """---
{metadata}
---

# {name}

{summary} Architecture `{architecture}`{note}.

{origin} [{paper}]({url}) ({authors}; {venue}).{caveat}

## Use

```python
{usage}
```

From this folder: `timm.create_model("local-dir:PATH", pretrained=True)`.{runtimes}

## Measured

| | |
|---|---|
| top-1 | {top1:.2f} % |
| top-5 | {top5:.2f} % |
| cross-entropy | {loss:.4f} |
| images | {images:,} ({split} split of {dataset}, all of it) |
| runs | n = 1 (seed {seed}), epoch {epoch}, the last one |
| parameters | {parameters:,} |
| max abs logit difference / max abs logit against the trained network | {logit_difference:.1e} |

Measured in float32 on the files of this repository. One run says nothing about the spread over seeds.

![loss, accuracy and learning rate by epoch](curves.png)

## Training

{epochs} epochs on {hardware}, precision {precision}, from random weights. All settings are in `recipe.yaml`:

```
timm-attn train {trained} --recipe recipe.yaml --data DATA
```

{settings}

## Input

RGB, {height}×{width} pixels, scaled to [0, 1], mean {mean}, std {std}, {interpolation} interpolation, crop
{crop_pct:g}. Classes: {classes}.

The weights are under Apache-2.0; the images they were trained on have terms of their own.

## Citation

```bibtex
{bibtex}
```
"""
RUNTIMES = {"model.onnx": "ONNX runtimes", "model.pt2": "`torch.export.load`"}
SETTINGS = ("opt", "lr", "momentum", "weight_decay", "batch_size", "sched", "warmup_epochs", "smoothing")


def card(checkpoint: Checkpoint, recipe: dict[str, Any]) -> str:
    """The README.md of a checkpoint's repository.

    Args:
        checkpoint: Its description; all figures come from there.
        recipe: The resolved recipe it was trained with.
    """
    metrics, details, cfg = checkpoint.metrics, checkpoint.details, checkpoint.pretrained_cfg
    paper = _paper(checkpoint)
    split = list(details["images"])[-1]  # the one that was evaluated
    fields = [
        "| " + " | ".join(row) + " |" for row in zip(*((k, str(recipe[k])) for k in SETTINGS), strict=True)
    ]
    fields.insert(1, "|---" * len(SETTINGS) + "|")
    options = ", ".join(f"`{option}`" for option in recipe["model_kwargs"])
    options = f" with {options}" if options else ""
    note = f", trained on {details['dataset']}"
    if checkpoint.folded_from:
        note += f"; the folded form of `{checkpoint.folded_from}`{options}, {_form(checkpoint)}"
    else:
        note = options + note
    text = TEMPLATE.format(
        metadata=_metadata(checkpoint, split).to_yaml(),
        name=checkpoint.name,
        summary=paper.summary,
        architecture=checkpoint.architecture,
        dataset=details["dataset"],
        note=note,
        origin="Re-implementation in timm_attn of" if paper.arxiv else "Code:",
        paper=paper.title,
        url=paper.url,
        authors=paper.authors.replace(" and ", ", "),
        venue=paper.venue,
        caveat=f"\n{paper.caveat}" if paper.caveat else "",
        usage=_usage(checkpoint),
        runtimes=_runtimes(checkpoint),
        split=split,
        trained=(checkpoint.folded_from or checkpoint.name).split(".")[0],
        settings="\n".join(fields),
        height=cfg["input_size"][1],
        width=cfg["input_size"][2],
        classes=", ".join(cfg["label_names"][:20]) + (", …" if len(cfg["label_names"]) > 20 else ""),
        bibtex=paper.bibtex,
        **{key: details[key] for key in ("seed", "epochs", "precision")},
        hardware=details["hardware"]
        if isinstance(details["hardware"], str)
        else ", ".join(details["hardware"]),
        **{key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")},
        **{
            k: metrics[k]
            for k in ("top1", "top5", "loss", "images", "epoch", "parameters", "logit_difference")
        },
    )
    return str(ModelCard(text))


def _form(checkpoint: Checkpoint) -> str:
    """What a folded network is."""
    if checkpoint.model_args.get("folded"):
        return "the same network with batch norms fused into the convolutions, with the same output"
    backbone = parse_name(str(checkpoint.folded_from).split(".")[0])[0]
    attention = (checkpoint.model_args.get("block_args") or {}).get("attn_layer")
    if attention is None and checkpoint.architecture == backbone:
        return "a plain network with the same output"
    return "a network with only the attention that stood on top, with the same output"


def _paper(checkpoint: Checkpoint) -> Paper:
    mechanism = MECHANISMS.get(checkpoint.details["mechanism"])
    return mechanism.paper if mechanism else TIMM


def _metadata(checkpoint: Checkpoint, split: str) -> ModelCardData:
    dataset = checkpoint.details["dataset"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(checkpoint.metrics[key], 4),
        )
        for name, key in (("Top-1 accuracy (%)", "top1"), ("Top-5 accuracy (%)", "top5"))
    ]
    arxiv = _paper(checkpoint).arxiv
    return ModelCardData(
        license="apache-2.0",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm_attn", *([f"arxiv:{arxiv}"] if arxiv else [])],
        datasets=[dataset] if "/" in dataset else None,
        model_name=checkpoint.name,
        eval_results=results,
    )


def _runtimes(checkpoint: Checkpoint) -> str:
    lines = [
        f"\n`{name}`, for {RUNTIMES[name]}: images in, logits out, any batch size; max abs logit difference "
        f"/ max abs logit against PyTorch {difference:.1e}."
        for name, difference in checkpoint.details.get("runtimes", {}).items()
    ]
    return "".join(f"\n{line}" for line in lines)


def _usage(checkpoint: Checkpoint) -> str:
    lines = ["import timm"]
    if checkpoint.architecture in model_names():
        lines = ["# pip install timm-attn", "import timm", "import timm_attn  # registers the architecture"]
    lines += ["", f'model = timm.create_model("hf-hub:{{ORG}}/{checkpoint.name}", pretrained=True).eval()']
    return "\n".join(lines)
