"""Cards, evaluation results, results.csv, configurations and the README's table say what the index says."""

import csv
import dataclasses
import json
import shutil
import statistics

import pytest
import scipy.stats
import timm
import yaml
from helpers import ROOT, script
from huggingface_hub import ModelCard

from timm_attn.errors import UserError
from timm_attn.papers import PAPERS
from timm_attn.publish.card import card, eval_results, half_width, judge
from timm_attn.publish.folders import link
from timm_attn.publish.render import render
from timm_attn.training.seeds import spread
from timm_attn.weights import read_index

SHIPPED = {c.name: c for c in read_index(ROOT / "hub")}
NAME = "resnet20_asr.cpu_c10"


def test_everything_that_is_rendered_agrees_with_what_was_measured():
    checked = script("render_hub.py", "--check")
    assert checked.returncode == 0, checked.stdout
    assert list(SHIPPED.values()) == link(SHIPPED.values())


@pytest.fixture
def copy(tmp_path):
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "README.md")
    return shutil.copytree(ROOT / "hub", tmp_path / "hub", ignore=shutil.ignore_patterns("results"))


def test_a_changed_index_changes_all_of_them(copy):
    index = json.loads((copy / "index.json").read_text())
    index["checkpoints"][NAME]["metrics"]["top1"] = 12.34
    (copy / "index.json").write_text(json.dumps(index))
    readme = copy.parent / "README.md"
    differing = render(copy, [readme], write=False)
    assert {
        copy / NAME / "README.md",
        copy / NAME / ".eval_results/cifar10.yaml",
        copy / "results.csv",
        readme,
    } <= set(differing)
    assert render(copy, [readme]) == differing and render(copy, [readme]) == []
    for path in differing:
        if path.parent.parent != copy or path.parent.name == NAME:
            assert "12.34" in path.read_text(), path
    readme.write_text("no table")
    with pytest.raises(UserError, match="must have one place for the results"):
        render(copy, [readme])


@pytest.mark.parametrize("field", ["architecture", "label_names", "pretrained_cfg"])
def test_a_config_that_differs_is_found(field, copy):
    path = copy / NAME / "config.json"
    config = json.loads(path.read_text())
    other = {
        "architecture": "resnet20_dia",
        "label_names": [*"abcdefghij"],
        "pretrained_cfg": {"mean": [0.0]},
    }
    path.write_text(json.dumps({**config, field: other[field]}))
    with pytest.raises(UserError, match="differs from the index"):
        render(copy)


@pytest.mark.parametrize("name", SHIPPED)
def test_cards_of_shipped_weights(name):
    checkpoint = SHIPPED[name]
    shown = ModelCard.load(checkpoint.folder / "README.md")
    assert shown.data.eval_results[0].metric_value == pytest.approx(checkpoint.metrics["top1"], abs=1e-4)
    paper = PAPERS[checkpoint.mechanism]
    assert paper.title in shown.text and paper.bibtex in shown.text and paper.caveat in shown.text
    assert f"seed {checkpoint.metrics['seed']}" in shown.text
    assert ("freeze.png" if checkpoint.frozen_from else "curves.png") in shown.text
    for other in (*checkpoint.controls, checkpoint.folded, checkpoint.folded_from):
        if other:
            assert f"`{other}` | {SHIPPED[other].metrics['parameters']:,}" in shown.text
    if "/" not in checkpoint.dataset["id"]:  # not on the Hub
        return
    entries = yaml.safe_load((checkpoint.folder / ".eval_results" / "cifar10.yaml").read_text())
    assert entries[0]["value"] == pytest.approx(checkpoint.metrics["top1"], abs=1e-4)
    assert entries[0]["dataset"]["id"] == checkpoint.dataset["id"]


def test_results_have_timms_columns():
    with (ROOT / "hub" / "results.csv").open(newline="") as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == SHIPPED.keys()
    columns = [
        "model",
        "img_size",
        "top1",
        "top1_err",
        "top5",
        "top5_err",
        "param_count",
        "crop_pct",
        "interpolation",
    ]
    assert list(rows[NAME])[: len(columns)] == columns
    for name, row in rows.items():
        metrics = SHIPPED[name].metrics
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
        assert float(row["top1"]) == pytest.approx(metrics["top1"], abs=1e-3)
        assert float(row["param_count"]) * 1e6 == pytest.approx(metrics["parameters"], abs=1)


@pytest.mark.parametrize("name", SHIPPED)
def test_timm_has_the_same_configuration(name):
    cfg = timm.models.get_pretrained_cfg(name).to_dict()
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "num_classes", "label_names"):
        assert json.loads(json.dumps(cfg[key])) == SHIPPED[name].pretrained_cfg[key], key


