"""The network of a run, from a recipe, and the recipe with its open ends resolved."""

import math
from collections.abc import Callable
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from torch import nn

from ..errors import UserError
from ..graft import graft
from ..load import create_pretrained, source_name
from ..models import graft_obstacle, model_names, parse_name
from ..models import mechanism as row_of
from ..weights import WeightsError
from .augment import derive_seed
from .data import Split
from .kernels import check_kernels
from .labels import composed, some
from .recipe import Recipe
from .splits import resolve_recipe


def build(
    model: str, recipe: Recipe, split: Split, say: Callable[[str], None] = print
) -> tuple[nn.Module, Recipe]:
    """The network of a recipe, with the configuration of its checkpoints, and the resolved recipe.

    Args:
        model: Name of the architecture.
        recipe: Where it says so, the network starts from other weights.
        split: The training split.
        say: Called with what a user must know of the start, one line.

    Raises:
        UserError: timm does not know the model, or the model refuses its arguments or the weights.
    """
    set_seed(derive_seed(recipe.seed, "init") % 2**32)
    classes = len(split.label_names)
    arguments = recipe.parsed_model_kwargs()
    try:
        if recipe.init is None:
            # create_model drops arguments that are None, so they say nothing here.
            network: Any = timm.create_model(model, num_classes=classes, in_chans=3, **arguments)
        else:
            network = _initial(model, recipe.init, split.label_names, arguments, say)
        recipe = resolve_recipe(recipe, split, network.pretrained_cfg if recipe.init else None)
        size = _image_size(network, recipe, split)
        with torch.no_grad():
            shape = tuple(network.eval()(torch.zeros(2, 3, *size)).shape)
        if shape != (2, classes):
            raise ValueError(f"its output has shape {shape} for 2 images, not (2, {classes})")
    except (UserError, WeightsError):
        raise
    except Exception as error:  # whatever a constructor of timm raises on odd arguments
        given = f" with {arguments}" if arguments else ""
        start = f" from {recipe.init}" if recipe.init else ""
        raise UserError(f"cannot build {model}{given}{start}: {type(error).__name__}: {error}") from None
    drop = _OF_OTHER_WEIGHTS - ({"license"} if recipe.init else set())
    network.pretrained_cfg = network.default_cfg = {
        **{k: v for k, v in network.pretrained_cfg.items() if k not in drop},
        "tag": None,
        "input_size": (3, *size),
        "pool_size": _pool_size(network.pretrained_cfg, size),
        "mean": recipe.mean,
        "std": recipe.std,
        "num_classes": classes,
        # Small images are read whole; those that were resized, bilinearly.
        **({"crop_pct": 1.0, "interpolation": "bilinear"} if _small(split) is not None else {}),
    }
    return _laid_out(network, recipe), recipe


def construction(network: Any) -> dict[str, Any]:
    """What ``rebuild`` needs of a network: its arguments and its configuration, JSON values."""
    # Those of create_model and of the weights that it started from, which may have another classifier.
    arguments = {**network._model_args, "num_classes": network.num_classes}
    return {"model_args": arguments, "pretrained_cfg": network.pretrained_cfg}


def rebuild(model: str, environment: dict[str, Any], recipe: Recipe) -> nn.Module:
    """The network of a run that goes on, whose weights come from a checkpoint."""
    network: Any = timm.create_model(model, **environment["model_args"])
    cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in environment["pretrained_cfg"].items()}
    network.pretrained_cfg = network.default_cfg = cfg
    return _laid_out(network, recipe)


def _laid_out(network: Any, recipe: Recipe) -> nn.Module:
    check_kernels(network, network.pretrained_cfg["input_size"][1:], recipe)
    return network.to(memory_format=torch.channels_last) if recipe.channels_last else network


#: Fields of a configuration that belong to the weights it came with, and to no new ones.
_OF_OTHER_WEIGHTS = {
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "label_names",
    "label_descriptions",
    "origin_url",
    "paper_ids",
    "paper_name",
    "notes",
    "license",
    "description",
    "test_input_size",
    "test_pool_size",
    "test_crop_pct",
}


def _initial(
    model: str, source: str, names: list[str], arguments: dict[str, Any], say: Callable[[str], None]
) -> Any:
    """A network that starts from other weights, with their classifier as far as it knows the classes."""

    def load(classes: int | None) -> Any:
        if source.startswith("graft:"):
            return graft(model, source_name(source.removeprefix("graft:")), num_classes=classes, **arguments)
        head = {} if classes is None else {"num_classes": classes}
        return create_pretrained(source_name(source), **head, **arguments)

    network = load(len(names))
    _take_classes(network, names, lambda: load(None), source, say)
    if source.startswith("graft:"):
        return network
    architecture = network.pretrained_cfg["architecture"]
    if architecture != model:
        fix = f"train {architecture}"
        if model in model_names():
            backbone, key = parse_name(model)
            stock, _ = row_of(key).graft_source(backbone, arguments)
            if not graft_obstacle(model):
                fix += f", or graft from a {stock} with --init graft:"
                fix += source if architecture == stock else "SOURCE (of ASR and SSIA, the folded form is one)"
        raise UserError(f"{source} is a {architecture}, not a {model}: {fix}")
    return network


