"""Model cards: what a checkpoint is, how to load it, and its results. Everything comes from the index."""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from ..errors import extra, install
from ..models import known_architecture, parse_name, register_name, registering
from ..papers import Paper, paper_of
from ..training.splits import HELD_OUT
from ..weights import Checkpoint
from .datasets import NOTES

TEMPLATE = """---
{metadata}
---

# {name}

{summary} Architecture `{architecture}`{note}.

{origin} [{paper}]({url}) ({authors}; {venue}).{caveat}

## Use

{usage}

## Results

{measured}

Top-1, top-5 and cross-entropy were measured with the files of this repository, in float32, on all
{images:,} images of the {split} split of {dataset}. The weights are those of the last epoch, {epoch}
(seed {seed}).{spread}{data_note}

{picture}

## Comparison

{claim}

## Training

{epochs} epochs on {hardware}, precision {precision}, starting from {start}. All settings are in
`recipe.yaml`. To repeat the run with timm_attn at commit `{git_commit}`:

```
timm-attn train {trained} --recipe recipe.yaml --data DATA --seed {seed}
```

{settings}

## Input

RGB, {height}×{width} pixels, scaled to [0, 1], then normalised with mean {mean} and std {std};
{interpolation} interpolation, `crop_pct` {crop_pct:g}. Classes: {classes}.

## Licence

Weights: {license}. Images of {dataset}: {dataset_license}.

## Citation

```bibtex
{bibtex}
```
"""
RUNTIMES = {"model.onnx": "ONNX runtimes", "model.pt2": "`torch.export.load`"}
SETTINGS = ("opt", "lr", "momentum", "weight_decay", "batch_size", "sched", "warmup_epochs", "smoothing")
#: Fewer runs have no interval: two are alike by chance too often for their deviation to mean anything.
FEWEST = 3
_LICENSES = {
    "unknown": "no stated licence",
    "imagenet": "those of ImageNet, for non-commercial research and education only",
    "other": "the dataset's own terms, see its page",
}


def card(checkpoint: Checkpoint, others: Mapping[str, Checkpoint], owner: str | None = None) -> str:
    """The README.md of a checkpoint's repository.

    Args:
        checkpoint: Its entry in the index.
        others: All entries by name.
        owner: User or organisation on the Hub; by default that of ``repo_id``. Without one, the card says
            how to load the folder.
    """
    metrics, cfg, recipe = checkpoint.metrics, checkpoint.pretrained_cfg, checkpoint.recipe
    dataset, training = checkpoint.dataset, checkpoint.training
    owner = owner or (checkpoint.repo_id or "").partition("/")[0] or None
    paper = paper_of(checkpoint.mechanism)
    options = ", ".join(f"`{option}`" for option in recipe["model_kwargs"])
    options = f" with {options}" if options else ""
    note = f", trained on {dataset['id']}"
    if checkpoint.folded_from:
        note += f"; the folded form of `{checkpoint.folded_from}`{options}, {_form(checkpoint)}"
    elif checkpoint.frozen_from:
        note += f"; `{checkpoint.frozen_from}` with channel gates replaced by constants"
    else:
        note = options + note
    labels = cfg.get("label_names") or []
    text = TEMPLATE.format(
        metadata=_metadata(checkpoint, owner).to_yaml(),
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        summary=paper.summary,
        note=note,
        origin="Re-implementation in timm_attn of" if paper.arxiv else "Code:",
        paper=paper.title,
        url=paper.url,
        authors=paper.authors.replace(" and ", ", "),
        venue=paper.venue,
        caveat="".join(f"\n{caveat}" for caveat in checkpoint.caveats),
        usage=_usage(checkpoint, others, owner),
        measured=_measured(checkpoint, others),
        spread=_spread(checkpoint),
        claim=_claim(checkpoint, others, paper),
        data_note=f"\n\n{NOTES[dataset['id']]}" if dataset["id"] in NOTES else "",
        picture=_picture(checkpoint),
        trained=checkpoint.as_trained(others).name.split(".")[0],
        start=f"`{recipe['init']}`" if recipe.get("init") else "random weights",
        settings=_settings(recipe),
        epochs=recipe["epochs"],
        dataset=dataset["id"],
        split=dataset["split"],
        license=_license(checkpoint).replace("apache", "Apache"),
        dataset_license=_LICENSES.get(dataset["license"], dataset["license"]),
        hardware=training["hardware"],
        precision=training["precision"],
        git_commit=training["git_commit"] or "unknown",
        height=cfg["input_size"][1],
        width=cfg["input_size"][2],
        classes=", ".join(labels[:20]) + (", …" if len(labels) > 20 else ""),
        bibtex=paper.bibtex,
        **{key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")},
        **{key: metrics[key] for key in ("images", "epoch", "seed")},
    )
    return str(ModelCard(text))


def eval_results(checkpoint: Checkpoint) -> dict[str, str]:
    """``.eval_results/*.yaml`` by path, in the Hub's format.

    There are none for datasets that are not on the Hub, and none for held-out images.
    """
    dataset = checkpoint.dataset["id"]
    if "/" not in dataset or checkpoint.dataset["split"].endswith(HELD_OUT):
        return {}
    over = checkpoint.over_seeds
    note = f"{checkpoint.dataset['split']} split, top-1 (%), last epoch, seed {checkpoint.metrics['seed']}"
    note += f", one of n = {over['top1']['n']}" if over else ""
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id="image-classification",
        value=round(checkpoint.metrics["top1"], 4),
        notes=note,
    )
    content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return {f".eval_results/{dataset.split('/')[1]}.yaml": content}


