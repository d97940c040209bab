"""The picture of a run, drawn."""

import pytest
from PIL import Image

from timm_attn.training.curves import draw, draw_seeds


def lines(epochs: int) -> list[dict]:
    keys = ("train_loss", "loss", "train_top1", "top1", "lr")
    return [{"epoch": n + 1, **{key: 1 / (n + 1) for key in keys}} for n in range(epochs)]


@pytest.mark.parametrize(
    ("make", "metrics"),
    [(draw, lines(1)), (draw, lines(30)), (draw_seeds, [lines(2), lines(1)])],
    ids=["one epoch", "many", "seeds"],
)
def test_curves_are_drawn(make, metrics, tmp_path):
    # Imported above, the two are those that draw; what is put in their place in conftest.py leaves one pixel.
    make(metrics, "a run", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (946, 308) and len(set(image.convert("L").getdata())) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
