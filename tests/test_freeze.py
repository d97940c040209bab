"""Channel gates: found, recorded, frozen and absorbed, on small networks of timm, torchvision and one's own."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from forked import run_code
from helpers import narrow, use_hub
from hub_server import HubServer
from test_data import picture, write
from torch import nn

import timm_attn
from timm_attn import cli, passes
from timm_attn.absorb import build_frozen
from timm_attn.compare import relative_difference
from timm_attn.errors import UserError
from timm_attn.freeze import _parts
from timm_attn.gates import Gate, find_gates, gate_of
from timm_attn.layers.frozen import FrozenGate
from timm_attn.load import load_model
from timm_attn.passes import Passes
from timm_attn.publish import publish
from timm_attn.record import held, record
from timm_attn.search import GateSearch
from timm_attn.training import Recipe, validate
from timm_attn.training.freezing import read_images
from timm_attn.training.recipe_file import load_recipe
from timm_attn.training.run import save_model


@pytest.fixture(autouse=True)
def equal_times(monkeypatch, request):
    """What is chosen depends on how long gates take, which on a busy machine is another thing each time."""
    if request.node.name != "test_times_are_measured":
        monkeypatch.setattr(Passes, "gate_times", lambda self: dict.fromkeys(self.gates, 1.0))
        monkeypatch.setattr(Passes, "times", lambda self, networks, rounds=9: [1.0] * len(networks))


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Norms and gates that make a difference: in a fresh network all gates are about one half."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
            module.weight.uniform_(0.5, 1.5, generator=g)
            module.bias.normal_(0, 0.3, generator=g)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] < 128:
            module.weight.mul_(1.5)
    return model.eval()


def coloured(n: int, size: int = 32, channels: int = 3, dtype=torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    colour = torch.randn(n, channels, 1, 1, generator=g)
    return (colour + torch.randn(n, channels, size, size, generator=g)).to(dtype)


class GateAfterPooling(nn.Module):
    """Somebody's own gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


class Own(nn.Module):
    """A network of one's own; ``read`` is who reads what the gate gives."""

    def __init__(self, read: str = "one", groups: int = 1, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.act = nn.SiLU()
        self.gate = gate or timm.layers.SEModule(8, rd_channels=4)
        self.a, self.b = nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 8, 3)
        self.read, self.num_classes = read, 8

    def forward(self, x):
        x = self.gate(self.act(self.stem(x)))
        y = self.a(x)
        if self.read == "two":
            y = y + self.b(x)
        elif self.read == "sum":
            y = y + x[:, :, 1:-1, 1:-1]
        return y.mean((2, 3))


#: name: how to build it, how many gates it has, and how many of them a layer takes in.
NETWORKS = {
    "seresnet18": (lambda: narrow_timm("seresnet18", channels=[8, 16, 16, 24], layers=[1] * 4), 4, 4),
    "resnet20_dia": (lambda: narrow("resnet20_dia", layers=[3, 1, 1]), 5, 5),
    "resnet20_sem": (lambda: narrow("resnet20_sem", layers=[1, 1, 1]), 3, 3),
    "resnet20_spem": (lambda: narrow("resnet20_spem", layers=[1, 1, 1]), 3, 3),
    "lcnet_035": (lambda: narrow_timm("lcnet_035"), 2, 2),
    "mobilenetv3_small_050": (lambda: narrow_timm("mobilenetv3_small_050"), 9, 9),
    "regnety_002": (lambda: narrow_timm("regnety_002"), 13, 13),
    "test_efficientnet": (lambda: narrow_timm("test_efficientnet"), 2, 2),
    "eca": (lambda: narrow_timm("ecaresnet26t", layers=[1] * 4, channels=[8, 16, 16, 24]), 4, 4),
    "cbam": (lambda: narrow_timm("resnet18", block_args={"attn_layer": "cbam"}, layers=[1] * 4), 4, 4),
    "torchvision": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 9, 9),
    "ese": (lambda: Own(gate=timm.layers.EffectiveSEModule(8)), 1, 1),
    "ceca": (lambda: Own(gate=timm.layers.CecaModule(8)), 1, 1),
    "gather excite": (lambda: Own(gate=timm.layers.GatherExcite(8, use_mlp=False)), 1, 1),
    "one reader": (lambda: Own(), 1, 1),
    "two readers": (lambda: Own("two"), 1, 1),
    "a sum reads it": (lambda: Own("sum"), 1, 0),
    "grouped": (lambda: Own(groups=4), 1, 1),
    "depthwise": (lambda: Own(groups=8), 1, 1),
}


