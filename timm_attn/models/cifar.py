"""ResNets for 32×32 images, made of timm's blocks.

Paper: "Deep Residual Learning for Image Recognition", section 4.2, https://arxiv.org/abs/1512.03385, with
1×1 convolutions on the shortcuts that change shape (the paper's option B).
"""

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3")


class CifarResNet(ResNet):
    """A 3×3 stem without pooling and three stages at strides 1, 2 and 4.

    Takes the keyword arguments of timm's ResNet that have a meaning here; ``output_stride`` has none. Feature
    maps are numbered 0 (stem) to 3 (``layer3``).

    Args:
        block: ``BasicBlock`` or ``Bottleneck`` of timm, or a subclass.
        layers: Number of blocks in each of the three stages.
        channels: Widths of the three stages, before the block's expansion; the first is the stem's too.
        zero_init_last: Start with the last γ of every branch at 0, as timm does; else at 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        channels: tuple[int, int, int] = (16, 32, 64),
        act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = True,
        block_args: dict | None = None,
        device=None,
        dtype=None,
    ) -> None:
        if len(channels) != 3 or len(layers) != 3:
            raise ValueError(f"a CIFAR ResNet has three stages, got channels={channels}, layers={layers}")
        if channels[0] % 2:
            raise ValueError(f"the first of channels must be even, got {channels[0]}")
        super().__init__(
            block,  # pyright: ignore[reportArgumentType] (timm annotates the class as an instance)
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            # timm's plain stem is 64 wide whatever one asks; its deep stem is 2 × stem_width wide.
            stem_type="deep",
            stem_width=channels[0] // 2,
            channels=channels,
            act_layer=act_layer,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            drop_block_rate=drop_block_rate,
            zero_init_last=zero_init_last,
            block_args=block_args,
            device=device,
            dtype=dtype,
        )
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, device=device, dtype=dtype)
        self.maxpool = nn.Identity()
        self.cifar_stem = True
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4), strict=True):
            info["reduction"] = reduction
        self.init_weights(zero_init_last=zero_init_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images B × in_chans × H × W to the last feature map, B × C × H/4 × W/4."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        x = self.layer1(x)  # pyright: ignore[reportCallIssue] (timm sets its stages by name)
        x = self.layer2(x)  # pyright: ignore[reportCallIssue]
        return self.layer3(x)  # pyright: ignore[reportCallIssue]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's ``ResNet.forward_intermediates`` for a stem and three stages (indices 0 to 3)."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, last = feature_take_indices(4, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take else []
        for index, name in enumerate(STAGES[:last] if stop_early else STAGES, start=1):
            stage = self.get_submodule(name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last feature map asked for, and the head; returns the indices kept."""
        take, last = feature_take_indices(4, indices)
        for name in STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last < 3:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < 3:
            self.reset_classifier(0, "")
        return take