def checkpoint(name, mechanism, mean=None, std=None, n=1, **changes):
    """An entry like the shipped ResNet-20's."""
    architecture, tag = name.split(".")
    over = {key: {"mean": mean or 0.0, "std": std, "n": n} for key in ("top1", "top5", "loss")}
    fields = {"architecture": architecture, "tag": tag, "mechanism": mechanism, "folded": None}
    over_seeds = {"seeds": list(range(n)), **over}
    return dataclasses.replace(SHIPPED[NAME], name=name, over_seeds=over_seeds, **fields, **changes)


def test_controls_have_the_same_backbone_and_recipe():
    plain, se = checkpoint("resnet20.a", "resnet"), checkpoint("resnet20_se.a", "se")
    dia = checkpoint("resnet20_dia.a", "dia", recipe={**plain.recipe, "model_kwargs": ["reduction=2"]})
    fused = checkpoint("resnet20_dia.a_folded", "dia", folded_from="resnet20_dia.a")
    deeper = checkpoint("resnet32.a", "resnet")
    longer = checkpoint("resnet20.b", "resnet", recipe={**plain.recipe, "epochs": 99})
    other = checkpoint("resnet20.c", "resnet", dataset={**plain.dataset, "id": "other"})
    linked = {c.name: c.controls for c in link([plain, se, dia, fused, deeper, longer, other])}
    both = ["resnet20.a", "resnet20_se.a"]
    assert linked["resnet20_dia.a"] == linked["resnet20_dia.a_folded"] == both
    assert linked["resnet20.a"] == ["resnet20_se.a"]
    assert linked["resnet32.a"] == linked["resnet20.b"] == linked["resnet20.c"] == []


def test_a_card_says_how_far_it_is_from_its_controls():
    plain = checkpoint("resnet20.a", "resnet", 91.0, 0.1, 4)
    dia = checkpoint("resnet20_dia.a", "dia", 91.5, 0.2, 4, controls=["resnet20.a"])
    text = card(dia, {"resnet20.a": plain})
    assert (
        "91.50 ± 0.20 % (n = 4) against 91.00 ± 0.10 % (n = 4) for `resnet20.a`. The difference of +0.50 points "
        "(95 % interval: +0.23 to +0.77) is distinguishable from 0." in text
    )
    assert "is not distinguishable" in judge({"mean": 91.2, "std": 0.2, "n": 4}, plain.over_seeds["top1"])
    # Two comparisons: the interval of each is wider.
    se = checkpoint("resnet20_se.a", "se", 91.19, 0.1, 4)
    ours = ["resnet20.a", "resnet20_se.a"]
    fused = checkpoint("resnet20_dia.a_folded", "dia", 91.5, 0.2, 4, folded_from=dia.name, controls=ours)
    asr = checkpoint("resnet20_asr.a", "asr", 91.3, 0.2, 3, controls=ours)
    few = checkpoint("resnet20_sem.a", "sem", 91.3, 0.2, 2, controls=ours)
    others = {c.name: c for c in (plain, se, dataclasses.replace(dia, controls=ours), fused, asr, few)}
    text = card(others[dia.name], others)
    wider = "95 % interval, corrected for 2 comparisons"
    assert f"+0.50 points ({wider}: +0.17 to +0.83) is distinguishable from 0." in text
    assert f"+0.31 points ({wider}: -0.02 to +0.64) is not distinguishable from 0." in text
    alone = judge(dia.over_seeds["top1"], se.over_seeds["top1"])
    assert alone.endswith("(95 % interval: +0.04 to +0.58) is distinguishable from 0.")
    # Decided by the figures themselves, and not by what is left of them in print.
    near = [{"mean": mean, "std": 0.09575, "n": 4} for mean in (92.084, 91.916)]
    assert half_width(*near) == pytest.approx(0.1657, abs=1e-4)
    assert judge(*near).startswith(
        "The difference of +0.17 points (95 % interval: +0.00 to +0.33) is disting"
    )
    assert "No baseline was trained" in card(dataclasses.replace(dia, controls=[]), {})
    for few in ({"mean": 95.0, "std": None, "n": 1}, {"mean": 95.0, "std": 0.01, "n": 2}):
        assert "may be noise" in judge(few, plain.over_seeds["top1"])
        assert "may be noise" in judge(plain.over_seeds["top1"], few)


def test_intervals_of_cards_are_scipys():
    a, b = ([91.2, 91.9, 91.4], [90.8, 91.1, 91.3, 90.9])
    theirs = scipy.stats.ttest_ind(a, b).confidence_interval(0.95)
    ours = half_width(spread(a), spread(b))
    difference = statistics.mean(a) - statistics.mean(b)
    assert (difference - ours, difference + ours) == pytest.approx(tuple(theirs), rel=1e-3)


