"""SSIA's loss reaches any training loop, with the gradients of the sum written out."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import BACKBONES, narrow, parse_name, randomise, small_names
from reference.resnet import forward
from reference.ssia import ssia_loss
from timm.layers import get_graph_node_names
from timm.models._manipulate import reinit_non_persistent_buffers

import timm_attn
from timm_attn.layers import SSIA

NAMES = small_names("ssia")
TARGETS = ("channel", "last", "spatial")


def batch(seed: int = 0, images: int = 6):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 1, 1, generator=g) + torch.randn(images, 3, 64, 64, generator=g)
    return x.double(), torch.randint(0, 10, (images,), generator=g)


def explicit_gradients(model, batches, weight: float, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of Σ scale · (cross-entropy + weight · L) over batches, by the reference network and loss."""
    name = model.pretrained_cfg["architecture"]
    backbone = BACKBONES[parse_name(name)[0]]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    leaves = {k: state[k].requires_grad_() for k, _ in model.named_parameters()}
    for x, y in batches:
        trace: list = []
        logits = forward(
            state,
            x,
            layout="cifar" if backbone.cifar else "imagenet",
            block="bottleneck" if backbone.bottleneck else "basic",
            layers=[len(model.get_submodule(info["module"])) for info in model.feature_info[1:]],
            mechanism="ssia",
            trace=trace,
            train=True,
        )
        last = {entry["stage"]: entry["output"] for entry in trace}
        heads = {k.removeprefix("ssia."): v for k, v in leaves.items() if k.startswith("ssia.")}
        loss = F.cross_entropy(logits, y) + weight * ssia_loss(list(last.values()), heads, model.ssia.target)
        (scale * loss).backward()
    return {k: leaf.grad for k, leaf in leaves.items()}


def assert_gradients(model, expected: dict[str, torch.Tensor]) -> None:
    for key, parameter in model.named_parameters():
        difference = (parameter.grad - expected[key]).abs().max()
        assert difference <= 1e-6 * expected[key].abs().max(), (key, difference)


def model_of(name: str, **options):
    return randomise(narrow(name, **options).double()).train()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_any_loop_trains_it(name, target):
    model = model_of(name, target=target, aux_weight=0.7)
    x, y = batch()
    expected = explicit_gradients(model, [(x, y)], 0.7)
    F.cross_entropy(model(x), y).backward()
    assert_gradients(model, expected)


def check_step(options: dict | None = None, weight: float = 1.0) -> None:
    model = model_of("resnet20_ssia", **(options or {}))
    x, y = batch()
    expected = explicit_gradients(model, [(x, y)], weight)
    F.cross_entropy(model(x), y).backward()
    assert_gradients(model, expected)


def not_detached(self, features):
    losses = []
    for s, x in enumerate(features[:-1]):
        guess, wanted = self.heads[s](x.mean((2, 3))), features[s + 1].mean((2, 3))
        guess, wanted = (
            (z - z.mean(1, keepdim=True)) / (z.std(1, correction=0, keepdim=True) + 1e-5)
            for z in (guess, wanted)
        )
        losses.append(1 - F.cosine_similarity(guess, wanted).mean())
    return torch.stack(losses).mean()


