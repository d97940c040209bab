"""The tables of measurements in README and docs."""

from accuracy_tables import comparison, freeze_accuracy, from_scratch, short_results, transfer
from speed_tables import cost_of_attach, freeze_speed, import_time, inference, training_speed, training_steps
from table_parts import RESULTS, ROOT, markdown

from timm_attn.files import read_csv

#: Where the tables stand.
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables() -> dict[str, str]:
    """Every other rendered table, by name."""
    return {
        "short results": short_results(),
        "freeze accuracy": freeze_accuracy("freeze_accuracy.csv"),
        "tiny freeze": freeze_accuracy("tiny_freeze.csv"),
        "freeze speed": freeze_speed(),
        "comparison": comparison(),
        "tiny": from_scratch("tiny", "resnet20"),
        "tiny resnet56": from_scratch("tiny", "resnet56"),
        "imagenette resnet18": from_scratch("imagenette", "resnet18"),
        "imagenette convnext": from_scratch("imagenette", "convnext_atto"),
        "transfer": transfer("transfer.csv"),
        "transfer all": transfer("transfer_all.csv"),
        "parameters": parameters(),
        "sweep": sweep(),
        "cost of attach": cost_of_attach(),
        "inference": inference(compiled="0"),
        "compiled": inference(compiled="1"),
        "training speed": training_speed(),
        "training steps": training_steps(),
        "import time": import_time(),
    }


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
    return markdown(["model", "depth 20", "56", "50", "101"], rows)


def sweep() -> str:
    """What works on timm's architectures."""
    rows = read_csv(RESULTS / "timm_sweep.csv")

    def share(rows: list[dict], good: list[dict]) -> str:
        return f"{len(good):,} of {len(rows):,}"

    def built(rows: list[dict]) -> list[dict]:
        return [row for row in rows if row["seconds"]]

    tried = built(rows)
    modules = {row["module"] for row in tried}
    ends = [row for row in rows if int(row["folding"] or 0)]
    norms = [row for row in rows if row in ends or int(row["norms"] or 0)]
    once = [row for row in rows if int(row["once"] or 0)]
    exact = [row for row in tried if row["asr_error"] and float(row["asr_error"]) <= 1e-5]
    worst = max(float(row["asr_error"]) for row in exact)
    return markdown(
        [
            "",
            "has a place for it",
            f"of those, built and run (the two smallest of each of {len(modules)} module files)",
        ],
        [
            [
                "ASR at the ends of branches; folds",
                share(rows, ends),
                share(built(ends), [row for row in exact if row["asr_where"] == "branches"]),
            ],
            [
                f"ASR there or on norms; folds (largest max\\|Δlogit\\| ÷ max\\|logit\\| {worst:.0e})",
                share(rows, norms),
                share(built(norms), exact),
            ],
            [
                "DIA; exports",
                share(rows, once),
                share(built(once), [row for row in tried if row["dia"] == "yes"]),
            ],
            ["SSIA; trains and folds", "", share(tried, [row for row in tried if row["ssia"] == "yes"])],
        ],
    )
