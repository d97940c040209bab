"""The table of stock networks of which variants are registered."""

import inspect
import sys
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import timm
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from .cifar import CifarResNet, CifarResNetV2


@dataclass(frozen=True)
class Backbone:
    """A stock network.

    Attributes:
        layers: Blocks in each stage; of ResNets only, pre-activation ones among them.
        bottleneck: Whether these are bottlenecks.
        cifar: It is this package's, for small images; timm has the others.
        preact: Its blocks begin with norm and activation.
        args: Further arguments of this package's class.
    """

    layers: tuple[int, ...] = ()
    bottleneck: bool = False
    cifar: bool = False
    preact: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def takes_attention(self) -> bool:
        """Whether its blocks are timm's that have a place for attention on top; of ResNets only."""
        return bool(self.layers) and not self.preact


BACKBONES = {
    "resnet18": Backbone((2, 2, 2, 2)),
    "resnet34": Backbone((3, 4, 6, 3)),
    "resnet50": Backbone((3, 4, 6, 3), bottleneck=True),
    "resnet101": Backbone((3, 4, 23, 3), bottleneck=True),
    "resnet152": Backbone((3, 8, 36, 3), bottleneck=True),
    "resnet26t": Backbone((2, 2, 2, 2), bottleneck=True),
    "resnet50d": Backbone((3, 4, 6, 3), bottleneck=True),
    "resnext50_32x4d": Backbone((3, 4, 6, 3), bottleneck=True),
    "wide_resnet50_2": Backbone((3, 4, 6, 3), bottleneck=True),
    "resnet20": Backbone((3, 3, 3), cifar=True),
    "resnet32": Backbone((5, 5, 5), cifar=True),
    "resnet44": Backbone((7, 7, 7), cifar=True),
    "resnet56": Backbone((9, 9, 9), cifar=True),
    "resnet110": Backbone((18, 18, 18), cifar=True),
    "resnet164": Backbone((18, 18, 18), bottleneck=True, cifar=True),
    # That of DIANet's authors, https://github.com/gbup-group/DIANet
    "resnext101_8x32d": Backbone(
        (11, 11, 11),
        bottleneck=True,
        cifar=True,
        args={"channels": (32, 64, 128), "cardinality": 8},
    ),
    # Those of ConAM's authors, https://github.com/1ZimingYuan/ConAM
    "resnet18_cifar": Backbone((2, 2, 2, 2), cifar=True, args={"channels": (64, 128, 256, 512)}),
    "resnet50_cifar": Backbone(
        (3, 4, 6, 3), bottleneck=True, cifar=True, args={"channels": (64, 128, 256, 512)}
    ),
    # Those of DIANet's and FMMNet's authors, https://github.com/gbup-group/DIANet
    "preresnet164": Backbone(
        (18, 18, 18), bottleneck=True, cifar=True, preact=True, args={"channels": (64, 128, 256)}
    ),
    "wrn52_4": Backbone((8, 8, 8), cifar=True, preact=True, args={"channels": (64, 128, 256)}),
    "wrn28_10": Backbone((4, 4, 4), cifar=True, preact=True, args={"channels": (160, 320, 640)}),
    **dict.fromkeys(
        (
            "regnetx_008",
            "regnety_016",
            "efficientnet_b0",
            "efficientnet_b1",
            "tf_efficientnetv2_b0",
            "mobilenetv3_large_100",
            "mobilenetv4_conv_small",
            "convnext_atto",
            "convnext_nano",
            "convnext_tiny",
            "convnext_small",
            "convnextv2_nano",
            "vit_tiny_patch16_224",
            "vit_small_patch16_224",
            "vit_base_patch16_224",
            "deit3_small_patch16_224",
            "swin_tiny_patch4_window7_224",
            "caformer_s18",
            "repvgg_a0",
            "repvgg_a2",
            "repvgg_b0",
            "mobileone_s0",
            "mobileone_s1",
            "starnet_s1",
            "mambaout_femto",
        ),
        Backbone(),
    ),
}


def spec_of(name: str) -> Backbone:
    """A row of the table; of a network that has none, what is true of timm's others."""
    return BACKBONES.get(name, Backbone())


def is_resnet(name: str) -> bool:
    """Whether it is a ResNet, with or without pre-activation, of timm or this package."""
    theirs = (ResNet.__module__, ResNetV2.__module__)
    return bool(spec_of(name).layers) or timm.model_entrypoint(name).__module__ in theirs


@cache
def takes_attention(name: str) -> bool:
    """Whether ``block_args=dict(attn_layer=...)`` puts attention into its blocks, which have none."""
    spec = spec_of(name)
    if spec.layers:
        return spec.takes_attention
    if timm.model_entrypoint(name).__module__ != ResNet.__module__:
        return False
    network = timm.create_model(name, device="meta")
    return all(b.se is None for b in network.modules() if isinstance(b, BasicBlock | Bottleneck))


#: Of timm's networks that are configured by a data class, not all arguments are parameters of the class.
_USUAL = {"act_layer", "norm_layer", "aa_layer", "drop_layer", "drop_rate", "num_heads"}


@cache
def network_arguments(name: str) -> frozenset[str]:
    """Names of the arguments that the networks in the module of one of timm's, or this package's, take."""
    networks: list[Any] = [CifarResNet, CifarResNetV2]
    if not spec_of(name).cifar:
        members = vars(sys.modules[timm.model_entrypoint(name).__module__]).values()
        networks = [m for m in members if isinstance(m, type) and issubclass(m, nn.Module)]
    signatures = [inspect.signature(network).parameters for network in networks]
    return frozenset(_USUAL).union(*(p for p in signatures if {"num_classes", "in_chans"} <= p.keys()))


#: timm would round the SE paper's hidden width C / 16 up to a multiple of 8: too wide for 16 to 64 channels.
paper_se = partial(SEModule, rd_ratio=1 / 16, rd_divisor=1)


def stock_network(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A stock network by its row's name, or any of timm's; of the CIFAR networks, also ``<name>_se``."""
    backbone, se, _ = name.partition("_se")
    spec = spec_of(backbone)
    if not spec.cifar:
        return timm.model_entrypoint(name)(pretrained=pretrained, **kwargs)
    kwargs = {"layers": spec.layers, **spec.args, **kwargs}
    if spec.preact:
        return CifarResNetV2(basic=not spec.bottleneck, **kwargs)
    block_args = dict(kwargs.pop("block_args", None) or {})
    if se or block_args.get("attn_layer") == "se":
        block_args["attn_layer"] = paper_se
    block = Bottleneck if spec.bottleneck else BasicBlock
    return CifarResNet(block, **kwargs, block_args=block_args)
