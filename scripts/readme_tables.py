"""The tables of measurements in README and docs, from the committed files of results."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from compare_seeds import top1_by_seed
from paired import difference

from timm_attn.files import read_csv
from timm_attn.publish.card import figure, standard_error
from timm_attn.training.run import read_metrics
from timm_attn.weights import read_index

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "hub" / "results"
PLAIN = "resnet20"
FROM_PLAIN = "difference from plain, paired by seed (95 % interval)"
#: Where the tables stand.
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables() -> dict[str, str]:
    """Every other rendered table, by name."""
    return {
        "short results": short_results(),
        "freeze accuracy": freeze_accuracy(),
        "freeze speed": freeze_speed(),
        "comparison": comparison(),
        "tiny": from_scratch("tiny", PLAIN),
        "transfer": transfer(),
        "parameters": parameters(),
        "sweep": sweep(),
        "cost of attach": cost_of_attach(),
        "inference": inference(compiled="0"),
        "compiled": inference(compiled="1"),
        "training speed": training_speed(),
        "training steps": training_steps(),
        "import time": import_time(),
    }


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def _ratio(measured: dict, low: str = "ratio_min", middle: str = "ratio_median", high: str = "ratio_max"):
    """A median with the least and the greatest of the rounds."""
    return f"{float(measured[middle]):.2f} ({float(measured[low]):.2f} to {float(measured[high]):.2f})"


def short_results() -> str:
    """Accuracy, parameters and time of each shipped network of the zoo."""
    zoo = _read("zoo.json")
    shipped = {c.name: c for c in read_index(ROOT / "hub")}
    trained = [c for c in shipped.values() if not c.derived_from and c.name in zoo["checkpoints"]]
    rows = []
    for c in sorted(trained, key=lambda c: -c.over_seeds["top1"]["mean"]):
        times = zoo["checkpoints"]
        folded = times[c.folded] if c.folded else zoo["resnet20, norms fused"]
        medians = [f"{float(t['ratio_median']):.2f}" for t in (times[c.name], folded)]
        parameters = f"{c.metrics['parameters']:,}"
        rows.append([f"`{c.architecture}`", parameters, figure(c.over_seeds["top1"]), *medians])
    return _table(["model", "parameters", "top-1 (%), mean ± std (n)", "time", "time, folded"], rows)


def freeze_accuracy() -> str:
    """Top-1 lost by freezing within budgets, over seeds."""
    rows = read_csv(RESULTS / "freeze_accuracy.csv")
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
            lost = [float(row["top1_before"]) - float(row["top1"]) for row in found]
            gates = " ".join(row["frozen"] for row in found)
            figures = (statistics.mean(lost), statistics.stdev(lost), len(lost)) if lost else ()
            cells += [gates, "{:.2f} ± {:.2f} ({})".format(*figures) if figures else ""]
        table.append(cells)
    header = ["model", "budget (points)", "gates frozen, by seed", "top-1 lost (points), mean ± std (n)"]
    return _table(
        [*header, f"gates frozen, with {steps} steps of recovery", "top-1 lost, with recovery"], table
    )


def freeze_speed() -> str:
    """Time of networks with frozen gates over the original's, and over that of the same without gates."""
    rows = read_csv(RESULTS / "freeze_speed.csv")
    cases = sorted({(row["compiled"], row["precision"], row["batch"]) for row in rows}, key=_by_batch)
    found = {(r["network"], r["compiled"], r["precision"], r["batch"]): r for r in rows}
    names = [f"{'compiled' if c == '1' else 'eager'}, {p}, batch {b}" for c, p, b in cases]
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        cells = [f"`{network}`"]
        for case in cases:
            row = found.get((network, *case))
            cells.append(
                f"{float(row['over_original']):.2f}, {float(row['over_without']):.2f}" if row else ""
            )
        table.append(cells)
    return _table(["time ÷ original, ÷ without gates", *names], table)


def _by_batch(case: tuple[str, str, str]) -> tuple[str, str, int]:
    compiled, precision, batch = case
    return compiled, precision, int(batch)


