"""What every network of the zoo must do: one check a function, each on an architecture and a way to build it."""

import csv
import inspect
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from helpers import STOCK, narrow, noise, parameters, randomise
from safetensors.torch import load_file, save_file
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models._features_fx import GraphExtractNet
from timm.models._manipulate import group_with_matcher
from torch import nn

from timm_attn.models import BACKBONES, attached, parse_name
from timm_attn.models.resnet_only import last_norm

COUNTS = Path(__file__).with_name("parameter_counts.csv")


@dataclass(frozen=True)
class Case:
    """An architecture, built small (few channels and blocks) or as it is."""

    name: str
    small: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def cifar(self) -> bool:
        return BACKBONES[parse_name(self.name)[0]].cifar

    @property
    def stages(self) -> int:
        return len(BACKBONES[parse_name(self.name)[0]].layers)

    def build(self, **kwargs):
        return narrow(self.name, **kwargs) if self.small else timm.create_model(self.name, **kwargs)

    def build_shallow(self):
        """For what takes a time in proportion to the number of blocks; DIA's state goes from one to the next."""
        first = 2 if parse_name(self.name)[1] == "dia" else 1
        return self.build(**{"layers": [first, *[1] * (self.stages - 1)]} if self.small else {})

    def images(self, batch: int = 2, channels: int = 3):
        return noise(batch, channels, 32 if self.cifar else 64, torch.Generator().manual_seed(1))


def committed_counts() -> dict[str, int]:
    """Parameters of every registered model with its own number of classes."""
    with COUNTS.open(newline="") as stream:
        return {row["model"]: int(row["parameters"]) for row in csv.DictReader(stream)}


# ------------------------------------------------------------------------------ for every registered model


def check_registration(case: Case) -> None:
    cfg = timm.models.get_pretrained_cfg(case.name)
    assert cfg.architecture == case.name
    model = timm.create_model(case.name, device="meta")
    assert model.num_classes == cfg.num_classes
    assert parameters(model) == committed_counts()[case.name]
    for path in (cfg.first_conv, cfg.classifier):
        for one in [path] if isinstance(path, str) else path:
            model.get_submodule(one)
    assert getattr(attached, case.name).__name__ == case.name
    state = model.state_dict(keep_vars=True)
    assert len({id(tensor) for tensor in state.values()}) == len(state), "aliases in the state dict"


def check_forward_and_safetensors(case: Case, folder: Path) -> None:
    model = case.build().eval()
    x = case.images()
    with torch.no_grad():
        expected = model(x)
    assert expected.shape == (2, model.num_classes) and expected.isfinite().all()
    save_file(model.state_dict(), folder / "m.safetensors")
    other = case.build(device="meta").to_empty(device="cpu")
    for module in other.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    other.load_state_dict(load_file(folder / "m.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), expected)


# ----------------------------------------------- for a small network of every mechanism and block type


def check_gradients(case: Case) -> None:
    # DIA's weights on the hidden state see zeros in the first block of a stage.
    model = case.build(**{"layers": [2] * case.stages} if case.small else {}).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("reduce.bias", "fc1.bias")):
                parameter.uniform_(3, 5)  # of one or two hidden units all may be dead
        for module in model.modules():
            if hasattr(module, "conv2") and (hasattr(module, "bn2") or hasattr(module, "fmm")):
                norm = last_norm(module)  # its weight starts at zero and hides the branch
                norm.weight.uniform_(0.5, 1.5)
                if norm.bias.requires_grad:
                    norm.bias.normal_(std=0.3)
    model(case.images(8)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def check_head(case: Case) -> None:
    x = case.images()
    model = case.build(num_classes=0)
    assert model(x).shape == (2, model.num_features)
    model = case.build(num_classes=0, global_pool="")
    assert model(x).shape[:2] == (2, model.num_features) and model(x).ndim == 4
    model = case.build(global_pool="catavgmax")
    assert model.get_classifier().weight.shape[1] == 2 * model.num_features == model.head_hidden_size
    assert model(x).shape == (2, model.num_classes)
    model = randomise(case.build(num_classes=5)).eval()
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


def check_input_channels(case: Case) -> None:
    for channels in (1, 4):
        model = case.build(in_chans=channels)
        assert model.in_chans == channels
        assert model(case.images(channels=channels)).shape == (2, model.num_classes)


def check_features(case: Case) -> None:
    x = case.images(1)
    torch.manual_seed(0)
    model = case.build(features_only=True).eval()
    reductions = model.feature_info.reduction()
    assert reductions == ([1, 1, 2, 4] if case.cifar else [2, 4, 8, 16, 32])
    torch.manual_seed(0)
    whole = case.build().eval()
    final, maps = whole.forward_intermediates(x)
    assert torch.equal(final, whole.forward_features(x))
    for ours, feature, channels, reduction in zip(
        model(x), maps, model.feature_info.channels(), reductions, strict=True
    ):
        assert feature.shape == (1, channels, x.shape[2] // reduction, x.shape[3] // reduction)
        assert torch.equal(ours, feature)
    two = case.build(features_only=True, out_indices=(1, -1))
    assert [f.shape for f in two(x)] == [maps[1].shape, maps[-1].shape]
    only = whole.forward_intermediates(x, indices=[1, 2], intermediates_only=True, stop_early=True)
    assert torch.equal(only[0], maps[1]) and torch.equal(only[1], maps[2])
    assert whole.prune_intermediate_layers([1]) == [1]
    assert torch.equal(whole(x), maps[1])
    assert whole.train()(x).shape == maps[1].shape
    if case.cifar:
        with pytest.raises(TypeError, match="output_stride"):
            case.build(output_stride=8)
        return
    for stride in (8, 16):
        model = case.build(output_stride=stride, features_only=True)
        assert [f.shape[2] for f in model(x)] == [64 // min(r, stride) for r in reductions]


def check_gradient_checkpointing(case: Case) -> None:
    x = case.images(4).double()
    plain = randomise(case.build().double()).train()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    runs = Counter()
    for path, module in checkpointed.named_modules():
        if path.endswith(".conv1"):
            module.register_forward_hook(lambda *_, path=path: runs.update([path]))
    a, b = plain(x), checkpointed(x)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert runs and set(runs.values()) == {2}, runs
    for (key, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, key=key: f"{key}: {m}")
    checkpointed.set_grad_checkpointing(False)
    assert torch.equal(checkpointed(x), plain(x))


def check_device_and_dtype(case: Case) -> None:
    meta = case.build(device="meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    model = case.build(dtype=torch.float64)
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float64}
    assert model(case.images().double()).dtype == torch.float64


def check_half_precision(case: Case) -> None:
    # Depth amplifies rounding: resnet152_conam comes to 0.18 and 0.03, the small networks to 0.04 and 0.006.
    x = case.images()
    model = randomise(case.build()).eval()
    expected = model(x)
    bounds = (0.08, 0.015) if case.small else (0.3, 0.05)
    for dtype, bound in zip((torch.bfloat16, torch.float16), bounds, strict=True):
        with torch.autocast("cpu", dtype=dtype):
            error = (model(x).float() - expected).abs().max() / expected.abs().max()
        assert error < bound
    half = deepcopy(model).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    half.train()(x.bfloat16()).float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())


def check_channels_last(case: Case) -> None:
    x = case.images().double()
    model = randomise(case.build().double()).eval()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)


def check_groups(case: Case) -> None:
    model = case.build()
    for coarse in (True, False):
        groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=coarse))
        assert len(groups) > 1
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))


