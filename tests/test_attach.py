"""Mechanisms in networks of other families: timm's own small ones, which its authors made for tests."""

import gc
import threading
import weakref
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from helpers import found
from reference.dia import dia_cell
from safetensors.torch import save_file
from timm.models import metaformer, mlp_mixer
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_attn
from timm_attn import ends
from timm_attn.branches import branches, example_input, runs
from timm_attn.compare import BOUNDS, relative_difference
from timm_attn.dia_end import DIAEnd
from timm_attn.ends import BranchEnd, GatedBatchNorm2d, mixed
from timm_attn.layers import ASR, DIACell
from timm_attn.layers.frozen import FrozenGate
from timm_attn.models.frozen import remove_gate
from timm_attn.models.grafting import GraftError, start_constant
from timm_attn.models.mechanisms import MECHANISMS

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 2, "img_size": 64}
#: name: arguments that make it small. Maps, tokens, NHWC, windows, sums of branches, SE inside and at the end.
FAMILIES = {
    "test_convnext": {},
    "test_convnext2": {},
    "mobilenetv4_conv_small_035": {},
    "mobilenetv3_small_050": {},
    "test_byobnet": {},
    "test_vit": {"depth": 3, "img_size": 64},
    "test_vit2": {"depth": 3, "img_size": 64},
    "deit3_small_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "img_size": 56},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 64)},
    "seresnet18": {"layers": [2, 1, 1, 1], "channels": [16, 32, 32, 32]},
    "repvgg_a0": {},
    "caformer_s18": {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 96)},
    "levit_128s": {"embed_dim": (32, 48, 64), "key_dim": 16, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
    "cait_xxs24_224": {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 64},
    "coat_tiny": {"img_size": 64, "serial_depths": [1] * 4, "parallel_depth": 1, "embed_dims": [64] * 4},
    "resmlp_12_224": {"img_size": 64, "num_blocks": 2, "embed_dim": 48},
}
#: Whose entry points take no sizes: what they call, with what they give it.
MAKERS = {
    "caformer_s18": partial(
        metaformer._create_metaformer,
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    "resmlp_12_224": partial(
        mlp_mixer._create_mixer,
        patch_size=16,
        mlp_ratio=4,
        block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    ),
}
MAPS = ("test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050")


def build(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**FAMILIES.get(name, {}), **kwargs}
    if "img_size" not in sizes and not timm.get_pretrained_cfg(name).fixed_input_size:
        sizes["pretrained_cfg_overlay"] = {"input_size": (3, 64, 64)}
    return MAKERS.get(name, timm.create_model)(name, num_classes=7, **sizes)


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Random affines, statistics and gates: a fresh network hides bugs."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() <= 1 and tensor.numel() > 1:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise + 0.5 if "bias" not in name and "mean" not in name else noise - 0.5)
        elif tensor.is_floating_point() and not tensor.count_nonzero():  # a classifier that starts at zero
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, ASR):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(model: nn.Module, batch: int = 3) -> torch.Tensor:
    x = example_input(model, batch)
    return x + torch.arange(batch)[:, None, None, None]


# ------------------------------------------------------------------------------------------ in and out again

ASR_WHERE = [(name, "branches") for name in FAMILIES]
LARGE = ("coat_tiny", "caformer_s18", "maxvit_rmlp_pico_rw_256", "repvgg_a0", "levit_128s")
ASR_WHERE += [(name, "norms") for name in FAMILIES if name not in (*LARGE, "resmlp_12_224")]


@pytest.mark.parametrize(("name", "where"), ASR_WHERE)
def test_asr_keeps_the_stock_keys_and_folds_into_them(name, where):
    stock = build(name).double()
    keys = set(stock.state_dict())
    model = shaken(timm_attn.attach(stock, "asr", where=where, delta=2))
    assert model is stock and keys < set(model.state_dict())
    assert all(".asr" in key for key in set(model.state_dict()) - keys)
    gates = [module.gate() for module in model.modules() if isinstance(module, ASR)]
    assert gates and torch.cat([gate.flatten() for gate in gates]).std() > 0.05
    x = images(model)
    folded = timm_attn.fold(model, x)
    assert set(folded.state_dict()) == keys
    plain = build(name).double().eval()
    assert type(folded) is type(plain)
    assert {type(m) for m in folded.modules()} == {type(m) for m in plain.modules()}
    plain.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(plain(x), folded(x))
    assert relative_difference(model, plain, x) <= BOUNDS[torch.float64]
    # The gates do something: without them it is another network.
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in keys})
    assert relative_difference(model, plain, x) > 1e-3


def test_a_branch_that_takes_in_no_constant_gets_no_gate_with_a_warning():
    model = build("test_convnext").double()
    block = model.stages[1].blocks[0]
    block.mlp, block.gamma = nn.Sequential(block.mlp, nn.Tanh()), None
    count = sum(len(stage.blocks) for stage in model.stages)
    message = rf"1 of {count} residual branches of ConvNeXt get no gate, .* stages\.1\.blocks\.0\.drop_path"
    with pytest.warns(UserWarning, match=message):
        timm_attn.attach(model, "asr")
    assert sum(isinstance(m, ASR) for m in shaken(model).modules()) == count - 1
    assert not any(".asr" in key for key in block.state_dict())
    x = images(model)
    assert relative_difference(model, timm_attn.fold(model, x), x) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("name", MAPS)
