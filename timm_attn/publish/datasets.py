"""Data sets that cards name: under what licence their images are, as far as that is known."""

import re

from ..errors import UserError

#: Licence identifiers of the Hub; ``imagenet`` for images of ImageNet, ``other`` for other own terms.
LICENSES = {
    "uoft-cs/cifar10": "unknown",
    "uoft-cs/cifar100": "unknown",
    "digits": "cc-by-4.0",
    "frgfm/imagenette": "imagenet",
    "ILSVRC/imagenet-1k": "imagenet",
    "Tiny-ImageNet-200 at 32 pixels": "imagenet",
}

#: What a reader of cards must know of a data set's images.
NOTES = {
    "Tiny-ImageNet-200 at 32 pixels": (
        "A third party resized the images, those of the test split with a sharper filter than those of the "
        "training split. Accuracy is lower there than on images held out of training, and differences "
        "between networks are not the same: "
        "[results](https://github.com/timm-attn/timm_attn/blob/main/docs/results.md) has both."
    ),
}


def license_of(dataset: str, given: str | None) -> str:
    """The licence that was given, or else the known one of a data set.

    Raises:
        UserError: There is neither, or what was given is no identifier.
    """
    if given is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise UserError(f"--dataset-license is {given!r}: it must be an identifier, e.g. cc-by-4.0 or other")
    if given is None and dataset not in LICENSES:
        raise UserError(
            f"the licence of {dataset} is not known here: say it with --dataset-license, e.g. cc-by-4.0, or "
            "name the data set by its Hub id with --dataset"
        )
    return given or LICENSES[dataset]
