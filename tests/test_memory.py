"""What a run says when there is too little memory."""

import pytest
import torch

from timm_attn.errors import UserError
from timm_attn.models.cifar import CifarResNet
from timm_attn.training import Recipe, train

RECIPE = Recipe(
    data="digits",
    img_size=8,
    epochs=1,
    batch_size=64,
    accumulation=2,
    workers=0,
    model_kwargs=("channels=[8,8,8]", "layers=[1,1,1]"),
)


def small_memory(monkeypatch, most: int) -> None:
    """Networks raise what CUDA raises for more images than so many."""
    forward = CifarResNet.forward

    def raising(self, x):
        if self.training and torch.is_grad_enabled() and len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return forward(self, x)

    monkeypatch.setattr(CifarResNet, "forward", raising)


@pytest.mark.parametrize(("most", "fits", "parts"), [(20, 16, 4), (1, 1, 64)])
def test_the_batch_size_that_fits_is_named(most, fits, parts, tmp_path, monkeypatch):
    small_memory(monkeypatch, most)
    with pytest.raises(UserError) as error:
        train("resnet20", RECIPE, tmp_path / "run")
    message = str(error.value)
    assert (
        f"with 32 images at a time; {fits} fit: take --batch-size {2 * fits}, or --accumulation {parts}"
        in message
    )
    assert "\n" not in message and error.value.__context__ is None


def test_there_may_be_none(tmp_path, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="even for one image"):
        train("resnet20", RECIPE, tmp_path / "run")
