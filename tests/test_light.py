"""What works where only torch, timm, safetensors and huggingface-hub are installed, with what these need."""

import re
import tomllib

from helpers import ROOT, python

#: Import names of everything that an extra of pyproject.toml brings, and of what comes with it.
_NAMES = {"pyyaml": None, "scikit-learn": "sklearn", "pyopenssl": "OpenSSL"}  # timm itself needs PyYAML
_ALSO = ("scipy", "pandas", "pyarrow", "multiprocess", "dill", "docstring_parser", "typeguard", "shtab")
_ALSO += ("sigstore", "cryptography")

BLOCK = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)
for name in {absent}:
    assert name not in sys.modules, name
"""

LIGHT = """
import timm, torch, timm_attn

assert len(timm.list_models("*_dia")) > 20 and timm_attn.model_names()
model = timm.create_model("resnet20_asr", pretrained=True).eval()
x = torch.randn(340, 3, 16, 16, generator=torch.Generator().manual_seed(0))
folded = timm_attn.fold(model, x[:2])
assert (folded(x[:2]) - model(x[:2])).abs().max() < 1e-3
se = timm.create_model("resnet20_se", pretrained=True).eval()
report = timm_attn.freeze(se, x, every=True)
assert report.frozen == 9 and report.model.pretrained_cfg["architecture"] == "resnet20"
with timm_attn.record(se) as gates, torch.no_grad():
    se(x[:4])
assert len(gates) == 9 and len(gates.correlations()) == 3
assert timm_attn.predict(se, x[:2])[0].classes[0] in se.pretrained_cfg["label_names"]
attached = timm_attn.attach(timm.create_model("convnext_atto"), "dia")
assert timm_attn.graft("resnet20_dia", "resnet20").num_classes == 10
from timm_attn.load import load_model
load_model("resnet20_dia")
"""

TRAIN = """
try:
    import timm_attn.training
except ModuleNotFoundError as error:
    assert str(error).endswith("is not installed: pip install 'timm-attn[train] @ git+https://github.com/timm-attn/timm_attn'"), error
else:
    raise SystemExit("it was there")
from timm_attn.style import style
try:
    with style():
        pass
except ModuleNotFoundError as error:
    assert str(error) == "matplotlib is not installed: pip install 'timm-attn[train] @ git+https://github.com/timm-attn/timm_attn'", error
else:
    raise SystemExit("it was there")
"""

COMMAND = """
sys.argv = ["timm-attn", "list"]
from timm_attn.__main__ import main
main()
"""


def absent() -> list[str]:
    """Import names of what is not installed without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) == 4, "the light set has grown: " + ", ".join(project["dependencies"])
    asked = [
        re.split(r"[>\[]", what)[0]
        for name in ("train", "export", "track", "sign")
        for what in project["optional-dependencies"][name]
    ]
    names = [_NAMES.get(name, name.replace("-", "_")) for name in asked]
    return sorted({*filter(None, names), *_ALSO})


def test_everything_but_training_works_without_extras():
    done = python("-c", BLOCK.format(absent=absent()) + LIGHT)
    assert done.returncode == 0, done.stderr


def test_what_needs_an_extra_says_which():
    done = python("-c", BLOCK.format(absent=absent()) + TRAIN + COMMAND)
    assert done.returncode == 2 and re.fullmatch(
        r"error: \w+ is not installed: pip install 'timm-attn\[train\] @ git\+https://github.com/timm-attn/timm_attn'\n",
        done.stderr,
    ), done.stderr
