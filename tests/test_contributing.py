"""CONTRIBUTING.md keeps its promise: one file and one row make a mechanism that passes the contract."""

import re
import shutil

from forked import run_code
from helpers import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
HEAD = "import torch\nfrom torch import Tensor, nn\n\nfrom .gate import ConstantGate\n\n\n"


#: Its option goes through train, fold, validate, export and load.
USE = """
import timm, timm_attn, torch
from timm_attn.cli import main
assert timm_attn.__file__.startswith("{0}")
data = ["--data", "digits"]
small = ["--model-kwargs", "start=0.5", "channels=[8,8,8]", "layers=[1,1,1]", "--img-size", "8", "--epochs", "1"]
main(["train", "resnet20_scale", *data, *small, "--out", "run"])
model = timm.create_model("local-dir:run", pretrained=True)
assert model._model_args["start"] == 0.5 and hasattr(model.layer1[0].scale, "scale")
folded = timm_attn.fold(model)
timm.create_model("resnet20", channels=[8, 8, 8], layers=[1, 1, 1]).load_state_dict(folded.state_dict())
main(["fold", "run"])
main(["validate", "run", *data])
main(["export", "run", "--tag", "guide", "--hub", "hub", "--dataset", "digits"])
again = timm.create_model("local-dir:hub/resnet20_scale.guide", pretrained=True)
assert torch.equal(again.layer1[0].scale.scale, model.layer1[0].scale.scale)
"""


def test_the_mechanism_of_the_guide_passes_the_contract(tmp_path):
    layer, row = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    for name in ("timm_attn", "tests", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "timm_attn" / "layers" / "scale.py").write_text(HEAD + layer)
    table = tmp_path / "timm_attn" / "models" / "mechanisms.py"
    text = table.read_text().replace("MECHANISMS = {\n", "MECHANISMS = {\n" + row)
    table.write_text(text.replace("from ..papers", "from ..layers.scale import Scale\nfrom ..papers"))

    def fresh(code):
        return run_code(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}", cwd=tmp_path)

    one = "sys.argv[1:] = ['resnext50_32x4d_scale']"
    result = fresh(f"import runpy\n{one}\nrunpy.run_path('scripts/count_parameters.py', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    files = [f"tests/test_{name}.py" for name in ("contract", "models", "networks", "fold")]
    kinds = "resnet20_scale and not (compile or export or onnx or script) or resnet50_scale and (gradients or features)"
    folds = "what_folds_leaves and scale or every_mechanism_is_on"
    selected = f"resnext50_32x4d_scale or ({kinds}) and not registered and not random or {folds}"
    arguments = [*files, "-k", selected, "-rps", "--basetemp", str(tmp_path / "base")]
    result = fresh(f"import pytest\nsys.exit(pytest.main({arguments}))")
    assert result.returncode == 0, result.stdout[-5000:]
    for test in (
        "contract.py::test_every_registered_model[resnext50_32x4d_scale]",
        "contract.py::test_every_kind[resnet20_scale-fx]",
        "contract.py::test_every_kind[resnet50_scale-gradients]",
        "models.py::test_every_mechanism_is_on_every_backbone",
        "fold.py::test_what_folds_leaves_the_stock_network[resnet20_scale]",
        "fold.py::test_what_folds_leaves_the_stock_network[resnet50_scale]",
    ):
        assert f"PASSED tests/test_{test}" in result.stdout, result.stdout
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped and all("no reference of 'scale'" in line for line in skipped), skipped
    result = fresh(USE.format(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "resnet20_scale.guide" in result.stdout and "resnet20.scale_guide_folded" in result.stdout
