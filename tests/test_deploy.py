"""Files for other runtimes: compared before they are kept, and of a folded network exactly the stock one's."""

import sys
from collections import Counter

import huggingface_hub
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import narrow, parse_name, randomise

import timm_attn
from timm_attn import cli
from timm_attn.compare import BOUNDS, relative
from timm_attn.errors import UserError
from timm_attn.models import MECHANISMS, stock_model
from timm_attn.publish import deploy, export
from timm_attn.training import Recipe, train
from timm_attn.weights import read_index


@pytest.mark.parametrize("name", ["resnet20_ssia"])
def test_a_folded_network_has_the_stock_networks_operations(name, tmp_path):
    model = randomise(narrow(name, layers=[1] * (3 if "20" in name else 4))).eval()
    folded = stock_model(model, timm_attn.fold(model, torch.randn(2, 3, 64, 64)))
    backbone, mechanism = parse_name(name)
    stock_name, extra = MECHANISMS[mechanism].stock_network(backbone, {})
    sizes = {k: v for k, v in model._model_args.items() if k in ("channels", "layers", "num_classes")}
    stock = timm.create_model(stock_name, **sizes, **extra)
    counts = []
    for network, path in ((folded, tmp_path / "a.onnx"), (stock, tmp_path / "b.onnx")):
        assert deploy.write_onnx(network, path) <= deploy.BOUND
        counts.append(Counter(node.op_type for node in onnx.load(path).graph.node))
    assert counts[0] == counts[1]
    if "ssia" in name:  # that the count can differ
        deploy.write_onnx(narrow("resnet20_dia", layers=[1, 1, 1]), tmp_path / "c.onnx")
        assert Counter(node.op_type for node in onnx.load(tmp_path / "c.onnx").graph.node) != counts[1]


@pytest.mark.parametrize(("write", "name"), [(deploy.write_onnx, "m.onnx"), (deploy.write_program, "m.pt2")])
def test_a_file_that_computes_something_else_is_not_kept(write, name, tmp_path, monkeypatch):
    model = randomise(narrow("resnet20_dia", layers=[2, 1, 1])).eval()
    compare = deploy._compare

    def both(network, path, run):
        assert compare(network, path, run) <= deploy.BOUND
        return compare(network, path, lambda x: run(x) * 1.001)

    monkeypatch.setattr(deploy, "_compare", both)
    with pytest.raises(timm_attn.FoldError, match=f"{name} does not compute what the network computes"):
        write(model, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_an_fmmnet_is_exported_without_its_folded_form_where_rounding_forbids_it(tmp_path, monkeypatch):
    def refuse(model):
        raise timm_attn.FoldError("folding changed the output")

    recipe = Recipe(data="digits", img_size=8, batch_size=256, epochs=1, model_kwargs=("channels=[8,8,8]",))
    train("fmmnet20", recipe, tmp_path / "run")
    # The name timm_attn.publish.export is the function's.
    monkeypatch.setattr(sys.modules["timm_attn.publish.export"], "fold", refuse)
    with pytest.warns(UserWarning, match="fmmnet20.x is exported without its folded form: folding changed"):
        export(tmp_path / "run", "x", tmp_path / "hub")
    assert [c.name for c in read_index(tmp_path / "hub")] == ["fmmnet20.x"]
    with pytest.raises(UserError, match="tag 'graft_x' would stand for grafted weights"):
        export(tmp_path / "run", "graft_x", tmp_path / "hub")


def test_a_network_without_layer_scales_is_a_program(tmp_path):
    name = timm_attn.register("test_convnext", "asr")
    overlay = {"input_size": (3, 64, 64)}
    model = randomise(timm.create_model(name, num_classes=3, pretrained_cfg_overlay=overlay)).eval()
    timm.models.save_for_hf(model, tmp_path / "net", safe_serialization=True)
    cli.main(["fold", str(tmp_path / "net"), "--layer-scale", "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    x = torch.randn(3, 3, 64, 64)
    assert relative(model(x).detach(), program(x).detach()) <= BOUNDS[torch.float32]
    keys = {key for key in model.state_dict() if "gamma" not in key and ".asr" not in key}
    assert set(program.state_dict()) == keys < set(model.state_dict())


def test_export_writes_them_beside_the_weights(tmp_path):
    small = ("channels=[8,8,8]", "layers=[1,1,1]")
    recipe = Recipe(data="digits", img_size=16, batch_size=256, epochs=1, model_kwargs=small)
    train("resnet20_conam", recipe, tmp_path / "run")
    export(tmp_path / "run", "x", tmp_path / "hub", onnx=True, torch_export=True)
    checkpoints = {c.name: c for c in read_index(tmp_path / "hub")}
    assert set(checkpoints) == {"resnet20_conam.x", "resnet20_conam.x_folded"}
    x = torch.randn(3, 3, 16, 16)
    for name, checkpoint in checkpoints.items():
        expected = timm.create_model(f"local-dir:{checkpoint.folder}", pretrained=True).eval()(x).detach()
        session = onnxruntime.InferenceSession(checkpoint.verified("model.onnx"))
        (logits,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        program = torch.export.load(checkpoint.verified("model.pt2"))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        card = huggingface_hub.ModelCard.load(checkpoint.folder / "README.md").text
        assert "`model.onnx`, for ONNX runtimes" in card and "`model.pt2`" in card, name