def _form(checkpoint: Checkpoint) -> str:
    """What a folded network is."""
    if checkpoint.model_args.get("folded"):
        return "the same network with batch norms fused into the convolutions and the same output"
    trained = str(checkpoint.folded_from).split(".")[0]
    register_name(trained)
    backbone = parse_name(trained)[0]
    attention = (checkpoint.model_args.get("block_args") or {}).get("attn_layer")
    if attention is None and checkpoint.architecture == backbone:
        return "a plain network with the same output"
    return "a network that keeps only the attention on top, with the same output"


def _metadata(checkpoint: Checkpoint, owner: str | None) -> ModelCardData:
    dataset, split = checkpoint.dataset["id"], checkpoint.dataset["split"]
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
    arxiv = paper_of(checkpoint.mechanism).arxiv
    tags = ["image-classification", "timm", "timm_attn", *([f"arxiv:{arxiv}"] if arxiv else [])]
    if not _own(checkpoint):
        tags.append("transformers")
    base = f"{owner}/{checkpoint.derived_from}" if owner and checkpoint.derived_from else None
    return ModelCardData(
        license=_license(checkpoint),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=tags,
        base_model=base,
        datasets=[dataset] if "/" in dataset else None,
        model_name=checkpoint.name,
        eval_results=results,
    )


def _license(checkpoint: Checkpoint) -> str:
    """That of the weights, which those that start from other weights keep."""
    return checkpoint.pretrained_cfg.get("license") or "apache-2.0"


def _own(checkpoint: Checkpoint) -> bool:
    """Whether this package must be imported to build it."""
    return known_architecture(checkpoint.architecture) or checkpoint.architecture == "frozen"


def _usage(checkpoint: Checkpoint, others: Mapping[str, Checkpoint], owner: str | None) -> str:
    name = f"hf-hub:{owner}/{checkpoint.name}" if owner else "local-dir:PATH_OF_THIS_FOLDER"
    needs_package = _own(checkpoint)
    lines = [f"# {install()}", "import timm", "import timm_attn  # registers the architecture"]
    lines = lines if needs_package else ["import timm"]
    call = registering(checkpoint.architecture)
    lines += ["", *([call] if call else [])]
    lines.append(f'model = timm.create_model("{name}", pretrained=True).eval()')
    blocks = ["```python\n" + "\n".join(lines) + "\n```"]
    if needs_package and checkpoint.name in others:
        blocks.append(
            f'Or by name: `timm.create_model("{checkpoint.name}", pretrained=True)`, if the weights ship '
            "with the package or are in the hub folder `TIMM_ATTN_HUB`. The file is then checked against the "
            "sha256 in the index."
        )
    if not needs_package and owner:
        blocks.append(
            "The model needs no plugin, and loads in transformers, too:\n\n```python\n"
            "from transformers import pipeline\n\n"
            f'classify = pipeline("image-classification", model="{owner}/{checkpoint.name}")\n```'
        )
    if checkpoint.folded:
        blocks.append(f"Folded form, for inference: `{checkpoint.folded}`.")
    blocks += [
        f"`{name}`, for {RUNTIMES[name]}: images in, logits out, any batch size; max|Δlogit| ÷ max|logit| "
        f"against PyTorch is {difference:.1e}."
        for name, difference in checkpoint.runtimes.items()
    ]
    return "\n\n".join(blocks)


