"""Pretrained weights as timm's users take them: whole, for other classes, other inputs, or features only."""

import json
from functools import cache

import pytest
import timm
import torch
from forked import run_code
from helpers import SMALL, narrow, randomise, same
from safetensors.torch import load_file, save_file

from timm_attn.weights import Checkpoint, sha256, write_index

WAYS = {
    "whole": {},
    "classes": {"num_classes": 3},
    "grey": {"in_chans": 1},
    "features": {"features_only": True},
    "pooled": {"num_classes": 0},
}
SCRIPT = """
import json, sys, warnings
import timm, torch
import timm_attn
names, ways = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in names:
    for way, options in ways.items():
        try:
            torch.save(timm.create_model(name, pretrained=True, **options).state_dict(), f"{name}.{way}.pt")
        except Exception as error:
            print(json.dumps([name, way, type(error).__name__, str(error)]))
"""


@cache
def small(name, seed):
    """Arguments of a small network, and random weights."""
    model = narrow(name)
    return model._model_args, randomise(model, seed).state_dict()


def write_hub(folder, names, damage=lambda name, state: state, states=None):
    """A hub folder with a small network of every architecture, with random weights or those given."""
    checkpoints = []
    for seed, name in enumerate(names):
        arguments, state = small(name, seed)
        state = (states or {}).get(name) or state
        place = folder / f"{name}.x"
        place.mkdir(parents=True)
        path = place / "model.safetensors"
        save_file(damage(name, state), path)
        cfg = timm.models.get_pretrained_cfg(name).to_dict(remove_source=True)
        checkpoint = Checkpoint(
            f"{name}.x",
            place,
            name,
            "x",
            pretrained_cfg={**cfg, "num_classes": 10, "label_names": None, "tag": "x"},
            model_args={k: v for k, v in arguments.items() if k != "num_classes"},
            files={path.name: {"sha256": sha256(path), "size": path.stat().st_size}},
        )
        checkpoints.append(checkpoint)
    write_index(folder, checkpoints)
    return folder


def make_hub(folder, damage=lambda name, state: state):
    """A hub folder with random weights of a small network of every mechanism and block type."""
    return write_hub(folder, SMALL, damage)


def create_all(hub, out, names=SMALL, ways=WAYS) -> list:
    """Create models in every way in a process of its own; returns what failed."""
    out.mkdir()
    result = run_code(SCRIPT, json.dumps(names), json.dumps(ways), env={"TIMM_ATTN_HUB": str(hub)}, cwd=out)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    assert create_all(make_hub(folder / "hub"), folder / "out") == []
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_every_way_takes_the_same_weights(name, loaded):
    states = {way: torch.load(loaded / "out" / f"{name}.{way}.pt") for way in WAYS}
    own = load_file(loaded / "hub" / f"{name}.x" / "model.safetensors")
    body = {k: v for k, v in own.items() if not k.startswith("fc.")}
    stem = own["conv1.weight"]
    assert states["whole"].keys() == own.keys()
    for way, state in states.items():
        for key, tensor in body.items():
            if way == "features" and key.startswith("ssia."):
                continue  # which acts on the logits
            if way == "grey" and key == "conv1.weight":
                torch.testing.assert_close(state[key], stem.sum(1, keepdim=True))
            else:
                assert torch.equal(state[key], tensor), (way, key)
    assert torch.equal(states["whole"]["fc.weight"], own["fc.weight"])
    assert states["classes"]["fc.weight"].shape[0] == 3
    assert not any(k.startswith("fc.") for way in ("features", "pooled") for k in states[way])


def test_weights_of_the_first_releases_are_taken(tmp_path):
    """ASR was in the place where a ResNet has SE."""
    arguments, state = small("resnet20_asr", 0)
    old = {key.replace(".asr.generators.", ".se.generators."): tensor for key, tensor in state.items()}
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 10}
    model = timm.create_model(
        "resnet20_asr", pretrained=True, pretrained_cfg_overlay=overlay, **{**arguments, "num_classes": 10}
    )
    assert same(model.state_dict(), state)


def without_last_weight(name, state):
    last = [key for key in state if not key.startswith("fc.") and key.endswith(".weight")][-1]
    return {key: tensor for key, tensor in state.items() if key != last}


def without_mechanism(name, state):
    own = [key for key in state if any(part in key for part in (".se.", "dia.", "conam.", "fmm.", "ssia."))]
    return {key: tensor for key, tensor in state.items() if key != (own or ["bn1.bias"])[0]}


def with_another_key(name, state):
    return {**state, "layer1.0.extra": torch.zeros(1)}


@pytest.mark.parametrize("damage", [without_last_weight, without_mechanism, with_another_key])
def test_a_key_too_few_or_too_many_raises_in_every_way(damage, tmp_path):
    hub, first = make_hub(tmp_path / "hub", damage), SMALL[:4]
    failures = create_all(hub, tmp_path / "out", first)
    assert {(name, way) for name, way, *_ in failures} == {(name, way) for name in first for way in WAYS}
    # What is missed does not depend on the way, nor how on the mechanism.
    others = create_all(hub, tmp_path / "others", SMALL[4:], {"whole": {}, "features": WAYS["features"]})
    assert {(name, way) for name, way, *_ in others} == {
        (n, w) for n in SMALL[4:] for w in ("whole", "features")
    }
    failures += others
    word = (
        "unexpected ['layer1.0.extra'] (1 in all)"
        if damage is with_another_key
        else "(1 in all), unexpected []"
    )
    for name, way, kind, message in failures:
        assert kind == "RuntimeError" and word in message, (name, way, kind, message)
    assert not [*(tmp_path / "out").iterdir(), *(tmp_path / "others").iterdir()]