def test_ssia_acts_in_training_only(name):
    stock = build(name)
    keys = set(stock.state_dict())
    plain = deepcopy(stock).train()
    model: nn.Module = timm_attn.attach(stock, "ssia").train()
    x = images(model)
    torch.manual_seed(1)
    theirs = plain(x)
    torch.manual_seed(1)
    ours = model(x)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for key, p in model.named_parameters() if key.startswith("ssia."))
    same = [
        torch.equal(dict(model.named_parameters())[key].grad, p.grad)
        for key, p in plain.named_parameters()
        if p.grad is not None
    ]
    assert not all(same)  # the auxiliary loss reaches the stages
    folded = timm_attn.fold(model, x)
    assert set(folded.state_dict()) == keys and type(folded) is type(plain)


class ByHand(nn.Module):
    """DIA at the end of a branch of tokens, in other words."""

    def __init__(self, state: dict, memory: dict, prefix: int) -> None:
        super().__init__()
        self.state, self.memory, self.prefix = state, memory, prefix

    def forward(self, x):
        g = x[:, self.prefix :].sum(1) / (x.shape[1] - self.prefix)
        h, c = self.memory.get("state", (torch.zeros_like(g), torch.zeros_like(g)))
        h, c = self.memory["state"] = dia_cell(g, h, c, self.state)
        return torch.einsum("bnc,bc->bnc", x, h)


def test_dia_on_a_vit_is_one_cell_that_reads_the_patches():
    model = shaken(timm_attn.attach(build("deit3_small_patch16_224").double(), "dia"))
    cells = [m for m in model.modules() if isinstance(m, DIACell)]
    assert len(cells) == 1 and model.num_prefix_tokens == 1
    state = model.state_dict()
    own = {k.removeprefix("blocks.0.dia1."): v for k, v in state.items() if ".dia" in k}
    plain = build("deit3_small_patch16_224").double().eval()
    plain.load_state_dict({k: v for k, v in state.items() if ".dia" not in k})
    memory: dict = {}
    for block in plain.blocks:
        block.drop_path1, block.drop_path2 = (ByHand(own, memory, 1) for _ in range(2))
    x = images(model)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"])
def test_dia_has_a_cell_for_each_run(name):
    model = build(name)
    found = runs(branches(model, example_input(model, 1)))
    timm_attn.attach(model, "dia")
    assert [m.channels for m in model.modules() if isinstance(m, DIACell)] == [
        run[0].channels for run in found
    ]
    assert sum(isinstance(m, DIAEnd) for m in model.modules()) == sum(map(len, found))


def test_dia_where_a_block_takes_patches_for_images():
    model = timm_attn.attach(timm.create_model("mobilevit_xxs"), "dia").eval()
    assert model(torch.randn(2, 3, 128, 128)).shape == (2, 1000)


@pytest.mark.parametrize("mechanism", ["se", "eca", "cbam", "sem", "spem"])
@pytest.mark.parametrize("name", MAPS)
def test_any_attention_stands_at_the_ends(name, mechanism):
    model = shaken(build(name))
    keys, x = set(model.state_dict()), images(model)
    plain = deepcopy(model)
    timm_attn.attach(model, mechanism)
    assert keys < set(model.state_dict())
    assert all(f".{mechanism}" in key or f"_{mechanism}" in key for key in set(model.state_dict()) - keys)
    assert relative_difference(plain, model.eval(), x) > 1e-6
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if key not in keys)


def test_attention_leaves_the_class_token_alone():
    model = build("deit3_small_patch16_224").eval()
    end = timm_attn.attach(model, "se").blocks[0].drop_path1
    x = torch.randn(2, 17, 48)
    out = end(x)
    assert torch.equal(out[:, 0], x[:, 0]) and not torch.allclose(out[:, 1:], x[:, 1:])
    expected = end.mechanism(x[:, 1:].transpose(1, 2).reshape(2, 48, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out[:, 1:], expected)


# --------------------------------------------------------------------------------------------------- grafting

STARTS = [(name, key) for name in MAPS for key in ("asr", "dia", "sem", "spem", "ssia", "se", "eca")]


@pytest.mark.parametrize(("name", "mechanism"), STARTS)
def test_a_mechanism_can_start_without_a_change(name, mechanism):
    model = shaken(build(name))
    plain = deepcopy(model)
    timm_attn.attach(model, mechanism)
    if name == "test_vit" and mechanism in ("sem", "spem", "se", "eca"):  # the class token has no gate
        with pytest.raises(GraftError, match="leaves the class token as it is"):
            start_constant(model, plain.state_dict())
        return
    start_constant(model, plain.state_dict())
    x = images(model)
    assert relative_difference(plain, model.eval(), x) <= 1e-5
    model.train()(x).square().sum().backward()
    own = [p for key, p in model.named_parameters() if key not in plain.state_dict()]
    assert own and any(p.grad is not None and p.grad.abs().sum() > 0 for p in own)


# ------------------------------------------------------------------------------------------------ LayerScale


@pytest.mark.parametrize("attention", [None, "asr", "dia"])
@pytest.mark.parametrize("name", ["test_convnext", "deit3_small_patch16_224"])
def test_layer_scales_fold_into_the_layers_before_them(name, attention):
    model = build(name).double()
    gammas = [key for key in model.state_dict() if "gamma" in key]
    model = shaken(timm_attn.attach(model, attention) if attention else model)
    x = images(model)
    folded = timm_attn.fold(model, x, layer_scale=True)
    own = {key for key in folded.state_dict() if ".dia" in key}
    assert gammas and set(folded.state_dict()) - own == set(build(name).state_dict()) - set(gammas)
    assert relative_difference(model, folded, x) <= BOUNDS[torch.float64]
    if attention == "asr":
        assert set(timm_attn.fold(model, x).state_dict()) >= set(gammas)
    for nothing, layer_scale in ((folded, True), *(() if attention == "asr" else ((model, False),))):
        with pytest.raises(timm_attn.NothingToFold):
            timm_attn.fold(nothing, x, layer_scale=layer_scale)


# ------------------------------------------------------------------------------------------------ what it meets


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [("test_vit", "dia"), ("swin_tiny_patch4_window7_224", "dia"), ("test_byobnet", "asr")],
)
def test_compiled_exported_and_checkpointed(name, mechanism):
    model = shaken(timm_attn.attach(build(name).double(), mechanism))
    x = images(model)
    expected = model(x)
    compiled = torch.compile(deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.compiler.reset()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))
    model.train()
    copy = deepcopy(model)
    copy.set_grad_checkpointing()
    for network in (model, copy):
        torch.manual_seed(0)
        network(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), copy.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, msg=lambda m, key=key: f"{key}: {m}")


