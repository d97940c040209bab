"""What is recorded, observed, reported and predicted, each figure recomputed by other code."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torch.distributed as dist
from helpers import narrow, randomise, same
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_attn
from timm_attn import cli
from timm_attn.cli import look
from timm_attn.cli.look import check_same_input
from timm_attn.errors import UserError
from timm_attn.gates import Gate
from timm_attn.images import DataError
from timm_attn.load import load_model
from timm_attn.predict import class_names, find_images
from timm_attn.publish import export_frozen
from timm_attn.record import Record
from timm_attn.report import OBSERVATIONS, Sample, page
from timm_attn.report.importance import importances, rank_correlation
from timm_attn.report.landscape import NOISE, accuracy_under_noise, gradient_norms, path_variation
from timm_attn.report.maps import activation_maps, confidences
from timm_attn.report.page import calibration
from timm_attn.report.stiffness import stiffness_of
from timm_attn.training import Recipe, validate
from timm_attn.training.validation import Evaluated


def sample(n=40, size=16, classes=10) -> Sample:
    g = torch.Generator().manual_seed(5)
    images = torch.randn(n, 3, 1, 1, generator=g) + torch.randn(n, 3, size, size, generator=g)
    labels = torch.arange(n) % classes
    return Sample(images, labels, [f"class {i}" for i in range(classes)], (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def se_network(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomise(narrow("resnet20_se", layers=[2, 1, 1], **kwargs)).eval()


def gates_of(model, x, path) -> torch.Tensor:
    """Gates of timm's SEModule by its own layers, B × C."""
    module, found = model.get_submodule(path), []
    hook = module.gate.register_forward_hook(lambda m, args, y: found.append(y.detach().flatten(1)))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found[0].double()


# ------------------------------------------------------------------------------------------------- the recorder


def test_the_recorder_finds_the_gates_itself_and_goes():
    model, data = se_network(), sample()
    with pytest.raises(ZeroDivisionError), timm_attn.record(model):
        raise ZeroDivisionError
    with timm_attn.record(model, keep={3, 17}) as gates, torch.no_grad():
        model(data.images[:16])
        model(data.images[16:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [gate.path for gate in gates.gates] == [f"layer{n}.se" for n in ("1.0", "1.1", "2.0", "3.0")]
    assert gates.images == 40 and len(gates) == 4
    for gate in gates.gates:
        values = gates_of(model, data.images, gate.path)
        torch.testing.assert_close(gates[gate.path].mean, values.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gates.kept[gate.path], values[[3, 17]], rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError, match=r"no gate at 'layer1.0' has been recorded; gates are: layer1.0.se"):
        gates["layer1.0"]


def test_correlations_are_numpys():
    model, data = se_network(), sample()
    with timm_attn.record(model) as gates, torch.no_grad():
        for x, _ in data.batches(model, 12):
            model(x)
    (found,) = gates.correlations()
    assert found.paths == ("layer1.0.se", "layer1.1.se")
    a, b = (gates_of(model, data.images, path).numpy() for path in found.paths)
    assert found.pearson[0, 1].item() == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-4)
    centred = [(v - v.mean(0)).ravel() for v in (a, b)]
    assert found.images[0, 1].item() == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-3)
    assert found.mean == pytest.approx(found.pearson[1, 0].item())


def test_a_gate_in_two_places_is_none_and_parts_of_a_network_may_be_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = timm.layers.SEModule(3, rd_channels=2)

        def forward(self, x):
            return self.se(self.se(x))

    with timm_attn.record(Twice()) as gates:
        gates_seen = Twice()(sample().images)  # another one: nothing is recorded of it
        assert not len(gates) and gates_seen.shape[1] == 3
    model = Twice()
    with timm_attn.record(model) as gates:
        model(sample().images)
        model(sample().images)
    assert not gates.gates and gates.unknown == {"se": "SEModule acts in several places"}
    model = se_network()
    with timm_attn.record(model) as gates, torch.no_grad():
        model.forward_features(sample().images)
        model.forward_features(sample().images)
    assert gates.images == 80 and len(gates) == 4 and not gates.unknown


@pytest.mark.parametrize("whole", [True, False])
def test_labels_are_those_of_the_images_that_a_part_of_the_network_is_called_with(whole):
    model, kinds = se_network(), 3 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [torch.randint(2, (n,), generator=torch.Generator().manual_seed(n)) for n in (8, 8, 5, 7)]
    with timm_attn.record(model) as gates, torch.no_grad():
        for labels in batches:
            gates.labels = labels
            (model if whole else model.forward_features)(kinds[labels])
        gates.labels = batches[0]
        model(kinds[batches[0]])  # the whole, after a part
    assert gates.images == 36 and gates["layer1.0.se"].class_share > 0.999
    with pytest.raises(ValueError, match="labels of shape"), timm_attn.record(model) as gates:
        gates.labels = batches[0]
        model.forward_features(kinds[batches[2]])


