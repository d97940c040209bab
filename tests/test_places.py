"""Where a branch ends: the axis of its channels and its class tokens, on maps of shapes that mislead."""

import contextlib
import inspect
import math
import re
import threading
from functools import partial

import pytest
import timm
import torch
from test_attach import build, images, shaken
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import prune

import timm_attn
from timm_attn.branches import branches, example_input
from timm_attn.compare import BOUNDS, relative_difference
from timm_attn.tokens import reads_neighbours

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
#: Their first maps are as wide and as high as they have channels.
SQUARE = {
    "swin_tiny_patch4_window7_224": SWIN,
    "maxvit_rmlp_pico_rw_256": {"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64)},
    "maxvit_tiny_pm_256": {"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64)},
    "swinv2_cr_tiny_ns_224": SWIN,
    "test_convnext": {"dims": (16, 24, 32, 48), "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
}


#: A network of timm, an attention layer with a parameter of the same name as the network has, and where
#: it shows.
SHARED = [
    ("caformer_s18", "cbam", {"mlp_bias": True}, "stages.0.blocks.0.mlp"),
    ("vit_tiny_patch16_224", "lambda", {"qkv_bias": False}, "blocks.0.attn"),
    ("mambaout_femto", "eca", {"kernel_size": 5}, "stages.0.blocks.0.conv"),
    ("pit_ti_224", "lambda", {"stride": 4}, "patch_embed"),
]


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


@pytest.mark.parametrize("backbone, mechanism, argument, where", SHARED)
def test_timms_attention_leaves_a_network_its_arguments(backbone, mechanism, argument, where):
    """Of networks that have parameters of these names."""
    made = [
        timm.create_model(backbone, **argument, device="meta"),
        timm_attn.create_model(backbone, attention=mechanism, **argument, device="meta"),
    ]
    stock, ours = (model.get_submodule(where) for model in made)
    assert str(stock) == str(ours)
    (name,) = argument
    assert str(stock) != str(timm.create_model(backbone, device="meta").get_submodule(where))
    assert name not in timm_attn.models.mechanisms.mechanism(mechanism).own(backbone, argument)


@pytest.mark.parametrize(
    "mechanism, size, where",
    [
        ("bat", 72, r"18 × 18 in layer1\.0"),
        ("halo", 72, r"18 × 18 in layer1\.0"),
        ("halo", 224, r"28 × 28 in layer2\.0"),
    ],
)
def test_attention_that_cannot_read_the_maps_is_refused_at_once(mechanism, size, where):
    model = timm.create_model("resnet18")
    keys = list(model.state_dict())
    message = rf"{mechanism} does not take the maps of ResNet, {where} .*\(\w.*\): choose"
    with pytest.raises(ValueError, match=message):
        timm_attn.attach(model, mechanism, torch.randn(1, 3, size, size))
    assert list(model.state_dict()) == keys
    if size == 224:  # of its configuration
        with pytest.raises(ValueError, match=message):
            timm_attn.create_model("resnet18", attention=mechanism)


#: All that ``timm.layers.create_attn`` makes.
ATTENTION = re.findall(r"attn_type == '(\w+)'", inspect.getsource(timm.layers.get_attn))
#: Of these, what cannot stand in a small ResNet: by a fault of timm's, or for the size of its maps.
NOT_THERE = {"ge", "bat", "halo", "bottleneck"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_of_timm_stands_in_networks_of_any_precision(dtype):
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    assert len(ATTENTION) > 15 and {*ATTENTION} > NOT_THERE
    for name in {*ATTENTION} - NOT_THERE:
        model = timm_attn.attach(timm.create_model("resnet10t", num_classes=5).to(dtype).eval(), name, x)
        assert model(x).dtype == dtype
    with contextlib.suppress(ValueError):  # a TypeError of timm 1.0.31, which may be mended
        timm_attn.attach(timm.create_model("resnet10t"), "ge")
    with pytest.raises(TypeError, match="SEM reduction must be a whole number"):
        timm_attn.attach(timm.create_model("resnet10t"), "sem", reduction="a")


@pytest.mark.parametrize("name", sorted({*ATTENTION} - NOT_THERE))
def test_which_attention_reads_neighbours(name):
    """Pixels in another order give the outputs in that order, unless it does."""
    torch.manual_seed(0)
    layer = timm.layers.create_attn(name, 16).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        x, order = torch.randn(1, 16, 4, 6, dtype=torch.double), torch.randperm(24)
        shuffled = x.flatten(2)[..., order].unflatten(2, (4, 6))
        kept = torch.allclose(layer(shuffled).flatten(2), layer(x).flatten(2)[..., order])
    assert reads_neighbours(layer) != kept


def test_attention_of_fixed_maps_or_windows_reads_neighbours():
    for name, options in (("halo", {}), ("bottleneck", {"feat_size": (4, 4)}), ("bat", {})):
        assert reads_neighbours(timm.layers.create_attn(name, 64, **options)), name
    for extent in (0, 2):  # 0 for the whole map
        assert reads_neighbours(timm.layers.GatherExcite(16, extent=extent, use_mlp=False)) == (extent > 0)


def test_attention_that_reads_neighbours_knows_which_these_are():
    options = {"depth": 1, "dynamic_img_size": True, "num_classes": 3, "global_pool": "avg"}
    vit = partial(timm.create_model, "vit_tiny_patch16_224", embed_dim=48, **options)
    cbam, pooled = (timm_attn.attach(vit(), name).eval() for name in ("cbam", "se"))
    wide = torch.randn(1, 3, 64, 96)
    with pytest.raises(ValueError, match=r"how 24 of them lie is not known \(it was attached for 14 × 14\)"):
        cbam(wide)
    assert pooled(wide).shape == cbam(wide[..., :64]).shape == (1, 3)
    cbam = timm_attn.attach(vit(), "cbam", images=wide).eval()
    end, x = cbam.blocks[0].drop_path1, torch.randn(1, 1 + 96, 48)  # twice the height and the width
    expected = end.mechanism(x[:, 1:].transpose(1, 2).unflatten(2, (8, 12))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(end(x)[:, 1:], expected)
    hiera = timm.create_model("hiera_tiny_224", stages=(1, 1, 1, 1), device="meta")
    keys = list(hiera.state_dict())
    with pytest.raises(
        ValueError, match=r"cbam reads neighbouring pixels, and the tokens of Hiera are no map"
    ):
        timm_attn.attach(hiera, "cbam")
    assert list(hiera.state_dict()) == keys
    timm_attn.attach(hiera, "ese")


def test_attention_that_reads_maps_of_one_size_is_taken_there():
    model = timm_attn.attach(timm.create_model("resnet18").eval(), "halo", torch.randn(1, 3, 256, 256))
    assert model(torch.randn(1, 3, 256, 256)).shape == (1, 1000)


@pytest.mark.parametrize("mechanism", ["cbam", "asr", "dia"])
def test_to_attach_draws_random_numbers_once(mechanism):
    """Whatever is tried before."""
    states = []
    for make in (
        lambda: timm_attn.attach(timm.create_model("resnet20"), mechanism),
        lambda: timm_attn.create_model("resnet20", attention=mechanism),
    ):
        torch.manual_seed(0)
        states.append(make().state_dict())
    first, second = states
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_network_that_cannot_be_copied_takes_what_needs_no_copy():
    model = build("test_convnext")
    model.lock = threading.Lock()
    with pytest.raises(
        ValueError, match=r"ConvNeXt cannot be copied \(TypeError: cannot pickle '_thread.lock'"
    ):
        timm_attn.attach(model, "asr")
    prune.random_unstructured(model.stages[0].blocks[0].mlp.fc1, "weight", 0.5)
    assert timm_attn.attach(model, "eca")(images(model)).isfinite().all()


PATCHES = [
    ({"img_size": 224, "patch_size": (8, 32)}, (3, 224, 224), (28, 7)),
    ({"img_size": (128, 256), "patch_size": (128, 2), "in_chans": 1}, (1, 128, 256), (1, 128)),
    ({"img_size": 64, "patch_size": (8, 4), "dynamic_img_size": True}, (3, 48, 32), (6, 8)),
]


@pytest.mark.parametrize("options, shape, grid", PATCHES)
def test_patches_need_not_be_squares(options, shape, grid):
    model = VisionTransformer(embed_dim=48, depth=1, num_heads=3, num_classes=2, **options)
    assert {b.grid for b in branches(model, torch.randn(1, *shape))} == {grid}


def test_tokens_in_another_order_than_by_row_are_no_map():
    """Hiera's follow one another by window."""
    model = timm.create_model("hiera_tiny_224", stages=(1, 1, 1, 1), device="meta")
    assert {b.grid for b in branches(model, example_input(model, 1))} == {None}


@pytest.mark.parametrize(
    "name, tokens",
    [("pit_ti_224", 1), ("pit_ti_distilled_224", 2), ("crossvit_tiny_240", 1), ("coat_lite_tiny", 1)],
)
def test_a_class_token_that_a_network_does_not_count_is_none_of_its_map(name, tokens):
    model = timm.create_model(name, device="meta")
    assert not hasattr(model, "num_prefix_tokens")
    found = [b for b in branches(model, example_input(model, 1)) if b.axis == -1 and b.pixels > 1]
    assert found
    for branch in found:
        assert branch.prefix == tokens and math.prod(branch.grid) == branch.pixels - tokens, branch


@pytest.mark.parametrize("count", [1, 5])
def test_a_branch_of_class_tokens_alone_is_no_map(count):
    model = timm.create_model("cait_xxs24_224", device="meta")
    model.num_prefix_tokens = count
    found = {(b.prefix, b.grid) for b in branches(model, example_input(model, 1)) if b.pixels == 1}
    assert found == {(0, (1, 1))}


class ScaledFirst(nn.Module):
    """A block that is called with B × H × W × C, and writes the scale before the map, as InternImage does."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))
        self.drop_path = nn.Identity()

    def forward(self, x):
        return x + self.drop_path(self.gamma * (self.gamma.exp() * self.fc(self.norm(x))))


class NHWC(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, width, 8, 8), ScaledFirst(width), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.block(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("size", [64, 192, 224])
def test_channels_are_found_behind_a_scale_that_is_written_first(size):
    """On maps with more, as many, and fewer rows than channels."""
    x = torch.randn(1, 3, size, size)
    (found,) = branches(NHWC(), x)
    assert (found.axis, found.channels, found.grid) == (-1, 24, (size // 8, size // 8))
    model = timm_attn.attach(NHWC(), "se", x)
    assert model.block.se.fc1.in_channels == 24
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 4)


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


@pytest.mark.parametrize(
    "name, stems",
    [
        ("preresnet164", 1),
        ("regnetx_002", 1),
        ("repvgg_a0", 1),
        ("resnet20", 1),
        ("densenet121", 1),
        ("xception41", 0),  # its first map is an activation inside of the first block
        ("convnext_atto", 0),
    ],
)
def test_the_loss_of_ssia_leaves_stems_aside(name, stems):
    model = timm.create_model(name, device="meta")
    maps = len(model.feature_info)
    timm_attn.attach(model, "ssia", images=torch.empty(1, 3, 64, 64, device="meta"))
    assert model.ssia.stages == maps - stems