def test_gates_on_norms_are_compiled_copied_and_pickled_as_weights(tmp_path):
    model = shaken(timm_attn.attach(build("test_byobnet").double(), "asr", where="norms"))
    x = images(model)
    expected = model(x)
    torch.testing.assert_close(deepcopy(model)(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    torch.compiler.reset()
    torch.save(model, tmp_path / "whole.pt")
    torch.testing.assert_close(torch.load(tmp_path / "whole.pt", weights_only=False)(x), expected)
    with pytest.raises(TypeError, match="cannot assign"):  # and nothing is lost in silence
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_timm_merges_branches_after_their_gates(name):
    model = shaken(timm_attn.attach(build(name).double(), "asr"))
    x = images(model, 2)
    merged = reparameterize_model(model)
    assert not any(isinstance(m, ASR | BranchEnd) for m in merged.modules())
    assert relative_difference(model, merged, x) <= 1e-9
    attached = timm_attn.attach(build(name), "dia")
    with pytest.raises(ValueError, match="cannot merge its branches: DIACell stands where they meet"):
        reparameterize_model(attached)


def test_a_network_that_merges_itself_takes_gates_first():
    model = shaken(timm_attn.attach(build("iformer_t").double(), "asr"))
    x = images(model, 1)
    expected = model(x)
    for merged in (reparameterize_model(model), deepcopy(model).fuse()):
        assert not any(isinstance(m, ASR | BranchEnd) for m in merged.modules())
        torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), expected)  # and is as it was


