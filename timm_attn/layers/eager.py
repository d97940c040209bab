"""Whether a tensor is computed eagerly, by PyTorch's ordinary autograd only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def eager(x: Any) -> bool:
    """False for tensors that are traced or compiled, within ``torch.func`` and in forward-mode autograd.

    There, the memory format is not ours to choose, and some of the operations are missing.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor):
        return False
    # Nothing public tells these. Without them the answer is the safe one.
    functorch: Any = getattr(torch._C, "_functorch", None)
    transformed = getattr(functorch, "peek_interpreter_stack", lambda: "unknown")()
    return transformed is None and getattr(forward_ad, "_current_level", 0) < 0
