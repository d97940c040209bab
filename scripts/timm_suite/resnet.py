"""A pytest plugin that gives timm's own tests a small network of every mechanism and block type.

timm files a model under the last part of its module's name and chooses some of its tests by that, so this
file has the name of timm's. ``scripts/test_timm.py`` runs it.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from helpers import SMALL, narrow
from safetensors.torch import save_file
from timm.models import generate_default_cfgs, register_model
from torch import nn

#: A model of timm with weights that no test mentions by name: what it gets, every small network must get.
REFERENCE = "resnet34"

_weights = tempfile.TemporaryDirectory()  # as long as the process
MODELS = {f"{architecture}_small": architecture for architecture in SMALL}

# The tests of pretrained weights choose the models that have some, so these get a file. Models without a
# configuration would be left out of most tests.
default_cfgs = generate_default_cfgs(
    {
        name: replace(
            timm.get_pretrained_cfg(architecture),
            num_classes=10,
            file=f"{_weights.name}/{name}.safetensors",
            url=None,
            hf_hub_id=None,
            tag=None,
            architecture=None,
        )
        for name, architecture in MODELS.items()
    }
)


def _register(name: str) -> None:
    if timm.is_model(name):
        raise ValueError(f"{name} is a model already")

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        kwargs["pretrained_cfg"] = default_cfgs[name].default
        # A residual branch that starts at zero would hide from the comparisons what is done to it.
        return narrow(MODELS[name], pretrained=pretrained, **{"zero_init_last": False, **kwargs})

    entry.__name__ = name
    register_model(entry)
    save_file(timm.create_model(name).state_dict(), default_cfgs[name].default.file)


for _name in MODELS:
    _register(_name)


class Recorder:
    """Leaves only the tests of the small networks, and writes what became of them as JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: list[str] = []
        self.names: dict[str, tuple[str, str]] = {}
        self.outcomes: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in MODELS}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        other = []
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            model = parameters.get("model_name", "").split(".")[0]
            if model in MODELS:
                self.names[item.nodeid] = model, item.originalname
            else:
                other.append(item)
            if model == REFERENCE and item.originalname not in self.tests:
                self.tests.append(item.originalname)
        items[:] = [item for item in items if item.nodeid in self.names]
        config.hook.pytest_deselected(items=other)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            model, test = self.names[report.nodeid]
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else report.longrepr[2] if report.skipped else report.longreprtext
            self.outcomes[model][test] = report.outcome, reason

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({"tests": self.tests, "outcomes": self.outcomes}))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.getoption("outcomes")))
