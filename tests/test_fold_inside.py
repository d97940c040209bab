"""Networks of this package fold wherever they sit, and every output is compared."""

from collections import namedtuple
from copy import deepcopy
from dataclasses import dataclass

import pytest
import timm
import torch
from helpers import SMALL, narrow, randomise
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.utils import prune

import timm_attn
from timm_attn.compare import BOUNDS, relative_difference
from timm_attn.fold import example_input, verify_fold
from timm_attn.layers import ASR
from timm_attn.models import MECHANISMS, parse_name

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Pair = namedtuple("Pair", "maps logits")


@dataclass
class Output:
    logits: Tensor
    maps: list[Tensor]
    name: str = "a"


class Wrapped(nn.Module):
    """A model as others build them: a network inside, other arguments, other outputs."""

    def __init__(self, network: nn.Module, wrap=lambda maps, logits: logits) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": network})
        self.head, self.wrap = nn.Linear(10, 3), wrap

    def forward(self, pixel_values: Tensor, scale: float = 1.0):
        logits = self.base_model["model"](pixel_values * scale)
        return self.wrap([logits, logits[:1]], self.head(logits))


class Adapter(nn.Module):
    """Hands on what it does not know to the network inside, as PEFT's models do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.base_model = network

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *arguments):
        return self.base_model(*arguments)


def network(architecture: str, **kwargs) -> nn.Module:
    return randomise(narrow(architecture, **kwargs)).eval()


def left(model: nn.Module) -> int:
    """Gates that fold, and norms that can be fused."""
    return sum(isinstance(m, ASR | nn.BatchNorm2d) or hasattr(m, "fuse") for m in model.modules())


@pytest.mark.parametrize(
    "architecture", [n for n in SMALL if ("20" in n and MECHANISMS[parse_name(n)[1]].fuses) or "_asr" in n]
)
def test_feature_maps_fold(architecture):
    model = network(architecture, features_only=True)
    folded = timm_attn.fold(model)
    assert left(folded) < left(model)
    maps, others = model(IMAGES), folded(IMAGES)
    assert len(maps) > 3
    for a, b in zip(maps, others, strict=True):
        assert (a - b).abs().max() / a.abs().max() <= BOUNDS[torch.float32]
    report = verify_fold(model, folded, IMAGES)
    assert report.max_relative <= BOUNDS[torch.float32] and report.top1_agreement != report.top1_agreement


@pytest.mark.parametrize("wrap", [
    lambda maps, logits: logits,
    lambda maps, logits: (maps, {"logits": logits}),
    Pair,
    lambda maps, logits: Output(logits, maps),
    lambda maps, logits: {"out": [Output(logits, maps)], "none": None, "n": 3},
    lambda maps, logits: (torch.fft.fft(logits), logits > 0, logits.argmax(1)),
], ids=["tensor", "nested", "namedtuple", "dataclass", "dataclass in dict", "complex"])  # fmt: skip
@pytest.mark.parametrize("architecture", ["resnet20_asr", "resnet20_dia"])
def test_a_network_in_another_model_folds(architecture, wrap):
    model = Wrapped(network(architecture), wrap)
    folded = timm_attn.fold(model)
    assert left(model) > left(folded) == (0 if architecture.endswith("dia") else left(narrow("resnet20")))
    assert relative_difference(model, folded, IMAGES) <= BOUNDS[torch.float32]
    inside = folded.base_model["model"]
    stock = timm.create_model(inside.pretrained_cfg["architecture"], **inside._model_args).eval()
    stock.load_state_dict(inside.state_dict(), strict=True)
    assert torch.equal(stock(IMAGES), inside(IMAGES))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_difference_in_any_output_is_found(place):
    model = Wrapped(network("resnet20_asr"), lambda maps, logits: {"a": [maps[0], maps[1]], "b": logits})
    other = deepcopy(model)
    other.wrap = lambda maps, logits: {
        "a": [t * (1 + (place == i) * 1e-3) for i, t in enumerate(maps)],
        "b": logits * (1 + (place == 2) * 1e-3),
    }
    assert relative_difference(model, other, IMAGES) == pytest.approx(1e-3, rel=1e-2)
    other.wrap = lambda maps, logits: {"a": maps, "b": logits[:, :2]}
    with pytest.raises(timm_attn.FoldError, match="the outputs have the shapes"):
        relative_difference(model, other, IMAGES)


@pytest.mark.parametrize("architecture", ["resnet20_asr", "resnet20_conam", "fmmnet20", "resnet20_ssia"])
def test_what_hands_attributes_on_folds(architecture):
    model = Adapter(network(architecture))
    folded = timm_attn.fold(model)
    assert left(folded) < left(model)
    assert relative_difference(model, folded, IMAGES) <= BOUNDS[torch.float32]


def test_a_pruned_network_names_the_fix():
    model = network("resnet20_asr")
    prune.l1_unstructured(model.layer1[0].conv2, "weight", 0.3)
    with pytest.raises(ValueError, match=r"CifarResNet cannot be copied.*prune\.remove"):
        timm_attn.fold(model)
    prune.remove(model.layer1[0].conv2, "weight")
    assert left(timm_attn.fold(model)) < left(model)


def test_several_networks_fold_at_once():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = network("resnet20_asr"), network("resnet20_dia"), network("resnet20")

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.a(x), self.b(x), self.c(x)]

    model = Two()
    folded = timm_attn.fold(model)
    assert left(folded) == 2 * left(model.c)
    assert all(torch.equal(a, b) for a, b in zip(model.c.parameters(), folded.c.parameters(), strict=True))


def test_other_ways_to_collect_feature_maps():
    for architecture in ("resnet20_dia", "resnet20_asr"):
        model = FeatureGetterNet(network(architecture), out_indices=(1, 2))
        assert left(timm_attn.fold(model)) < left(model)
        hooked = network(architecture, features_only=True, feature_cfg={"feature_cls": "hook"})
        assert left(timm_attn.fold(hooked)) < left(hooked)
    # Of a traced graph the gates are operations; norms are fused.
    graph = timm.create_model("resnet20_dia", features_only=True, feature_cfg={"feature_cls": "fx"})
    assert left(timm_attn.fold(graph)) < left(graph)
    graph = timm.create_model("resnet20_asr", features_only=True, feature_cfg={"feature_cls": "fx"})
    with pytest.raises(timm_attn.NothingToFold):
        timm_attn.fold(graph)


def test_a_block_and_a_stage_fold_with_inputs():
    model = network("resnet20_asr")
    maps = torch.randn(2, 8, 9, 9)
    for part in (model.layer1, model.layer1[0]):
        with pytest.raises(
            ValueError, match=r"does not take images \(2, 3, 224, 224\) .*give what it takes as inputs="
        ):
            timm_attn.fold(part)
        folded = timm_attn.fold(part, maps)
        assert not any(isinstance(m, ASR) for m in folded.modules())
        assert relative_difference(part, folded, maps) <= BOUNDS[torch.float32]


def test_other_arguments_are_given_as_a_tuple_or_by_name():
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network("resnet20_asr")

        def forward(self, left: Tensor, right: Tensor, weight: float) -> Tensor:
            return self.network(left) - weight * self.network(right)

    model = Siamese()
    with pytest.raises(ValueError, match="Siamese does not take images .*inputs="):
        timm_attn.fold(model)
    folded = timm_attn.fold(model, (IMAGES, IMAGES.flip(3), 0.5))
    named = {"left": IMAGES, "right": IMAGES.flip(3), "weight": 0.5}
    timm_attn.fold(model, named)
    report = verify_fold(model, folded, named)
    assert report.images == 2 and report.max_relative <= BOUNDS[torch.float32]
    with pytest.raises(ValueError, match="inputs must be one image or more"):
        timm_attn.fold(model, ())


def test_an_output_without_tensors_is_named():
    model = Wrapped(network("resnet20_asr"), lambda maps, logits: {"n": 3})
    with pytest.raises(ValueError, match="the output, dict, holds no tensor"):
        timm_attn.fold(model)


def test_the_example_is_of_the_network_inside():
    assert example_input(Wrapped(network("resnet18_asr"))).shape == (2, 3, 64, 64)
