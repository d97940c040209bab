"""timm entry points for all combinations of mechanisms and backbones.

DIA     https://arxiv.org/abs/1905.10671   ``<backbone>_dia``    ``reduction``, ``dia_light``, ``norm``
ASR     https://arxiv.org/abs/2304.06345   ``<backbone>_asr``    ``delta``, ``generator``, ``reduction``,
                                                               ``where``, ``attention`` (of ResNets);
                                                               ``_asr_se`` has SE on top
SSIA    https://arxiv.org/abs/2206.07434   ``<backbone>_ssia``   ``target``, ``aux_weight``
SEM     https://arxiv.org/abs/2209.05680   ``<backbone>_sem``    ``reduction``
SPEM    https://arxiv.org/abs/2208.10322   ``<backbone>_spem``   ``aux_weight``
ConAM   https://arxiv.org/abs/2110.14369   ``<backbone>_conam``  ``grid``, ``patch_size``, ``reduction``,
                                                               ``temperature``; ResNets only
FMMNet  https://arxiv.org/abs/2106.15067   ``fmmnet<depth>``     ``mode``, ``pin_bias``; ResNets only
SE      https://arxiv.org/abs/1709.01507   ``<backbone>_se``     CIFAR backbones; timm has the others

The classes of the layers document the options. timm lists a model under the last part of its module's name.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .. import weights
from .backbones import spec_of, stock_network
from .building import create
from .mechanisms import MECHANISMS, mechanism
from .resnet_only import residual_blocks
from .variants import GRAFT, VARIANTS, check_graft, graft_obstacle, variant_name

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


#: Tags of timm's weights that were asked for, besides the default, by variant.
_OTHER_TAGS: dict[str, set[str]] = {}


def graft_tags(architecture: str) -> list[str]:
    """Tags under which timm's own weights of the stock network are grafted into an architecture."""
    tags = default_cfgs[architecture].tags if architecture in default_cfgs else []
    return [tag for tag in tags if tag.startswith(GRAFT)]


def _graft_cfgs(variant: str) -> dict[str, dict[str, Any]]:
    """timm's checkpoints of the stock backbone, the default and those that were asked for, as grafts."""
    backbone, key = VARIANTS[variant]
    row = mechanism(key)
    # Of SE networks, which ASR with SE on top grows from, timm has too few checkpoints.
    if spec_of(backbone).cifar or graft_obstacle(variant) or row.stock(backbone) != (backbone, {}):
        return {}
    found = {}
    for name in (backbone, *(f"{backbone}.{tag}" for tag in sorted(_OTHER_TAGS.get(variant, ())))):
        tag, has_weights, fields = _stock_cfg(name)
        if has_weights:
            fields = {k: v for k, v in fields.items() if k not in ("architecture", "tag", "url")}
            found[f"{variant}.{GRAFT}{tag}"] = fields
    return found


@cache
def _stock_cfg(name: str) -> tuple[str, bool, dict[str, Any]]:
    """Tag of a network of timm, by default the default, whether it has weights, and its configuration."""
    stock: Any = timm.models.get_pretrained_cfg(name)
    return stock.tag, stock.has_weights, stock.to_dict()


def _cfg(backbone: str) -> dict[str, Any]:
    spec = spec_of(backbone)
    if not spec.cifar:
        sources = ("architecture", "tag", "url", "hf_hub_id", "custom_load")
        return {k: v for k, v in _stock_cfg(backbone)[2].items() if k not in sources}
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (32 >> len(spec.layers) - 1,) * 2,
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "stem.conv" if spec.preact else "conv1",
        "classifier": "head.fc" if spec.preact else "fc",
        "license": "apache-2.0",
        "interpolation": "bilinear",
    }


def _cfgs(variant: str) -> dict[str, Any]:
    """All configurations of an architecture by name and tag, the default first."""
    cfgs = weights.pretrained_cfgs(variant) | _graft_cfgs(variant)
    return cfgs or {variant: _cfg(VARIANTS[variant][0])}


# timm reads this table while it registers an entry point, so it must stand above them.
default_cfgs = generate_default_cfgs(
    {tag: cfg for variant in VARIANTS for tag, cfg in _cfgs(variant).items()}
)


