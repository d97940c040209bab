"""The weights that ship, and what the README says of them."""

import json
import statistics

import pytest
import timm
import torch
from helpers import ROOT, fixed_images, parameters

import timm_attn
from timm_attn.compare import relative_difference
from timm_attn.publish.card import half_width
from timm_attn.training.run import read_metrics, read_results
from timm_attn.training.seeds import spread
from timm_attn.weights import read_index, sha256

SHIPPED = {c.name: c for c in read_index(ROOT / "hub")}
LOGITS = json.loads((ROOT / "tests" / "shipped_logits.json").read_text())


NETWORKS = {"resnet20", *(f"resnet20_{name}" for name in ("se", "dia", "conam", "asr", "ssia")), "fmmnet20"}
TINY = {"resnet20", *(f"resnet20_{name}" for name in ("se", "dia", "asr"))}


@pytest.mark.parametrize(("tag", "networks"), [("cpu_c10", NETWORKS), ("cpu_tin32", TINY)])
def test_what_ships(tag, networks):
    """Every network with one recipe, and all but the plain one with their folded form."""
    trained = {c.name: c for c in SHIPPED.values() if c.tag == tag and not c.derived_from}
    assert {c.architecture for c in trained.values()} == networks
    assert len({json.dumps(c.recipe) for c in trained.values()}) == 1
    folded = {c.folded_from for c in SHIPPED.values()} & trained.keys()
    assert folded == {c.name for c in trained.values() if c.architecture != "resnet20"}
    assert LOGITS.keys() == SHIPPED.keys()


def test_all_finished_runs_are_exported():
    """The figures are over all runs that are kept, and the weights are those of one of them."""
    results = ROOT / "hub" / "results"
    folders = {"cpu_c10": "zoo", "cpu_tin32": "tiny"}
    for c in SHIPPED.values():
        if c.frozen_from:
            continue
        if not c.folded_from:
            runs = results / folders[c.tag] / c.architecture
            kept = {int(p.parent.name.removeprefix("seed-")) for p in runs.glob("seed-*/results.json")}
            # Seeds that came after the export are there to compare networks by.
            assert c.over_seeds["seeds"] == (sorted(kept)[:3] if c.tag == "cpu_tin32" else sorted(kept))
            metrics = runs / f"seed-{c.metrics['seed']}" / "metrics.jsonl"
            assert sha256(metrics) == c.files["metrics.jsonl"]["sha256"]
            for seed, top1 in zip(c.over_seeds["seeds"], c.over_seeds["top1"]["values"], strict=True):
                run = runs / f"seed-{seed}"
                last = read_metrics(run)[-1]
                trained = read_results(run)
                assert trained["epoch"] == last["epoch"]
                assert c.recipe["val_fraction"] or trained["top1"] == last["top1"]
                # A run evaluates in bf16, in which the classes of a few images differ.
                assert top1 == pytest.approx(trained["top1"], abs=0.3)
        values = c.over_seeds["top1"]["values"]
        assert spread(values) == c.over_seeds["top1"]
        middle = statistics.median_low(values)
        assert c.metrics["top1"] == middle == values[c.over_seeds["seeds"].index(c.metrics["seed"])]
    timed = {name for name in SHIPPED if name.split(".")[1].removesuffix("_folded").endswith("cpu_c10")}
    assert json.loads((results / "zoo.json").read_text())["checkpoints"].keys() == timed


def test_the_verdicts_of_the_readme_hold():
    """Which networks are distinguishable from plain is a sentence; the figures beside it are rendered."""
    over = {c.architecture: c.over_seeds["top1"] for c in SHIPPED.values() if c.tag == "cpu_c10"}

    plain = over.pop("resnet20")
    apart = {
        name for name, top1 in over.items() if abs(top1["mean"] - plain["mean"]) > half_width(top1, plain)
    }
    assert apart == {"fmmnet20"}
    assert 0.45 < plain["mean"] - over["fmmnet20"]["mean"] < 0.5
    rest = over.keys() - {"fmmnet20", "resnet20_ssia"}
    assert max(over["fmmnet20"]["values"]) < min(min(over[name]["values"]) for name in rest)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_by_name(name):
    checkpoint = SHIPPED[name]
    for filename in checkpoint.files:
        checkpoint.verified(filename)
    on_hub = "/" in checkpoint.dataset["id"]
    rendered = {"README.md", *([".eval_results"] if on_hub else [])}
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
    assert cfg.tag == "cpu_c10"
    assert timm.create_model(name, pretrained=True).pretrained_cfg["tag"] == cfg.tag


@pytest.mark.parametrize("name", [n for n, c in SHIPPED.items() if c.folded_from])
def test_shipped_folded_weights_are_the_fold_of_the_trained(name):
    trained = timm.create_model(SHIPPED[name].folded_from, pretrained=True).eval()
    folded = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(4, *trained.pretrained_cfg["input_size"])
    assert relative_difference(trained, folded, x) <= 1e-5
    again, shipped = timm_attn.fold(trained).state_dict(), folded.state_dict()
    assert again.keys() == shipped.keys()
    for key, value in again.items():  # folded on another CPU, whose sums have another order
        torch.testing.assert_close(shipped[key], value, rtol=0, atol=1e-6 * value.abs().max().item(), msg=key)
