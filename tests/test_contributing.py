"""CONTRIBUTING.md keeps its promise: one file and one row make a mechanism that passes the contract."""

import re
import shutil

from helpers import ROOT, python

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
HEAD = "import torch\nfrom torch import Tensor, nn\n\n\n"


def test_the_mechanism_of_the_guide_passes_the_contract(tmp_path):
    layer, row = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    for name in ("timm_attn", "tests", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "timm_attn" / "layers" / "scale.py").write_text(HEAD + layer)
    table = tmp_path / "timm_attn" / "models" / "mechanisms.py"
    text = table.read_text().replace("MECHANISMS = {\n", "MECHANISMS = {\n" + row)
    table.write_text(text.replace("from ..papers", "from ..layers.scale import Scale\nfrom ..papers"))
    env = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = python("scripts/count_parameters.py", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    files = [f"tests/test_{name}.py" for name in ("contract", "models", "networks", "fold")]
    kinds = "resnet20_scale and not (compile or export) or resnet50_scale and not (onnx or compile or export or script)"
    selected = f"(registration or count) and scale or ({kinds}) and not registered and not twenty or every_mechanism_is_on"
    result = python("-m", "pytest", *files, "-k", selected, "-rps", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stdout[-5000:]
    for test in (
        "contract.py::test_every_registered_model[resnext50_32x4d_scale-count]",
        "contract.py::test_every_kind[resnet20_scale-onnx]",
        "contract.py::test_every_kind[resnet50_scale-gradients]",
        "models.py::test_every_mechanism_is_on_every_backbone",
        "fold.py::test_what_folds_leaves_the_stock_network[resnet20_scale]",
        "fold.py::test_what_folds_leaves_the_stock_network[resnet50_scale]",
    ):
        assert f"PASSED tests/test_{test}" in result.stdout, result.stdout
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped and all("no reference of 'scale'" in line for line in skipped), skipped
    folded = """
import timm, timm_attn, torch
assert timm_attn.__file__.startswith("{0}")
model = timm.create_model("resnet20_scale", start=0.5)
assert (model.layer1[0].se.scale == 0.5).all()
folded = timm_attn.fold(model)
timm.create_model("resnet20").load_state_dict(folded.state_dict(), strict=True)
"""
    result = python("-c", folded.format(tmp_path), cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