def test_a_target_that_is_not_detached_is_told_apart(monkeypatch):
    check_step()
    monkeypatch.setattr(SSIA, "loss", not_detached)
    with pytest.raises(AssertionError):
        check_step()


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_another_weight_is_told_apart(wrong):
    with pytest.raises(AssertionError):
        check_step(weight=wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_gradient_accumulation(target):
    model = model_of("resnet20_ssia", target=target)
    batches = [batch(seed) for seed in range(3)]
    expected = explicit_gradients(model, batches, 1.0, scale=1 / 3)
    model.ssia.aux_scale.fill_(1 / 3)
    for x, y in batches:
        (F.cross_entropy(model(x), y) / 3).backward()
    assert_gradients(model, expected)


def test_gradient_scaler_with_accumulation():
    model = model_of("resnet20_ssia")
    batches = [batch(seed) for seed in range(2)]
    expected = explicit_gradients(model, batches, 1.0, scale=1 / 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        scaler.scale(torch.zeros(()))  # which makes the scaler's lazy scale
        model.ssia.aux_scale.fill_(scaler.get_scale() / 2)
        scaler.scale(F.cross_entropy(model(x), y) / 2).backward()
    scaler.unscale_(optimizer)
    assert_gradients(model, expected)


def test_a_scale_that_comes_too_late_is_an_error():
    model = model_of("resnet20_ssia")
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    model.ssia.aux_scale.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_may_be_changed_in_place():
    model = model_of("resnet20_ssia")
    x, y = batch()
    logits = model(x)
    logits.div_(2)
    F.cross_entropy(logits, y).backward()
    assert model.ssia.heads[0].weight.grad.abs().sum() > 0


def test_weight_zero_is_the_plain_network_bit_for_bit():
    models = []
    for name, options in (("resnet20", {}), ("resnet20_ssia", {"aux_weight": 0.0})):
        torch.manual_seed(0)
        model = narrow(name, drop_rate=0.2, **options).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
        models.append(model)
    plain, ssia = models
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ssia.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_in_eval_mode_it_is_the_stock_network(name):
    model = randomise(narrow(name)).eval()
    x = batch()[0].float()
    arguments = {k: v for k, v in model._model_args.items() if k in ("channels", "layers", "num_classes")}
    stock = timm.create_model(parse_name(name)[0], **arguments).eval()
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("ssia.")})
    assert torch.equal(model(x), stock(x))
    model(x).sum().backward()
    assert all(p.grad is None for p in model.ssia.parameters())
    assert torch.equal(timm_attn.fold(model)(x), stock(x))
    assert not any(k.startswith("ssia.aux_scale") for k in model.state_dict())


def test_under_autocast_the_loss_is_computed_in_float32():
    model = randomise(narrow("resnet20_ssia")).train()
    features = [torch.rand(4, c, 8, 8).bfloat16() for c in (8, 16, 24)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.ssia.loss(features).dtype == torch.float32
        x, y = batch()
        F.cross_entropy(model(x.float()), y).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.ssia.parameters())


@pytest.mark.parametrize("target", TARGETS[:1])
def test_compiled_with_its_backward_pass(target):
    model = model_of("resnet20_ssia", target=target)
    x, y = batch()
    expected = explicit_gradients(model, [(x, y)], 1.0, scale=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.ssia.aux_scale.fill_(0.5)
    (F.cross_entropy(compiled(x), y) * 0.5).backward()
    assert_gradients(model, expected)
    torch.compiler.reset()


def test_built_on_the_meta_device_it_trains_as_any_other():
    source = model_of("resnet20_ssia")
    model = narrow("resnet20_ssia", device="meta", dtype=torch.float64).to_empty(device="cpu").train()
    reinit_non_persistent_buffers(model)
    model.load_state_dict(source.state_dict())
    x, y = batch()
    expected = explicit_gradients(source, [(x, y)], 1.0)
    F.cross_entropy(model(x), y).backward()
    assert_gradients(model, expected)


def test_a_tracer_takes_the_loss_as_one_node():
    training, evaluation = get_graph_node_names(narrow("resnet20_ssia"))
    assert "ssia" in training and "ssia" not in evaluation


def test_per_sample_gradients_by_torch_func():
    model = model_of("resnet20_ssia", norm_layer=partial(timm.layers.GroupNorm, num_groups=2))
    x, y = batch()

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    parameters = {key: p.detach() for key, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    loss(dict(model.named_parameters()), x[1], y[1]).backward()
    assert_gradients(model, {key: gradient[1] for key, gradient in gradients.items()})


@pytest.mark.parametrize("last", [2, 3])
def test_a_pruned_network_has_no_loss(last):
    model = model_of("resnet20_ssia")
    model.prune_intermediate_layers([last])
    model(batch()[0])
    assert not list(model.ssia.parameters())


def test_averages_of_the_weights_can_be_taken_in_training():
    model = narrow("resnet20_ssia").train()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    x, y = batch()
    loss = F.cross_entropy(model(x.float()), y)
    copy.deepcopy(model)
    loss.backward()
    average.update(model)
    assert average.module.ssia.heads[0].weight.shape == model.ssia.heads[0].weight.shape
