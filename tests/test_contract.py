"""The contract: light checks on every registered model, all checks on a small network of every kind."""

import contract
import pytest
from contract import CHECKS, FOR_EVERY_MODEL, Case
from helpers import SMALL

import timm_attn
from timm_attn.models import parse_name

#: Basic, Bottleneck and CIFAR. CIFAR networks of bottlenecks, whose parts these have, run under `make test-all`.
KINDS = [name for name in SMALL if parse_name(name)[0] != "resnet164"]
#: Slow, and made of the parts of the two others; under `make test-all` they are exported, too.
NOT_AS_ONNX = [name for name in KINDS if "18" in name]


def label(value) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("check_")


@pytest.mark.parametrize("check", FOR_EVERY_MODEL, ids=label)
@pytest.mark.parametrize("case", [Case(name, small=False) for name in timm_attn.model_names()], ids=label)
def test_every_registered_model(case, check, tmp_path):
    contract.run(check, case, tmp_path)


@pytest.mark.parametrize(
    ("case", "check"),
    [
        (Case(name), check)
        for name in KINDS
        for check in CHECKS
        if check is not contract.check_onnx or name not in NOT_AS_ONNX
    ],
    ids=label,
)
def test_every_kind(case, check, tmp_path):
    contract.run(check, case, tmp_path)


@pytest.mark.all_models
@pytest.mark.parametrize("check", CHECKS, ids=label)
@pytest.mark.parametrize("case", [Case(name, small=False) for name in timm_attn.model_names()], ids=label)
def test_everything_on_every_registered_model(case, check, tmp_path):
    contract.run(check, case, tmp_path)
