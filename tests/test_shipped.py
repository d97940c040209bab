"""The weights that ship, their cards, and what the README says of them."""

import json

import pytest
import timm
import torch
from helpers import ROOT, fixed_images, parameters

import timm_attn
from timm_attn.fold import relative_difference
from timm_attn.weights import read_index, sha256

SHIPPED = {c.name: c for c in read_index(ROOT / "hub")}
LOGITS = json.loads((ROOT / "tests" / "shipped_logits.json").read_text())


NETWORKS = {
    "resnet20",
    "resnet20_se",
    "resnet20_dia",
    "resnet20_conam",
    "resnet20_asr",
    "resnet20_ssia",
    "fmmnet20",
}


def test_what_ships():
    """Every network with one recipe, and all but the plain one with their folded form."""
    trained = [c for c in SHIPPED.values() if not c.folded_from]
    assert {c.architecture for c in trained} == NETWORKS
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
    assert json.loads((results / "zoo.json").read_text())["checkpoints"].keys() == SHIPPED.keys()


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