class Scaled(nn.Module):
    """A network whose first argument is no image."""

    def __init__(self):
        super().__init__()
        self.net = se_network()

    def forward(self, scale, x):
        return self.net(scale * x)


@pytest.mark.parametrize("scale", [torch.tensor(1.0), torch.ones(1), torch.ones(1, 1, 1)])
def test_images_are_told_from_other_arguments(scale):
    model, data = Scaled(), sample(8)
    for given, named in (((scale, data.images), {}), ((), {"scale": scale, "x": data.images})):
        with timm_attn.record(model, keep=[1, 5]) as gates, torch.no_grad():
            gates.labels = data.labels
            model(*given, **named)
        assert gates.images == 8 and len(gates.kept["net.layer1.0.se"]) == 2


def test_a_pass_that_raised_may_be_tried_again():
    """With the labels that were given to it; nor does it stay in the way of a part of the network."""
    model, data = se_network(), sample(8)

    def refuse(module, args):
        raise RuntimeError("out of memory")

    found = []
    for failing in (False, True):
        with timm_attn.record(model) as gates, torch.no_grad():
            gates.labels = torch.arange(8) % 2
            if failing:
                hook = model.fc.register_forward_pre_hook(refuse)
                with pytest.raises(RuntimeError, match="out of memory"):
                    model(data.images)
                hook.remove()
            model(data.images)
            assert gates.labels is None
        found.append([gates[gate.path].class_share for gate in gates.gates])
    assert found[0] == found[1] and len(found[0]) == 4 and not np.isnan(found[0]).any()
    with timm_attn.record(model) as gates, torch.no_grad():
        hook = model.fc.register_forward_pre_hook(refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(data.images)
        hook.remove()
        model.forward_features(data.images)
    assert gates.images == 8 and len(gates) == 4 and not gates.unknown


def test_gates_kept_of_an_image_are_its_own_where_a_block_takes_patches_for_images():
    model = timm.create_model("mobilevit_xxs", num_classes=5)
    model = timm_attn.attach(model, "dia", images=torch.randn(1, 3, 64, 64)).eval()
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def kept(x):
        with timm_attn.record(model, keep=[1, 4]) as gates, torch.no_grad():
            model(x)
        assert gates.images == len(x)
        return gates.kept["stages.2.1.transformer.0.drop_path1"]

    own, other = x.clone(), x.clone()
    own[[1, 4]] *= -1
    other[[0, 2, 3, 5]] *= -1
    before = kept(x)
    assert before.shape[0] == 2 and ((before - kept(own)).abs().amax(1) > 1e-5).all()
    torch.testing.assert_close(before, kept(other), rtol=0, atol=1e-6)


def test_gates_that_are_the_same_for_all_channels_are_found_on_the_axis_of_channels():
    sizes = {"img_size": 64, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    stock = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)
    model = timm_attn.graft("swin_tiny_patch4_window7_224_dia", stock, **sizes).eval()
    with timm_attn.record(model) as gates, torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    assert [(g.channels, g.axis) for g in gates.gates] == [(32, -1)] * 2 + [(64, -1)] * 2
    report = timm_attn.freeze(model, torch.randn(400, 3, 64, 64), every=True)
    assert report.frozen == 4


def test_a_gate_is_called_by_its_own_class_with_asr_before_it():
    model = timm.create_model("resnet20_asr_se").eval()
    with timm_attn.record(model) as gates, torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    assert {gate.kind for gate in gates.gates} == {"SEModule"}


def test_it_records_in_training_under_checkpoints_and_compile():
    model, data = se_network(), sample(8)
    expected = gates_of(model, data.images, "layer1.1.se").mean(0)
    model.set_grad_checkpointing()
    with timm_attn.record(model) as gates:
        model(data.images).sum().backward()
    assert gates.images == 8 and not gates.unknown  # the backward pass runs blocks again
    torch.testing.assert_close(gates["layer1.1.se"].mean, expected, rtol=1e-4, atol=1e-5)
    model = se_network()
    compiled = torch.compile(model, backend="eager")
    compiled(data.images)  # compiled without hooks
    with timm_attn.record(compiled) as gates, torch.no_grad():
        compiled(data.images)
    torch.testing.assert_close(gates["layer1.1.se"].mean, expected, rtol=1e-4, atol=1e-5)
    model.train()
    with timm_attn.record(model) as gates, torch.autocast("cpu", torch.bfloat16):
        model(data.images).sum().backward()
    assert len(gates) == 4 and gates["layer3.0.se"].mean.isfinite().all()


def test_it_records_on_a_wrapped_network(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(se_network())
        with timm_attn.record(model) as gates:
            model(sample(8).images).sum().backward()
    finally:
        dist.destroy_process_group()
    assert next(gate.path for gate in gates.gates) == "layer1.0.se" and gates.images == 8


# ------------------------------------------------------------------------------------------------- observations


def test_stripes_are_numpys():
    model, data = se_network(), sample()
    found = OBSERVATIONS["stripes"]({"a": model, "b": se_network()}, data)
    assert len(found.rows) == 8
    row = next(r for r in found.rows if r["gate"] == "layer1.1.se")
    values = gates_of(model, data.images, "layer1.1.se").numpy()
    assert row["stripe_index"] == pytest.approx(1 - values.var(0).mean() / values.var(), rel=1e-2)
    assert row["std_over_images"] == pytest.approx(values.std(0).mean(), rel=1e-2)
    assert found.rows[4]["moved"] == 0 and found.rows[0]["moved"] == ""
    for observed in (found, OBSERVATIONS["correlation"]({"a": model}, data)):
        assert len(observed.draw().axes) > 1 and observed.summary


def test_correlations_are_those_of_what_is_known_and_varies():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(3, 50, 4, generator=g, dtype=torch.float64)
    values[1, :, 2] = torch.nan  # a channel that is 0 in every image
    values[2] = 0.5 + 1e-15 * values[2]  # a constant
    gates = [Gate(name, "SE", 4) for name in "abc"]
    found = Record(gates)
    for rows in torch.arange(50).split(20):
        found.begin_pass(len(rows))
        for gate, one in zip(gates, values, strict=True):
            found.take(gate, one[rows], torch.ones(len(rows), dtype=torch.bool))
        found.end_pass()
    (group,) = found.correlations()
    a, b = (v[:, [0, 1, 3]].numpy() for v in values[:2])
    assert group.pearson[0, 1] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    within = [(v - v.mean(0)).ravel() for v in (a, b)]
    assert group.images[0, 1] == pytest.approx(np.corrcoef(*within)[0, 1])
    assert group.images[:2, 2].isnan().all()


def test_channels_that_were_not_known_before_have_not_moved():
    model, data = se_network(), sample()
    later = deepcopy(model)
    with torch.no_grad():  # a channel that reaches a gate as 0 in the first network only
        model.layer1[0].bn2.weight[3] = model.layer1[0].bn2.bias[3] = 0
    rows = OBSERVATIONS["stripes"]({"a": model, "b": later}, data).rows
    (row,) = (r for r in rows if r["model"] == "b" and r["gate"] == "layer1.0.se")
    before, after = (gates_of(m, data.images, "layer1.0.se").mean(0) for m in (model, later))
    moved = (before - after).abs()
    assert row["moved"] == pytest.approx(torch.cat([moved[:3], moved[4:]]).mean().item(), rel=1e-2)
    assert row["moved"] != pytest.approx(moved.mean().item(), rel=1e-2)


def test_a_norm_between_mean_and_classifier_has_no_class_activation():
    model = timm.create_model("test_convnext", num_classes=3).eval()
    x, classes = torch.randn(2, 3, 160, 160), torch.tensor([0, 2])
    assert activation_maps(model, x, classes) is None
    assert activation_maps(timm.create_model("test_resnet", num_classes=3).eval(), x, classes) is not None


def test_names_that_are_shortened_to_the_same_stay_two_classes(monkeypatch):
    names = [f"a long name of a plant (with a remark)___{word}" for word in ("healthy", "ill")]
    labels = torch.arange(10) % 2
    seen = Evaluated(torch.eye(2)[labels], labels, names, None, {}, None)
    drawn = []
    monkeypatch.setattr(page, "png", lambda figure: drawn.append(figure) or b"")
    page._accuracy(seen)
    figure, _ = drawn  # light and dark
    bars = figure.axes[0].patches
    assert len({bar.get_y() for bar in bars}) == 2 and len(figure.axes[0].get_yticklabels()) == 2


def test_stiffness_is_what_a_walk_through_the_blocks_gives():
    model, data = randomise(narrow("resnet20", layers=[3, 1, 1])).eval(), sample(6)
    found = stiffness_of(model, data)
    assert list(found) == ["layer1.0", "layer1.1"]
    with torch.no_grad():
        x = model.maxpool(model.act1(model.bn1(model.conv1(data.images))))
        xs, fs = [], []
        for block in model.layer1:
            f = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))
            xs.append(x)
            fs.append(f)
            x = (x + f).relu()
    for t in (0, 1):
        expected = (fs[t + 1] - fs[t]).flatten(1).norm(dim=1) / (xs[t + 1] - xs[t]).flatten(1).norm(dim=1)
        torch.testing.assert_close(found[f"layer1.{t}"], expected, rtol=1e-4, atol=1e-5)
    two = timm.create_model("test_vit", num_classes=3).eval()  # two branches a block
    x = torch.randn(2, 3, 160, 160)
    images = Sample(x, torch.zeros(2).long(), ["a", "b", "c"], (0.5,) * 3, (0.5,) * 3)
    assert len(stiffness_of(two, images)) == len(two.blocks) - 1
    assert OBSERVATIONS["stiffness"]({"vit": two}, images).draw().axes
    with pytest.raises(UserError, match="has no two neighbouring residual blocks"):
        OBSERVATIONS["stiffness"]({"linear": nn.Sequential(nn.Flatten(), nn.Linear(76800, 3))}, images)


