"""The weights that ship, their cards, and what the README says of them."""

import itertools
import json
import re
import statistics

import pytest
import timm
import torch
from helpers import ROOT, fixed_images, parameters

import timm_attn
from timm_attn.fold import relative_difference
from timm_attn.publish.card import standard_error
from timm_attn.training.run import read_metrics, read_results
from timm_attn.training.seeds import spread
from timm_attn.weights import read_index, sha256

SHIPPED = {c.name: c for c in read_index(ROOT / "hub")}
LOGITS = json.loads((ROOT / "tests" / "shipped_logits.json").read_text())


#: What must ship, and what the README's sentences call it.
NETWORKS = {
    "resnet20": "plain",
    "resnet20_se": "SE",
    "resnet20_dia": "DIA",
    "resnet20_conam": "ConAM",
    "resnet20_asr": "ASR",
    "resnet20_ssia": "SSIA",
    "fmmnet20": "FMMNet",
}


def test_what_ships():
    """Every network with one recipe, and all but the plain one with their folded form."""
    trained = [c for c in SHIPPED.values() if not c.folded_from]
    assert {c.architecture for c in trained} == NETWORKS.keys()
    assert all(c.recipe == trained[0].recipe and c.tag == trained[0].tag for c in trained)
    folded = {c.folded_from for c in SHIPPED.values()} - {None}
    assert folded == {c.name for c in trained if c.architecture != "resnet20"}
    assert LOGITS.keys() == SHIPPED.keys()


def test_all_finished_runs_are_exported():
    """The figures are over all runs that are kept, and the weights are those of one of them."""
    results = ROOT / "hub" / "results"
    for c in SHIPPED.values():
        if not c.folded_from:
            runs = results / "zoo" / c.architecture
            kept = {int(p.parent.name.removeprefix("seed-")) for p in runs.glob("seed-*/results.json")}
            assert set(c.over_seeds["seeds"]) == kept
            metrics = runs / f"seed-{c.metrics['seed']}" / "metrics.jsonl"
            assert sha256(metrics) == c.files["metrics.jsonl"]["sha256"]
            for seed, top1 in zip(c.over_seeds["seeds"], c.over_seeds["top1"]["values"], strict=True):
                run = runs / f"seed-{seed}"
                last = read_metrics(run)[-1]
                trained = read_results(run)
                assert trained["epoch"] == last["epoch"] and trained["top1"] == last["top1"]
                # A run evaluates in bf16, in which the classes of a few images differ.
                assert top1 == pytest.approx(trained["top1"], abs=0.3)
        values = c.over_seeds["top1"]["values"]
        assert spread(values) == c.over_seeds["top1"]
        middle = statistics.median_low(values)
        assert c.metrics["top1"] == middle == values[c.over_seeds["seeds"].index(c.metrics["seed"])]
    assert json.loads((results / "zoo.json").read_text())["checkpoints"].keys() == SHIPPED.keys()


@pytest.fixture
def findings():
    """The sentences under the README's table, which are written by hand, on one line."""
    _, _, text = (ROOT / "README.md").read_text().partition("![top-1 against parameters")
    return " ".join(text.partition("## Set up")[0].split())


def test_the_readme_says_the_measured_accuracies(findings):
    over = {c.architecture: c.over_seeds["top1"] for c in SHIPPED.values() if not c.folded_from}
    figures = {name: f"{top1['mean']:.2f} ± {top1['std']:.2f}" for name, top1 in over.items()}
    assert set(re.findall(r"\d+\.\d+ ± \d+\.\d+", findings)) == set(figures.values())
    assert {top1["n"] for top1 in over.values()} == {3}

    def behind(a, b):
        """How many standard errors the mean of a is below that of b, the measure of the cards."""
        return (over[b]["mean"] - over[a]["mean"]) / standard_error(over[a], over[b])

    fmm_behind = behind("fmmnet20", "resnet20")
    ssia_behind = behind("resnet20_ssia", "resnet20")
    rest = NETWORKS.keys() - {"fmmnet20", "resnet20_ssia"}
    apart = max(abs(behind(a, b)) for a, b in itertools.combinations(rest, 2))
    assert fmm_behind > 2 > apart
    assert max(over["fmmnet20"]["values"]) < min(min(over[name]["values"]) for name in rest)
    for sentence in (
        f"{figures['fmmnet20']} against {figures['resnet20']} (n = 3 each), {fmm_behind:.1f} standard errors",
        f"SSIA, {figures['resnet20_ssia']} (n = 3), is {ssia_behind:.1f} standard errors behind plain",
        *(f"{NETWORKS[name]} {figures[name]}" for name in rest - {"resnet20"}),
        f"Plain {figures['resnet20']}",
        f"(n = 3 each) differ by at most {apart:.1f} standard errors",
    ):
        assert sentence in findings, sentence