def comparison() -> str:
    """Each shipped network of the zoo against the plain one: accuracy, and time trained and folded."""
    zoo = _read("zoo.json")
    shipped = {c.name: c for c in read_index(ROOT / "hub")}
    trained = [c for c in shipped.values() if not c.derived_from and c.name in zoo["checkpoints"]]
    plain = next(c for c in trained if c.mechanism == "resnet").over_seeds["top1"]
    rows = []
    for c in sorted(trained, key=lambda c: -c.over_seeds["top1"]["mean"]):
        top1, times = c.over_seeds["top1"], zoo["checkpoints"]
        behind = (plain["mean"] - top1["mean"]) / standard_error(plain, top1)
        folded = shipped[c.folded] if c.folded else None
        seed = c.over_seeds["seeds"][0]
        again = RESULTS / "zoo" / c.architecture / f"xeon-seed-{seed}"
        first = read_metrics(again.with_name(f"seed-{seed}"))[-1]["top1"]
        rows.append(
            [
                f"`{c.architecture}`",
                figure(top1),
                f"{behind:+.1f}" if c.mechanism != "resnet" else "",
                f"{read_metrics(again)[-1]['top1'] - first:+.2f}" if again.is_dir() else "",
                _ratio(times[c.name]),
                _ratio(times[folded.name] if folded else zoo["resnet20, norms fused"]),
                f"{folded.metrics['logit_difference']:.0e}" if folded else "",
            ]
        )
    header = [
        "model",
        "top-1 (%), mean ± std (n)",
        "behind plain",
        f"seed {seed} again",
        "time",
        "time, folded",
    ]
    return _table([*header, "max\\|Δlogit\\| ÷ max\\|logit\\|"], rows)


def from_scratch(name: str, plain: str) -> str:
    """Networks trained from random weights, against a plain one, paired by seed; the best first."""
    folder = RESULTS / name
    runs = {path.name: top1_by_seed(path) for path in folder.iterdir() if path.is_dir()}
    runs = {network: found for network, found in runs.items() if found}
    costs = {row["network"]: _ratio(row) for row in read_csv(folder.with_name(f"{name}_cost.csv"))}
    splits = list(runs[plain])

    def order(network: str) -> tuple[bool, float]:
        told = difference(runs[network][splits[0]], runs[plain][splits[0]])
        return network != plain, -told["difference"] if told else 0

    table = []
    for network in sorted(runs, key=order):
        cells = [f"`{network}`"]
        for split in splits:
            told = difference(runs[network][split], runs[plain][split]) if network != plain else {}
            cells += [over_seeds(runs[network][split]), in_words(told) if told else ""]
        table.append([*cells, costs.get(network, "")])
    header = [f"{split}: {what}" for split in splits for what in ("top-1 (%), mean ± std (n)", FROM_PLAIN)]
    return _table(["network", *header, "time, folded"], table)


def over_seeds(top1: dict[int, float]) -> str:
    """Mean, standard deviation and number of runs."""
    std = f" ± {statistics.stdev(top1.values()):.2f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1.values()):.2f}{std} ({len(top1)})"


def transfer() -> str:
    """Fine-tuned grafts against the fine-tuned plain network, paired by seed."""
    rows = read_csv(RESULTS / "transfer.csv")
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
    return _table(["network", "images", "learning rate", "top-1 (%), mean ± std (n)", FROM_PLAIN], table)


def in_words(told: dict) -> str:
    """A paired difference and its interval."""
    if told["n"] == 1:
        return f"{told['difference']:+.2f} (n = 1)"
    return f"{told['difference']:+.2f} ({told['low']:+.2f} to {told['high']:+.2f})"


def parameters() -> str:
    """Parameters of the registered models with 1000 (CIFAR: 10) classes."""
    known = read_csv(ROOT / "tests" / "parameter_counts.csv")
    counts = {row["model"]: f"{int(row['parameters']):,}" for row in known}
    names = ["", "_se", "_dia", "_asr", "_asr_se", "_conam", "fmm", "_ssia", "_sem", "_spem"]
    rows = []
    for name in names:
        models = [f"fmmnet{d}" if name == "fmm" else f"resnet{d}{name}" for d in (20, 56, 50, 101)]
        label = "`fmmnet<depth>`" if name == "fmm" else f"`resnet<depth>{name}`"
        rows.append([label, *(counts.get(model, "timm's") for model in models)])
    return _table(["model", "depth 20", "56", "50", "101"], rows)


def sweep() -> str:
    """What works on timm's architectures."""
    rows = read_csv(RESULTS / "timm_sweep.csv")
    tried = [row for row in rows if row["seconds"]]

    def share(rows: list[dict], good: list[dict]) -> str:
        return f"{len(good):,} of {len(rows):,}"

    modules = {row["module"] for row in tried}
    ends = [row for row in rows if int(row["folding"] or 0)]
    verified = {row["module"] for row in tried if row["asr_where"] == "branches"}
    folding = [row for row in ends if row["module"] in verified]
    norms = [row for row in rows if row in ends or int(row["norms"] or 0)]
    once = [row for row in rows if int(row["once"] or 0)]
    exact = [row for row in tried if row["asr_error"] and float(row["asr_error"]) <= 1e-5]
    worst = max(float(row["asr_error"]) for row in exact)
    return _table(
        [
            "",
            "has a place for it",
            f"built and run: the {len(tried)} smallest, of {len(modules)} module files",
        ],
        [
            [
                "ASR at the ends of branches; folds",
                share(rows, folding),
                share(tried, [row for row in exact if row["asr_where"] == "branches"]),
            ],
            [
                f"ASR there or on norms; folds (largest max\\|Δlogit\\| ÷ max\\|logit\\| {worst:.0e})",
                share(rows, norms),
                share(tried, exact),
            ],
            ["DIA; exports", share(rows, once), share(tried, [row for row in tried if row["dia"] == "yes"])],
            ["SSIA; trains and folds", "", share(tried, [row for row in tried if row["ssia"] == "yes"])],
        ],
    )