def _measured(checkpoint: Checkpoint, others: Mapping[str, Checkpoint]) -> str:
    """A table of this checkpoint's results, its other form's and its baselines'."""
    names = [checkpoint.derived_from, checkpoint.folded, *checkpoint.controls]
    rows = [checkpoint, *(others[name] for name in names if name in others)]
    lines = [
        "| | parameters | top-1 (%) | top-5 (%) | cross-entropy | top-1, mean ± std (n) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = {
            checkpoint.name: "**this model**",
            checkpoint.derived_from: "made from",
            checkpoint.folded: "folded",
        }.get(row.name, "baseline, same recipe")
        metrics = row.metrics
        lines.append(
            f"| {what}, `{row.name}` | {metrics['parameters']:,} | {metrics['top1']:.2f} "
            f"| {metrics['top5']:.2f} | {metrics['loss']:.4f} | {figure(row.over_seeds.get('top1'))} |"
        )
    if checkpoint.folded_from:
        difference = checkpoint.metrics["logit_difference"]
        lines.append(f"\nmax|Δlogit| ÷ max|logit| against the trained network: {difference:.1e}.")
    return "\n".join(lines)


def figure(value: dict[str, Any] | None) -> str:
    """Mean, standard deviation and number of runs."""
    return f"{_mean(value)} ({value['n']})" if value else "–"


def _mean(value: dict[str, Any]) -> str:
    std = "" if value["std"] is None else f" ± {value['std']:.2f}"
    return f"{value['mean']:.2f}{std}"


def _spread(checkpoint: Checkpoint) -> str:
    over = checkpoint.over_seeds
    if not over or over["top1"]["n"] == 1:
        return " This is a single run, so the spread over seeds is unknown."
    *most, last = map(str, over["seeds"])
    which = "median" if over["top1"]["n"] % 2 else "lower" if len(most) == 1 else "lower median"
    values = [f"{value:.2f}" for value in over["top1"].get("values", ())]
    each = f" (top-1: {', '.join(values[:-1])} and {values[-1]} %)" if values else ""
    return (
        f"\nMean and sample standard deviation are over seeds {', '.join(most)} and {last}{each}; "
        f"this is the run with the {which} top-1."
    )


def _picture(checkpoint: Checkpoint) -> str:
    if checkpoint.frozen_from:
        return "![accuracy lost against time as gates are frozen one by one](freeze.png)"
    curves = "![loss, accuracy and learning rate by epoch](curves.png)"
    images, split = checkpoint.dataset["images"], checkpoint.dataset["split"]
    held_out = next((name for name in images if name.endswith(HELD_OUT)), None)
    if held_out in (None, split):
        return curves
    return (
        f"{curves}\n\nThe curves of the evaluation are of {images[held_out]:,} images held out of training, "
        f"not of the {split} split."
    )