def _register(variant: str) -> None:
    backbone, key = VARIANTS[variant]

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return create(variant, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = variant
    entry.__doc__ = f"{backbone}: {mechanism(key).paper.summary}"
    globals()[variant] = register_model(entry)


@contextmanager
def overwriting() -> Iterator[None]:
    """Register what timm knows already without its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting")
        yield


def _register_again(variant: str) -> None:
    """Let timm know the checkpoints that an architecture has by now."""
    default_cfgs.update(generate_default_cfgs(_cfgs(variant)))
    with overwriting():
        _register(variant)


for _variant in VARIANTS:
    _register(_variant)
_REGISTERED_BY_IMPORT = frozenset(VARIANTS)


def did_you_mean(name: str) -> str:
    """A question with the nearest names of models, or ''."""
    near = get_close_matches(name, timm.list_models(), n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def register(backbone: str, key: str) -> str:
    """Register a network of timm with a mechanism as the model ``<backbone>_<mechanism>``.

    Args:
        backbone: Name of an architecture, without tag.
        key: Name of the mechanism, as for ``timm_attn.attach``.

    Returns:
        The name of the model. A model that is already registered is left as it is.

    Raises:
        ValueError: timm has no such network, the mechanism does not exist or is for ResNets only, or another
            network has the name. Whether the network has a place for the mechanism, its creation tells.
    """
    name = variant_name(backbone, key)
    if VARIANTS.get(name) == (backbone, key):
        return name
    if "." in backbone:
        raise ValueError(
            f"{backbone!r} has a tag: leave it out, or take "
            f"timm_attn.create_model({backbone!r}, attention={key!r})"
        )
    if not timm.is_model(backbone):
        hint = did_you_mean(backbone) or "timm.list_models() shows those that it has"
        raise ValueError(f"timm has no network {backbone!r}: {hint}")
    now = timm.models.get_deprecated_models().get(backbone)
    if now is not None:
        raise ValueError(f"{backbone} is an old name: timm calls it {now}")
    row, of = mechanism(key), VARIANTS.get(backbone)
    if of is not None and of[1] not in ("", "se"):
        raise ValueError(f"{backbone} has {of[1]} already: name {of[0]}")
    if name == backbone:
        raise ValueError(f"{backbone} is the stock network: name a mechanism")
    row.stock(backbone)
    if row.resnets:
        residual_blocks(stock_network(backbone, device="meta"), key)
    if timm.is_model(name):
        raise ValueError(f"{name} is a network already: timm.create_model({name!r})")
    VARIANTS[name] = (backbone, key)
    try:
        default_cfgs.update(generate_default_cfgs(_cfgs(name)))
        _register(name)
    except BaseException:
        del VARIANTS[name]
        raise
    return name


def register_graft(variant: str, tag: str) -> str:
    """Register a variant with timm's weights of one tag of its stock network.

    Returns:
        ``<variant>.graft_<tag>``, for ``timm.create_model(..., pretrained=True)``.

    Raises:
        GraftError: The mechanism cannot be initialised without changing the outputs.
        ValueError: timm has no such weights.
    """
    backbone, key = VARIANTS[variant]
    check_graft(variant)
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{backbone}.*")]
    if tag not in tags:
        raise ValueError(f"{backbone} has no weights {tag!r}: choose from {', '.join(tags) or 'none'}")
    stock, _ = mechanism(key).stock(backbone)
    if stock != backbone:
        raise ValueError(
            f"{variant} grows from {stock}, not {backbone}: take timm_attn.graft({variant!r}, ...)"
        )
    if spec_of(backbone).cifar:
        trained = f"{variant}.{tag}" in weights.pretrained_cfgs(variant)
        hint = (
            f"timm.create_model('{variant}.{tag}', pretrained=True) was trained with {key}, "
            if trained
            else ""
        )
        raise ValueError(
            f"{backbone}.{tag} are no weights of timm's own: {hint}timm_attn.graft({variant!r}, "
            f"'{backbone}.{tag}') starts from these"
        )
    if tag not in _OTHER_TAGS.setdefault(variant, set()):
        _OTHER_TAGS[variant].add(tag)
        _register_again(variant)
    return f"{variant}.{GRAFT}{tag}"


def register_name(architecture: str) -> bool:
    """Register ``<backbone>_<mechanism>`` if the name has this form; returns whether timm knows the name."""
    keys = sorted(filter(None, MECHANISMS), key=len, reverse=True)
    for key in (*keys, architecture.rpartition("_")[2]):
        backbone = architecture.removesuffix(f"_{key}")
        if not timm.is_model(architecture) and backbone != architecture and timm.is_model(backbone):
            with suppress(ValueError):  # there is no such mechanism
                register(backbone, key)
    return timm.is_model(architecture)


def known_architecture(architecture: str) -> bool:
    """Whether it is one of this package's; a pair of a network and a mechanism becomes one."""
    return register_name(architecture) and architecture in VARIANTS


def registering(architecture: str) -> str:
    """The call that registers one of this package's architectures; '' if the import alone does."""
    if not known_architecture(architecture) or architecture in _REGISTERED_BY_IMPORT:
        return ""
    backbone, key = VARIANTS[architecture]
    return f'timm_attn.register("{backbone}", "{key}")'


def register_folder(folder: str | Path) -> list[str]:
    """Make ``pretrained=True`` search the checkpoints of a hub folder first.

    Args:
        folder: A folder with an ``index.json``, as ``timm-attn export`` writes it.

    Returns:
        The names of its checkpoints for ``timm.create_model``. Folded networks of timm's own architectures
        are not among them: ``timm.create_model("local-dir:FOLDER/NAME", pretrained=True)`` loads them.

    Raises:
        WeightsError: The folder is not a hub folder, or its index is invalid.
    """
    from . import frozen  # which needs this module

    added = weights.add_folder(folder)
    found = [c for c in added if c.architecture == "frozen" or known_architecture(c.architecture)]
    for variant in {c.architecture for c in found}:
        if variant == "frozen":
            frozen.register_again()
        else:
            _register_again(variant)
    return [c.name for c in found]


for _checkpoint in weights.checkpoints():  # a hub folder may hold networks whose names are nobody's yet
    known_architecture(_checkpoint.architecture)
