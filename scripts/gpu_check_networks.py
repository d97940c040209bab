"""The checks of ``gpu_check.py`` that run networks in its own process, or in two for SyncBatchNorm."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from bench_timing import tf32
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch._dynamo.utils import counters

import timm_attn
from timm_attn.compare import BOUNDS

#: Name: (a smaller one of the family for --small, mechanisms that stand in it).
NETWORKS = {
    "resnet50": ("resnet20", ("asr", "dia", "ssia", "sem", "spem", "se", "conam", "fmm")),
    "convnext_tiny": ("test_convnext", ("asr", "dia", "ssia", "sem", "spem", "se")),
    "vit_small_patch16_224": ("test_vit", ("asr", "dia", "ssia", "sem", "spem")),
    "efficientnet_b0": ("efficientnet_b0", ("asr", "dia", "ssia")),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Greatest max|Δlogit| ÷ max|logit| against float64 on the CPU: a few roundings of the arithmetic.
LOGITS = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-2}
#: Greatest `gradient_difference` in eval mode. An activation that rounding moves across the kink of a ReLU
#: changes gradients by more than the rounding; a gradient that is missing or twice too large gives 1.
GRADIENTS = {"fp32": 2e-2, "tf32": 3e-1, "bf16": 8e-1, "fp16": 3e-1}
#: The same in training mode, in fp32. The statistics of four images multiply roundings: in half precision the
#: gradients of a ResNet-50 that is not trained are noise, and only asked to be finite.
TRAINING_GRADIENTS = 2e-1


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and until when.

    Attributes:
        small: Smaller networks of the same families.
        ends: When all must be over, by ``time.perf_counter``.
    """

    device: torch.device
    small: bool
    ends: float = math.inf

    def left(self, most: float) -> float:
        """Seconds that something may take: so many, or what is left of the time."""
        return max(1.0, min(most, self.ends - time.perf_counter()))

    def network(self, name: str, mechanism: str = "", **kwargs: Any) -> nn.Module:
        """A network with live norms and branches, on the CPU in eval mode."""
        torch.manual_seed(0)
        model: Any = timm.create_model(NETWORKS[name][0] if self.small else name, num_classes=10, **kwargs)
        if mechanism:
            timm_attn.attach(model, mechanism)
        low = 0.3 if mechanism == "fmm" else 0.5  # products of feature maps explode over 50 layers
        with torch.no_grad():
            for module in model.modules():
                if isinstance(getattr(module, "running_var", None), Tensor):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.8, 1.2)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                    module.weight.uniform_(low, 2 * low)  # timm starts the last ones at zero
        return model.eval()

    def images(self, model: Any, batch: int = 4) -> Tensor:
        channels, height, width = model.pretrained_cfg["input_size"]
        if self.small and model.pretrained_cfg["architecture"].startswith("efficientnet"):
            height = width = 64
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, channels, height, width, generator=generator)


@contextmanager
def autocast(device: torch.device, name: str) -> Iterator[None]:
    """Autocast to a half precision, for forward passes; fp32 and TF32 as they are."""
    with torch.autocast(device.type, DTYPES.get(name), enabled=name in DTYPES):
        yield