def narrow_timm(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


@pytest.mark.parametrize("name", NETWORKS)
def test_constants_are_absorbed_exactly(name):
    make, count, taken = NETWORKS[name]
    model = lively(make()).double()
    x = coloured(6, 64, dtype=torch.float64)
    gates, _ = find_gates(model, x)
    assert len(gates) == count
    g = torch.Generator().manual_seed(2)
    constants = {gate: torch.rand(gate.channels, generator=g).double() + 0.1 for gate in gates}
    frozen, where = build_frozen(model, constants, x)
    assert sum(place != "a multiplication" for place in where.values()) == taken
    assert sum(isinstance(m, FrozenGate) for m in frozen.modules()) == count - taken
    with torch.no_grad(), held(model, constants):
        expected = model(x)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-9, atol=1e-10)
    # The gates do something.
    assert (model(x) - expected).abs().max() > 1e-4 * expected.abs().max()


def test_what_is_no_channel_gate_is_left_alone_and_listed():
    ends = [f"layer{n}.0.se" for n in (1, 2, 3, 4)]
    for attention, inner, word in (
        ("cbam", ".channel", "CbamModule"),  # of which a part is a gate
        ("gc", "", None),
        ("nl", None, "NonLocalAttn"),
    ):
        model = narrow_timm("resnet18", block_args={"attn_layer": attention}, layers=[1] * 4)
        found, others = find_gates(lively(model), coloured(4, 64))
        assert [gate.path for gate in found] == ([] if inner is None else [end + inner for end in ends])
        reason = f"{word} is no channel gate: it does more than scale channels"
        assert others == (dict.fromkeys(ends, reason) if word else {})


def test_ones_own_gate_is_listed_until_it_is_named():
    model = lively(Own(gate=GateAfterPooling(8)))
    assert find_gates(model, coloured(4)) == (
        [],
        {"gate": "GateAfterPooling scales channels but is not known: name it to have it frozen"},
    )
    for name in (GateAfterPooling, "gate"):
        found, others = find_gates(model, coloured(4), [name])
        assert found == [Gate("gate", "GateAfterPooling", 8)] and not others
    with pytest.raises(ValueError, match=r"no module 'gat' in Own: name one such as"):
        find_gates(model, coloured(4), ["gat"])


def test_the_recorder_knows_what_numpy_would_say():
    model = lively(Own()).double()
    x, labels = coloured(60, dtype=torch.float64), torch.arange(60) % 3
    (gate,), _ = find_gates(model, x[:4])
    with record(model, [gate]) as found:
        for part in range(0, 60, 16):
            found.labels = labels[part : part + 16]
            model(x[part : part + 16])
    values = gate_of(model.act(model.stem(x)), model.gate(model.act(model.stem(x))), 1)[0]
    direct = model.gate(torch.ones(1, 8, 1, 1).double())  # of a map of ones: another gate, of the same size
    assert values.shape == (60, 8) and direct.shape == (1, 8, 1, 1)
    statistics = found.statistics["gate"]
    torch.testing.assert_close(statistics.mean, values.mean(0))
    torch.testing.assert_close(statistics.variance, values.var(0, unbiased=False))
    torch.testing.assert_close(statistics.low.double(), values.amin(0), rtol=1e-6, atol=0)
    within = values.var(0, unbiased=False).mean()
    assert math.isclose(statistics.image_share, within / values.var(unbiased=False), rel_tol=1e-9)
    means = torch.stack([values[labels == k].mean(0) for k in range(3)])
    between = 20 * (means - values.mean(0)).square().sum()  # 20 images a class; ω² by its textbook formula
    rest = sum((values[labels == k] - means[k]).square().sum() for k in range(3))
    noise = rest / 8 / (60 - 3)
    omega = (between / 8 - (3 - 1) * noise) / ((between + rest) / 8 + noise)
    assert math.isclose(statistics.class_share, max(0, omega), rel_tol=1e-6, abs_tol=1e-12)
    assert not model.gate._forward_hooks


