"""The checks for a GPU, as far as a CPU can do them; all of them take minutes: scripts/gpu_check.py says how."""

import json

from helpers import script


def test_a_part_of_it_passes_here_and_only_what_failed_is_run_again(tmp_path):
    out = tmp_path / "check.json"
    arguments = ("--device", "cpu", "--small", "--out", out)
    for only in (
        "numerics convnext_tiny asr",
        "fold convnext_tiny asr",
        "graft convnext_tiny asr",
        "sync bn",
    ):
        done = script("gpu_check.py", *arguments, "--only", only)
        assert done.returncode == 0, done.stdout
    report = json.loads(out.read_text())
    checks = report["checks"]
    assert {name for name, found in checks.items() if found.get("passed")} == {
        *(f"numerics convnext_tiny asr {precision}" for precision in ("fp32", "bf16")),
        "fold convnext_tiny asr",
        "graft convnext_tiny asr",
    }
    assert checks["numerics convnext_tiny asr bf16"]["error"] > 0 and "left_out" in checks["sync bn"]
    checks["fold convnext_tiny asr"]["passed"] = False
    out.write_text(json.dumps(report))
    again = script("gpu_check.py", *arguments, "--only", "fold convnext_tiny asr")
    assert again.returncode == 0 and json.loads(out.read_text())["checks"]["fold convnext_tiny asr"]["passed"]
    other = script("gpu_check.py", "--device", "cpu", "--out", out)
    assert other.returncode and "name another file with --out" in other.stdout