def test_what_depends_on_the_image_stays_where_only_norms_are_merged():
    model = shaken(timm_attn.attach(build("nextvit_small").double(), "sem"))
    x = images(model, 1)
    merged = reparameterize_model(model)
    ends = [sum(isinstance(m, BranchEnd) for m in network.modules()) for network in (model, merged)]
    assert ends[0] == ends[1] > 0
    torch.testing.assert_close(merged(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_whole_block_that_is_merged_does_not_take_attention_with_it():
    model = timm_attn.attach(build("iformer_t"), "sem").eval()
    before = model.state_dict().keys()
    for merge in (reparameterize_model, lambda model: model.fuse()):
        with pytest.raises(ValueError, match="cannot merge its branches: SEM stands where they meet"):
            merge(model)
    assert model.state_dict().keys() == before


def test_no_state_of_dia_outlives_its_graph():
    model = timm_attn.attach(build("test_convnext"), "dia").train()
    alive = weakref.WeakSet()

    def watch(module, args, output):
        alive.update(t for t in output)

    for module in model.modules():
        if isinstance(module, DIACell):
            module.register_forward_hook(watch)
    loss = model(images(model)).sum()
    assert len(alive) > 0
    loss.backward()
    del loss
    gc.collect()
    assert len(alive) == 0
    with torch.no_grad():
        model.eval()(images(model))
    assert len(alive) == 0


def test_a_reentrant_checkpoint_is_refused():
    model = timm_attn.attach(build("test_vit"), "dia").train()
    x = images(model)
    tokens = model.patch_embed(x)
    tokens = model._pos_embed(tokens)
    for block in model.blocks:
        tokens = checkpoint(block, tokens, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        tokens.sum().backward()


def test_a_block_may_be_run_again_by_another_thread():
    """As autograd does on GPUs, which call the hooks of saved tensors from a thread of theirs."""
    model = shaken(timm_attn.attach(build("test_vit").double(), "dia")).train()
    copy = deepcopy(model)
    copy.set_grad_checkpointing()
    x = images(model)
    model(x).square().sum().backward()
    model(-x).square().sum().backward()
    loss = copy(x).square().sum() + copy(-x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_block_after_a_frozen_one_may_be_run_again_by_another_thread():
    model = shaken(timm_attn.attach(build("test_vit").double(), "dia")).train()
    for layers in (model.patch_embed, model.blocks[0]):
        layers.requires_grad_(False)  # what comes before the next block has no graph
    model.cls_token.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    copy = deepcopy(model)
    copy.set_grad_checkpointing()
    x = images(model)
    model(x).square().sum().backward()
    thread = threading.Thread(target=copy(x).square().sum().backward)
    thread.start()
    thread.join()
    for p, q in zip(model.blocks[1:].parameters(), copy.blocks[1:].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_passes_at_once_keep_their_states_apart():
    model = shaken(timm_attn.attach(build("test_vit").double(), "dia")).train()
    fresh = deepcopy(model)
    x, y = images(model, 4).chunk(2)
    left = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)  # unfinished
    torch.testing.assert_close(model(y), fresh(y))
    assert left[0].grad_fn is not None
    # Two passes in step.
    maps = [model._pos_embed(model.patch_embed(images)) for images in (x, y)]
    for block in model.blocks:
        maps = [block(tokens) for tokens in maps]
    for tokens, images_ in zip(maps, (x, y), strict=True):
        torch.testing.assert_close(model.forward_head(model.norm(tokens)), fresh(images_))


def test_a_block_compiled_alone_reads_what_was_left_for_it():
    model = shaken(timm_attn.attach(build("test_vit").double(), "dia"))
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        model.blocks[0].compile(backend="eager")
        torch.testing.assert_close(model(x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("mechanism", ["asr", "dia", "sem", "spem"])
def test_gates_keep_the_precision_of_the_map(mechanism):
    model = timm_attn.attach(build("mobilenetv3_small_050"), mechanism).train()
    ends = [module for module in model.modules() if isinstance(module, BranchEnd)]
    seen = []
    for end in ends:
        end.register_forward_hook(lambda module, args, y: seen.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(model))
    assert len(seen) == len(ends) and all(a == b for a, b in seen)
    assert torch.bfloat16 in {a for a, _ in seen}


def test_norms_without_running_statistics_are_as_they_are_without_a_gate():
    model = shaken(timm_attn.attach(build("seresnet18").double(), "asr")).train()
    other = deepcopy(model)
    for norm in found(m for m in other.modules() if isinstance(m, GatedBatchNorm2d)):
        norm.end[0].ungate()
    x = images(model)
    for network in (model, other):
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):  # virtual adversarial training: no trace in the statistics
                norm.track_running_stats = False
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.testing.assert_close(model(x), other(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for network in (model, other):
        for norm in network.eval().modules():
            if isinstance(norm, nn.BatchNorm2d):  # adaptation at test time: by the batch alone
                norm.running_mean = norm.running_var = None
    torch.testing.assert_close(model(x), other(x))


def test_attention_reads_tokens_as_the_grid_that_they_are():
    model = build("test_vit", img_size=(32, 128)).eval()
    assert model.patch_embed.grid_size == (2, 8)
    end = timm_attn.attach(model, "cbam").blocks[0].drop_path1
    prefix = model.num_prefix_tokens
    x = torch.randn(2, prefix + 16, model.embed_dim)
    expected = end.mechanism(x[:, prefix:].transpose(1, 2).unflatten(2, (2, 8))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(end(x)[:, prefix:], expected)
    levit = timm_attn.attach(build("levit_128s"), "cbam").eval()  # which does not say its grid
    end = next(module for module in levit.modules() if isinstance(module, BranchEnd))
    count, width = end.branch.pixels, end.branch.channels
    assert (end.branch.axis, end.branch.grid, count) == (-1, (14, 14), 14 * 14)
    for side in (14, 10):  # of other images, a square
        x = torch.randn(2, side * side, width)
        expected = end.mechanism(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        torch.testing.assert_close(end(x), expected)


@pytest.mark.parametrize(("name", "where"), [("resnet18", "branches"), ("test_convnext", "branches")])
def test_a_wrong_fold_is_seen_before_anything_is_trained(name, where, monkeypatch):
    """A fresh network would hide it: gates are all the same, and scales before them about 0."""
    right = ends.scale
    monkeypatch.setattr(ends, "scale", lambda block, names, gate, n: right(block, names, gate.flip(-1), n))
    with pytest.raises(ValueError, match="asr would not fold out of"):
        timm_attn.attach(build(name), "asr", generator="ie", where=where)


def test_rounding_is_no_wrong_fold(monkeypatch):
    """Random gates in networks of many summed branches, such as mobileone_s4, round to more than the bound."""
    monkeypatch.setitem(BOUNDS, torch.float32, 1e-12)
    model = timm_attn.attach(build("test_convnext"), "asr", generator="ie")
    with pytest.raises(timm_attn.FoldError, match="if it is rounding"):
        timm_attn.fold(shaken(model))


def test_a_gate_of_both_signs_is_refused_before_an_activation():
    network = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    timm_attn.attach(timm.create_model("cspresnet50", **network), "asr")
    with pytest.raises(ValueError, match="asr would not fold out of CspNet"):
        timm_attn.attach(timm.create_model("cspdarknet53", **network), "asr", generator="scale")


def test_parameters_are_set_anew():
    """What FSDP does with a network made on the meta device."""
    for mechanism, options in (("asr", {"where": "norms"}), ("sem", {}), ("spem", {})):
        model = timm_attn.attach(build("test_byobnet"), mechanism, **options)
        fresh = deepcopy(model)
        shaken(model)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        drawn = (nn.Linear, nn.Conv2d, nn.Conv1d)
        random = [f"{path}." for path, module in model.named_modules() if isinstance(module, drawn)]
        own = [key for key in fresh.state_dict() if mechanism in key and not key.startswith(tuple(random))]
        for key in found(own):
            assert torch.equal(model.state_dict()[key], fresh.state_dict()[key]), key
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in found(norms):
            weight, bias = (norm._parameters[name] for name in ("weight", "bias"))
            assert (weight == 1).all() and (bias == 0).all() and (norm.running_mean == 0).all()


def test_ssia_refuses_what_its_maps_do_not_survive():
    with pytest.raises(ValueError, match="patch_drop_rate=0, not 0.5"):
        timm_attn.attach(build("test_vit", patch_drop_rate=0.5), "ssia")
    with pytest.raises(ValueError, match="patch_drop_rate=0, not 0.5"):
        timm_attn.attach(timm.create_model("hiera_tiny_224", patch_drop_rate=0.5, device="meta"), "ssia")
    own = build("resnet18")
    own.__class__ = type(
        "Own", (type(own),), {"forward": lambda self, x: 2 * timm.models.ResNet.forward(self, x)}
    )
    with pytest.raises(ValueError, match="ssia cannot be used with Own: in training its forward gives"):
        timm_attn.attach(own, "ssia")
    assert type(own).__name__ == "Own" and not hasattr(own, "ssia")
    model = timm_attn.attach(build("test_vit"), "ssia").train()
    x = images(model)
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    model(x, attn_mask=mask).sum().backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if key.startswith("ssia."))
    with pytest.raises(TypeError, match="by name"):
        model(x, mask)


def test_an_own_network_with_a_child_called_module_is_folded_whole():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = timm_attn.attach(build("seresnet18"), "asr")
            self.head = nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.module(x))

    x = images(Own().module)
    assert timm_attn.fold(Own(), x)(x).shape == (3, 2)
    assert timm_attn.fold(nn.DataParallel(Own().module), x)(x).shape == (3, 7)


@pytest.mark.parametrize("training", [False, True])
def test_the_gate_in_a_norm_is_the_gate_after_it(training):
    model = shaken(timm_attn.attach(build("seresnet18").double(), "asr")).train(training)
    other = deepcopy(model)
    gated = [m for m in other.modules() if isinstance(m, GatedBatchNorm2d)]
    assert len(gated) == 5
    for norm in gated:
        norm.end[0].ungate()
    x = images(model)
    a, b = model(x), other(x)
    torch.testing.assert_close(a, b)
    for loss in (a.square().sum(), b.square().sum()):
        loss.backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# -------------------------------------------------------------------------------------------------- registered


def test_every_network_of_timm_can_be_had_by_name():
    model = timm_attn.create_model("test_vit3", attention="dia", num_classes=4, reduction=8)
    assert model.pretrained_cfg["architecture"] == "test_vit3_dia" and timm.is_model("test_vit3_dia")
    again = timm.create_model("test_vit3_dia", num_classes=4, reduction=8)
    again.load_state_dict(model.state_dict(), strict=True)
    assert timm_attn.create_model("test_vit3", num_classes=4).pretrained_cfg["architecture"] == "test_vit3"
    folded = timm_attn.fold(shaken(timm_attn.create_model("test_convnext", attention="asr")))
    assert folded.pretrained_cfg["architecture"] == "test_convnext"
    with pytest.raises(ValueError, match="conam is for timm's ResNets"):
        timm_attn.create_model("test_vit", attention="conam")
    with pytest.raises(ValueError, match="ASR has attention='se' on top in blocks of timm's ResNet only"):
        timm_attn.create_model("test_vit", attention="asr_se")
    with pytest.raises(ValueError, match="timm has no network 'resnet5': did you mean resnet"):
        timm_attn.register("resnet5", "asr")
    with pytest.raises(ValueError, match="resnet20_dia has dia already: name resnet20"):
        timm_attn.create_model("resnet20_dia.cpu_c10", attention="asr")
    with pytest.raises(ValueError, match=r"'resnet50.a1_in1k' has a tag: leave it out, or .*attention='asr'"):
        timm_attn.register("resnet50.a1_in1k", "asr")
    with pytest.raises(ValueError, match=r"tv_resnet50 is an old name: timm calls it resnet50.tv_in1k"):
        timm_attn.register("tv_resnet50", "asr")
    assert not {"test_vit_conam", "test_vit_asr_se", "resnet5_asr"} & {*timm.list_models()}


def test_any_resnet_of_timm_can_have_attention_on_top():
    model = shaken(timm_attn.create_model("resnetaa50d", attention="asr_se", num_classes=2))
    assert timm_attn.fold(model).pretrained_cfg["architecture"] == "seresnetaa50d"
    timm_attn.register("resnet10t", "asr")
    folded = timm_attn.fold(shaken(timm.create_model("resnet10t_asr", attention="eca", num_classes=2)))
    stock = timm.create_model("resnet10t", block_args={"attn_layer": "eca"}, num_classes=2)
    assert folded.state_dict().keys() == stock.state_dict().keys()
    for taken in ("seresnet50", "ecaresnet26t", "resnetv2_50"):  # by another attention, or no place for any
        with pytest.raises(ValueError, match="ASR has attention='se' on top in blocks of timm's ResNet only"):
            timm_attn.register(taken, "asr_se")


# --------------------------------------------------------------------------------------------------- bad input


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))


class Wrapped(nn.parallel.DistributedDataParallel):
    def __init__(self) -> None:
        nn.Module.__init__(self)


@pytest.mark.parametrize(
    ("make", "mechanism", "options", "error", "message"),
    [
        (lambda: build("test_vit"), "sea", {}, ValueError, "no mechanism 'sea': name one of se, dia, asr"),
        (lambda: build("test_vit"), "", {}, ValueError, "no mechanism"),
        (
            lambda: build("test_vit"),
            "fmm",
            {},
            ValueError,
            "fmm is for timm's ResNets, .* VisionTransformer is none",
        ),
        (
            lambda: build("test_vit"),
            "asr",
            {"detla": 2},
            TypeError,
            "asr takes no detla: its options are delta",
        ),
        (lambda: build("test_vit"), "asr", {"delta": 0}, ValueError, "ASR delta must be at least 1, got 0"),
        (
            lambda: timm.create_model("vgg11", device="meta"),
            "dia",
            {},
            ValueError,
            "no residual branch .* where='norms'",
        ),
        (
            lambda: timm.create_model("vgg11", device="meta"),
            "asr",
            {"where": "norms"},
            ValueError,
            "no norm layer with a weight",
        ),
        (
            lambda: timm.create_model("mixer_s32_224", device="meta"),
            "asr",
            {},
            ValueError,
            "takes in a constant gate",
        ),
        (
            lambda: timm_attn.attach(build("test_vit"), "dia"),
            "asr",
            {},
            ValueError,
            "has DIACell at .* already",
        ),
        (lambda: timm.create_model("resnet20_ssia"), "asr", {}, ValueError, "already: take a fresh network"),
        (
            lambda: torch.compile(build("test_vit")),
            "asr",
            {},
            ValueError,
            "is compiled: attach to the network",
        ),
        (Wrapped, "asr", {}, ValueError, r"wraps a network: attach to that \(.module\)"),
        (quantised, "asr", {}, ValueError, "is quantised .*: attach, train and fold before"),
        (lambda: torch.fx.symbolic_trace(nn.Linear(2, 2)), "asr", {}, ValueError, "recorded graph"),
        (nn.ReLU, "asr", {}, ValueError, "has no parameters"),
        (dict, "asr", {}, TypeError, "attach needs a network, got dict"),
        (
            lambda: nn.Linear(3, 3),
            "asr",
            {},
            ValueError,
            r"does not take images \(1, 3, 224, 224\) .*images=",
        ),
        (
            lambda: nn.Conv2d(3, 4, 1),
            "ssia",
            {},
            ValueError,
            "ssia needs a network of timm .* Conv2d lacks one",
        ),
    ],
)
def test_what_cannot_be_says_why_in_one_line_and_changes_nothing(make, mechanism, options, error, message):
    model = make()
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    before = {path: (type(m), list(vars(m))) for path, m in modules.items()}
    with pytest.raises(error, match=message) as caught:
        timm_attn.attach(model, mechanism, **options)
    assert "\n" not in str(caught.value)
    after = dict(model.named_modules()) if modules else {}
    assert {path: (type(m), list(vars(m))) for path, m in after.items()} == before


@pytest.mark.parametrize("mechanism", ["asr", "dia", "ssia", "se"])
@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "seresnet18", "mobilenetv3_small_050"])
def test_in_inference_mode_the_same_places_are_found(name, mechanism):
    def make():
        return timm_attn.attach(timm.create_model(name, **FAMILIES[name]).eval(), mechanism)

    wanted = make()
    with torch.inference_mode():
        made = make()
        assert made.state_dict().keys() == wanted.state_dict().keys()
        made.load_state_dict(wanted.state_dict())
        images = example_input(wanted)
        assert torch.equal(made(images), wanted(images))
        if mechanism == "asr":
            assert relative_difference(timm_attn.fold(made), wanted, images) <= BOUNDS[images.dtype]


def test_it_attaches_on_the_meta_device():
    model = timm_attn.attach(timm.create_model("test_vit", device="meta"), "asr")
    assert all(p.is_meta for p in model.parameters())


def test_an_own_class_keeps_its_name_for_the_eye():
    assert mixed(BranchEnd, nn.Linear).__name__ == "BranchEndLinear"
    assert {"asr", "dia", "ssia", "sem", "spem", "conam", "fmm"} < set(MECHANISMS)


# --------------------------------------------------------------------------- what other people's networks showed


def test_a_graft_in_front_of_se_is_refused_not_wrong():
    sizes = {"layers": [1, 1, 1, 1], "channels": [16, 32, 32, 32]}
    stock = shaken(timm.create_model("seresnet50", **sizes))
    for mechanism in ("dia", "sem"):
        with pytest.raises(GraftError, match="se ends the branch, and lets no scale through"):
            timm_attn.graft(timm_attn.register("seresnet50", mechanism), stock, **sizes)


def test_se_in_timms_own_place_starts_constant_in_every_way(tmp_path):
    sizes = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32]}
    stock = shaken(timm.create_model("resnet50", **sizes))
    save_file(stock.state_dict(), tmp_path / "m.safetensors")
    overlay = {"file": str(tmp_path / "m.safetensors")}
    x = torch.randn(2, 3, 64, 64)
    loaded = timm_attn.create_model(
        "resnet50", attention="se", pretrained=True, pretrained_cfg_overlay=overlay, **sizes
    )
    for model in (loaded, timm_attn.graft("resnet50_se", stock, **sizes)):
        assert relative_difference(stock, model, x) < BOUNDS[torch.float32]
        assert model.layer1[0].se is not None


@pytest.mark.parametrize("trained", ["all", "last block", "last mlp"])
@pytest.mark.parametrize("order", ["two losses", "evaluation between", "unfinished pass between"])
def test_checkpointed_passes_do_not_mix(order, trained):
    torch.manual_seed(0)
    model = timm_attn.attach(build("test_vit").double(), "dia").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dia" in name:
                parameter.mul_(5)
    if trained != "all":  # what comes before has no graph that could keep its state
        model.requires_grad_(False)
        last = model.blocks[-1]
        for layers in (last if trained == "last block" else last.mlp, model.norm, model.head):
            layers.requires_grad_(True)
    a = images(model, 2)
    b = 3 + a.flip(0)
    gradients = []
    for checkpointed in (False, True):
        net = deepcopy(model)
        net.set_grad_checkpointing(checkpointed)
        loss = net(a).square().sum()
        if order == "two losses":
            loss = loss + net(b).square().sum()
        else:
            with torch.no_grad():
                if order == "evaluation between":
                    net(b)
                else:
                    net.forward_intermediates(b, indices=[-2], stop_early=True, intermediates_only=True)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def test_a_class_token_is_told_by_the_grid_not_by_a_square():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(224, 256), depth=1, embed_dim=48, num_heads=2)
    model = timm_attn.attach(model, "se")
    end, x = model.blocks[0].drop_path1, torch.randn(1, 225, 48)  # 14 · 16 + 1 = 15²
    assert end.branch.prefix == 1 and torch.equal(end(x)[:, 0], x[:, 0])