def test_a_card_of_what_was_made_in_two_steps_names_what_was_trained():
    trained = checkpoint("resnet20_dia.a", "dia", 91.5, 0.2, 4)
    frozen = {
        "gates": 9,
        "frozen": 3,
        "budget": 1.0,
        "steps": 0,
        "images": 5,
        "batch_size": 8,
        "hardware": "a",
    }
    frozen |= {"means": "train", "split": "test"}
    figures = {"top1": 91.0, "agreement": 99.0, "kl": 0.1, "milliseconds": 1.0}
    frozen |= {"before": figures, "after": figures}
    plain = checkpoint("resnet20.a", "resnet", 91.0, 0.1, 4)
    first = checkpoint("frozen.a1", "dia", 91.0, frozen_from=trained.name, frozen=frozen)
    second = checkpoint("frozen.a2", "dia", 91.0, frozen_from=first.name, frozen=frozen)
    linked = {c.name: c for c in link([plain, trained, first, second])}
    assert linked["frozen.a2"].controls == linked["frozen.a1"].controls == ["resnet20.a"]
    assert "timm-attn train resnet20_dia --recipe" in card(linked["frozen.a2"], linked)


def test_a_card_says_that_its_curves_are_of_other_images_than_its_figures():
    run = checkpoint("resnet20.a", "resnet", 91.0)
    images = {"train": 90, "train, held out": 10, "test": 20}
    assert "The curves" not in card(run, {})
    for split, told in (("test", True), ("train, held out", False)):
        text = card(dataclasses.replace(run, dataset={**run.dataset, "images": images, "split": split}), {})
        assert ("are of 10 images held out of training, not of the test split." in text) == told


def test_a_card_says_which_of_the_seeds_it_is():
    for n, which in (
        (2, "over seeds 0 and 1; this is the run with the lower top-1."),
        (3, "over seeds 0, 1 and 2; this is the run with the median top-1."),
        (4, "over seeds 0, 1, 2 and 3; this is the run with the lower median top-1."),
    ):
        assert which in card(checkpoint("resnet20.a", "resnet", 91.0, 0.1, n), {})
    assert "This is a single run" in card(checkpoint("resnet20.a", "resnet", 91.0), {})


def test_a_control_has_no_claim():
    se = checkpoint("resnet20_se.a", "se", 91.0, 0.1, 3)
    text = card(checkpoint("resnet20.a", "resnet", 91.0, 0.1, 3, controls=[se.name]), {se.name: se})
    assert "baseline; we make no claim about it.\n\nHere, with the same recipe" in text


def test_a_card_says_which_options_there_were_and_what_is_left():
    def with_options(*options, **changes):
        base = checkpoint("resnet20_asr.x", "asr")
        recipe = {**base.recipe, "model_kwargs": list(options)}
        return card(dataclasses.replace(base, recipe=recipe, **changes), {})

    assert "Architecture `resnet20_asr` with `delta=2`, `generator=eca`, trained on" in with_options(
        "delta=2", "generator=eca"
    )
    folded = {"architecture": "resnet20", "folded_from": "resnet20_asr.x"}
    assert "form of `resnet20_asr.x` with `delta=2`, a plain network" in with_options("delta=2", **folded)
    for changes in (
        {"architecture": "resnet20_se", "folded_from": "resnet20_asr_se.x"},
        {**folded, "folded_from": "resnet20_asr_se.x", "model_args": {"block_args": {"attn_layer": "eca"}}},
    ):
        text = with_options(**changes)
        assert "a network that keeps only the attention on top" in text and "plain network with" not in text


def test_cards_of_networks_that_nobody_has_named_before():
    """A pair of a network and a mechanism gets its name when it is trained; other processes read the index."""
    assert not timm.is_model("regnetx_004_tv_asr")
    trained = checkpoint("regnetx_004_tv_asr.t", "asr")
    folded = checkpoint(
        "regnetx_004_tv.asr_t_folded",
        "asr",
        folded_from="regnetx_004_tv_asr.t",
    )
    known = {c.name: c for c in (trained, folded)}
    assert "a plain network with the same output" in card(folded, known, "me")
    text = card(trained, known, "me")
    assert 'timm_attn.register("regnetx_004_tv", "asr")\nmodel = timm.create_model' in text
    assert "transformers" not in text
    for name in ("resnet20_dia", "resnet50_asr", "resnet20"):
        assert "register(" not in card(checkpoint(f"{name}.t", "dia"), known, "me")


def test_a_card_has_the_licence_of_the_weights_that_it_began_with():
    cfg = {**SHIPPED[NAME].pretrained_cfg, "license": "cc-by-nc-4.0"}
    text = card(dataclasses.replace(SHIPPED[NAME], pretrained_cfg=cfg), SHIPPED)
    assert "Weights: cc-by-nc-4.0. Images" in text and ModelCard(text).data.license == "cc-by-nc-4.0"
    assert "Weights: Apache-2.0. Images" in card(SHIPPED[NAME], SHIPPED)


def test_held_out_images_make_no_entry_in_a_table_of_the_hub():
    shipped = SHIPPED[NAME]
    assert eval_results(shipped)
    held_out = {**shipped.dataset, "split": "train, held out"}
    assert not eval_results(dataclasses.replace(shipped, dataset=held_out))