def _claim(checkpoint: Checkpoint, others: Mapping[str, Checkpoint], paper: Paper) -> str:
    if checkpoint.frozen_from:
        return _frozen(checkpoint)
    lines = [f"The paper reports: {paper.claim}"] if paper.claim else []
    if checkpoint.is_control:
        lines = ["This network is a baseline; we make no claim about it."]
    measured = checkpoint.over_seeds.get("top1") or {}
    found = {name: others[name].over_seeds.get("top1") for name in checkpoint.controls if name in others}
    controls = {name: control for name, control in found.items() if control and measured}
    for name, control in controls.items():
        lines.append(
            f"Here, with the same recipe: {_mean(measured)} % (n = {measured['n']}) against "
            f"{_mean(control)} % (n = {control['n']}) for `{name}`. "
            f"{judge(measured, control, _comparisons(name, checkpoint, others))}"
        )
    if len(lines) < 2 and not checkpoint.controls and not checkpoint.is_control:
        lines.append("No baseline was trained with the same recipe, so the claim is not tested here.")
    return "\n\n".join(lines)


def _comparisons(control: str, checkpoint: Checkpoint, others: Mapping[str, Checkpoint]) -> int:
    """How many trained networks have enough runs to be compared with a control."""
    trained = {c.name: c for c in (c.as_trained(others) for c in (checkpoint, *others.values()))}
    compared = (c.over_seeds.get("top1") for c in trained.values() if control in c.controls)
    return sum(bool(top1) and top1["n"] >= FEWEST for top1 in compared)


def _frozen(checkpoint: Checkpoint) -> str:
    """How many gates are frozen, and what that changed on images not used to choose them."""
    frozen = checkpoint.frozen
    before, after = frozen["before"], frozen["after"]
    budget = frozen["budget"]
    within = "whatever the loss" if budget is None else f"within a budget of {budget:g} points"
    recovery = f", after {frozen['steps']} steps of distillation from the original" if frozen["steps"] else ""
    rows = [
        ("top-1 (%)", f"{before['top1']:.2f}", f"{after['top1']:.2f}"),
        ("agreement with the original (%)", "100", f"{after['agreement']:.2f}"),
        ("KL divergence from the original (nats)", "0", f"{after['kl']:.4f}"),
        (
            f"time (ms), batch of {frozen['batch_size']}",
            f"{before['milliseconds']:.1f}",
            f"{after['milliseconds']:.1f}",
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [("", "original", "frozen"), ("---",) * 3, *rows])
    return (
        f"{frozen['frozen']} of {frozen['gates']} channel gates are frozen to their means over images of the "
        f"{frozen['means']} split, {within}{recovery}. Measured on {frozen['images']:,} images of the "
        f"{frozen['split']} split that were not used to choose the gates, and timed in turn on "
        f"{frozen['hardware']}; `freeze.json` has the figures of every gate.\n\n{table}"
    )


def half_width(a: dict[str, Any], b: dict[str, Any], comparisons: int = 1) -> float:
    """Half the width of the 95 % interval of the difference of two means over seeds, in the same unit.

    Student's t, with a common standard deviation. Runs are not paired by seed: those of one seed may be from
    different machines, which changes as much as another seed does. Of several comparisons, all intervals hold
    at once with 95 % (Bonferroni).
    """
    with extra("train"):
        from scipy.stats import t
    freedom = a["n"] + b["n"] - 2
    variance = ((a["n"] - 1) * a["std"] ** 2 + (b["n"] - 1) * b["std"] ** 2) / freedom
    return float(t.ppf(1 - 0.025 / comparisons, freedom)) * (variance * (1 / a["n"] + 1 / b["n"])) ** 0.5


def judge(a: dict[str, Any], b: dict[str, Any], comparisons: int = 1) -> str:
    """What can be said of the difference of two means over seeds, as a sentence.

    With fewer than three runs, the standard deviation is too uncertain for an interval.
    """
    difference = a["mean"] - b["mean"]
    said = f"The difference of {difference:+.2f} points"
    if min(a["n"], b["n"]) < FEWEST:
        return f"{said} may be noise, with so few runs."
    half = half_width(a, b, comparisons)
    verdict = "is distinguishable from 0" if abs(difference) > half else "is not distinguishable from 0"
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    return (
        f"{said} (95 % interval{corrected}: {difference - half:+.2f} to {difference + half:+.2f}) {verdict}."
    )


def _settings(recipe: Mapping[str, Any]) -> str:
    names = [key for key in SETTINGS if key in recipe]
    rows = [names, ["---"] * len(names), [str(recipe[key]) for key in names]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
