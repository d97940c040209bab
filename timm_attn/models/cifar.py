"""ResNets for 32×32 images, made of timm's blocks.

Papers: "Deep Residual Learning for Image Recognition", section 4.2, https://arxiv.org/abs/1512.03385, with
1×1 convolutions on the shortcuts that change shape (the paper's option B); "Identity Mappings in Deep
Residual Networks", https://arxiv.org/abs/1603.05027; "Wide Residual Networks",
https://arxiv.org/abs/1605.07146.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import create_conv2d
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn


class CifarResNet(ResNet):
    """A 3×3 stem without pooling and three stages at strides 1, 2 and 4, or four, up to 8.

    Takes the keyword arguments of timm's ResNet that have a meaning here; ``output_stride`` has none. Feature
    maps are numbered from 0 (stem).

    Args:
        block: ``BasicBlock`` or ``Bottleneck`` of timm, or a subclass.
        layers: Number of blocks in each stage.
        channels: Widths of the stages, before the block's expansion; the first is the stem's too.
        cardinality: Groups of the 3×3 convolutions of a Bottleneck.
        zero_init_last: Start with the last γ of every branch at 0, as timm does; else at 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        channels: Sequence[int] = (16, 32, 64),
        cardinality: int = 1,
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
        if len(channels) not in (3, 4) or len(layers) != len(channels):
            raise ValueError(
                f"a CIFAR ResNet has three stages or four, got channels={channels}, layers={layers}"
            )
        if channels[0] % 2:
            raise ValueError(f"the first of channels must be even, got {channels[0]}")
        super().__init__(
            block,  # pyright: ignore[reportArgumentType] (timm annotates the class as an instance)
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            # timm's plain stem is 64 wide whatever one asks; its deep stem is 2 × stem_width wide.
            stem_type="deep",
            stem_width=channels[0] // 2,
            channels=tuple(channels),
            cardinality=cardinality,
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
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=False):
            info["reduction"] = reduction
        self.init_weights(zero_init_last=zero_init_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images B × in_chans × H × W to the last feature map."""
        x = self.act1(self.bn1(self.conv1(x)))
        stages = [self.get_submodule(name) for name in self._stages()]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x

    def _stages(self) -> list[str]:
        return [str(info["module"]) for info in self.feature_info[1:]]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's ``ResNet.forward_intermediates`` for a stem (index 0) and the stages."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        names = self._stages()
        take, last = feature_take_indices(len(names) + 1, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take else []
        for index, name in enumerate(names[:last] if stop_early else names, start=1):
            stage = self.get_submodule(name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last feature map asked for, and the head; returns the indices kept."""
        names = self._stages()
        take, last = feature_take_indices(len(names) + 1, indices)
        for name in names[last:]:
            setattr(self, name, nn.Sequential())
        if last < len(names):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < len(names):
            self.reset_classifier(0, "")
        return take


class CifarResNetV2(ResNetV2):
    """Pre-activation blocks after a 3×3 stem, in three stages at strides 1, 2 and 4; wide ResNets too.

    Convolutions have no bias. The shortcuts that change shape see the activated map, as in timm and in wide
    ResNets.

    Args:
        layers: Number of blocks in each stage.
        channels: Width of what each stage gives.
        basic: Blocks of two 3×3 convolutions, and not bottlenecks.
        stem_chs: Width of the stem.
        kwargs: Of timm's ResNetV2. ``output_stride``, ``stem_type`` and ``preact`` have no meaning here.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int],
        basic: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        stem_chs: int = 16,
        norm_layer: Any = nn.BatchNorm2d,
        conv_layer: Any = create_conv2d,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ("output_stride", "stem_type", "preact"):
            if name in kwargs:
                raise TypeError(f"{name}={kwargs[name]!r} has no meaning for a pre-activation CIFAR ResNet")
        super().__init__(
            list(layers),
            channels=tuple(channels),
            num_classes=num_classes,
            in_chans=in_chans,
            stem_chs=stem_chs,
            basic=basic,
            bottle_ratio=1.0 if basic else 0.25,
            norm_layer=norm_layer,
            conv_layer=conv_layer,
            **kwargs,
        )
        like = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.stem = nn.Sequential(OrderedDict(conv=conv_layer(in_chans, stem_chs, 3, **like)))
        self.cifar_stem = True
        for i, info in enumerate(self.feature_info):
            info["reduction"] = 2 ** max(i - 1, 0)
        self.init_weights(zero_init_last)

    def _taken(self, indices: int | list[int] | None) -> list[int]:
        # timm's class counts five maps, whatever the number of stages.
        return feature_take_indices(len(self.feature_info), indices)[0]

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, **kwargs: Any) -> Any:
        """timm's ``ResNetV2.forward_intermediates`` for a stem (index 0) and the stages."""
        return super().forward_intermediates(x, self._taken(indices), **kwargs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, **kwargs: Any) -> list[int]:
        """Drop what comes after the last feature map asked for; returns the indices kept."""
        return super().prune_intermediate_layers(self._taken(indices), **kwargs)
