"""Other people's tracers: torch.fx, torchvision's extractor, FX quantisation, the old exporter to ONNX."""

import io
from copy import deepcopy
from fractions import Fraction

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import MECHANISMS, narrow, noise, randomise, small_names
from torch.ao.quantization import QConfigMapping, default_qconfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models.feature_extraction import create_feature_extractor

from timm_attn.layers import ConAM
from timm_attn.layers.conam import nearest_patch
from timm_attn.layers.dia import update
from timm_attn.models import parse_name

NAMES = [name for key in MECHANISMS for name in small_names(key, ("resnet20", "resnet18"))]
SHALLOW = {"resnet20": [2, 1, 1], "resnet18": [2, 1, 1, 1]}


def network(name, **kwargs):
    return randomise(narrow(name, layers=SHALLOW[parse_name(name)[0]], **kwargs))


def images(batch=4, size=32):
    return noise(batch, 3, size, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["bn", "sigmoid", "gate", "raw"])
def test_every_mode_of_fmm_is_traced(mode):
    model = network("fmmnet20", mode=mode).eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(images()), model(images()))


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_network_computes_and_trains_as_it_did(name):
    model = network(name).double()
    x = images().double()
    assert torch.equal(torch.fx.symbolic_trace(model.eval())(x), model(x))
    traced = torch.fx.symbolic_trace(deepcopy(model).train())
    model.train()(x).square().sum().backward()
    traced(x).square().sum().backward()
    gradients = {key: p.grad for key, p in traced.named_parameters()}
    for (
        key,
        parameter,
    ) in model.named_parameters():  # SSIA's heads too, whose loss only the backward pass sees
        assert parameter.grad.abs().sum() > 0 or "ssia" not in key
        torch.testing.assert_close(gradients[key], parameter.grad, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained")
@pytest.mark.parametrize("name", NAMES)
def test_torchvision_extracts_features(name):
    model = network(name).eval()
    extracted = create_feature_extractor(model, {"layer2": "maps", "fc": "logits"})(images())
    assert torch.equal(extracted["logits"], model(images()))
    assert torch.equal(extracted["maps"], model.forward_intermediates(images(), [2])[1][0])


#: Ranges from the least to the greatest value: the default observers search for narrower ones, for seconds.
EIGHT_BITS = QConfigMapping().set_global(default_qconfig)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [*(name for name in NAMES if "20" in name), "resnet18_dia"])
def test_fx_quantises(name):
    model = network(name).eval()  # resnet18_dia ends in maps of one pixel
    x = images(8)
    prepared = prepare_fx(deepcopy(model), EIGHT_BITS, x)
    prepared(x)
    quantised = convert_fx(prepared)
    assert any("quantized" in type(m).__module__ for m in quantised.modules())
    # Eight bits are coarse: that it is the same function, and no other, is all that can be asked for.
    assert correlation(quantised(x), model(x)) > 0.6
    assert quantised(x[:3]).shape == (3, 10)


def correlation(a, b):
    """Of logits, without what they are for every image."""
    return torch.corrcoef(torch.stack([(y - y.mean(0)).flatten() for y in (a, b)]))[0, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_state_of_dia_is_not_quantised():
    model = timm.create_model("resnet20_dia", pretrained=True).eval()
    x = images(32)
    prepared = prepare_fx(deepcopy(model), EIGHT_BITS, x)
    prepared(x)
    quantised = convert_fx(prepared)
    assert correlation(quantised(x), model(x)) > 0.9
    states = [node.args[1] for node in quantised.graph.nodes if node.target is update]
    # From block to block in float32: in eight bits, with the default observers, the correlation is 0.5.
    kept = [state for state in states if getattr(state.args[0], "target", None) is update]
    assert (len(states), len(kept)) == (9, 6)


@pytest.mark.filterwarnings("ignore")  # the exporter says that it is old
@pytest.mark.parametrize("name", NAMES)
def test_the_old_exporter_to_onnx_takes_every_network(name):
    model = network(name).eval()
    size = 32 if "20" in name else 64
    file = io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (images(2, size),), file, dynamo=False, opset_version=18, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = images(5, size)
    expected = model(x).detach()
    y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    # Two implementations of convolution, in float32.
    assert (y - expected).abs().max() / expected.abs().max() < 5e-5


# ------------------------------------------------------------------------------------- ConAM's patches


def test_a_pixel_has_the_patch_whose_centre_is_nearest():
    for patches in (1, 2, 3, 4, 7, 16):
        for pixels in (1, 2, 3, 5, 8, 14, 41, 56, 82, 112, 164):
            found = nearest_patch(pixels, patches, torch.device("cpu")).tolist()
            for pixel, patch in enumerate(found):
                distances = [
                    abs(Fraction(2 * p + 1, patches) - Fraction(2 * pixel + 1, pixels))
                    for p in range(patches)
                ]
                assert distances[patch] == min(distances), (patches, pixels, pixel)
            if pixels % patches == 0:
                assert found == [pixel // (pixels // patches) for pixel in range(pixels)]


SIZES = [(164, 12), (12, 164), (24, 36), (41, 82), (5, 3)]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        *((size, options) for size in SIZES for options in ({}, {"grid": 3})),
        *((size, {"patch_size": 4}) for size in SIZES if not any(side % 4 for side in size)),
    ],
    ids=str,
)
def test_the_map_is_weighted_patch_by_patch(size, options):
    torch.manual_seed(0)
    layer, x = ConAM(8, **options).eval(), torch.randn(2, 8, *size)
    confidence = layer.confidence(x)
    rows, columns = (nearest_patch(n, p, x.device) for n, p in zip(size, confidence.shape[1:], strict=True))
    expected = x.clone()
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            expected[:, :, i, j] *= 1 + confidence[:, row, column, None]
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), expected)
    if all(n % p == 0 for n, p in zip(size, confidence.shape[1:], strict=True)):
        whole = F.interpolate(1 + confidence[:, None], size, mode="nearest-exact")
        assert torch.equal(x * whole, expected)


@pytest.mark.parametrize("options", [{}, {"patch_size": 4}], ids=str)
def test_maps_of_other_sizes_after_export(options):
    layer = ConAM(8, **options).eval()
    auto = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        layer, (torch.randn(2, 8, 16, 24),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    for size in ((16, 24), (164, 12), (20, 52)):
        x = torch.randn(3, 8, *size)
        assert torch.equal(program.module()(x), layer(x))