def test_hooks_go_after_an_exception():
    model = lively(Own())
    (gate,), _ = find_gates(model, coloured(4))
    with pytest.raises(ZeroDivisionError), record(model, [gate]):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), held(model, {gate: torch.ones(8)}):
        raise ZeroDivisionError
    assert not model.gate._forward_hooks


def test_a_dead_channel_has_no_say():
    x = torch.zeros(2, 3, 4, 4)
    x[:, 1] = 1
    gate, rest = gate_of(x, x * 0.5, 1)
    assert gate[:, 1].tolist() == [0.5, 0.5] and gate[:, 0].isnan().all() and rest == 0


# ------------------------------------------------------------------------------------------------- the choice


@pytest.fixture(scope="module")
def trained():
    """A small network that tells bright images from dark ones, and one that needs a gate for it."""
    torch.manual_seed(0)
    return lively(narrow_timm("seresnet18", channels=[8, 16, 16, 24], layers=[1] * 4))


def test_a_gate_that_takes_long_does_not_use_up_the_budget():
    slow, *quick = (Gate(name, "SE", 8) for name in "abcd")
    search = object.__new__(GateSearch)
    search.staying, search._loss = (
        {},
        lambda some: (sum(0.09 if gate is slow else 0.03 for gate in some), 0.0),
    )
    search.milliseconds = dict.fromkeys(quick, 1.0) | {slow: 2.9}  # its damage for its time is the least
    search.orders = [[slow, *quick], [*quick, slow]]
    assert search.choose(0.1) == (quick, {}, {slow: pytest.approx(0.18)}, [*quick, slow])
    search.milliseconds[slow] = 3.1
    assert search.choose(0.1).chosen == [slow]
    assert search.choose(1.0).chosen == [slow, *quick]


def test_times_are_measured():
    class Slow(timm.layers.SEModule):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    model = lively(Own(gate=Slow(8, rd_channels=4)))
    gates, _ = find_gates(model, coloured(4))
    passes = Passes(model, gates, [(coloured(4), None)], 4)
    assert passes.gate_times()[gates[0]] >= 20 and passes.times([model], 1)[0] >= 20
    assert not model.gate._forward_hooks and not model.gate._forward_pre_hooks


def test_everything_within_a_large_budget_and_nothing_that_costs_more(trained):
    x = coloured(400)
    with torch.no_grad():
        labels = trained(x).argmax(1)
    whole = timm_attn.freeze(trained, x, labels, budget=100)
    assert whole.frozen == 4 and all(gate.frozen for gate in whole.gates)
    assert whole.model.pretrained_cfg["architecture"] == "resnet18" and whole.loads
    stock = timm.create_model("resnet18", layers=[1] * 4, channels=[8, 16, 16, 24])
    assert set(whole.model.state_dict()) == set(stock.state_dict())
    one = 100 / 120 + 1e-6  # an image more or less, in batches of other sizes
    assert whole.before.top1 == pytest.approx(100, abs=one) and whole.images == (160, 120, 120)
    least = timm_attn.freeze(trained, x, labels, budget=5.0)
    assert 0 < least.frozen < 4 and least.model is not trained
    assert sum(gate.frozen for gate in least.gates) == least.frozen
    for gate in least.gates:
        assert gate.frozen == gate.where.startswith("in ")
        assert gate.frozen or "points with those before it" in gate.where
    # On the images for choosing, by the definition of the budget.
    _, (choosing, theirs), (last, others) = _parts(x, labels, None, None, 5.0)
    right = least.model(choosing).argmax(1) == theirs
    difference = 100 * (1 - right.double())
    assert difference.mean() <= max(5.0, difference.std() / len(difference) ** 0.5) + one
    # And the figures are of others.
    top1 = 100 * (least.model(last).argmax(1) == others).double().mean().item()
    assert least.after.top1 == pytest.approx(top1, abs=one)


def test_kept_gates_stay_and_agreement_serves_without_labels(trained):
    report = timm_attn.freeze(trained, coloured(340), every=True, keep=["layer1.*", "layer4.0.se"])
    assert [gate.frozen for gate in report.gates] == [False, True, True, False]
    assert report.gates[0].where == "named by keep"
    assert math.isnan(report.before.top1) and report.before.agreement == 100 > report.after.agreement
    assert report.model._model_args["kept"] == [0, 3] and report.model._model_args["backbone"] == "seresnet18"


