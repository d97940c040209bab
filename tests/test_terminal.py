"""What a user sees who has another terminal, another interpreter or no compiler; and a caller's own state."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import run_code
from helpers import python
from PIL import Image

from timm_attn.errors import UserError
from timm_attn.training import Recipe, train, validate
from timm_attn.training.augment import AutoAugment

TRAIN = ["train", "resnet20_asr", "--data", "digits", "--epochs", "1", "--img-size", "8"]
TRAIN += ["--model-kwargs", "layers=[1,1,1]"]
TINY = {"data": "digits", "epochs": 1, "batch_size": 64, "img_size": 8, "model_kwargs": ("layers=[1,1,1]",)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "run"
    train("resnet20_asr", Recipe(**TINY), folder)
    return folder


USE = """
import timm, timm_attn
from timm_attn.cli import main
data = ["--data", "pictures"]
small = ["--model-kwargs", "layers=[1,1,1]", "--epochs", "1", "--batch-size", "4", "--workers", "1"]
main(["train", "resnet20_asr", *data, *small, "--precision", "bf16", "--mixup", "0.8", "--ema-decay", "0.9", "--out", "run"])
main(["validate", "run", *data])
main(["fold", "run"])
main(["export", "run", "--tag", "pictures", "--hub", "hub", "--dataset-license", "cc0-1.0"])
"""


def test_no_command_warns_of_what_is_right(tmp_path):
    """Neither does a hub folder which the first export makes, nor does any library."""
    import matplotlib.font_manager  # noqa: F401 (writes a list of fonts, and warns where that takes long)

    for folder in ("train/up", "train/down", "val/up", "val/down"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        gradient = Image.linear_gradient("L").resize((16, 16)).rotate(180 * folder.endswith("up"))
        for number in range(4):
            gradient.convert("RGB").save(tmp_path / "pictures" / folder / f"{number}.png")
    env = {"TIMM_ATTN_HUB": str(tmp_path / "hub"), "HF_HOME": str(tmp_path / "cache")}
    load = "import timm, timm_attn; timm.create_model('resnet20_asr', pretrained=True)"
    for done in (python("-c", USE, cwd=tmp_path, env=env), run_code(load, cwd=tmp_path, env=env)):
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "warn" not in done.stdout.lower(), done.stdout


def test_any_encoding_is_written_to(run, tmp_path):
    command = ("-m", "timm_attn", "fold", str(run), "--out", str(tmp_path / "f"))
    done = python(*command, env={"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and "logit" in done.stdout and not done.stderr
    assert (tmp_path / "f" / "model.safetensors").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_is_no_reason_to_resume_what_was_no_training():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "timm_attn", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2 and "No space left" in done.stderr
    assert "--resume" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("policy", ["nonsense", "rand-m9-nonsense", "rand-x3", "augmix-n2", "v0-m3", "rand9"])
def test_a_policy_is_checked_without_assertions(policy):
    with pytest.raises(ValueError, match="begin with one of|is no setting of"):
        AutoAugment(policy, (0.5, 0.5, 0.5), 32)
    with pytest.raises(UserError, match="is no policy of timm's"):
        Recipe(aa=policy)


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5-inc1", "rand-n3-p0.5-tweights", "augmix-m5-w4-d2", "v0", "original-mstd0.5", "3a"],
)
def test_timms_policies_are_taken(policy):
    assert Recipe(aa=policy).aa == policy


def test_compile_without_a_compiler_is_one_message(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\nin a long list")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        UserError, match="No working C.. compiler found\\): install a C.. compiler, or leave out"
    ):
        train("resnet20", Recipe(**TINY, compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_callers_accelerator_keeps_its_state(tmp_path, run):
    from accelerate import PartialState
    from accelerate.state import GradientState

    saved = [(s, dict(s._shared_state)) for s in (AcceleratorState, PartialState, GradientState)]
    try:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        from timm_attn.load import load_model

        validate(load_model(str(run)), Recipe(**TINY))
        train("resnet20", Recipe(**TINY), tmp_path / "a")
        with pytest.raises(UserError):
            train("resnet20", Recipe(**{**TINY, "batch_size": 10**6}), tmp_path / "b")
        assert mine.mixed_precision == "bf16" and AcceleratorState().mixed_precision == "bf16"
        assert mine.gradient_accumulation_steps == 3
        with mine.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    finally:
        for singleton, state in saved:
            singleton._shared_state.clear()
            singleton._shared_state.update(state)


def test_a_run_is_described_whole_or_not_at_all(tmp_path, monkeypatch):
    """A kill while environment.json is written again must leave the one before."""
    from timm_attn import files
    from timm_attn.files import write_json

    write_json(tmp_path / "environment.json", {"a": 1})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "environment.json", {"a": 2})
    assert '"a": 1' in (tmp_path / "environment.json").read_text()


@pytest.mark.parametrize("arguments", [["list"], TRAIN])
def test_a_closed_pipe_is_no_error(arguments, tmp_path):
    read, write = os.pipe()
    os.close(read)  # before anything is written: `| head -1` may close it later than that
    command = [sys.executable, "-m", "timm_attn", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, cwd=tmp_path)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr, done.stderr  # as a signal would end it
    assert not done.stderr or arguments is TRAIN  # libraries may warn there
