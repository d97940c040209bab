"""What is rendered from the index: cards, ``.eval_results``, results.csv and the README's table."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import UserError
from ..files import replace_file
from ..weights import CONFIG, Checkpoint, read_config, read_index
from .card import card, eval_results, figure

README = "README.md"
RESULTS = "results.csv"


def rendered(
    checkpoint: Checkpoint, checkpoints: Iterable[Checkpoint], owner: str | None = None
) -> dict[str, str]:
    """Content by path of a checkpoint's rendered files."""
    others = {c.name: c for c in checkpoints}
    return {README: card(checkpoint, others, owner), **eval_results(checkpoint)}


def render(
    hub: Path,
    documents: Iterable[Path] = (),
    write: bool = True,
    tables: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write what is rendered from the index of a hub folder, where it differs.

    Args:
        hub: The hub folder.
        documents: Files with places for tables, that of results and others.
        write: Write; otherwise only look.
        tables: The other tables, by name.

    Returns:
        The files that differed.

    Raises:
        UserError: No document has a place for a table, or several have; a configuration differs from the
            index.
        WeightsError: The index cannot be read.
    """
    checkpoints = read_index(hub)
    for checkpoint in checkpoints:
        fields = ("metrics", "over_seeds", "recipe", "dataset", "training", "pretrained_cfg")
        missing = [field for field in fields if not getattr(checkpoint, field)]
        if missing:
            raise UserError(f"the index says no {', '.join(missing)} of {checkpoint.name}: export it again")
    wanted = {
        checkpoint.folder / path: text
        for checkpoint in checkpoints
        for path, text in rendered(checkpoint, checkpoints).items()
    }
    wanted[hub / RESULTS] = results_csv(checkpoints)
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    for name, table in {"results": results_table(checkpoints), **(tables or {})}.items() if texts else ():
        begin, end = f"<!-- {name}: rendered by scripts/render_hub.py -->", f"<!-- end of {name} -->"
        places = [path for path, text in texts.items() if begin in text and end in text]
        if len(places) != 1 or texts[places[0]].count(begin) != 1 or texts[places[0]].count(end) != 1:
            where = ", ".join(map(str, places or texts))
            raise UserError(
                f"{where} must have one place for the {name}: put {begin} and {end} around it, once"
            )
        before, rest = texts[places[0]].split(begin)
        texts[places[0]] = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    wanted |= texts
    for checkpoint in checkpoints:
        check_config(checkpoint)
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in changed if write else []:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, wanted[path].encode())
    return changed


def check_config(checkpoint: Checkpoint) -> None:
    """Raise a UserError if a checkpoint's config.json says other things than the index."""
    if not (checkpoint.folder / CONFIG).is_file():
        return
    config = read_config(checkpoint.folder / CONFIG)
    cfg = {**config["pretrained_cfg"], "num_classes": config["num_classes"]}
    if config.get("label_names"):
        cfg["label_names"] = config["label_names"]
    described = (config["architecture"], cfg, config.get("model_args", {}))
    if described != (checkpoint.architecture, checkpoint.pretrained_cfg, checkpoint.model_args):
        raise UserError(f"{checkpoint.folder / CONFIG} differs from the index: export the run again")


def results_csv(checkpoints: Iterable[Checkpoint]) -> str:
    """Results with the column names of timm's, and mean, standard deviation and number of runs."""
    stream = io.StringIO()
    columns = ["model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct"]
    columns += ["interpolation", "top1_mean", "top1_std", "n", "epoch", "seed", "dataset", "folded_from"]
    columns += ["frozen_from"]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for checkpoint in checkpoints:
        metrics, cfg = checkpoint.metrics, checkpoint.pretrained_cfg
        over = checkpoint.over_seeds["top1"]
        writer.writerow(
            {
                "model": checkpoint.name,
                "img_size": cfg["input_size"][-1],
                "top1": f"{metrics['top1']:.3f}",
                "top1_err": f"{100 - metrics['top1']:.3f}",
                "top5": f"{metrics['top5']:.3f}",
                "top5_err": f"{100 - metrics['top5']:.3f}",
                "param_count": f"{metrics['parameters'] / 1e6:.6f}",
                "crop_pct": cfg["crop_pct"],
                "interpolation": cfg["interpolation"],
                "top1_mean": f"{over['mean']:.3f}",
                "top1_std": "" if over["std"] is None else f"{over['std']:.3f}",
                "n": over["n"],
                "epoch": metrics["epoch"],
                "seed": metrics["seed"],
                "dataset": checkpoint.dataset["id"],
                "folded_from": checkpoint.folded_from or "",
                "frozen_from": checkpoint.frozen_from or "",
            }
        )
    return stream.getvalue()


def results_table(checkpoints: Iterable[Checkpoint]) -> str:
    """The table of results for a README: a line for every trained network, with its folded form."""
    by_name = {c.name: c for c in checkpoints}
    columns = ["weights", "parameters", "top-1 (%)", "mean ± std (n)", "trained on, or made from"]
    columns += ["folded form", "parameters", "top-1 (%)"]
    rows = [columns, ["---"] * len(columns)]
    for name in sorted(by_name, key=lambda name: name.split(".")):
        checkpoint = by_name[name]
        if checkpoint.folded_from in by_name:
            continue
        source = f"{checkpoint.dataset['id']}, {checkpoint.recipe['epochs']} epochs"
        if checkpoint.folded_from:
            source = f"`{checkpoint.folded_from}`, folded"
        elif checkpoint.frozen_from:
            frozen = checkpoint.frozen
            source = f"`{checkpoint.frozen_from}`, {frozen['frozen']} of {frozen['gates']} gates constant"
        folded = by_name.get(checkpoint.folded or "")
        rows.append(
            [
                *_measured(checkpoint),
                figure(checkpoint.over_seeds["top1"]),
                source,
                *(_measured(folded) if folded else [""] * 3),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _measured(checkpoint: Checkpoint) -> list[str]:
    metrics = checkpoint.metrics
    return [f"`{checkpoint.name}`", f"{metrics['parameters']:,}", f"{metrics['top1']:.2f}"]