def test_a_regnet_without_its_gates_is_built_by_name():
    """No other name of timm's is that network."""
    model = lively(narrow_timm("regnety_002"))
    report = timm_attn.freeze(model, coloured(340, 32), every=True)
    assert report.loads and report.frozen == 13
    assert report.model.pretrained_cfg["architecture"] == "regnety_002"
    assert report.model._model_args["se_ratio"] == 0
    again = timm.create_model("regnety_002", num_classes=10, se_ratio=0).eval()
    again.load_state_dict(report.model.state_dict())
    x = coloured(4)
    assert torch.equal(again(x), report.model(x))


def test_a_runs_tail_goes_first():
    model = lively(narrow("resnet20_dia", layers=[3, 1, 1]))
    report = timm_attn.freeze(model, coloured(340, 8), every=True, keep=["layer1.1.*"])
    stays = {gate.path: gate.where for gate in report.gates if not gate.frozen}
    assert stays == {
        "layer1.0.drop_path": "layer1.1.drop_path, which stays, reads its cell",
        "layer1.1.drop_path": "named by keep",
    }
    x = coloured(4)
    assert report.model(x).shape == (4, 10) and report.model.layer1[0].dia is not None


@pytest.mark.parametrize("name", ["seresnet18", "mobilenetv3_small_050", "resnet20_dia"])
def test_what_is_left_is_built_by_name(name, tmp_path):
    model = lively(NETWORKS[name][0]())
    x = coloured(340, 16)
    whole = timm_attn.freeze(model, x, every=True)
    part = timm_attn.freeze(model, x, every=True, keep=[whole.gates[0].path])
    for report in (whole, part):
        folder = tmp_path / str(report.frozen)
        folder.mkdir()
        save_model(report.model, folder, [str(i) for i in range(10)])
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(again(x[:4]), report.model(x[:4]))
        maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(x[:4])
        assert len(maps) >= 3
        code = f"import timm, timm_attn; print(timm.create_model('local-dir:{folder}', pretrained=True).num_classes)"
        result = run_code(code) if report is part and name == "seresnet18" else None
        assert result is None or result.stdout.strip() == "10", result.stderr


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("name", ["resnet20_se", "resnet20_dia", "mobilenetv3_small_050"])
def test_a_frozen_network_is_frozen_further(name, absorbed, tmp_path, monkeypatch):
    if not absorbed:
        monkeypatch.setattr("timm_attn.absorb._plan", lambda *arguments: {})
    model = lively(
        timm.create_model(name, num_classes=10, **({} if "mobile" in name else {"channels": [4, 8, 8]}))
    )
    x, names = coloured(340, 32 if "mobile" in name else 8), [str(i) for i in range(10)]
    paths = [gate.path for gate in find_gates(model, x[:4])[0]]
    network = model
    few = paths[1::3] if "dia" not in name else paths[:4]
    for keep in (few, few[1:2] if "dia" not in name else few[:1], []):
        found = timm_attn.freeze(network, x, every=True, keep=keep)
        assert found.loads and len(found.gates) - found.frozen == len(keep)
        folder = tmp_path / str(len(keep))
        folder.mkdir()
        save_model(found.model, folder, names)
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(network(x[:4]), found.model(x[:4]))
        assert len(find_gates(network, x[:4])[0]) == len(keep)
    at_once = timm_attn.freeze(model, x, every=True).model
    assert network.state_dict().keys() == at_once.state_dict().keys()


def test_recovery_is_asked_for_more_gates_until_the_budget_ends(trained):
    x = coloured(400, 16)
    with torch.no_grad():
        labels = trained(x).argmax(1)
    asked = []

    def recover(network):
        asked.append(sum(isinstance(m, timm.layers.SEModule) for m in network.modules()))
        return network  # untrained: it must not pass

    report = timm_attn.freeze(trained, x, labels, budget=1.0, recover=recover)
    plain = timm_attn.freeze(trained, x, labels, budget=1.0)
    assert asked and report.frozen == plain.frozen < 4
    everything = timm_attn.freeze(trained, x, labels, every=True, recover=recover)
    assert everything.frozen == 4


