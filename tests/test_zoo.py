"""The scripts that train, export, measure and draw the zoo, on digits."""

import csv
import json
import shutil
import subprocess

import pytest
from helpers import ROOT, found, script

from timm_attn import cli
from timm_attn.training.recipe_file import load_recipe
from timm_attn.training.run import read_results
from timm_attn.weights import read_index, sha256

RECIPE = """data: digits
img_size: 8
crop_padding: 1
batch_size: 256
lr: 0.1
epochs: 1
model_kwargs: {channels: [8, 8, 8], layers: [1, 1, 1]}
"""
KEPT = {
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "results.json",
    "curves.png",
    "config.json",
    "model.safetensors",
}


start = subprocess.run


def train_here(command: list[str], **options) -> subprocess.CompletedProcess:
    """``python -m timm_attn train ...`` in this process; other programs as they are started."""
    if command[1:4] != ["-m", "timm_attn", "train"]:
        return start(command, **options)
    try:
        cli.main(command[3:])
    except SystemExit as stop:
        return subprocess.CompletedProcess(command, stop.code)
    return subprocess.CompletedProcess(command, 0)


def train_zoo(folder, *options, models=("resnet20", "resnet20_asr"), start=train_here):
    arguments = ["--data", "digits", "--recipe", folder / "recipe.yaml", "--runs", folder / "runs"]
    arguments += ["--results", folder / "hub" / "results" / "zoo", "--models", *models, *options]
    return script("train_zoo.py", *arguments, start=start)


def export_zoo(folder, data="digits", rounds=2):
    arguments = [
        "--data",
        data,
        "--dataset",
        "digits",
        "--tag",
        "tiny",
        "--rounds",
        rounds,
        "--batch-size",
        4,
    ]
    arguments += ["--runs", folder / "hub" / "results" / "zoo", "--hub", folder / "hub"]
    return script("export_zoo.py", *arguments)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two networks with two seeds, exported."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "recipe.yaml").write_text(RECIPE)
    for result in (train_zoo(folder, "--seeds", "0", "1"), export_zoo(folder)):
        assert result.returncode == 0, result.stdout
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in found(folder.rglob("*")) if p.is_file()}


def test_what_is_kept_of_a_run(zoo):
    for model in ("resnet20", "resnet20_asr"):
        for seed in (0, 1):
            kept = zoo / "hub" / "results" / "zoo" / model / f"seed-{seed}"
            assert {p.name for p in kept.iterdir()} == KEPT
            about = json.loads((kept / "environment.json").read_text())
            assert about["recipe_sha256"] == sha256(kept / "recipe.yaml")
            assert load_recipe(kept / "recipe.yaml").seed == seed
            run = zoo / "runs" / model / f"seed-{seed}"
            assert read_results(kept) == read_results(run)
            assert sha256(kept / "model.safetensors") == sha256(run / "model.safetensors")


def test_what_is_exported(zoo):
    exported = {c.name: c for c in read_index(zoo / "hub")}
    assert set(exported) == {"resnet20.tiny", "resnet20_asr.tiny", "resnet20.asr_tiny_folded"}
    assert all(c.over_seeds["seeds"] == [0, 1] and c.over_seeds["top1"]["n"] == 2 for c in exported.values())
    assert exported["resnet20_asr.tiny"].controls == ["resnet20.tiny"]
    assert "n = 2" in (exported["resnet20_asr.tiny"].folder / "README.md").read_text()
    times = json.loads((zoo / "hub" / "results" / "zoo.json").read_text())
    assert times["checkpoints"].keys() == exported.keys() and times["torch"]
    assert times["checkpoints"]["resnet20.tiny"]["ratio_median"] == 1
    assert (zoo / "hub" / "results" / "zoo.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (zoo / "hub").glob(".*")} <= {".index.lock"}


def test_a_failed_export_changes_nothing(zoo):
    before = contents(zoo)
    result = export_zoo(zoo, data="./gone")
    assert result.returncode == 2 and "error: ./gone is not a folder" in result.stdout
    result = export_zoo(zoo, rounds=0)
    assert result.returncode == 2 and "--rounds is 0: it must be at least 1" in result.stderr
    assert contents(zoo) == before


def test_a_damaged_run_is_named(zoo, tmp_path):
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    damaged = folder / "hub" / "results" / "zoo" / "resnet20_asr" / "seed-1" / "model.safetensors"
    damaged.write_text("x")
    checkpoints = {c.name: c.files for c in read_index(folder / "hub")}
    result = export_zoo(folder)
    assert result.returncode == 2 and f"error: {damaged} cannot be read" in result.stdout
    assert {c.name: c.files for c in read_index(folder / "hub")} == checkpoints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "resnet20", "resnet20_dai"), "unknown model 'resnet20_dai': did you mean resnet20_dia"),
        (("--seeds", "0", "-1"), "seed must be finite and not negative, got -1"),
    ],
)
def test_wrong_networks_and_seeds_are_found_before_the_first_run(tmp_path, options, message):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = train_zoo(tmp_path, *options)
    assert result.returncode == 2 and message in result.stdout
    assert not (tmp_path / "runs").exists()