def test_the_landscape_of_a_linear_network_is_known():
    torch.manual_seed(0)
    data = sample(12, size=4, classes=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    with torch.no_grad():
        p, w = model(data.images).softmax(1), model[1].weight
        rise = p.gather(1, data.labels[:, None]) * (w[data.labels] - p @ w)
        per_pixel = rise.view(12, 3, 16) / torch.tensor(data.std)[:, None]
        torch.testing.assert_close(gradient_norms(model, data), per_pixel.flatten(1).norm(dim=1))
        variation, changes = path_variation(model, data)
        for i in range(11):
            way = [data.images[i] + k / 10 * (data.images[i + 1] - data.images[i]) for k in range(11)]
            p = torch.stack([model(x[None])[0].softmax(0) for x in way])
            assert variation[i].item() == pytest.approx((p[1:] - p[:-1]).abs().sum().item(), rel=1e-4)
            assert changes[i] == (p.argmax(1)[1:] != p.argmax(1)[:-1]).sum()
        right = (model(data.images).argmax(1) == data.labels).double().mean().item()
    given = []
    watched = nn.Sequential(nn.Identity(), *model)
    watched[0].register_forward_hook(lambda m, args, y: given.append(y))
    noisy = accuracy_under_noise(watched, data)
    for scale, x in zip(NOISE, given, strict=True):  # in pixels from 0 to 1
        pixels = (x - data.images) * torch.tensor(data.std)[:, None, None]
        assert pixels.std().item() == pytest.approx(scale, rel=0.1, abs=1e-6)
    assert noisy[0] == pytest.approx(100 * right) and len(noisy) == len(NOISE)
    assert len(OBSERVATIONS["landscape"]({"linear": model}, data).draw().axes) == 3


def test_importance_is_scipys():
    model, data = se_network(), sample(6)
    with timm_attn.record(model) as gates, torch.no_grad():
        before = nn.functional.cross_entropy(model(data.images), data.labels, reduction="none")
    gate = gates.gates[1]
    found = importances(model, gate, [0, 5], data)
    with torch.no_grad():
        off = model.layer1[1].se.register_forward_hook(
            lambda m, args, y: y * (torch.arange(y.shape[1]) != 5)[:, None, None]
        )
        after = nn.functional.cross_entropy(model(data.images), data.labels, reduction="none")
        off.remove()
    torch.testing.assert_close(found[:, 1], (after - before).abs(), rtol=1e-4, atol=1e-6)
    a, b = torch.randn(4, 9).round(decimals=1), torch.randn(4, 9)
    rho = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), rho)
    observed = OBSERVATIONS["importance"]({"se": model}, data)
    assert [row["gate"] for row in observed.rows] == [g.path for g in gates.gates]
    assert len(observed.draw().axes) == 2


