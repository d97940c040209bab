"""Puts a mechanism into a network of timm, or another one, without changing the keys of its state dict."""

import warnings
from contextlib import suppress
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .branches import copied, example_input, first_parameter
from .compare import FoldError
from .ends import BranchEnd, GatedInput, GatedNorm, GateEnd, tensor_at
from .fold import fold
from .layers import ConAM, ConstantGate
from .layers.fmm import FMM
from .models import graft_obstacle, register, register_graft
from .models.mechanisms import mechanism as row_of
from .models.mechanisms import options_of
from .models.ssia import SSIANetwork, check_forward

_ATTACHED = (BranchEnd, GatedInput, GatedNorm, SSIANetwork, ConAM, FMM)


def attach(model: nn.Module, mechanism: str, images: Tensor | None = None, **options: Any) -> nn.Module:
    """Put a mechanism into a network, in place.

    The network keeps the keys of its state dict; those of the mechanism contain its name, such as
    ``layer1.0.asr.generators.0.psi``. If the mechanism does not depend on the image, ``timm_attn.fold`` gives
    back the stock network.

    Args:
        model: A network of timm, or one that contains blocks of timm.
        mechanism: ``asr``, ``dia``, ``ssia``, ``sem``, ``spem``; on ResNets also ``conam`` and ``fmm``; or a
            name of timm's ``create_attn``, such as ``se``, ``eca`` and ``cbam``. All but ``ssia``, ``conam``
            and ``fmm`` are put at the ends of residual branches; in transformers, they read the patch tokens.
        images: Example images, B × C × H × W. Needed only if the network does not take images of the size in
            its ``pretrained_cfg``.
        options: Options of the mechanism's layer. ``asr`` also takes ``where="norms"``, for a gate on every
            norm layer instead of the ends of branches.

    Returns:
        The network.

    Raises:
        TypeError: ``model`` is not a network, or an option does not exist.
        ValueError: The mechanism does not exist or does not fit this network, an option is out of range, or
            the network is compiled, wrapped, quantised or already has a mechanism. It is left unchanged.
    """
    _check(model)
    if mechanism == "asr_se":
        raise ValueError("asr_se is asr in a network that has se: attach asr to such a one, as seresnet50")
    row = row_of(mechanism or "''")
    known = options_of(row.put)
    unknown = set(options) - set(known)
    if unknown:
        raise TypeError(
            f"{mechanism} takes no {sorted(unknown)[0]}: its options are {', '.join(known) or 'none'}"
        )
    given = example_input(model, 1) if images is None else images
    given = given if given.is_meta else given.to(first_parameter(model).device)
    if row.folds and not given.is_meta:
        trial: Any = copied(model)
        devices = [given.device] if given.device.type == "cuda" else []
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices):
            row.put(trial, given, **options)
        if isinstance(trial, SSIANetwork):
            check_forward(trial, given)
        else:
            _check_fold(trial, given, mechanism)
    row.put(model, given, **options)
    return model


def _check_fold(trial: nn.Module, images: Tensor, mechanism: str) -> None:
    _tell_channels_apart(trial)
    try:
        fold(trial, images)
    except FoldError as error:
        # With these values, networks of many summed branches differ from themselves by more in float32.
        with suppress(RuntimeError):  # of a network that converts to float32 inside, or a FoldError
            if images.dtype == torch.float32:
                fold(trial.double(), images.double())
                return
        raise ValueError(f"{mechanism} would not fold out of {type(trial).__name__}: {error}") from None


@torch.no_grad()
def _tell_channels_apart(model: nn.Module) -> None:
    """Give gates, and scales before them that are about 0, values with which a wrong fold would be seen."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, ConstantGate):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        elif isinstance(module, GateEnd):
            for name in module.branch.affine:
                scale = tensor_at(module.block, name)
                if scale.dim() == 1 and not name.endswith("bias"):
                    scale.copy_(torch.where(scale.abs() < 0.01, 0.1, scale))


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach needs a network, got {type(model).__name__}")
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{name} is compiled: attach to the network, then compile it")
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"{name} wraps a network: attach to that (.module), then wrap it in DistributedDataParallel"
        )
    if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise ValueError(f"{name} is a recorded graph: attach to the network that it was made from")
    quantised = [
        m for m in model.modules() if ".quantized" in type(m).__module__ or hasattr(m, "_packed_params")
    ]
    if quantised:
        raise ValueError(
            f"{name} is quantised ({type(quantised[0]).__name__}): attach, train and fold before that"
        )
    attached = [(path, m) for path, m in model.named_modules() if isinstance(m, _ATTACHED)]
    if attached:
        kind = getattr(attached[0][1], "mechanism", attached[0][1])
        raise ValueError(
            f"{name} has {type(kind).__name__} at {attached[0][0] or 'its root'} already: "
            "take a fresh network"
        )
    if hasattr(model, "attached"):
        raise ValueError(f"{name} has {model.attached} in its blocks already: take a fresh network")
    if not any(p.is_floating_point() for p in model.parameters()):
        raise ValueError(f"{name} has no parameters to attach anything to")


def create_model(
    model_name: str, attention: str | None = None, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """``timm.create_model``, with a mechanism in the network.

    Args:
        model_name: Name of a network of timm or this package.
        attention: The mechanism, as for ``attach``. The combined name, such as ``resnet50_dia``, is
            registered with timm if necessary.
        pretrained: Load weights. Of a name with a tag, such as ``resnet50.a2_in1k``, these are timm's of the
            stock network, and the mechanism is initialised so that the outputs do not change. Without a tag,
            weights that were trained with the mechanism come first, then those of timm's default tag.
        kwargs: Options of the mechanism, and arguments of ``timm.create_model``. Of the names that networks
            and attention layers share, such as ``act_layer``, the network has the argument.

    Raises:
        GraftError: The mechanism cannot be initialised without changing the outputs.
        ValueError: As for ``attach``; or timm has no such weights.
    """
    if attention is None:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    architecture, _, tag = model_name.partition(".")
    name = register(architecture, attention)
    if tag and (pretrained or not graft_obstacle(name)):
        name = register_graft(name, tag)
    return timm.create_model(name, pretrained=pretrained, **kwargs)