def test_a_third_seed_takes_the_place_of_the_older_weights(zoo, tmp_path):
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    seed = folder / "hub" / "results" / "zoo" / "resnet20_asr" / "seed-1"
    shutil.copytree(seed, seed.with_name("seed-2"))
    recipe = seed.with_name("seed-2") / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 1", "seed: 2"))
    assert export_zoo(folder).returncode == 0
    exported = {c.name: c for c in read_index(folder / "hub")}
    assert exported["resnet20.tiny"].over_seeds["seeds"] == [0, 1]
    for name in ("resnet20_asr.tiny", "resnet20.asr_tiny_folded"):
        assert exported[name].over_seeds["seeds"] == [0, 1, 2]
        assert exported[name].folder == folder / "hub" / name
        assert exported[name].verified("model.safetensors").is_file()


def test_what_is_finished_is_skipped_and_another_recipe_is_refused(zoo, tmp_path):
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    before = contents(folder)
    assert train_zoo(folder, "--seeds", "0", "1").returncode == 0
    assert contents(folder) == before
    (folder / "recipe.yaml").write_text(RECIPE.replace("0.1", "0.2"))
    result = train_zoo(folder, "--seeds", "0")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert result.returncode == 2 and "has lr 0.1, not 0.2: name other folders" in result.stdout
    assert contents(folder) == before


def test_records_are_kept_without_weights(zoo, tmp_path):
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    shutil.rmtree(folder / "hub")
    assert train_zoo(folder, "--seeds", "0", "--records-only").returncode == 0
    kept = folder / "hub" / "results" / "zoo" / "resnet20" / "seed-0"
    assert {p.name for p in kept.iterdir()} == KEPT - {"curves.png", "config.json", "model.safetensors"}
    before = contents(folder)
    assert train_zoo(folder, "--seeds", "0", "--records-only").returncode == 0
    assert contents(folder) == before


def test_deployed_networks_are_timed_against_the_plain_one(tmp_path):
    arms = ["resnet20_asr:generator=scale", "resnet20_eca"]
    options = ["--rounds", "2", "--batch-size", "2", "--img-size", "16", "--out", str(tmp_path / "c.csv")]
    result = script("bench_deployed.py", *arms, *options)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert [row["network"] for row in rows] == [arm.replace(":", "-") for arm in arms]
    assert all(float(row["ratio_median"]) > 0 and row["baseline"] == "resnet20" for row in rows)


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("0.1", "1.0e+30"))
    result = train_zoo(tmp_path, "--seeds", "0")
    assert result.returncode == 1 and "not finished: " in result.stdout
    assert all((tmp_path / "runs" / model / "seed-0").is_dir() for model in ("resnet20", "resnet20_asr"))


