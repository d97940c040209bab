"""Gates that do not depend on the image, so that they fold."""

from torch import Tensor, nn


class ConstantGate(nn.Module):
    """One factor above zero for each channel, the same for every image.

    :func:`timm_attn.fold` multiplies it into the parameters before it. A subclass has :meth:`gate`.
    """

    def gate(self) -> Tensor:
        """The gate, 1 × C."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x (B × C × H × W)."""
        return x * self.gate()[:, :, None, None]
