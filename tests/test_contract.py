"""The contract: light checks on every registered model, all checks on a small network of every kind."""

import contract
import pytest
import timm
import torch
from contract import CHECKS, FOR_EVERY_MODEL, Case
from helpers import SMALL

import timm_attn
from timm_attn.models import BACKBONES, MECHANISMS, parse_name

#: Basic, Bottleneck and CIFAR. CIFAR networks of bottlenecks, whose parts these have, run under `make test-all`.
KINDS = [name for name in SMALL if parse_name(name)[0] != "resnet164"]
#: What takes seconds. ImageNet networks of basic blocks are made of the parts of the two other kinds; what an ONNX
#: file is made from is checked by `check_export`, and that each of its operations is the right one on one network.
SLOW = (contract.check_compile, contract.check_export, contract.check_onnx)
LEFT_OUT = {
    (name, check)
    for name in KINDS
    for check in SLOW
    if "18" in name or (check is contract.check_onnx and parse_name(name)[0] != "resnet20")
}
#: ASR with SE on top is ASR, too; SSIA has the stock blocks.
LEFT_OUT |= {(name, contract.check_compile) for name in ("resnet50_asr", "resnet50_ssia")}


def label(value) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("check_")


@pytest.mark.parametrize("name", timm_attn.model_names())
def test_every_registered_model(name, tmp_path):
    contract.run(contract.check_registration, Case(name, small=False), tmp_path)
    backbone, key = parse_name(name)
    # Of other families, test_attach.py makes small ones.
    if BACKBONES[backbone].layers and key not in ("sem", "spem"):
        contract.run(contract.check_forward_and_safetensors, Case(name), tmp_path)


@pytest.mark.parametrize("name", ["fmmnet110", "fmmnet152"])
def test_depth_leaves_a_fresh_product_finite(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        assert model(Case(name).images()).isfinite().all()


@pytest.mark.parametrize(
    ("case", "check"),
    [(Case(name), check) for name in KINDS for check in CHECKS if (name, check) not in LEFT_OUT],
    ids=label,
)
def test_every_kind(case, check, tmp_path):
    contract.run(check, case, tmp_path)


def test_every_mechanism_meets_every_check():
    checked = {
        (parse_name(name)[1], check) for name in KINDS for check in CHECKS if (name, check) not in LEFT_OUT
    }
    assert checked == {(mechanism, check) for mechanism in MECHANISMS for check in CHECKS}


@pytest.mark.all_models
@pytest.mark.parametrize("check", [*FOR_EVERY_MODEL, *CHECKS], ids=label)
@pytest.mark.parametrize("case", [Case(name, small=False) for name in timm_attn.model_names()], ids=label)
def test_everything_on_every_registered_model(case, check, tmp_path):
    contract.run(check, case, tmp_path)