def test_every_run_is_a_process_of_its_own(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = train_zoo(tmp_path, "--seeds", "0", models=["resnet20"], start=start)
    assert result.returncode == 0, result.stdout
    kept = tmp_path / "hub" / "results" / "zoo" / "resnet20" / "seed-0"
    assert {p.name for p in kept.iterdir()} == KEPT
    command = json.loads((kept / "environment.json").read_text())["command"]
    assert "runs/resnet20/seed-0" in command and f"--out {tmp_path}" not in command


def test_differences_are_scipys_paired_intervals(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    stats = pytest.importorskip("scipy.stats")
    values = {
        "resnet20": [50.0, 51.0, 50.4],
        "resnet20_se": [51.1, 52.0, 51.6],
        "fmmnet20": [49.0, 50.01],
        "resnet20_asr": [],
        "resnet56_se": [90.0, 90.0, 90.0],  # another backbone
    }
    runs = tmp_path / "runs"
    for network, found_top1 in values.items():
        for seed, top1 in enumerate(found_top1):
            run = runs / network / f"seed-{seed}"
            run.mkdir(parents=True)
            results = {"top1": top1, "split": "test", "best_epoch": {"split": "train, held out"}}
            (run / "results.json").write_text(json.dumps(results))
            (run / "metrics.jsonl").write_text(f'{{"top1": 1}}\n{{"top1": {2 * top1}}}\n')
    (runs / "resnet20_se" / "seed-7").mkdir()  # not finished
    (tmp_path / "cost.csv").write_text("network,ratio_min,ratio_median,ratio_max\nresnet20_se,1,1.1,1.2\n")
    options = ("--out", tmp_path / "d.csv", "--picture", tmp_path / "d.png", "--cost", tmp_path / "cost.csv")
    result = script("compare_seeds.py", str(runs), *map(str, options))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    twice, _, better, alone = rows
    assert [row["split"] for row in rows] == ["held out", "held out", "test", "test"]
    assert float(twice["difference"]) == pytest.approx(2 * float(better["difference"]), abs=1e-3)
    wanted = stats.ttest_rel(values["resnet20_se"], values["resnet20"]).confidence_interval(0.95)
    assert better["corrected_low"] == better["low"]  # the only network with an interval
    from paired import difference

    wider = stats.ttest_rel(values["resnet20_se"], values["resnet20"]).confidence_interval(1 - 0.05 / 7)
    told = difference(*(dict(enumerate(values[name])) for name in ("resnet20_se", "resnet20")), 7)
    assert (told["corrected_low"], told["corrected_high"]) == pytest.approx((wider.low, wider.high))
    assert float(better["low"]) == pytest.approx(wanted.low, abs=1e-3)
    assert float(better["high"]) == pytest.approx(wanted.high, abs=1e-3)
    assert (better["network"], better["verdict"], better["n"]) == ("resnet20_se", "above", "3")
    assert (alone["network"], alone["verdict"], alone["low"]) == ("fmmnet20", "not distinguishable", "-inf")


def test_a_table_takes_rows_of_its_columns_only(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench import write

    for _ in range(2):
        write(tmp_path / "a.csv", [{"network": "a", "ms": 1}])
    with pytest.raises(SystemExit, match="has other columns"):
        write(tmp_path / "a.csv", [{"network": "a", "peak": 2, "ms": 1}])
    assert (tmp_path / "a.csv").read_text() == "network,ms\na,1\na,1\n"


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_held_out_images_are_none_of_those_trained_on(share, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from measure_transfer import UserError, part_of

    features = datasets.Features(x=datasets.Value("int64"), label=datasets.ClassLabel(names=["a", "b"]))
    for split, first, n in (("train", 0, 80), ("test", 1000, 10)):
        table = {"x": [*range(first, first + n)], "label": [i % 2 for i in range(n)]}
        datasets.Dataset.from_dict(table, features).to_parquet(str(tmp_path / "d" / f"{split}.parquet"))
    parts = {}
    for held_out in (0.0, 0.1):
        folder = part_of(str(tmp_path / "d"), share, held_out, tmp_path / f"part-{held_out}")
        parts[held_out] = {name: split["x"] for name, split in datasets.load_dataset(folder).items()}
    assert parts[0.0]["test"] == [*range(1000, 1010)]
    assert len(parts[0.0]["train"]) == share * 80
    assert len(parts[0.1]["test"]) == 8 and max(parts[0.1]["test"]) < 80
    assert not {*parts[0.1]["test"]} & {*parts[0.1]["train"]}
    again = part_of(str(tmp_path / "d"), share, 0.1, tmp_path / "part-0.1")
    assert datasets.load_dataset(again)["test"]["x"] == parts[0.1]["test"]
    with pytest.raises(UserError, match="is a part of other data than .*: choose another --runs"):
        part_of(str(tmp_path / "part-0.1"), share, 0.1, tmp_path / "part-0.1")
    if share < 1:  # the rate is chosen with the very images that it is used for
        assert parts[0.1]["train"] == parts[0.0]["train"]