# -------------------------------------------------------------------------------------------------- bad input


class Shared(Own):
    def forward(self, x):
        return self.a(self.gate(self.gate(self.act(self.stem(x))))).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (lambda: timm.create_model("resnet18"), {}, ValueError, "ResNet has no channel gates to freeze"),
        (Own, {"images": coloured(50)}, ValueError, r"50 images are too few: .*: give 3334 or more"),
        (Own, {"images": coloured(50), "budget": 0.0}, ValueError, "fewer than 100 tell nothing: give 334"),
        (Own, {"images": coloured(900, channels=4)}, ValueError, r"Own does not take images \(4, 32, 32\)"),
        (Own, {"images": [1]}, TypeError, "images must be normalised, B × C × H × W, got list"),
        (Own, {"labels": torch.full((900,), 8)}, ValueError, "label 8 is not one of the network's 8 classes"),
        (Own, {"labels": torch.zeros(3).long()}, ValueError, "labels must be 900 whole numbers"),
        (Own, {"budget": -1}, ValueError, "budget is in points of top-1, from 0 to 100, got -1"),
        (Own, {"keep": "gate"}, TypeError, "keep is a list, got 'gate'"),
        (Shared, {}, ValueError, "gate: SEModule acts in 2 places, which one constant does not serve"),
        (
            lambda: timm.create_model("seresnet18", drop_rate=0.2).train(),
            {},
            ValueError,
            r"in training mode, where dropout acts: call .eval\(\) first",
        ),
        (lambda: "resnet18", {}, TypeError, "freeze needs a network, got str"),
        (nn.Identity, {}, ValueError, "Identity has no parameters"),
        (Own, {"keep": ["gat"]}, ValueError, "keep 'gat' names no gate: gates are gate"),
        (Own, {"gates": "gate"}, TypeError, "gates is a list, got 'gate'"),
        (Own, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (Own, {"images": coloured(0)}, TypeError, "images must be normalised"),
        (Own, {"images": coloured(900) / 0}, ValueError, "images hold NaN or infinity, first in image 0"),
        (
            Own,
            {"calibration": coloured(200, 16)},
            ValueError,
            r"calibration is of \(3, 16, 16\), images",
        ),
        (Own, {"calibration": coloured(20)}, ValueError, "20 images for the means are too few: give 100"),
        (
            Own,
            {"calibration": coloured(200), "calibration_labels": torch.zeros(3).long()},
            ValueError,
            "3 calibration_labels for 200 images",
        ),
        (
            lambda: timm.create_model("seresnet18", features_only=True),
            {},
            ValueError,
            "FeatureListNet gives no logits",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(make, change, error, message):
    given = {"images": coloured(900), "budget": 1.0, **change}
    if change == {"images": given["images"]} and len(given["images"]) == 50:
        given["budget"] = 0.1
    model = make()
    model = model.eval() if isinstance(model, nn.Module) and "dropout" not in message else model
    with pytest.raises(error, match=message) as caught:
        timm_attn.freeze(model, **given)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- the command line


def test_the_command_writes_what_timm_loads_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    recipe = ["--data", "digits", "--img-size", "8", "--batch-size", "128", "--crop-padding", "1"]
    kwargs = ["--model-kwargs", "channels=[8,8,8]", "layers=[1,1,1]"]
    cli.main(["train", "resnet20_se", *recipe, "--epochs", "1", *kwargs, "--out", str(tmp_path / "run")])
    hub = tmp_path / "hub"
    cli.main(["export", str(tmp_path / "run"), "--tag", "d", "--hub", str(hub)])
    out = tmp_path / "frozen"
    freeze = [
        "freeze",
        str(hub / "resnet20_se.d"),
        "--data",
        "digits",
        "--all",
        "--recover",
        "6",
        "--out",
        str(out),
    ]
    from timm_attn.training import freezing

    # Stopped in the middle of recovery, at a step of which there is a checkpoint.
    train = freezing.train

    def stopped(model, recipe, run):
        def stop(step):
            if step == 4:
                raise KeyboardInterrupt

        recipe = dataclasses.replace(recipe, checkpoint_every=2)
        return train(model, recipe, run, on_step=stop)

    monkeypatch.setattr(freezing, "train", stopped)
    with pytest.raises(SystemExit) as status:
        cli.main(freeze)
    assert status.value.code == 130 and not (out / "config.json").exists()
    assert "stopped; run the same command again to resume" in capsys.readouterr().err
    monkeypatch.setattr(freezing, "train", None)  # it is not started again
    capsys.readouterr()
    cli.main(freeze)
    assert "3 of 3 gates are frozen" in capsys.readouterr().out
    report = json.loads((out / "freeze.json").read_text())
    assert report["steps"] == 6 and report["images"] == [1437, 180, 180] and (out / "freeze.png").exists()
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.pretrained_cfg["architecture"] == "resnet20"
    # It is trained and evaluated on images like the original's.
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 8, 8)
    (again,) = (load_recipe(path / "run" / "recipe.yaml") for path in out.glob("recover-*"))
    assert (again.img_size, again.crop_padding, again.hflip) == (8, 1, False)
    with pytest.raises(SystemExit):
        cli.main(freeze)
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["freeze", str(out), "--data", "digits", "--out", str(tmp_path / "again")])
    assert "has no channel gates to freeze" in capsys.readouterr().err and not (tmp_path / "again").exists()

    part = tmp_path / "part"
    source = str(hub / "resnet20_se.d")
    cli.main(["freeze", source, "--data", "digits", "--all", "--keep", "layer3.*", "--out", str(part)])
    _exported_and_published([out, part], hub, monkeypatch, capsys)