class OwnBlock(nn.Module):
    """A residual block whose norm is read twice, or stands in another block, too."""

    def __init__(self, norm: nn.Module, twice: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.drop_path, self.twice = (
            nn.Conv2d(8, 8, 3, padding=1),
            norm,
            nn.Identity(),
            twice,
        )

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.drop_path(y) + (y if self.twice else x)


def test_what_a_block_still_reads_is_not_overwritten():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(OwnBlock(nn.BatchNorm2d(8), True) for _ in range(2))).eval()
    x = torch.randn(2, 3, 16, 16)
    timm_attn.attach(model, "dia", x)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_a_norm_in_two_blocks_takes_in_no_gate():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), OwnBlock(norm, False), OwnBlock(norm, False))
    with pytest.raises(ValueError, match="end in nothing that takes in a constant gate"):
        timm_attn.attach(model, "asr", torch.randn(1, 3, 16, 16))


def test_se_in_the_middle_of_a_branch_is_not_its_end():
    model = timm_attn.attach(timm.create_model("rexnet_100"), "se").eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert any(isinstance(m, BranchEnd) for m in model.modules())


@pytest.mark.parametrize("name", ["levit_128s", "test_convnext"])
def test_timms_reparameterisation_takes_gates_first(name):
    model = shaken(timm_attn.attach(build(name), "asr"))
    x = images(model)
    with torch.no_grad():  # LeViT keeps what it computes in eval mode
        expected = model(x)
        error = (reparameterize_model(model)(x) - expected).abs().max() / expected.abs().max()
    assert error < BOUNDS[torch.float32]


