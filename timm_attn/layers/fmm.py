"""FMM: a product of feature maps in place of the residual sum.

Paper: "Towards Understanding the Effectiveness of Attention Mechanism", Ye, He, Wang, Li
https://arxiv.org/abs/2106.15067

The text of the paper has S(x) ⊙ F(x), which taken literally explodes in deep networks. The first author's
code has two other forms: both factors normalised, with norm biases of 1 (the default here); and 1 + σ of
the last convolution of the branch, which then has no norm, times the normalised shortcut.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .options import check_affine, check_choice, check_flag

#: mode: (the shortcut is normalised, initial bias of the branch's last norm, None if it has none)
MODES: dict[str, tuple[bool, float | None]] = {
    "bn": (True, 1.0),
    "sigmoid": (True, None),
    "gate": (False, 0.0),
    "raw": (False, 0.0),
}


@torch.fx.wrap
def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · b, in float32 if the inputs are float16 under autocast."""
    # The product of two maps leaves float16's range long before either of them does.
    if a.dtype == torch.float16 and torch.is_autocast_enabled(a.device.type):
        a, b = a.float(), b.float()
    return a * b


class FMM(nn.Module):
    """Product of a residual branch f, which ends in a norm unless the mode is sigmoid, and a shortcut s::

        bn       f ⊙ norm(s)               both factors start with mean 1
        sigmoid  (σ(f) + 1) ⊙ norm(s)      f is the last convolution's output as it is
        gate     (1 + f) ⊙ s               a sum and a product; no parameters of its own
        raw      f ⊙ s                     the text of the paper; unstable

    The activation follows. A shortcut that changes the shape already has a norm; others get one here.

    Args:
        channels: Width C of both factors.
        mode: One of ``MODES``.
        norm_layer: Class of the norm on an identity shortcut; None if the shortcut already has a norm.

    Raises:
        TypeError: ``mode`` is not a name.
        ValueError: There is no such mode.
    """

    def __init__(
        self, channels: int, mode: str = "bn", norm_layer: Any = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_choice("FMM mode", mode, MODES)
        self.mode = mode
        self.norm = nn.Identity()
        if MODES[mode][0] and norm_layer is not None:
            self.norm = norm_layer(channels, device=device, dtype=dtype)

    def init_norms(self, branch: Any, shortcut: Any, pin_bias: bool = False) -> None:
        """Set the biases of the two norms so that both factors start with mean 1.

        Args:
            branch: Last norm of the residual branch; unused in mode sigmoid, which has none.
            shortcut: Norm of the shortcut, in this module or in the shortcut itself.
            pin_bias: Do not train these biases, as in the author's code.

        Raises:
            TypeError: ``pin_bias`` is neither True nor False.
            ValueError: The mode does not normalise the shortcut, so that there are no biases to pin; or a
                norm has no weight and bias.
        """
        normalised, start = MODES[self.mode]
        check_flag("FMM pin_bias", pin_bias)
        if pin_bias and not normalised:
            raise ValueError(f"pin_bias needs an FMM mode that normalises the shortcut, got {self.mode!r}")
        starts = ([] if start is None else [(branch, start)]) + ([(shortcut, 1.0)] if normalised else [])
        for norm, value in starts:
            check_affine("FMM", norm)
            nn.init.constant_(norm.bias, value)
            if pin_bias:
                norm.bias.requires_grad_(False)

    def factor(self, f: Tensor) -> Tensor:
        """The factor that multiplies the shortcut, from the branch output f (B × C × H × W)."""
        if self.mode == "sigmoid":
            return f.sigmoid() + 1
        if self.mode == "gate":
            return f + 1
        return f

    def forward(self, factor: Tensor, shortcut: Tensor) -> Tensor:
        """The product, B × C × H × W, before the activation."""
        return multiply(factor, self.norm(shortcut))