def _exported_and_published(folders, hub, monkeypatch, capsys):
    """Frozen networks go into the index, have cards, and come back from the Hub as they went."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = [load_model(f"local-dir:{folder}") for folder in folders]

    def validate_elsewhere(model, recipe):
        """As with an accelerator, on which the model is left."""
        figures = validate(model, recipe)
        model.to("meta")
        return figures

    monkeypatch.setattr(sys.modules["timm_attn.publish.export_frozen"], "validate", validate_elsewhere)
    for folder in folders:
        cli.main(["export", str(folder), "--tag", "d_frozen", "--hub", str(hub)])
        before = (hub / "index.json").read_text()
        with pytest.raises(SystemExit):
            cli.main(["export", str(folder), "--tag", "d_frozen", "--hub", str(hub)])
        assert "is there already" in capsys.readouterr().err and (hub / "index.json").read_text() == before
    with HubServer(tokens={"hf_a": {"name": "alice", "orgs": {}}}) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_a")
        use_hub(monkeypatch, server.endpoint)
        names = ["resnet20.d_frozen", "frozen.d_frozen"]
        publish([hub / name for name in names], "alice")
        for name, model, constants in zip(names, loaded, ("3 of 3", "2 of 3"), strict=True):
            card = server.files(f"alice/{name}")["README.md"].decode()
            assert f"{constants} channel gates are frozen" in card and "not used to choose" in card
            assert "base_model: alice/resnet20_se.d" in card and "(freeze.png)" in card
            assert "import timm_attn" in card and "- transformers" not in card
            assert "over images of the train split, whatever the loss" in card
            told = json.loads(server.files(f"alice/{name}")["freeze.json"])
            assert (told["source"], told["data"], told["budget"]) == ("resnet20_se.d", "digits", None)
            again = timm.create_model(f"hf-hub:alice/{name}", pretrained=True).eval()
            assert torch.equal(again(images), model(images))
        features = timm.create_model("hf-hub:alice/frozen.d_frozen", pretrained=True, features_only=True)
        assert len(features(images)) == len(features.feature_info.channels())
    torch.save(loaded[1](images), hub.parent / "outputs.pt")
    run_code(REGISTERED, cwd=hub.parent)
    with pytest.raises(SystemExit):
        cli.main(["export", str(folders[0]), "--tag", "e", "--hub", str(hub.parent / "other")])
    assert "export that one first" in capsys.readouterr().err


@pytest.mark.parametrize("shape, axis", [((2, 4, 3, 3), 1), ((2, 5, 4), -1)])
def test_a_constant_keeps_the_precision_of_the_map(shape, axis):
    assert FrozenGate(4, axis)(torch.randn(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16


#: A folder with a frozen network is registered; saved again, the network has the options it was made with.
REGISTERED = """
import timm, timm_attn, torch
from pathlib import Path
from timm_attn.load import load_model
from timm_attn.training.run import save_model
assert "frozen.d_frozen" in timm_attn.register_folder("hub")
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
expected = torch.load("outputs.pt")
for model in (timm.create_model("frozen.d_frozen", pretrained=True).eval(), load_model("frozen.d_frozen")):
    assert torch.equal(model(x), expected)
    assert model._model_args.keys() >= {"backbone", "kept", "multiplied", "channels", "layers"}
