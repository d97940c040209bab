"""Hooks fire on every module that computes something: what Grad-CAM, captum and torchinfo are made of."""

from collections import Counter

import pytest
import torch
from helpers import SMALL, narrow, noise, randomise
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook

from timm_attn.layers import ASR, SSIA
from timm_attn.models import parse_name

#: CIFAR networks of basic blocks and ImageNet networks of bottlenecks.
NAMES = [name for name in SMALL if parse_name(name)[0] in ("resnet20", "resnet50")]


def images(batch=2, size=32):
    return noise(batch, 3, size, torch.Generator().manual_seed(1))


def blocks(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, BasicBlock | Bottleneck)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_stages_are_called_as_modules(name, checkpointing):
    model = randomise(narrow(name)).train()
    model.set_grad_checkpointing(checkpointing)
    stages = {info["module"]: model.get_submodule(info["module"]) for info in model.feature_info[1:]}
    # timm's checkpointing runs the blocks of all stages as one sequence.
    watched = blocks(model) | ({} if checkpointing else stages)
    calls = Counter()
    for path, module in watched.items():
        module.register_forward_pre_hook(lambda *_, path=path: calls.update([(path, "before")]))
        module.register_forward_hook(lambda *_, path=path: calls.update([(path, "after")]))
        module.register_full_backward_hook(lambda *_, path=path: calls.update([(path, "backward")]))
    loss = model(images()).square().sum()
    assert calls == dict.fromkeys([(path, when) for path in watched for when in ("before", "after")], 1)
    loss.backward()
    for path in watched:
        assert calls[path, "before"] == (2 if checkpointing else 1), path
        assert calls[path, "backward"] == 1, path


@pytest.mark.parametrize("name", NAMES)
def test_the_usual_grad_cam(name):
    model = randomise(narrow(name)).eval()
    x, seen = images(), {}

    def keep(module, inputs, output):
        seen["map"] = output
        output.register_hook(lambda grad: seen.update(grad=grad))

    last = [model.get_submodule(info["module"]) for info in model.feature_info][-1][-1]
    handle = last.register_forward_hook(keep)
    model(x)[:, 3].sum().backward()
    handle.remove()
    weights = seen["grad"].mean((2, 3), keepdim=True)
    cam = (weights * seen["map"]).sum(1).relu()
    features = model.forward_features(x)
    torch.testing.assert_close(seen["map"], features)
    by_hand = model.fc.weight[3] / features[0, 0].numel()
    torch.testing.assert_close(seen["grad"], by_hand[None, :, None, None].expand_as(features))
    assert cam.shape == (2, *features.shape[2:])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_walk_over_all_modules_misses_nothing(name, training):
    model = randomise(narrow(name)).train(training)
    called = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    model(images(4))
    # What is there for training only, and what holds modules without computing anything itself.
    ssia = [path for path, module in model.named_modules() if isinstance(module, SSIA)]
    silent = {p for p, m in model.named_modules() if isinstance(m, nn.Identity | nn.ModuleList)}
    if not training:
        silent |= {p for p, _ in model.named_modules() if any(p.startswith(f"{s}.") for s in ssia)} | {*ssia}
    assert {path for path, _ in model.named_modules()} - called <= silent


def count_hooks(model, kind, calls):
    """Hooks on one kind of module, or on all at once."""
    if kind is None:
        return [
            register_module_forward_hook(
                lambda m, *_: calls.update([k for k in (ASR, nn.BatchNorm2d) if isinstance(m, k)])
            )
        ]
    return [
        m.register_forward_hook(lambda m, *_: calls.update([kind]))
        for m in model.modules()
        if isinstance(m, kind)
    ]


# torch.compile itself leaves hooks on all modules out.
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(ASR, False), (ASR, True), (nn.BatchNorm2d, False), (nn.BatchNorm2d, True), (None, False)],
)
def test_hooks_on_the_two_that_training_fuses(kind, compiled):
    model = randomise(narrow("resnet20_asr")).train()
    calls = Counter()
    handles = count_hooks(model, kind, calls)
    try:
        (torch.compile(model, backend="eager") if compiled else model)(images())
    finally:
        for handle in handles:
            handle.remove()
        torch.compiler.reset()
    expected = {k: sum(isinstance(m, k) for m in model.modules()) for k in (ASR, nn.BatchNorm2d)}
    assert calls == ({kind: expected[kind]} if kind else expected)


@pytest.mark.parametrize("name", ["resnet20_dia", "resnet50_dia"])
def test_blocks_of_dia_may_be_wrapped(name):
    """A block that somebody's wrapper runs a second time reads the state of the first."""
    model = randomise(narrow(name)).double().train()
    x = images(4).double()
    model(x).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    assert not [k for m in model.modules() for k, v in vars(m).items() if torch.is_tensor(v)], "state is kept"
    model.zero_grad()
    for info in model.feature_info[1:]:
        stage = model.get_submodule(info["module"])
        for index in range(1, len(stage)):
            stage[index] = checkpoint_wrapper(stage[index])
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key.replace("_checkpoint_wrapped_module.", "")])


def test_a_block_of_dia_needs_the_state():
    model = narrow("resnet20_dia")
    with pytest.raises(RuntimeError, match="step 1 of 2 has no state .* call the whole network"):
        model.layer1[1](torch.zeros(1, 8, 8, 8))