def test_norms_without_bias_take_gates():
    model = timm.create_model("vit_tiny_patch16_224", norm_layer=timm.layers.RmsNorm, **SMALL).double()
    model = shaken(timm_attn.attach(model, "asr", where="norms"))
    timm_attn.fold(model, images(model))


@pytest.mark.parametrize("name", ["seresnet50", "res2net50_26w_4s", "xception41p"])
def test_feature_maps_of_networks_outside_the_table(name):
    stock = timm.create_model(name, features_only=True, device="meta")
    model = timm.create_model(timm_attn.register(name, "asr"), features_only=True, device="meta")
    assert set(stock.state_dict()) < set(model.state_dict())


def test_ssia_keeps_what_a_network_gives_and_takes():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)
    model.set_distilled_training(True)
    timm_attn.attach(model, "ssia")
    outputs = model.train()(images(model, 2))
    assert isinstance(outputs, tuple) and len(outputs) == 2
    sum(y.square().sum() for y in outputs).backward()
    vit = timm_attn.attach(build("test_vit"), "ssia").eval()
    assert torch.equal(vit(images(vit), attn_mask=None), vit(images(vit)))
    with pytest.raises(TypeError, match="not on a dict of patches"):
        vit.train()({"patches": images(vit)})
    with pytest.raises(ValueError, match="aux_logits=False"):
        timm_attn.attach(timm.create_model("inception_v3", aux_logits=True), "ssia")