def test_the_readme_says_the_measured_times(findings):
    zoo = json.loads((ROOT / "hub" / "results" / "zoo.json").read_text())
    times = {name: entry["ratio_median"] for name, entry in zoo["checkpoints"].items()}
    fused = zoo["resnet20, norms fused"]["ratio_median"]
    asr, ssia = (zoo["checkpoints"][f"resnet20.{name}_cpu_c10_folded"] for name in ("asr", "ssia"))
    low, high = min(asr["ratio_min"], ssia["ratio_min"]), max(asr["ratio_max"], ssia["ratio_max"])
    five = [times[c.name] for c in SHIPPED.values() if not (c.folded_from or c.is_control)]
    kept = [times[c.name] for c in SHIPPED.values() if c.folded_from and c.architecture != "resnet20"]
    every = [*zoo["checkpoints"].values(), zoo["resnet20, norms fused"]]
    least, greatest = min(e["ratio_min"] for e in every), max(e["ratio_max"] for e in every)
    for sentence in (
        f"single rounds are at {least:.2f} to {greatest:.2f}",
        f"({asr['ratio_median']:.2f} and {ssia['ratio_median']:.2f} of it; rounds: {low:.2f} to {high:.2f})",
        f"As trained, the five take {min(five):.2f} to {max(five):.2f} times the plain network's time",
        f"SE {times['resnet20_se.cpu_c10']:.2f}",
        f"take {min(kept):.2f} to {max(kept):.2f}; the plain network with its own fused takes {fused:.2f}",
        f"of which theirs is {min(kept) / fused:.2f} to {max(kept) / fused:.2f}",
    ):
        assert sentence in findings, sentence


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_by_name(name):
    checkpoint = SHIPPED[name]
    for filename in checkpoint.files:
        checkpoint.verified(filename)
    rendered = {"README.md", ".eval_results"}
    assert {p.name for p in checkpoint.folder.iterdir()} == set(checkpoint.files) | rendered
    model = timm.create_model(name, pretrained=True).eval()
    again = timm.create_model(f"local-dir:{checkpoint.folder}", pretrained=True).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert torch.equal(model(x), again(x))
    assert parameters(model) == checkpoint.metrics["parameters"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_compute_what_they_did(name):
    model = timm.create_model(name, pretrained=True).eval()
    logits = model(fixed_images(model.pretrained_cfg["input_size"]))
    # Five decimals are written, and machines differ in the order of sums.
    torch.testing.assert_close(logits, torch.tensor(LOGITS[name]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_default_is_the_trained_form(name):
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg.tag and not cfg.tag.endswith("_folded")
    assert timm.create_model(name, pretrained=True).pretrained_cfg["tag"] == cfg.tag


@pytest.mark.parametrize("name", [n for n, c in SHIPPED.items() if c.folded_from])
def test_shipped_folded_weights_are_the_fold_of_the_trained(name):
    trained = timm.create_model(SHIPPED[name].folded_from, pretrained=True).eval()
    folded = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(4, *trained.pretrained_cfg["input_size"])
    assert relative_difference(trained, folded, x) <= 1e-5
    assert relative_difference(timm_attn.fold(trained), folded, x) == 0
