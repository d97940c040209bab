"""Inside other people's networks: what docs/attach.md shows, and the keys of feature maps."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch

import timm_attn

PAGE = (Path(__file__).parents[1] / "docs" / "attach.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OPTIONAL = ("segmentation_models_pytorch", "transformers")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_the_page_runs(block):
    needed = [name for name in OPTIONAL if name in block]
    if needed and not importlib.util.find_spec(needed[0]):
        pytest.skip(f"{needed[0]} is not installed")
    names = {}
    exec(compile(block, "docs/attach.md", "exec"), names)
    if "folded" in names:
        assert not any(isinstance(m, timm_attn.layers.ASR) for m in names["folded"].modules())
    if "network" in names:
        assert any(isinstance(m, timm_attn.layers.ASR) for m in names["network"].modules()) == (
            "FasterRCNN" not in block
        )


#: One of each class that timm has for feature maps.
SIZES = {
    "resnet18": {"layers": [2, 1, 1, 1], "channels": [16, 16, 24, 32]},
    "convnext_atto": {"depths": [2, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
}


def test_feature_maps_are_the_last_ones_of_a_vit_of_any_depth():
    small = {"img_size": 64, "embed_dim": 48}
    for depth, options in ((4, {}), (16, {}), (2, {"out_indices": (0, 1)})):
        names = ["vit_tiny_patch16_224", "vit_tiny_patch16_224_asr", "vit_tiny_patch16_224_dia"]
        stock, *ours = (
            timm.create_model(n, features_only=True, depth=depth, device="meta", **small, **options)
            for n in names
        )
        assert [model.feature_info.out_indices for model in ours] == [stock.feature_info.out_indices] * 2
    vit = {"backbone": names[0] + "_se", "kept": [0, 3], "depth": 4, "device": "meta"}
    assert timm.create_model("frozen", features_only=True, **vit).feature_info.out_indices == (1, 2, 3)


@pytest.mark.parametrize("indices", [None, (1, 2)])
@pytest.mark.parametrize("name", SIZES)
def test_feature_maps_are_those_of_the_stock_network(name, indices):
    options = SIZES[name] | ({} if indices is None else {"out_indices": indices})
    stock = timm.create_model(name, features_only=True, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    for mechanism in ("dia", "ssia", "asr"):
        architecture = timm_attn.register(name, mechanism)
        model = timm.create_model(architecture, features_only=True, **options).eval()
        assert model.feature_info.channels() == stock.feature_info.channels()
        assert model.feature_info.reduction() == stock.feature_info.reduction()
        assert set(model.state_dict()) >= set(stock.state_dict())
        assert [f.shape for f in model(x)] == [f.shape for f in stock(x)]
    folded = timm_attn.fold(model, x)
    stock.load_state_dict(folded.state_dict(), strict=True)
    for a, b in zip(stock(x), folded(x), strict=True):
        assert torch.equal(a, b)
