"""The checks for a GPU, as far as a CPU can do them; all of them take minutes: scripts/gpu_check.py says how."""

import json
import time

import pytest
import torch
from helpers import ROOT, script

CHECKS = ("numerics resnet50 asr", "fold convnext_tiny asr", "graft convnext_tiny asr", "sync bn, two")


def test_a_part_of_it_passes_here_and_only_what_failed_is_run_again(tmp_path):
    out = tmp_path / "check.json"
    arguments = ("--device", "cpu", "--small", "--out", out)
    for only in CHECKS:
        done = script("gpu_check.py", *arguments, "--only", only)
        assert done.returncode == 0, done.stdout
    report = json.loads(out.read_text())
    checks = report["checks"]
    assert {name for name, found in checks.items() if found.get("passed")} == {
        *(f"numerics resnet50 asr {precision}" for precision in ("fp32", "bf16")),
        "fold convnext_tiny asr",
        "graft convnext_tiny asr",
    }
    assert "left_out" in checks["sync bn, two processes"]
    # A precision that is not in force would show: half precision is far from float32, and float32 is near.
    fp32, bf16 = (checks[f"numerics resnet50 asr {precision}"] for precision in ("fp32", "bf16"))
    for figure in ("error", "gradients"):
        assert 0 < 100 * fp32[figure] < bf16[figure]
    assert 0 < fp32["training_gradients"] < 1e-4
    checks["fold convnext_tiny asr"]["passed"] = False
    checks["fold convnext_tiny ssia"] = {"measured": True, "mark": 1}
    out.write_text(json.dumps(report))
    late = script("gpu_check.py", *arguments, "--only", "fold convnext_tiny", "--seconds", "0")
    assert late.returncode == 1 and "run the same command again" in late.stdout
    again = script("gpu_check.py", *arguments, "--only", "fold convnext_tiny")
    checks = json.loads(out.read_text())["checks"]
    assert again.returncode == 0 and checks["fold convnext_tiny asr"]["passed"]
    assert checks["fold convnext_tiny ssia"]["mark"] == 1
    other = script("gpu_check.py", "--device", "cpu", "--out", out)
    assert other.returncode and "name another file with --out" in other.stdout


@pytest.fixture
def networks(monkeypatch):
    """The module of the checks in this process."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check_networks

    return gpu_check_networks


def test_gradients_that_are_wrong_in_one_parameter_fail_in_every_precision(networks):
    wanted = {"long": torch.ones(4), "short": torch.full((4,), 0.05), "none": torch.zeros(4)}
    for wrong in ({**wanted, "short": 2 * wanted["short"]}, {key: wanted[key] for key in ("long", "none")}):
        assert networks.gradient_difference(wrong, wanted) > max(networks.GRADIENTS.values())
    close = {key: 1.001 * gradient for key, gradient in wanted.items()}
    assert networks.gradient_difference(close, wanted) < min(networks.GRADIENTS.values())
    broken = {**wanted, "none": torch.full((4,), torch.nan)}
    assert not networks.gradient_difference(broken, wanted) <= 1  # NaN compares as false


def test_wrong_gradients_fail_the_check(networks, monkeypatch):
    setting = networks.Setting(torch.device("cpu"), small=True)
    run = networks.run

    def wrong(model, x, *rest, **kwargs):
        logits, gradients = run(model, x, *rest, **kwargs)
        if x.dtype != torch.float64:  # the reference stays
            key = max(gradients, key=lambda key: gradients[key].norm())
            gradients[key] = 2 * gradients[key]
        return logits, gradients

    monkeypatch.setattr(networks, "run", wrong)
    found = networks.numerics(setting, "resnet50", "", "bf16")
    assert not found["passed"] and found["error"] <= found["bound"]


def test_a_check_that_breaks_or_runs_out_of_time(tmp_path, monkeypatch):
    """One that fails says why; what the time was too short for is left for the next call."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check_training

    out = tmp_path / "check.json"
    arguments = ("--device", "cpu", "--small", "--out", out, "--only", "pinned loader")

    def breaks(setting):
        raise ValueError("no such thing")

    monkeypatch.setattr(gpu_check_training, "pinned_loader", breaks)
    done = script("gpu_check.py", *arguments)
    assert done.returncode == 1 and "no such thing" in done.stdout
    assert json.loads(out.read_text())["checks"]["pinned loader"]["why"] == "ValueError: no such thing"
    out.unlink()

    now = time.perf_counter

    def slow(setting):
        monkeypatch.setattr(time, "perf_counter", lambda: now() + 1000)
        assert setting.left(240) == 1  # second that a process may still take
        raise TimeoutError

    monkeypatch.setattr(gpu_check_training, "pinned_loader", slow)
    done = script("gpu_check.py", *arguments)
    assert done.returncode == 0 and not out.exists() and "run the same command again" in done.stdout
