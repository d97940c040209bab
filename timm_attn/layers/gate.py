"""Gates that do not depend on the image, so that they fold."""

from torch import Tensor, nn


class ConstantGate(nn.Module):
    """One factor per channel, the same for every image.

    ``timm_attn.fold`` multiplies it into the parameters before it; where an activation stands between, it has
    to be positive. Subclasses define ``gate``.
    """

    def gate(self) -> Tensor:
        """The gate, 1 × C."""
        raise NotImplementedError

    def forward(self, x: Tensor, axis: int = 1) -> Tensor:
        """Scale the channels of x: B × C × H × W, or with axis −1 B × N × C or B × H × W × C."""
        gate = self.gate().to(x.dtype)  # under autocast the map is of lower precision, and stays so
        return x * (gate[:, :, None, None] if axis == 1 else gate[0])

    def fuse(self) -> nn.Module:
        """What is left after folding: an identity. timm's ``reparameterize_model`` calls this."""
        return nn.Identity()