def _take_classes(
    network: Any, names: list[str], whole: Callable[[], Any], source: str, say: Callable[[str], None]
) -> None:
    """Keep the rows of a classifier whose classes are wanted, by name, or make a new classifier.

    Args:
        network: With as many classes as ``names``.
        whole: Makes it with the classes of its weights.
    """
    known = list(map(composed, network.pretrained_cfg.get("label_names") or []))
    if not known:
        kept = network.pretrained_cfg.get("num_classes") == len(names)
        what = (
            f"its classifier is kept for {some(names)}, in this order"
            if kept
            else "a new classifier is trained"
        )
        say(f"{source} names no classes: {what}")
        return
    if known == names:
        return
    head = network.get_classifier()
    if len({*known}) == len(known) and {*names} <= {*known} and isinstance(head, nn.Linear):
        rows = torch.tensor([known.index(name) for name in names])
        trained = whole().get_classifier()
        with torch.no_grad():
            for new, old in zip(head.parameters(), trained.parameters(), strict=True):
                new.copy_(old[rows])
        return
    say(
        f"{source} has the classes {some(known)}, not {some(names)}: its classifier goes, and a new one "
        "is trained"
    )
    network.reset_classifier(len(names))


def load_teacher(
    source: str, names: list[str], student: Any, recipe: Recipe, say: Callable[[str], None] = print
) -> nn.Module:
    """The network that a run learns from, in eval mode.

    Raises:
        UserError: It has other classes, or reads images another way.
    """
    teacher: Any = create_pretrained(source_name(source)).eval().requires_grad_(False)
    known = list(map(composed, teacher.pretrained_cfg.get("label_names") or []))
    if teacher.num_classes != len(names) or (known and known != names):
        raise UserError(
            f"the teacher {source} has the classes {some(known) if known else teacher.num_classes}, not "
            f"{some(names)}: name one of the same classes"
        )
    if not known:
        say(f"the teacher {source} names no classes: they are taken for {some(names)}, in this order")
    for field in ("mean", "std"):
        theirs, ours = (tuple(net.pretrained_cfg[field]) for net in (teacher, student))
        if theirs != ours:
            raise UserError(
                f"the teacher {source} reads images with {field} {theirs}, the run with {ours}: "
                f"give --{field}"
            )
    return teacher.to(memory_format=torch.channels_last) if recipe.channels_last else teacher


def classifier_parameters(network: Any) -> list[nn.Parameter]:
    """Parameters of the classifier, or of the several that distilled networks have."""
    found = network.get_classifier()
    return [p for layer in (found if isinstance(found, tuple) else (found,)) for p in layer.parameters()]


def freeze_backbone(network: nn.Module) -> list[nn.Module]:
    """Leave only the classifier and the mechanism to be trained.

    Returns:
        The norm layers that are frozen, whose running statistics must not change either.
    """
    head = {id(p) for p in classifier_parameters(network)}
    added = _added_keys(network)
    for key, parameter in network.named_parameters():
        parameter.requires_grad = id(parameter) in head or key in added
    return [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in m.parameters())
    ]


def _added_keys(network: Any) -> set[str]:
    """Names of the parameters that the stock backbone does not have."""
    names = {key for key, _ in network.named_parameters()}
    return names - getattr(network, "stock_keys", names)


def _pool_size(cfg: dict[str, Any], size: tuple[int, ...]) -> tuple[int, ...] | None:
    """Size of the last feature map: timm's configuration has it for images of the default size."""
    if not cfg.get("pool_size"):
        return None
    return tuple(
        math.ceil(pool * new / old)
        for pool, new, old in zip(cfg["pool_size"], size, cfg["input_size"][1:], strict=True)
    )


def _small(split: Split) -> tuple[int, ...] | None:
    """Height and width of a split's images if these are small."""
    return split.native if split.pixels is None else tuple(split.pixels.shape[1:3])


def _image_size(network: Any, recipe: Recipe, split: Split) -> tuple[int, ...]:
    """Height and width of the images of a run."""
    asked = (recipe.img_size,) * 2 if recipe.img_size else None
    return _small(split) or asked or tuple(network.pretrained_cfg["input_size"][1:])