def test_class_activation_and_confidence():
    model, data = randomise(narrow("resnet20_conam")).eval(), sample(3)
    with torch.no_grad():
        logits = model(data.images)
        classes = logits.argmax(1)
        cam = activation_maps(model, data.images, classes)
        # Its mean and the bias are the logit.
        mean = cam.mean((1, 2)) + model.fc.bias[classes]
    torch.testing.assert_close(mean, logits.amax(1), rtol=1e-4, atol=1e-4)
    eta = confidences(model, data.images)
    assert list(eta) == [f"layer{i}.0.conam" for i in (1, 2, 3)]
    torch.testing.assert_close(eta["layer1.0.conam"].sum((1, 2)), torch.ones(3))
    observed = OBSERVATIONS["maps"]({"conam": model}, data)
    assert "folding" in observed.summary[-1][0] and float(observed.summary[-1][1]) < 1e-4
    assert len(observed.draw().axes) == 3 * 6 + 5  # a colour bar for each column but the first
    with pytest.raises(UserError, match="there are no maps"):
        OBSERVATIONS["maps"](
            {"mlp": timm.create_model("test_mambaout", num_classes=10).eval()}, sample(2, 96)
        )


def test_calibration_error_by_hand():
    g = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(500, 4, generator=g)).softmax(1)
    labels = torch.randint(0, 4, (500,), generator=g)
    confidence, predicted = p.max(1)
    expected = 0.0
    for i in range(15):
        rows = [k for k in range(500) if i / 15 < confidence[k].item() <= (i + 1) / 15]
        if rows:
            accuracy = sum((predicted[k] == labels[k]).item() for k in rows) / len(rows)
            expected += len(rows) / 500 * abs(accuracy - sum(confidence[k].item() for k in rows) / len(rows))
    assert calibration(p, labels)[0] == pytest.approx(expected, abs=1e-6)
    assert calibration(torch.eye(4), torch.arange(4)) == (0, [pytest.approx({**_ONE})])