def test_nothing_is_attached_twice_in_timms_own_place():
    model = timm_attn.attach(timm.create_model("resnet18"), "se")
    with pytest.raises(ValueError, match="has se in its blocks already"):
        timm_attn.attach(model, "dia")
    with pytest.raises(ValueError, match="asr_se is asr in a network that has se"):
        timm_attn.attach(timm.create_model("resnet18"), "asr_se")


class Doubled(nn.Module):
    """What libraries put around a module, and leave in its place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, *args):
        return 2 * self.inner(x, *args)


@pytest.mark.parametrize(
    ("name", "mechanism"), [("resnet18", "asr"), ("resnet18", "sem"), ("test_vit", "asr")]
)
def test_what_is_put_in_place_of_a_mechanism_acts(name, mechanism):
    model = shaken(timm_attn.attach(build(name), mechanism))
    end = next(m for m in model.modules() if isinstance(m, BranchEnd))
    outputs = []
    end.block.register_forward_hook(lambda module, args, y: outputs.append(y))
    x = images(model)
    model(x)
    setattr(end.block, end.key, Doubled(end.mechanism))
    model(x)
    assert not torch.allclose(outputs[0], outputs[1])
    if mechanism == "asr":
        with pytest.raises(timm_attn.FoldError, match="Doubled stands in place of the gate"):
            timm_attn.fold(model)
        setattr(end.block, end.key, torch.compile(end.mechanism.inner, backend="eager"))
        torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)
    setattr(end.block, end.key, nn.Identity())
    model(x)
    assert not torch.allclose(outputs[0], outputs[-1])
    delattr(end.block, end.key)
    with pytest.raises(RuntimeError, match=f"has lost its {end.key}: put a module there"):
        model(x)
    torch.compiler.reset()


@pytest.mark.parametrize("mechanism", ["asr", "dia", "se", "sem"])
def test_branches_that_are_lists_of_layers_take_a_mechanism(mechanism):
    stock = timm.create_model("vit_small_patch16_18x2_224", **SMALL)
    keys = stock.state_dict().keys()
    model = shaken(timm_attn.attach(deepcopy(stock), mechanism))
    ends = [m for m in model.modules() if isinstance(m, BranchEnd)]
    assert len(ends) == 2 * 2 * SMALL["depth"] and keys < model.state_dict().keys()
    x = images(model)
    expected = model(x)
    torch.testing.assert_close(deepcopy(model)(x), expected)
    assert all(f".{mechanism}" in key for key in model.state_dict().keys() - keys)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if f".{mechanism}" in n)
    if mechanism == "asr":
        folded = timm_attn.fold(model, x)
        assert folded.state_dict().keys() == keys
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)


def test_slots_that_several_branches_pass_are_named():
    with pytest.warns(UserWarning, match="8 of 15 slots for stochastic depth of Visformer get nothing"):
        model = timm_attn.attach(timm.create_model("visformer_tiny", device="meta"), "dia")
    assert sum(isinstance(m, BranchEnd) for m in model.modules()) == 7
    with pytest.raises(ValueError, match="of Cait share their slots .*such as blocks.0.drop_path"):
        timm_attn.attach(build("cait_xxs24_224"), "se")


def test_example_images_may_be_on_another_device():
    for mechanism in ("asr", "dia", "ssia"):
        for x in (torch.randn(1, 3, 64, 64), torch.randn(1, 3, 160, 160)):
            model = timm.create_model("test_convnext", device="meta")
            keys = model.state_dict().keys()
            assert keys < timm_attn.attach(model, mechanism, images=x).state_dict().keys()


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224"])
def test_networks_that_keep_tensors_between_calls_are_copied(name):
    model = build(name).eval()
    x = images(model)
    model(x)  # which keeps a tensor with a graph
    timm_attn.attach(model, "asr")
    shaken(model)(x)
    timm_attn.fold(model, x)


def test_a_layer_that_needs_more_than_channels_is_not_blamed_on_images():
    with pytest.raises(
        ValueError, match="bottleneck cannot stand at the ends of branches: A concrete feature"
    ):
        timm_attn.attach(build("resnet18"), "bottleneck")


def test_dia_trains_where_branches_run_side_by_side():
    model = timm_attn.attach(timm.create_model("vit_small_patch16_18x2_224", **SMALL).double(), "dia").train()
    x, y = images(model, 4).chunk(2)
    alone = [deepcopy(model)(batch) for batch in (x, y)]
    both = [model(batch) for batch in (x, y)]  # the graph of the first lives during the second
    torch.testing.assert_close(both, alone)
    (both[0] + both[1]).sum().backward()


class Own(nn.Module):
    """What is called ``fuse`` in it is a layer or a flag; or it takes and returns what timm's does not."""

    def __init__(self, fuse: nn.Module | bool) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", num_classes=7)
        self.fuse = fuse

    def forward(self, x):
        return self.fuse(self.body(x)) if self.fuse else self.body(x)


