"""What a run says when there is too little memory."""

from dataclasses import replace

import pytest
import torch

from timm_attn.errors import UserError
from timm_attn.models.cifar import CifarResNet
from timm_attn.training import Recipe, train
from timm_attn.training.trainer import Trainer

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


def test_what_a_step_needs_besides_the_network_counts(tmp_path, monkeypatch):
    small_memory(monkeypatch, 20)
    loss = Trainer._loss

    def raising(self, logits, images, targets):
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, logits, images, targets)

    monkeypatch.setattr(Trainer, "_loss", raising)
    with pytest.raises(UserError, match="4 fit: take --batch-size 8, or --accumulation 16"):
        train("resnet20", RECIPE, tmp_path / "run")


def test_optimisers_take_memory_at_their_first_step(tmp_path, monkeypatch):
    def raising(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.SGD, "step", raising)
    with pytest.raises(UserError, match="even for one image"):
        train("resnet20", RECIPE, tmp_path / "run")


@pytest.mark.parametrize(
    ("batch", "most", "parts", "fields"),
    [(200, 12, 20, {}), (120, 7, 20, {}), (20, 4, 10, {"mixup": 0.8})],
)
def test_the_parts_that_are_named_are_equal(batch, most, parts, fields, tmp_path, monkeypatch):
    """So that a recipe takes them."""
    small_memory(monkeypatch, most)
    with pytest.raises(UserError, match=f"or --accumulation {parts} for the same steps"):
        train("resnet20", replace(RECIPE, batch_size=batch, **fields), tmp_path / "run")
    replace(RECIPE, batch_size=batch, accumulation=parts, **fields)


@pytest.mark.parametrize(("most", "said"), [(5, "2 fit: take --batch-size 4"), (1, "even for two images")])
def test_mixup_takes_even_numbers_of_images(most, said, tmp_path, monkeypatch):
    small_memory(monkeypatch, most)
    with pytest.raises(UserError, match=said):
        train("resnet20", replace(RECIPE, batch_size=24, mixup=0.8), tmp_path / "run")