def difference(found: Tensor, wanted: Tensor) -> float:
    """max|Δ| ÷ max|wanted|."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


Gradients = dict[str, Tensor]


def gradient_difference(found: Gradients, wanted: Gradients) -> float:
    """Greatest ‖Δ‖ ÷ ‖wanted‖ of a parameter's gradient.

    Gradients shorter than a hundredth of the longest count as that long. One that is missing is zero.
    """
    lengths = {name: gradient.norm() for name, gradient in wanted.items()}
    shortest = max(lengths.values()) / 100
    return (
        torch.stack(
            [
                (found.get(name, torch.zeros_like(gradient)) - gradient).norm() / max(lengths[name], shortest)
                for name, gradient in wanted.items()
            ]
        )
        .max()
        .item()
    )


def run(model: nn.Module, x: Tensor, name: str, training: bool) -> tuple[Tensor, Gradients]:
    """Logits, and the gradients of the cross-entropy by the name of the parameter, in float64 on the CPU."""
    model.train(training).zero_grad()
    scale = 256.0 if name == "fp16" else 1.0  # or small gradients would be zero
    for key, buffer in model.named_buffers():
        if key.endswith("aux_scale"):
            buffer.fill_(scale)
    with tf32(name == "tf32"):  # the backward pass, too
        with autocast(x.device, name):
            logits = model(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(logits, torch.arange(len(x), device=x.device) % 10)
        (scale * loss).backward()
    gradients = {
        key: p.grad.double().cpu() / scale for key, p in model.named_parameters() if p.grad is not None
    }
    return logits.detach(), gradients


@dataclass(frozen=True)
class Reference:
    """A network on the CPU in fp32 and what it computes in float64: logits and gradients in eval mode, and
    gradients in training mode."""

    model: nn.Module
    images: Tensor
    logits: Tensor
    gradients: Gradients
    training: Gradients


@lru_cache(maxsize=1)  # the precisions of a network follow one another
def reference(setting: Setting, network: str, mechanism: str) -> Reference:
    model = setting.network(network, mechanism)
    x = setting.images(model)
    double = deepcopy(model).double()
    logits, gradients = run(double, x.double(), "fp64", training=False)
    _, training = run(double, x.double(), "fp64", training=True)
    return Reference(model, x, logits, gradients, training)


def numerics(setting: Setting, network: str, mechanism: str, name: str) -> dict[str, Any]:
    """A network with a mechanism, in a precision, against itself in float64 on the CPU."""
    wanted = reference(setting, network, mechanism)
    model, x = deepcopy(wanted.model).to(setting.device), wanted.images.to(setting.device)
    logits, gradients = run(model, x, name, training=False)
    _, training = run(model, x, name, training=True)
    result = {
        "error": difference(logits, wanted.logits),
        "bound": LOGITS[name],
        "gradients": gradient_difference(gradients, wanted.gradients),
        "bound_gradients": GRADIENTS[name],
        "finite_in_training": all(gradient.isfinite().all().item() for gradient in training.values()),
    }
    passed = result["error"] <= LOGITS[name] and result["gradients"] <= GRADIENTS[name]
    passed &= result["finite_in_training"] or name == "fp16"  # whose scaler passes over such steps
    if name == "fp32":
        result |= {
            "training_gradients": gradient_difference(training, wanted.training),
            "bound_training_gradients": TRAINING_GRADIENTS,
        }
        passed &= result["training_gradients"] <= TRAINING_GRADIENTS
    return {"passed": bool(passed)} | result


def folding(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """fold on the device, in fp32 and with half weights."""
    model = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    with tf32(False), torch.no_grad():
        error = difference(timm_attn.fold(model).to(setting.device)(x), model(x))
        half = deepcopy(model).to(torch.bfloat16)
        error_half = difference(timm_attn.fold(half).to(setting.device)(x.bfloat16()), half(x.bfloat16()))
    bound, bound_half = 10 * BOUNDS[torch.float32], 2 * BOUNDS[torch.bfloat16]
    return {"passed": error <= bound and error_half <= bound_half, "error": error, "bound": bound} | {
        "error_bf16": error_half,
        "bound_bf16": bound_half,
    }


def grafting(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """graft from a network on the device."""
    stock = setting.network(network).to(setting.device)
    architecture = timm_attn.register(stock.pretrained_cfg["architecture"], mechanism)  # pyright: ignore
    model = timm_attn.graft(architecture, stock)
    x = setting.images(stock).to(setting.device)
    with tf32(False), torch.no_grad():
        error = difference(model.eval()(x), stock(x))
    same = next(model.parameters()).device.type == setting.device.type
    return {"passed": error <= 1e-4 and same, "error": error, "bound": 1e-4}


def freezing(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """freeze on the device: all gates, absorbed."""
    model = setting.network(network, mechanism).to(setting.device)
    x = torch.cat([setting.images(model, 64) + i for i in range(6)])
    report = timm_attn.freeze(model, x, every=True, batch_size=32)
    taken = sum(gate.where != "a multiplication" for gate in report.gates)
    device = next(report.model.parameters()).device.type
    right = report.frozen == len(report.gates) == taken and device == setting.device.type
    return {"passed": right} | {
        "gates": len(report.gates),
        "absorbed": taken,
        "agreement": report.after.agreement,
    }


def channels_last(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """Channels last against contiguous memory."""
    model = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    with tf32(False), torch.no_grad():
        wanted = model(x)
        found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))  # pyright: ignore
    error = difference(found, wanted)
    return {"passed": error <= 1e-4, "error": error, "bound": 1e-4}


def checkpointing(setting: Setting, network: str, mechanism: str) -> dict[str, Any]:
    """Gradients with checkpointing against those without: on GPUs, another thread runs blocks again."""
    model: Any = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.eval().zero_grad()
        with tf32(False):
            logits = model(x), model(-x)  # two passes, whose blocks are run again one after the other
            sum(one.square().mean() for one in logits).backward()
        named = model.named_parameters()
        gradients.append({key: p.grad.double().cpu() for key, p in named if p.grad is not None})
    error = gradient_difference(gradients[1], gradients[0])
    return {"passed": error <= 1e-3, "error": error, "bound": 1e-3}


def compiled(setting: Setting, network: str, mechanism: str, mode: str) -> dict[str, Any]:
    """torch.compile, with CUDA graphs where the mode says so, called more than once."""
    graphs = mode == "reduce-overhead"
    if graphs and setting.device.type != "cuda":
        return {"left_out": "CUDA graphs need CUDA"}
    model = setting.network(network, mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    counters.clear()
    try:
        network_compiled = torch.compile(model, mode=mode)
        with tf32(False), torch.no_grad():
            # A graph that is replayed must see each input.
            inputs = [x + i for i in range(5)]
            errors = [difference(network_compiled(t).clone(), model(t)) for t in inputs]
    finally:
        torch.compiler.reset()
    result = {"error": max(errors), "bound": 1e-3, "programs": counters["stats"]["unique_graphs"]}
    passed = max(errors) <= 1e-3 and result["programs"] > 0
    if graphs:  # which PyTorch leaves out with a warning where it cannot have them
        skipped = counters["inductor"]["cudagraph_skips"]
        recorded = counters["inductor"]["cudagraph_recorded_non_static_inputs"]  # the images
        result |= {"graphs_skipped": skipped, "graph_inputs": recorded}
        passed &= skipped == 0 < recorded
    return {"passed": passed} | result


def sync_bn_conversion(setting: Setting, mechanism: str) -> dict[str, Any]:
    """SyncBatchNorm in one process, where it is BatchNorm: its conversion changes nothing."""
    model = setting.network("resnet50", mechanism).to(setting.device)
    x = setting.images(model).to(setting.device)
    converted = convert_sync_batchnorm(deepcopy(model))
    norms = sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    (wanted, wanted_gradients), (found, gradients) = (run(m, x, "fp32", True) for m in (model, converted))
    error, error_gradients = difference(found, wanted), gradient_difference(gradients, wanted_gradients)
    passed = norms > 0 and error <= 1e-4 and error_gradients <= TRAINING_GRADIENTS
    return {"passed": passed, "norms": norms, "error": error, "bound": 1e-4} | {
        "gradients": error_gradients,
        "bound_gradients": TRAINING_GRADIENTS,
    }


def sync_bn_two(setting: Setting, mechanism: str) -> dict[str, Any]:
    """SyncBatchNorm in two processes on one GPU, each with half of a batch, against the whole batch in one.

    By Gloo: NCCL wants a GPU for each process.
    """
    if setting.device.type != "cuda":
        return {"left_out": "PyTorch has no SyncBatchNorm for CPUs"}
    with tempfile.TemporaryDirectory() as scratch:
        context = torch.multiprocessing.spawn(
            _half_of_a_batch, (setting.device, setting.small, mechanism, scratch), nprocs=2, join=False
        )
        assert context is not None
        deadline = time.perf_counter() + setting.left(120)
        try:
            while not context.join(timeout=1):
                if time.perf_counter() > deadline:
                    raise TimeoutError("the two processes did not end")
        finally:
            for process in context.processes:
                process.kill()
        halves = [torch.load(Path(scratch) / f"{rank}.pt") for rank in range(2)]
    model = setting.network("resnet50", mechanism).to(setting.device).train()
    with tf32(False):  # as in the two processes
        logits = model(setting.images(model, 8).to(setting.device))
        logits.square().sum().backward()
    error = difference(torch.cat([half["logits"] for half in halves]), logits)
    wanted = {key: p.grad.double().cpu() for key, p in model.named_parameters() if p.grad is not None}
    summed = {key: sum(half["gradients"][key] for half in halves) for key in wanted}
    error_gradients = gradient_difference(summed, wanted)
    passed = error <= 1e-3 and error_gradients <= TRAINING_GRADIENTS
    return {"passed": passed, "error": error, "bound": 1e-3} | {
        "gradients": error_gradients,
        "bound_gradients": TRAINING_GRADIENTS,
    }


def _half_of_a_batch(rank: int, device: torch.device, small: bool, mechanism: str, folder: str) -> None:
    """One of the two processes: logits and gradients of its half of the batch, written to the folder."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    setting = Setting(device, small)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = convert_sync_batchnorm(setting.network("resnet50", mechanism)).to(device).train()
    logits = model(setting.images(model, 8).chunk(2)[rank].to(device))
    logits.square().sum().backward()
    gradients = {key: p.grad.double().cpu() for key, p in model.named_parameters() if p.grad is not None}
    torch.save({"logits": logits.detach().cpu(), "gradients": gradients}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