class Merging(nn.Sequential):
    merged = ""

    def fuse(self, how: str = "all") -> bool:
        self.merged = how
        return True


@pytest.mark.parametrize("mechanism", ["asr", "sem"])
def test_what_only_has_the_name_of_merging_is_left_alone(mechanism):
    x = torch.randn(2, 3, 64, 64)
    layer = nn.Linear(7, 3)
    for fuse in (layer, False):
        model = timm_attn.attach(Own(fuse), mechanism, images=x)
        assert model(x).shape == (2, 3 if fuse else 7) and model.fuse is fuse
        reparameterize_model(model.eval())
    model = shaken(timm_attn.attach(Merging(build("resnet18")), mechanism, images=x))
    expected = model(x)
    assert model.fuse(how="some") is True and model.merged == "some"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, BranchEnd) for m in model.modules()) == (mechanism == "sem")


def test_merging_in_place_takes_networks_that_keep_tensors():
    model = timm_attn.attach(build("levit_128s"), "sem").eval()
    x = images(model)
    expected = model(x)
    torch.testing.assert_close(reparameterize_model(model, inplace=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_constant_that_nothing_absorbed_is_not_merged_away():
    model = timm_attn.attach(build("repvgg_a0"), "dia").eval()
    path = [path for path, m in model.named_modules() if isinstance(m, DIAEnd)][-1]
    end = model.get_submodule(path)
    remove_gate(model, path, FrozenGate(end.branch.channels))
    with pytest.raises(ValueError, match="cannot merge its branches"):
        reparameterize_model(model)