def cost_of_attach() -> str:
    """Time of networks with attached mechanisms over that of block classes made for them."""
    rows = read_csv(RESULTS / "cost_of_attach.csv")
    cases = sorted({(row["pass"], row["precision"]) for row in rows})
    ratios = {(row["network"], row["pass"], row["precision"]): row["ratio"] for row in rows}
    return _table(
        ["attached ÷ block classes", *(f"{kind}, {precision}" for kind, precision in cases)],
        (
            [f"`{name}`", *(ratios[name, *case] for case in cases)]
            for name in dict.fromkeys(r["network"] for r in rows)
        ),
    )


def inference(compiled: str) -> str:
    """Time at inference over that of resnet50 under the same conditions."""
    rows = [row for row in read_csv(RESULTS / "bench_infer.csv") if row["compiled"] == compiled]
    keys = ("infer_batch_size", "precision", "memory_format")
    settings = (("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "channels_last"))
    conditions = [(size, *setting) for size in ("1", "32") for setting in settings]
    names = {
        "seresnet50": "`seresnet50` (timm)",
        "ecaresnet50d": "`ecaresnet50d` (timm)",
        "pytorchcv diaresnet50b": "`diaresnet50b` (pytorchcv, r = 4)",
        "resnet50_dia reduction=4": "`resnet50_dia`, r = 4",
        "resnet50_dia": "`resnet50_dia` (r = 20)",
        "resnet50_conam": "`resnet50_conam`",
        "fmmnet50": "`fmmnet50`",
        "resnet50 fused": "`resnet50`, fused",
        "seresnet50 fused": "`seresnet50`, fused",
        "resnet50_dia folded": "`resnet50_dia`, folded",
        "resnet50_conam folded": "`resnet50_conam`, folded",
        "fmmnet50 folded": "`fmmnet50`, folded",
    }
    medians = {
        (row["model"], tuple(row[key] for key in keys)): f"{float(row['ratio_median']):.2f}"
        for row in rows
        if row["baseline"] == "resnet50"
    }
    header = [
        f"batch {size}, {precision}{', channels last' if layout == 'channels_last' else ''}"
        for size, precision, layout in conditions
    ]
    what = "compiled" if compiled == "1" else "eager"
    return _table(
        [f"time ÷ `resnet50`, 224 px, {what}, median", *header],
        ([label, *(medians[name, condition] for condition in conditions)] for name, label in names.items()),
    )


def training_speed() -> str:
    """Images a second of the trainer and of timm's own."""
    measured = _read("bench_train.json")["end_to_end"]
    keys = ("min", "median", "max")
    ours = "timm_attn bf16"
    labels = {ours: "`timm-attn train`, bf16", "timm bf16 channels_last": "timm bf16, channels last"}
    rows = [
        [
            labels.get(name, name),
            f"{speed['median']:.0f}",
            "" if name == ours else _ratio(measured["times_as_fast_as"][name], *keys),
        ]
        for name, speed in measured["images_per_second"].items()
    ]
    n = measured["images_per_second"][ours]["n"]
    return _table(["ResNet-20, CIFAR-10", "images/s", f"speed-up of `timm-attn train` (n = {n})"], rows)


def training_steps() -> str:
    """Time of a training step over the plain network's."""
    measured = _read("bench_train.json")["step_over_plain"]
    labels = {"se": "SE", "dia": "DIA", "asr": "ASR", "conam": "ConAM", "fmm": "FMM", "ssia": "SSIA"}
    names = {
        "se": ("resnet20_se", "seresnet50"),
        "fmm": ("fmmnet20", "fmmnet50"),
        **{key: (f"resnet20_{key}", f"resnet50_{key}") for key in ("dia", "asr", "conam", "ssia")},
    }
    rows = [
        [label, *(_ratio(next(steps[n] for n in names[key] if n in steps)) for steps in measured.values())]
        for key, label in labels.items()
    ]
    return _table(["step time ÷ plain network's", *measured], rows)


def import_time() -> str:
    """What importing the package costs."""
    measured = _read("import_time.json")
    low, high = measured["ratio_range"]
    return (
        f"`import timm, timm_attn` takes {measured['median_ratio']:.2f} times what `import timm` takes "
        f"({low:.2f} to {high:.2f}, n = {measured['n']}; `make bench`)."
    )
