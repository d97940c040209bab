"""The tables of times in README and docs, from the committed files of results."""

from table_parts import RESULTS, markdown, ratio, read

from timm_attn.files import read_csv


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
    return markdown(
        [f"time ÷ `resnet50`, 224 px, {what}, median", *header],
        ([label, *(medians[name, condition] for condition in conditions)] for name, label in names.items()),
    )


def training_speed() -> str:
    """Images a second of the trainer and of timm's own."""
    measured = read("bench_train.json")["end_to_end"]
    keys = ("min", "median", "max")
    ours = "timm_attn bf16"
    labels = {ours: "`timm-attn train`, bf16", "timm bf16 channels_last": "timm bf16, channels last"}
    rows = [
        [
            labels.get(name, name),
            f"{speed['median']:.0f}",
            "" if name == ours else ratio(measured["times_as_fast_as"][name], *keys),
        ]
        for name, speed in measured["images_per_second"].items()
    ]
    n = measured["images_per_second"][ours]["n"]
    return markdown(["ResNet-20, CIFAR-10", "images/s", f"speed-up of `timm-attn train` (n = {n})"], rows)


def training_steps() -> str:
    """Time of a training step over the plain network's."""
    measured = read("bench_train.json")["step_over_plain"]
    labels = {"se": "SE", "dia": "DIA", "asr": "ASR", "conam": "ConAM", "fmm": "FMM", "ssia": "SSIA"}
    names = {
        "se": ("resnet20_se", "seresnet50"),
        "fmm": ("fmmnet20", "fmmnet50"),
        **{key: (f"resnet20_{key}", f"resnet50_{key}") for key in ("dia", "asr", "conam", "ssia")},
    }
    rows = [
        [label, *(ratio(next(steps[n] for n in names[key] if n in steps)) for steps in measured.values())]
        for key, label in labels.items()
    ]
    return markdown(["step time ÷ plain network's", *measured], rows)


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
    return markdown(["time ÷ original, ÷ without gates", *names], table)


def _by_batch(case: tuple[str, str, str]) -> tuple[str, str, int]:
    compiled, precision, batch = case
    return compiled, precision, int(batch)


def cost_of_attach() -> str:
    """Time of networks with attached mechanisms over that of block classes made for them."""
    rows = read_csv(RESULTS / "cost_of_attach.csv")
    cases = sorted({(row["pass"], row["precision"]) for row in rows})
    ratios = {(row["network"], row["pass"], row["precision"]): row["ratio"] for row in rows}
    return markdown(
        ["attached ÷ block classes", *(f"{kind}, {precision}" for kind, precision in cases)],
        (
            [f"`{name}`", *(ratios[name, *case] for case in cases)]
            for name in dict.fromkeys(r["network"] for r in rows)
        ),
    )


def import_time() -> str:
    """What importing the package costs."""
    measured = read("import_time.json")
    low, high = measured["ratio_range"]
    return (
        f"`import timm, timm_attn` takes {measured['median_ratio']:.2f} times what `import timm` takes "
        f"({low:.2f} to {high:.2f}, n = {measured['n']}; `make bench`)."
    )
