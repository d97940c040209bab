"""Gates are folded before branches or norms are merged, by timm, by a network itself or by ``fold``."""

import inspect
from functools import partial
from typing import Any

from torch import nn

from .branches import copied
from .ends import BranchEnd, GatedInput, GatedNorm, GateEnd
from .layers.frozen import FrozenGate

#: What ``timm.utils.reparameterize_model`` calls, and some networks of timm themselves.
_MERGING = ("fuse", "reparameterize", "switch_to_deploy")


def gates_first(model: nn.Module) -> None:
    """Make every method that merges branches or norms fold the gates first, which stand after those."""
    for path, end in list(model.named_modules()):
        if not isinstance(end, BranchEnd | GatedInput):
            continue
        parts = path.split(".")
        for depth in range(len(parts)):
            module = model.get_submodule(".".join(parts[:depth]))
            methods = [name for name in _MERGING if inspect.isfunction(getattr(type(module), name, None))]
            if depth == len(parts) - 1 and not any(hasattr(module, name) for name in _MERGING):
                methods = ["reparameterize"]
            for name in methods:
                vars(module).setdefault(name, partial(merge, module, name))


def merge(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Fold the gates in a module, then let it do what timm asks of it.

    Raises:
        ValueError: It would drop what stays, such as what depends on the image.
    """
    staying = _staying(module)
    if staying and hasattr(type(module), method):
        trial = copied(module)
        made = _merged(trial, method, *args, **kwargs)
        if len(_staying(made if isinstance(made, nn.Module) else trial)) < len(staying):
            kind = type(getattr(staying[0], "mechanism", staying[0])).__name__
            raise ValueError(
                f"{type(module).__name__} cannot merge its branches: {kind} stands where they meet"
            )
    return _merged(module, method, *args, **kwargs)


def _staying(module: nn.Module) -> list[nn.Module]:
    """What stands at the ends of branches and is folded by nobody."""
    ends = (m for m in module.modules() if isinstance(m, BranchEnd | FrozenGate))
    return [m for m in ends if not isinstance(m, GateEnd)]


def _merged(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    fuse_ends(module)
    if _is_ours(module, method):
        del vars(module)[method]
    own = getattr(module, method, None)
    return own(*args, **kwargs) if own else None


def _is_ours(module: nn.Module, method: str) -> bool:
    return getattr(vars(module).get(method), "func", None) is merge


def fuse_ends(model: nn.Module) -> None:
    """Multiply every gate that does not depend on the image into the parameters before it, in place.

    Raises:
        ValueError: There are no parameters to multiply one of the gates into.
    """
    for module in model.modules():
        for name in _MERGING:
            if _is_ours(module, name):
                del vars(module)[name]
    for path, module in list(model.named_modules()):
        if isinstance(module, GateEnd | GatedInput | GatedNorm):
            end = module.gate_end[0] if isinstance(module, GatedInput) else module
            try:
                left = module.fuse()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, left)
            if isinstance(end, GateEnd):
                delattr(end.home, end.key)
    gates_first(model)  # of what is left
