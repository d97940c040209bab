"""Where a branch ends: the axis of its channels and its class tokens, on maps of shapes that mislead."""

import pytest
import timm
import torch
from test_attach import build, images, shaken
from torch import nn

import timm_attn
from timm_attn.branches import branches, example_input
from timm_attn.compare import BOUNDS, relative_difference

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
#: Their first maps are as wide and as high as they have channels.
SQUARE = {
    "swin_tiny_patch4_window7_224": SWIN,
    "maxvit_rmlp_pico_rw_256": {"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64)},
    "maxvit_tiny_pm_256": {"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64)},
    "swinv2_cr_tiny_ns_224": SWIN,
    "test_convnext": {"dims": (16, 24, 32, 48), "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
}


@pytest.mark.parametrize("name", SQUARE)
def test_channels_are_not_taken_for_rows(name):
    model = build(name, **SQUARE[name])
    found = branches(model, example_input(model, 1))
    square = [b for b in found if b.channels**2 == b.pixels]
    assert square
    timm_attn.attach(shaken(model), "se")
    for branch in square:
        block = model.get_submodule(branch.block)
        attention = ("PartitionAttentionCl", "ParallelPartitionAttention")
        channels_last = name.startswith("swin") or type(block).__name__ in attention
        end = getattr(block, branch.slot)
        width = end.mechanism.fc1.in_channels
        assert width == branch.channels
        seen = {}
        hook = end.register_forward_hook(lambda m, args, y, s=seen: s.update(gate=y / args[0]))
        with torch.no_grad():
            model.eval()(images(model))
        hook.remove()
        gate = seen["gate"].movedim(-1 if channels_last else 1, 1)[0].flatten(1)  # C × pixels
        assert (gate.amax(1) - gate.amin(1)).max() < 1e-3 * (gate.amax() - gate.amin())


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "swin_tiny_patch4_window7_224"])
def test_gates_on_square_maps_fold(name):
    model = shaken(timm_attn.attach(build(name, **SQUARE[name]).double(), "asr"))
    x = images(model)
    assert relative_difference(model, timm_attn.fold(model, x), x) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("height, width", [(96, 96), (96, 128), (128, 96), (192, 224), (96, 160)])
def test_class_tokens_are_told_on_any_image(height, width):
    """6 · 8 + 1 and 12 · 14 + 1 are squares; XCiT has its class token in the last two blocks only."""
    x = torch.empty(1, 3, height, width, device="meta")
    grid = (height // 16, width // 16)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True, device="meta")
    assert {(b.prefix, b.grid) for b in branches(vit, x)} == {(1, grid)}
    xcit = timm.create_model("xcit_nano_12_p16_224", depth=1, device="meta")
    found = [(b.prefix, b.grid) for b in branches(xcit, x)]
    assert found[0] == (0, grid) and found[-1] == (1, grid) and len(set(found)) == 2


def test_patches_are_the_grid_of_the_image():
    model = timm.create_model("pvt_v2_b0", device="meta")
    found = branches(model, torch.empty(1, 3, 96, 160, device="meta"))
    assert list(dict.fromkeys(b.grid for b in found)) == [(24, 40), (12, 20), (6, 10), (3, 5)]


@pytest.mark.parametrize("attention", ["dia", "cbam", "asr"])
def test_a_name_that_both_have_is_the_networks(attention):
    model = timm_attn.create_model("resnet18", attention=attention, act_layer=nn.SiLU, device="meta")
    assert isinstance(model.act1, nn.SiLU) and isinstance(model.layer1[0].act1, nn.SiLU)
    attached = timm_attn.attach(timm.create_model("resnet18"), "cbam", act_layer=nn.SiLU)
    assert isinstance(attached.layer1[0].drop_path.mechanism.channel.act, nn.SiLU)


@pytest.mark.parametrize("mechanism", ["bat", "halo"])
def test_attention_that_cannot_read_the_maps_is_refused_at_once(mechanism):
    model = build("resnet18")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"{mechanism} does not take the maps of ResNet on images"):
        timm_attn.attach(model, mechanism)
    assert list(model.state_dict()) == keys


class Scaled(nn.Module):
    """A network that takes more than images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("test_convnext")

    def forward(self, x, scale):
        return self.net(x) * scale


@pytest.mark.parametrize("named", [False, True])
def test_layer_scales_fold_where_a_network_takes_more_than_images(named):
    model = shaken(Scaled())
    x, scale = images(model.net), torch.tensor(2.0)
    given = {"x": x, "scale": scale} if named else (x, scale)
    folded = timm_attn.fold(model, given, layer_scale=True)
    assert not any("gamma" in key for key in folded.state_dict())
    assert relative_difference(model, folded, given) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("name", ["preresnet164", "regnetx_002", "repvgg_a0", "resnet20", "densenet121"])
def test_the_loss_of_ssia_leaves_stems_aside(name):
    model = timm.create_model(name, device="meta")
    stages = [stage["num_chs"] for stage in model.feature_info][1:]
    assert timm_attn.attach(
        model, "ssia", images=torch.empty(1, 3, 64, 64, device="meta")
    ).ssia.stages == len(stages)
