"""The contract: light checks on every registered model, all checks on a small network of every kind."""

import contract
import pytest
import timm
import torch
from contract import CHECKS, FOR_EVERY_MODEL, Case
from helpers import SMALL

import timm_attn
from timm_attn.models import MECHANISMS, parse_name

#: Basic and Bottleneck, CIFAR and ImageNet. What else is made of their parts runs under `make test-all`.
KINDS = SMALL
#: What takes seconds. What an ONNX file is made from is checked by `check_export`, and that each of its operations
#: is the right one on one network.
SLOW = (contract.check_compile, contract.check_export, contract.check_onnx)
LEFT_OUT = {(name, contract.check_onnx) for name in KINDS if parse_name(name)[0] != "resnet20"}
# Of what stands at the ends of branches, DIA and ASR go through ONNX.
LEFT_OUT |= {(f"resnet20_{key}", contract.check_onnx) for key in ("se", "asr_se", "sem", "spem")}
LEFT_OUT.add(("resnet20", contract.check_onnx))  # SSIA's network has the same operations then
LEFT_OUT |= {("resnet20_asr_se", check) for check in (contract.check_compile, contract.check_export)}
# Of networks with bottlenecks, DIA's state and FMM's blocks are what a compiler could stumble over.
LEFT_OUT |= {
    (name, contract.check_compile)
    for name in KINDS
    if parse_name(name)[0] == "resnet50" and parse_name(name)[1] not in ("dia", "fmm", "asr_se")
}
PREACTIVATION = ("preresnet164_dia", "wrn28_10_fmm", "wrn52_4_conam")


def label(value) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("check_")


#: Every backbone with DIA, every mechanism on some backbones; `make test-all` has all pairs.
REGISTERED = [
    name
    for name in timm_attn.model_names()
    if parse_name(name)[1] == "dia"
    or name in PREACTIVATION
    or parse_name(name)[0] in ("resnet50", "resnext50_32x4d", "resnet20", "wrn52_4", "vit_tiny_patch16_224")
]


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_model(name, tmp_path):
    contract.run(contract.check_registration, Case(name, small=False), tmp_path)
    # Of other families, test_attach.py makes small ones; depth and width have no code of their own.
    if name in (*SMALL, *PREACTIVATION):
        contract.run(contract.check_forward_and_safetensors, Case(name), tmp_path)


@pytest.mark.parametrize("name", ["fmmnet110", "fmmnet152"])
def test_depth_leaves_a_fresh_product_finite(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        assert model(Case(name).images()).isfinite().all()


@pytest.mark.parametrize(
    ("case", "check"),
    [
        *((Case(name), check) for name in KINDS for check in CHECKS if (name, check) not in LEFT_OUT),
        *((Case(name), check) for name in PREACTIVATION for check in CHECKS if check not in SLOW),
    ],
    ids=label,
)
def test_every_kind(case, check, tmp_path):
    contract.run(check, case, tmp_path)


def test_every_mechanism_meets_every_check():
    checked = {
        (parse_name(name)[1], check) for name in KINDS for check in CHECKS if (name, check) not in LEFT_OUT
    }
    wanted = {(mechanism, check) for mechanism in MECHANISMS for check in CHECKS}
    assert wanted - checked == {(key, contract.check_onnx) for key in ("", "se", "asr_se", "sem", "spem")}


@pytest.mark.all_models
@pytest.mark.parametrize("check", [*FOR_EVERY_MODEL, *CHECKS], ids=label)
@pytest.mark.parametrize("case", [Case(name, small=False) for name in timm_attn.model_names()], ids=label)
def test_everything_on_every_registered_model(case, check, tmp_path):
    contract.run(check, case, tmp_path)
