"""Networks with ConAM (https://arxiv.org/abs/2110.14369) before the first block of stages 1 to 3."""

# Modules that are found by name have no static type.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any

from timm.models.resnet import ResNet

from ..layers import ConAM
from ..layers.options import check_whole
from .cifar import CifarResNet

STAGES = 3


class ConAMMixin:
    """Puts a ConAM before the branch of the first block of stages 1 to 3; stage 4 has none, as in the paper.

    Args:
        grid: Patches along each side of a feature map, 4 by default.
        patch_size: Side of a patch in pixels, in place of ``grid``: one number, or one a stage with 0 for
            none (the paper's networks of four stages have 8, 8, 4, 0; the CIFAR backbones have three).
        reduction: C ÷ hidden width of each ConAM.
        temperature: Of each ConAM.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: ``patch_size`` does not have one entry a stage, an option is out of range, or ``grid`` and
            ``patch_size`` are both given.
    """

    def __init__(
        self,
        *args,
        grid: int | None = None,
        patch_size: int | Sequence[int] | None = None,
        reduction: int = 16,
        temperature: float | str = 1.0,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        stages = [self.get_submodule(info["module"]) for info in self.feature_info[1:]]
        patch_sizes: dict[int, Any]
        if isinstance(patch_size, str) or not isinstance(patch_size, Sequence):
            patch_sizes = dict.fromkeys(range(STAGES), patch_size)
        elif len(patch_size) == len(stages):
            for size in patch_size:
                check_whole("ConAM patch_size", size, least=0)
            if grid is not None:
                raise ValueError(f"ConAM takes grid or patch_size, got {grid=} and {patch_size=}")
            patch_sizes = {stage: size for stage, size in enumerate(patch_size) if size}
        else:
            raise ValueError(f"patch_size needs one entry for each of {len(stages)} stages, got {patch_size}")
        for stage, size in patch_sizes.items():
            block = stages[stage][0]
            block.conam = ConAM(
                block.conv1.in_channels, grid, size, reduction, temperature, device=device, dtype=dtype
            )


class ConAMResNet(ConAMMixin, ResNet):
    """timm's ResNet with ConAM."""


class ConAMCifarResNet(ConAMMixin, CifarResNet):
    """The CIFAR ResNet with ConAM."""