def check_copy_in_training(case: Case) -> None:
    x = case.images(4).double()
    model = randomise(case.build().double()).train()
    loss = model(x).square().sum()
    copy = deepcopy(model)  # with a graph alive, as an average of the weights is made
    loss.backward()
    copy(x).square().sum().backward()
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        assert p is not q
        torch.testing.assert_close(p.grad, q.grad)


def check_compile(case: Case) -> None:
    x = case.images(4).double()
    eager = randomise(case.build_shallow().double()).eval()
    model = deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), eager(x))
    eager.train()(x).square().sum().backward()
    compiled.train()(x).square().sum().backward()
    for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, key=key: f"{key}: {m}")
    torch.compiler.reset()


def check_fx(case: Case) -> None:
    # In double: a traced network may multiply in another order than the eager one.
    x = case.images(4).double()
    model = randomise(case.build()).double()
    nodes = [info["module"] for info in model.feature_info[1:]] + [model.pretrained_cfg["classifier"]]
    traced = GraphExtractNet(deepcopy(model), nodes)
    for training in (False, True):
        expected = model.train(training)(x)
        *maps, logits = traced.train(training)(x)
        torch.testing.assert_close(logits.flatten(1), expected)
        assert len(maps) == case.stages
    (logits.square().sum() + 0 * maps[0].sum()).backward()
    expected.square().sum().backward()
    gradients = dict(model.named_parameters())
    if any(key.startswith("ssia.") for key in gradients):
        return  # its loss is attached after the last node
    assert len(list(traced.parameters())) == len(gradients)
    for key, p in traced.graph_module.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key].grad, msg=lambda m, key=key: f"{key}: {m}")


def check_export(case: Case) -> None:
    x, more = case.images().double(), case.images(5).double()
    model = randomise(case.build_shallow().double()).eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(more), model(more))


def check_onnx(case: Case, folder: Path) -> None:
    import onnxruntime

    model = randomise(case.build_shallow()).eval()
    path = folder / "m.onnx"
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    torch.onnx.export(model, (case.images(),), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = case.images(5)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x).detach()
    difference = (torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()
    assert difference < 5e-5, difference  # two implementations of convolution, in float32


def check_norm_conversion(case: Case) -> None:
    model = randomise(case.build().double()).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = case.images().double()
    expected = model(x)
    for convert in (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        convert_sync_batchnorm,
        freeze_batch_norm_2d,
    ):
        converted = convert(deepcopy(model))
        kinds = {type(m) for m in converted.modules()}
        assert nn.BatchNorm2d not in kinds
        # A frozen norm counts no batches, and holds its affine as buffers.
        after = {k: v for k, v in converted.state_dict().items() if "num_batches_tracked" not in k}
        assert after.keys() == {k for k in before if "num_batches_tracked" not in k}
        assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
        own = {k for k, p in model.named_parameters() if not STOCK.fullmatch(k) and p.ndim}
        trainable = {k for k, _ in converted.named_parameters()}
        norms = {k for k in own if "norm." in k} if convert is freeze_batch_norm_2d else set()
        assert own - norms <= trainable
        if convert is freeze_batch_norm_2d:  # SyncBatchNorm runs on GPUs only
            torch.testing.assert_close(converted(x), expected)


def check_unknown_argument(case: Case) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        case.build(nonsense=1)


FOR_EVERY_MODEL: list[Callable] = [check_registration, check_forward_and_safetensors]
CHECKS: list[Callable] = [
    value
    for name, value in list(globals().items())
    if name.startswith("check_") and value not in FOR_EVERY_MODEL
]


def run(check: Callable, case: Case, folder: Path) -> None:
    """Run a check on a case; ``folder`` is for files."""
    torch.manual_seed(0)
    check(*(case, folder)[: len(inspect.signature(check).parameters)])