_ONE = {"low": 14 / 15, "high": 1.0, "share": 1.0, "confidence": 1.0, "accuracy": 1.0}


# --------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run on digits, with checkpoints."""
    out = tmp_path_factory.mktemp("report") / "run"
    recipe = ["--data", "digits", "--img-size", "8", "--epochs", "3", "--keep-checkpoints", "9"]
    kwargs = ["--model-kwargs", "channels=[8,8,8]", "layers=[2,1,1]"]
    cli.main(["train", "resnet20_se", *recipe, *kwargs, "--out", str(out)])
    return out


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as status:
        cli.main(list(arguments))
    assert status.value.code == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    return message


@pytest.mark.parametrize("what", OBSERVATIONS)
def test_look_writes_a_picture_and_a_table(what, run, tmp_path, capsys):
    cli.main(["look", what, str(run), "--data", "digits", "--out", str(tmp_path), "--max-images", "32"])
    with Image.open(tmp_path / f"{what}.png") as image:
        assert image.width > 800 and image.getextrema() != ((255, 255),) * 4
    with (tmp_path / f"{what}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows and "images of digits" in capsys.readouterr().out
    if what == "stripes":  # every checkpoint of the run, and its end
        assert list(dict.fromkeys(row["model"] for row in rows)) == ["step 11", "step 22", "run"]


def test_stripes_of_a_run_with_an_average_are_those_of_averages(tmp_path):
    kwargs = ["--model-kwargs", "channels=[8,8,8]", "layers=[1,1,1]", "--ema-decay", "0.99"]
    recipe = [
        "--data",
        "digits",
        "--img-size",
        "8",
        "--epochs",
        "2",
        "--keep-checkpoints",
        "9",
        "--lr",
        "0.1",
    ]
    cli.main(["train", "resnet20_se", *recipe, *kwargs, "--out", str(tmp_path / "run")])
    model = load_model(str(tmp_path / "run"))
    ((_, earlier),) = look._checkpoints(tmp_path / "run", {"run": model}).items()
    average = load_file(tmp_path / "run" / "step-11" / "ema.safetensors")
    assert same(earlier.state_dict(), average)
    assert not same(average, load_file(tmp_path / "run" / "step-11" / "model.safetensors"))


def test_confusions_of_many_classes_take_no_matrix():
    labels = torch.tensor([5, 5, 7, 90_000])
    logits = torch.zeros(4, 100_000)
    logits[range(4), [6, 6, 7, 1]] = 1
    names = [str(i) for i in range(100_000)]
    section = page._confusion(SimpleNamespace(names=names, labels=labels, logits=logits))
    assert section["table"][1:] == [("5", "6", "2"), ("90000", "1", "1")]


def test_look_says_what_is_wrong_in_one_line(run, tmp_path, capsys):
    end = ["--data", "digits", "--out", str(tmp_path / "o")]
    assert "correlation takes one model, got 2" in fails(
        capsys, "look", "correlation", str(run), str(run), *end
    )
    assert "--max-images must be at least 2" in fails(
        capsys, "look", "stripes", str(run), *end, "--max-images", "1"
    )
    message = fails(capsys, "look", "stripes", str(run), *end, "--gates", "layer1.0.sse")
    assert "--gates 'layer1.0.sse' names no gate: gates are layer1.0.se" in message
    assert "--gates is for stripes" in fails(capsys, "look", "maps", str(run), *end, "--gates", "layer1.0.se")
    plain = tmp_path / "plain"
    kwargs = ["--model-kwargs", "channels=[8,8,8]", "layers=[1,1,1]"]
    recipe = ["--data", "digits", "--img-size", "8", "--epochs", "1"]
    cli.main(["train", "resnet20", *recipe, *kwargs, "--out", str(plain)])
    capsys.readouterr()
    for what in ("stripes", "correlation", "importance"):
        assert "plain has no channel gates" in fails(capsys, "look", what, str(plain), *end)
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    cli.main(["report", str(run), "--data", "digits", "--out", str(out)])
    return out


def test_the_report_stands_alone(run, report):
    page = report.read_text(encoding="utf-8")
    results = json.loads((run / "results.json").read_text())
    assert f"{results['top1']:.2f} %" in page
    titles = ["Training", "Accuracy by class", "Confusion matrix", "Calibration", "Worst mistakes", "Speed"]
    for title in (*titles, "Dependence of gates on the image"):
        assert f"<h2>{title}</h2>" in page
    links = re.findall(r'(?:src|href|srcset)="([^"]{0,12})', page)
    assert links and all(link.startswith(("data:", "#")) for link in links)


def test_the_report_renders(report, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(
        [chromium, *flags, "--enable-logging=stderr", "--window-size=400,900", "--dump-dom", report.as_uri()],
        env={**os.environ, **dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), str(tmp_path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<h2>Speed</h2>" in seen.stdout and "CONSOLE" not in seen.stderr


def test_what_was_held_out_is_looked_at_and_reported(run, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    recipe = ["--data", "digits", "--img-size", "8", "--epochs", "1", "--val-fraction", "0.2"]
    recipe += ["--model-kwargs", "channels=[8,8,8]", "layers=[2,1,1]"]
    cli.main(["train", "resnet20", *recipe, "--out", out])
    capsys.readouterr()
    given = ["--data", "digits", "--split", "held out", "--out"]
    cli.main(["look", "stiffness", out, *given, str(tmp_path / "look")])
    assert "287 images of digits" in capsys.readouterr().out  # a fifth of 1437; the test split has 360
    recipes = []
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(page, "write_report", lambda model, recipe, *_: recipes.append(recipe) or 1 / 0)
        cli.main(["report", out, *given, str(tmp_path / "report.html")])
    assert (recipes[0].eval_split, recipes[0].val_fraction) == ("held out", 0.2)
    message = fails(capsys, "look", "stiffness", str(run), *given, str(tmp_path / "other"))
    assert "'held out' of digits needs --val-fraction" in message


def test_names_of_classes_cannot_break_the_page(tmp_path):
    names = ["<b onclick=x>", "$x_$ & _$^"]
    g = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in names:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(g.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    run, data = str(tmp_path / "run"), str(tmp_path / "data")
    kwargs = ["--model-kwargs", "channels=[8,8,8]", "layers=[1,1,1]"]
    recipe = ["--data", data, "--img-size", "8", "--epochs", "1", "--batch-size", "4"]
    cli.main(["train", "resnet20", *recipe, *kwargs, "--out", run])
    out = tmp_path / "report.html"
    cli.main(["report", run, "--data", data, "--out", str(out)])
    page = out.read_text(encoding="utf-8")
    assert "&lt;b onclick=x&gt;" in page and "<b onclick" not in page


# ------------------------------------------------------------------------------------------------------ predict


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "within").mkdir(parents=True)
    g = np.random.default_rng(0)
    for i in range(3):
        pixels = g.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("within" if i else ".") / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def test_predict_prepares_images_as_evaluation_does(run, pictures):
    model = load_model(str(run))
    paths = sorted(pictures.rglob("*.png"))
    predictions = timm_attn.predict(model, paths, topk=3)
    assert [p.source for p in predictions] == [str(path) for path in paths]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for path, prediction in zip(paths, predictions, strict=True):
        with torch.no_grad():
            p = model(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
        values, indices = p.topk(3)
        assert prediction.probabilities == pytest.approx(values.tolist(), abs=1e-5)
        assert prediction.classes == tuple(str(i) for i in indices.tolist())
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    model.train()
    model.layer1.eval()  # such as norms that stay frozen
    by_tensor = timm_attn.predict(model, batch, topk=3, batch_size=2)
    assert model.training and not model.layer1.training
    assert [p.classes for p in by_tensor] == [p.classes for p in predictions]
    with pytest.raises(DataError, match=r"broken.jpg"):
        timm_attn.predict(model, [pictures / "broken.jpg"])
    with pytest.raises(ValueError, match="no images"):
        timm_attn.predict(model, [])
    with pytest.raises(ValueError, match="topk"):
        timm_attn.predict(model, batch, topk=0)
    model.train()
    timm_attn.predict(model, batch)
    assert model.training


def test_an_opened_image_is_read_like_its_file(run, tmp_path):
    model, g = load_model(str(run)), np.random.default_rng(0)
    turned = Image.fromarray(g.integers(0, 255, (8, 12, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photo.jpg", exif=exif)
    Image.fromarray(g.integers(0, 255, (8, 8, 4), dtype=np.uint8)).save(tmp_path / "transparent.png")
    Image.fromarray(g.integers(0, 2**16, (8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    for path in sorted(tmp_path.glob("*.*g")):
        by_path, opened = (timm_attn.predict(model, [image])[0] for image in (path, Image.open(path)))
        assert by_path.probabilities == opened.probabilities, path
    with pytest.raises(DataError, match="cannot read image 0: its pixels are of mode F"):
        timm_attn.predict(model, [Image.new("F", (8, 8))])


def test_the_command_names_what_it_passes_over(run, pictures, tmp_path, capsys):
    table, sheet = tmp_path / "p.csv", tmp_path / "sheet.png"
    cli.main(["predict", str(run), str(pictures), "--topk", "2", "--out", str(table), "--show", str(sheet)])
    out = capsys.readouterr().out
    assert "broken.jpg" in out and "notes.txt" not in out
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 and {row["rank"] for row in rows} == {"1", "2"}
    assert Image.open(sheet).width > 800
    assert "does not exist" in fails(capsys, "predict", str(run), str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "no images in" in fails(capsys, "predict", str(run), str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    assert "none of 1 images can be read" in fails(capsys, "predict", str(run), str(tmp_path / "empty"))


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
def test_names_that_are_no_utf8_are_written_as_they_are(run, tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    with open(folder + b"/\xff.png", "wb") as stream:
        image.save(stream, "PNG")
    cli.main(["predict", str(run), os.fsdecode(folder), "--topk", "1", "--out", str(tmp_path / "p.csv")])
    assert folder + b"/\xff.png," in (tmp_path / "p.csv").read_bytes()


def test_networks_that_take_no_rgb_images_say_so(run, tmp_path):
    model = timm.create_model("resnet18", in_chans=1, num_classes=10).eval()
    image = Image.new("RGB", (32, 32))
    with pytest.raises(UserError, match="takes images of 1 channels, and files are read as RGB"):
        timm_attn.predict(model, image)
    assert len(timm_attn.predict(model, torch.zeros(2, 1, 32, 32))) == 2
    with pytest.raises(UserError, match="takes images of 1 channels, and data is read as RGB"):
        validate(model, Recipe(data="digits"))


def test_classes_have_names():
    imagenet = timm.create_model("resnet18")
    assert class_names(imagenet)[207].startswith("golden retriever")
    assert class_names(timm.create_model("resnet18", num_classes=3)) == ["0", "1", "2"]
    assert class_names(timm.create_model("resnet18", num_classes=1000, in_chans=1))[1].startswith("goldfish")
    with pytest.raises(UserError, match="does not exist"):
        find_images([__import__("pathlib").Path("nowhere")])


# ----------------------------------------------------------------------------------- what a new user ran into


def with_dead_channels(n: int) -> nn.Module:
    """A gate behind a ReLU that n of its 12 channels never pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), timm.layers.SEModule(12, rd_channels=4))
    with torch.no_grad():
        model[0].bias[:n] = -1e3
        model[2].fc2.weight.mul_(20)
    return nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_channels_of_which_nothing_is_known_do_not_count():
    model, data = with_dead_channels(8), sample(classes=12)
    values = gates_of(model, data.images, "2").numpy()[:, 8:]
    with timm_attn.record(model) as gates, torch.no_grad():
        model(data.images)
    assert gates["2"].known.sum() == 4
    share = values.var(0).mean() / values.var()
    assert gates["2"].image_share == pytest.approx(share, rel=1e-3)
    (row,) = OBSERVATIONS["stripes"]({"a": model}, data).rows
    assert row["dead_channels"] == 8 and row["mean"] == pytest.approx(values.mean(), rel=1e-3)
    weight = torch.tensor([[1.0, torch.nan, 2.0, 3.0, torch.nan]])
    change = torch.tensor([[9.0, 0.0, 8.0, 7.0, 0.0]])
    assert rank_correlation(weight, change).item() == pytest.approx(-1)


def test_a_pass_that_raises_leaves_nothing():
    model, data = se_network(), sample(6)

    def stop(*_):
        raise RuntimeError("stop")

    with timm_attn.record(model) as gates, torch.no_grad():
        hook = model.layer3.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            model(data.images)
        hook.remove()
        model(data.images)
    assert gates.images == 6 and {gates[gate.path].images for gate in gates.gates} == {6}
    with timm_attn.record(model) as gates, torch.no_grad():
        model.layer3.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            model(data.images)
    assert gates.images == 0


def test_labels_are_of_one_pass_and_as_many_as_images():
    model, data = se_network(), sample(6)
    with timm_attn.record(model) as gates, torch.no_grad():
        gates.labels = [0, 0, 0, 1, 1, 1]
        model(data.images)
        share = gates["layer3.0.se"].class_share
        model(data.images + 1)  # without labels
        assert share == share and gates.labels is None
        model(data.images[:0])  # nothing to see
        gates.labels = [0, 1]
        with pytest.raises(ValueError, match=r"labels of shape \(2,\) for 6 images"):
            model(data.images)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"also": ["layer9.se"]}, ValueError, "no module 'layer9.se' in CifarResNet: name one such as"),
        ({"also": "layer1.0.se"}, TypeError, "further gates are a list"),
        ({"keep": -1}, ValueError, "keep must not be below 0"),
        ({"keep": "abc"}, TypeError, "keep is a number of images"),
        ({"gates": ["layer1.0.se"]}, TypeError, "gates are those of find_gates"),
    ],
)
def test_bad_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message), timm_attn.record(se_network(), **given):
        pass
    with pytest.raises(TypeError, match="record needs a network, got str"), timm_attn.record("resnet18"):
        pass


def test_networks_that_show_nothing_say_why():
    data = sample(4)
    fresh = narrow("resnet20_se").eval()  # timm starts the last norm of a branch at zero
    for what in ("stripes", "importance", "correlation"):
        with pytest.raises(
            UserError, match="see nothing but zeros, as its branches are still zero: train it"
        ):
            OBSERVATIONS[what]({"fresh": fresh}, data)
    with pytest.raises(UserError, match="whose branches are not zero"):
        OBSERVATIONS["stiffness"]({"fresh": fresh}, data)
    with pytest.raises(UserError, match="are constants, the same for every image, and fold away"):
        OBSERVATIONS["stripes"]({"asr": randomise(narrow("resnet20_asr")).eval()}, data)
    broken = se_network()
    with torch.no_grad():
        broken.layer2[0].conv1.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"is not finite after layer2.0.se in 4 of 4 images"):
        OBSERVATIONS["stripes"]({"broken": broken}, data)


def test_a_gate_may_be_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = timm.layers.SEModule(3, rd_channels=2)

        def forward(self, x):
            return self.se(x=x)

    model = Named()
    with timm_attn.record(model) as gates:
        model(sample(4).images)
    assert gates["se"].images == 4


def test_places_that_cannot_be_written_are_refused_before_the_work(
    run, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("timm_attn.cli.look.load_model", None)  # it is not reached
    no = str(tmp_path / "no" / "a")
    assert "does not exist: make it" in fails(capsys, "report", str(run), "--data", "digits", "--out", no)
    link = tmp_path / "link.html"
    link.symlink_to(no)
    assert "does not exist: make it" in fails(
        capsys, "report", str(run), "--data", "digits", "--out", str(link)
    )
    for option in ("--out", "--show"):
        assert "does not exist" in fails(capsys, "predict", str(run), str(pictures), option, no)
        assert "is a folder" in fails(capsys, "predict", str(run), str(pictures), option, str(tmp_path))
    message = fails(capsys, "look", "landscape", str(run), str(run), "--data", "digits")
    assert "a model is named twice" in message


def test_names_in_brackets_are_shown_as_they_are(run, tmp_path, capsys):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "[red]a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    cli.main(["predict", str(run), str(tmp_path), "--topk", "1"])
    out = capsys.readouterr().out
    assert "[red]a.png" in out and "left out: cannot read" in out and "gone.png" in out
    assert "--on-corrupt" not in out and "object at" not in out


def test_a_bad_tag_of_a_frozen_network_is_refused_first(tmp_path):
    for tag in ("my tag", "", "a/b", "graft_x"):
        with pytest.raises(UserError, match="tag"):
            export_frozen(tmp_path / "none", tag, tmp_path)
    assert not list(tmp_path.iterdir())


def test_networks_with_other_classes_than_the_first_are_not_compared():
    model = timm.create_model("resnet20", pretrained=True)
    names = list(model.pretrained_cfg["label_names"])
    check_same_input("again", model, model, names)
    with pytest.raises(UserError, match="again has other classes than the first model"):
        check_same_input("again", model, model, names[::-1])


@pytest.mark.parametrize(
    "field, value",
    [
        ("crop_pct", 0.875),
        ("interpolation", "bicubic"),
        ("crop_mode", "squash"),
        ("mean", (0.5, 0.5, 0.5)),
        ("input_size", (3, 40, 40)),
    ],
)
def test_networks_that_take_images_prepared_otherwise_are_not_compared(field, value):
    first, other = (timm.create_model("resnet20", pretrained=True) for _ in range(2))
    other.pretrained_cfg = other.default_cfg = {**other.pretrained_cfg, field: value}
    names = list(first.pretrained_cfg["label_names"])
    with pytest.raises(UserError, match=f"other takes other images than the first model .{field} "):
        check_same_input("other", other, first, names)
