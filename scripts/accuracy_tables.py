"""The tables of accuracy in README and docs, from the committed files of results."""

import statistics

from compare_seeds import family, top1_by_seed
from paired import FEWEST, difference
from table_parts import RESULTS, ROOT, markdown, ratio, read

from timm_attn.files import read_csv
from timm_attn.publish.card import figure, half_width
from timm_attn.training.run import read_metrics
from timm_attn.weights import read_index

PLAIN = "resnet20"
FROM_PLAIN = "difference from plain, paired by seed (95 % interval)"


def short_results() -> str:
    """Accuracy, parameters and time of each shipped network of the zoo."""
    zoo = read("zoo.json")
    shipped = {c.name: c for c in read_index(ROOT / "hub")}
    trained = [c for c in shipped.values() if not c.derived_from and c.name in zoo["checkpoints"]]
    rows = []
    for c in sorted(trained, key=lambda c: (c.mechanism != "resnet", c.architecture)):
        times = zoo["checkpoints"]
        folded = times[c.folded] if c.folded else zoo["resnet20, norms fused"]
        medians = [f"{float(t['ratio_median']):.2f}" for t in (times[c.name], folded)]
        parameters = f"{c.metrics['parameters']:,}"
        rows.append([f"`{c.architecture}`", parameters, figure(c.over_seeds["top1"]), *medians])
    return markdown(["model", "parameters", "top-1 (%), mean ± std (n)", "time", "time, fused"], rows)


def comparison() -> str:
    """Each shipped network of the zoo against the plain one: accuracy, and time trained and folded."""
    zoo = read("zoo.json")
    shipped = {c.name: c for c in read_index(ROOT / "hub")}
    trained = [c for c in shipped.values() if not c.derived_from and c.name in zoo["checkpoints"]]
    plain = next(c for c in trained if c.mechanism == "resnet").over_seeds["top1"]
    rows = []
    for c in sorted(trained, key=lambda c: (c.mechanism != "resnet", c.architecture)):
        top1, times = c.over_seeds["top1"], zoo["checkpoints"]
        apart, half = top1["mean"] - plain["mean"], half_width(top1, plain)
        folded = shipped[c.folded] if c.folded else None
        seed = c.over_seeds["seeds"][0]
        again = RESULTS / "zoo" / c.architecture / f"xeon-seed-{seed}"
        first = read_metrics(again.with_name(f"seed-{seed}"))[-1]["top1"]
        rows.append(
            [
                f"`{c.architecture}`",
                figure(top1),
                f"{apart:+.2f} ± {half:.2f}" if c.mechanism != "resnet" else "",
                f"{read_metrics(again)[-1]['top1'] - first:+.2f}" if again.is_dir() else "",
                ratio(times[c.name]),
                ratio(times[folded.name] if folded else zoo["resnet20, norms fused"]),
                f"{folded.metrics['logit_difference']:.0e}" if folded else "",
            ]
        )
    header = [
        "model",
        "top-1 (%), mean ± std (n)",
        "difference from plain (95 % interval)",
        f"seed {seed} retrained",
        "time",
        "time, fused",
    ]
    return markdown([*header, "max\\|Δlogit\\| ÷ max\\|logit\\|"], rows)


def from_scratch(folder: str, plain: str) -> str:
    """Networks trained from random weights, against the plain one that they are made of, paired by seed."""
    runs = {path.name: top1_by_seed(path) for path in family(RESULTS / folder, plain)}
    runs = {network: found for network, found in runs.items() if found}
    costs = {row["network"]: ratio(row) for row in read_csv(RESULTS / f"{folder}_{plain}_cost.csv")}
    splits = sorted(runs[plain])  # the held-out images first

    table = []
    for network in runs:
        cells = [f"`{network}`"]
        for split in splits:
            told = difference(runs[network][split], runs[plain][split]) if network != plain else {}
            cells += [over_seeds(runs[network][split]), in_words(told) if told else ""]
        table.append([*cells, costs.get(network, "")])
    header = [f"{split}: {what}" for split in splits for what in ("top-1 (%), mean ± std (n)", FROM_PLAIN)]
    return markdown(["network", *header, "time, fused"], table)


def transfer(name: str) -> str:
    """Fine-tuned grafts against the fine-tuned plain network, paired by seed."""
    rows = read_csv(RESULTS / name)
    constant = ("source", "data", "epochs", "held_out", "recipe", "precision")
    assert len({tuple(row[name] for name in constant) for row in rows}) == 1, "a table for each of them"
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["share"], row["lr"], row["network"]), {})[int(row["seed"])] = float(row["top1"])
    plain_rate = {share: lr for share, lr, network in reversed(found) if network == PLAIN}
    table = []
    for (share, lr, network), top1 in found.items():
        told = {} if network == PLAIN else difference(top1, found[share, plain_rate[share], PLAIN])
        cells = [f"`{network}`", f"{100 * float(share):.0f} %", lr, over_seeds(top1)]
        table.append([*cells, in_words(told) if told else ""])
    return markdown(["network", "images", "learning rate", "top-1 (%), mean ± std (n)", FROM_PLAIN], table)


def freeze_accuracy(name: str) -> str:
    """Top-1 lost by freezing within budgets, over seeds."""
    rows = read_csv(RESULTS / name)
    assert len({row["data"] for row in rows}) == 1, "a table for each data set"
    steps = next(row["recover"] for row in rows if row["recover"] != "0")
    table = []
    for network, budget in dict.fromkeys((row["network"], row["budget"]) for row in rows):
        cells = [f"`{network}`", "all" if budget == "inf" else budget]
        for recover in ("0", steps):
            found = [
                row
                for row in rows
                if (row["network"], row["budget"], row["recover"]) == (network, budget, recover)
            ]
            lost = {i: float(row["top1_before"]) - float(row["top1"]) for i, row in enumerate(found)}
            gates = " ".join(row["frozen"] for row in found)
            kept = sum(row["recovered"] == "1" for row in found)
            gates += f" ({kept} of {len(found)})" if recover != "0" else ""
            cells += [gates if lost else "", over_seeds(lost) if lost else ""]
        table.append(cells)
    header = ["model", "budget (points)", "gates frozen, by seed", "top-1 lost (points), mean ± std (n)"]
    recovery = f"gates frozen, with {steps} steps of recovery (runs in which it was kept)"
    return markdown([*header, recovery, "top-1 lost, with recovery"], table)


def over_seeds(top1: dict[int, float]) -> str:
    """Mean, standard deviation and number of runs."""
    std = f" ± {statistics.stdev(top1.values()):.2f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1.values()):.2f}{std} ({len(top1)})"


def in_words(told: dict) -> str:
    """A paired difference and its interval."""
    if told["n"] < FEWEST:
        return f"{told['difference']:+.2f} (n = {told['n']})"
    return f"{told['difference']:+.2f} ({told['low']:+.2f} to {told['high']:+.2f})"