Path("saved").mkdir()
save_model(model, Path("saved"), list(model.pretrained_cfg["label_names"]))
assert torch.equal(load_model("saved")(x), expected)
"""


def test_the_damage_of_each_gate_is_measured_on_all_classes(monkeypatch):
    """Folders of images are sorted by class."""
    monkeypatch.setattr(passes, "ALONE", 30)
    model = narrow("resnet20_se").eval()
    images, labels = torch.randn(100, 3, 32, 32), torch.arange(100) // 25
    work = Passes(model, [], [(images, labels)], 16)
    taken = torch.cat([y for _, y in work.batches(0, passes.ALONE)])
    assert len(taken) == 30 and len(taken.unique()) == 4
    again = torch.cat([x for x, _ in work.batches(0, passes.ALONE)])
    assert torch.equal(again, torch.cat([x for x, _ in work.batches(0, passes.ALONE)]))
    assert torch.equal(torch.cat([x for x, _ in work.batches(0)]), images)


CLASSES = ("airplane", "automobile", "bird")  # of those that a resnet20 has by default


def test_only_a_training_split_that_is_not_there_is_done_without(tmp_path, capsys):
    model, recipe = narrow("resnet20_se"), Recipe(data=str(tmp_path / "d"), workers=0)
    write(tmp_path / "d", split="test", images=[picture(i) for i in range(6)], names=CLASSES)
    images, labels, means, classes, *_ = read_images(model, recipe, 10, show=False)
    assert len(images) == len(labels) == 6 and means is classes is None
    assert (
        "no split train, only test: the means of the gates are from evaluation images"
        in capsys.readouterr().out
    )
    write(
        tmp_path / "d",
        images=[*[picture(i) for i in range(5)], {"bytes": b"no image", "path": None}],
        names=CLASSES,
    )
    with pytest.raises(UserError, match=r"row 5 of .*d \(train\)"):
        read_images(model, recipe, 10, show=False)
    recipe = dataclasses.replace(recipe, on_corrupt="skip")
    assert len(read_images(model, recipe, 10, show=False)[2]) == 5


def test_a_batch_of_corrupt_images_only_is_left_out(tmp_path):
    model, broken = narrow("resnet20_se"), {"bytes": b"no image", "path": None}
    large = [picture(i, (80, 80)) for i in range(4)]
    for split in ("train", "test"):
        write(tmp_path / "d", split=split, images=[*large, broken], names=CLASSES)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "input_size": (3, 80, 80),
    }  # larger ones are read in batches
    recipe = Recipe(data=str(tmp_path / "d"), batch_size=4, workers=0, on_corrupt="skip")
    images, labels, *_ = read_images(model, recipe, 10, show=False)
    assert len(images) == len(labels) == 4


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    from timm_attn.training import Recipe
    from timm_attn.training.freezing import freeze_trained

    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        freeze_trained("resnet20_se", Recipe(data="digits"), tmp_path)


def test_plan_is_empty_for_a_negative_constant():
    model = lively(Own()).double()
    x = coloured(4, dtype=torch.float64)
    (gate,), _ = find_gates(model, x)
    constants = {gate: -torch.ones(8).double()}
    frozen, where = build_frozen(model, constants, x)
    assert where == {gate: "a multiplication"}
    with held(model, constants):
        torch.testing.assert_close(frozen(x), model(x))


def test_the_report_is_json(tmp_path):
    from timm_attn.training.freezing import _json, draw

    report = timm_attn.freeze(lively(Own()), coloured(340), every=True, curves=True)
    assert json.loads(json.dumps(_json(report)))["before"]["top1"] is None
    draw(report, "own", Path(tmp_path) / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


# ----------------------------------------------------------------------------------- what a new user ran into


def test_a_network_that_was_changed_is_not_called_what_it_was():
    model = lively(narrow_timm("seresnet18", channels=[8, 16, 16, 24], layers=[1] * 4))
    model.maxpool = nn.Identity()  # as for small images; no key tells
    x = coloured(400, 16)
    for keep in ([], ["layer1.*"]):
        report = timm_attn.freeze(model, x, every=True, keep=keep)
        assert not report.loads and isinstance(report.model.maxpool, nn.Identity)
    attached = timm_attn.attach(narrow_timm("resnet18", channels=[8, 16, 16, 24], layers=[1] * 4), "sem")
    report = timm_attn.freeze(lively(attached), x, every=True)
    assert report.loads and report.model.pretrained_cfg["architecture"] == "resnet18"
    report = timm_attn.freeze(attached, x, every=True, keep=["layer1.*"])
    assert not report.loads and any(isinstance(m, timm_attn.layers.SEM) for m in report.model.modules())


def test_gates_one_after_the_other():
    model = lively(
        timm_attn.attach(narrow_timm("seresnet18", channels=[8] * 4, layers=[1] * 4), "dia")
    ).double()
    x = coloured(6, dtype=torch.float64)
    gates, _ = find_gates(model, x)
    assert len(gates) == 8
    constants = {gate: torch.rand(gate.channels, dtype=torch.float64) + 0.5 for gate in gates}
    frozen, _ = build_frozen(model, constants, x)
    with held(model, constants):
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-10)


def test_a_kept_end_of_a_run_keeps_what_feeds_it_in_curves_and_recovery_too():
    model = lively(narrow("resnet20_dia", layers=[2, 1, 1]))
    report = timm_attn.freeze(
        model, coloured(400, 8), every=True, keep=["layer1.1.*"], curves=True, recover=lambda network: network
    )
    assert [gate.frozen for gate in report.gates] == [False, False, True, True]
    assert [n for n, *_ in report.curves["depth"]] == [0, 1, 2]


def test_classes_in_turn_are_in_every_part():
    for _, labels in _parts(torch.zeros(2000, 1, 1, 1), torch.arange(2000) % 10, None, None, 0.0):
        assert len(labels.unique()) == 10


def test_the_frozen_architecture_gives_feature_maps():
    for backbone in ("mobilenetv3_small_050", "resnet20_se", "seresnet18"):
        stock = timm.create_model(backbone, features_only=True)
        model = timm.create_model("frozen", backbone=backbone, kept=[0], features_only=True)
        assert model.feature_info.channels() == stock.feature_info.channels()
    with pytest.raises(ValueError, match="seresnet18 has 8 gates, numbered from 0: there is no gate 9"):
        timm.create_model("frozen", backbone="seresnet18", kept=[9])
    with pytest.raises(ValueError, match="frozen needs the name of a network as backbone="):
        timm.create_model("frozen")


def test_classes_that_make_no_difference_have_no_share():
    model = lively(Own())
    (gate,), _ = find_gates(model, coloured(4))
    with record(model, [gate]) as found:
        found.labels = torch.arange(300) % 100
        model(coloured(300))
    assert found.statistics["gate"].class_share < 0.1


def test_gates_after_a_norm_of_dias_own_are_recorded_and_frozen():
    """The authors' pre-activation networks, in which a norm stands between branch and gate."""
    torch.manual_seed(0)
    model = timm.create_model("preresnet164_dia", layers=(2, 1, 1), num_classes=5)
    x = coloured(400, 5)
    with torch.no_grad():
        model.train()(x[:64])
    with record(model.eval()) as found, torch.no_grad():
        model(x)
    ends = [f"stages.{path}.drop_path.1" for path in ("0.blocks.0", "0.blocks.1", "1.blocks.0", "2.blocks.0")]
    assert [gate.path for gate in found.gates] == ends and not found.unknown
    report = timm_attn.freeze(model, x, every=True, keep=["stages.0*"])
    assert report.frozen == 2 and {row.where for row in report.gates} >= {"in stages.2.blocks.0.dia_norm"}
    again = timm.create_model("frozen", **report.model._model_args).eval()
    again.load_state_dict(report.model.state_dict())
    assert torch.equal(again(x[:4]), report.model(x[:4]))
    with held(model, {g: found[g.path].mean.float() for g in found.gates[2:]}), torch.no_grad():
        assert relative_difference(model, again, x[:4]) < 0.02
