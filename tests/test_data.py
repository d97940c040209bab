"""Reading data: columns, splits, sizes, and what is wrong with a data set."""

import io
import os
from functools import partial
from itertools import islice

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from forked import run_code
from helpers import python, use_hub
from hub_server import HubServer
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_attn.images import DataError
from timm_attn.training import pixels
from timm_attn.training.augment import AutoAugment, crop_and_flip
from timm_attn.training.batches import Batch, Batches, Shard
from timm_attn.training.data import load_split
from timm_attn.training.recipe import Recipe
from timm_attn.training.splits import hold_out, load_splits
from timm_attn.training.validation import evaluation_images

CPU = torch.device("cpu")
CONFIG = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
}


def picture(seed: int, size=(8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encode(image: Image.Image) -> dict:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write(
    folder, split="train", images=None, labels=None, image="image", label="label", names=("a", "b", "c")
):
    """One split as a parquet file in the layout of the Hub."""
    images = [picture(i) for i in range(6)] if images is None else images
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    columns = {image: [i if isinstance(i, dict) else encode(i) for i in images], label: labels}
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_a_held_out_part_stands_for_a_test_split(tmp_path):
    data = write(tmp_path / "d", images=[picture(i) for i in range(10)])
    with pytest.raises(DataError, match="no split test or validation, only train: .* --val-fraction 0.2$"):
        load_splits(Recipe(data=data), Accelerator())
    with pytest.raises(DataError, match="no split dev, only train: choose with --eval-split$"):
        load_splits(Recipe(data=data, eval_split="dev", val_fraction=0.2), Accelerator())
    splits = load_splits(Recipe(data=data, val_fraction=0.2), Accelerator())
    assert splits.counts == {"train": 8, "train, held out": 2} and splits.test is None
    write(tmp_path / "d", split="test")
    assert load_splits(Recipe(data=data, val_fraction=0.2), Accelerator()).counts["test"] == 6


def test_a_folder_too_deep_is_told(tmp_path):
    for split, label in (("train", "a"), ("train", "b"), ("test", "a")):
        (tmp_path / "photos" / split / label).mkdir(parents=True)
        picture(0).save(tmp_path / "photos" / split / label / "0.png")
    with pytest.raises(DataError, match=f"or give the folder above, {tmp_path / 'photos'}$"):
        load_splits(Recipe(data=str(tmp_path / "photos" / "train")), Accelerator())


def epoch(batches: Batches, number: int, first: int = 0) -> list[Batch]:
    """The batches of an epoch from one of its steps on."""
    parts = batches.recipe.accumulation
    return list(islice(batches.train(number * batches.steps + first), (batches.steps - first) * parts))


def test_parquet_is_read_bit_for_bit(tmp_path):
    data = write(tmp_path / "d")
    split = load_split(data, "train")
    assert split.label_names == ["a", "b", "c"]
    assert split.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert split.pixels.shape == (6, 8, 8, 3)
    for i in range(6):
        assert np.array_equal(split.pixels[i].numpy(), np.asarray(picture(i)))


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("picture", "kind")])
def test_columns_are_found_by_type(image, label, tmp_path):
    assert len(load_split(write(tmp_path / "d", image=image, label=label), "train")) == 6


def test_of_two_label_columns_the_fine_one_is_taken(tmp_path):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "coarse_label": datasets.ClassLabel(names=["x"]),
            "fine_label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    columns = {"img": [encode(picture(0)), encode(picture(1))], "coarse_label": [0, 0], "fine_label": [1, 0]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "d" / "train-0.parquet")
    assert load_split(str(tmp_path / "d"), "train").labels.tolist() == [1, 0]
    named = load_split(str(tmp_path / "d"), "train", label_column="coarse_label")
    assert named.label_names == ["x"]


def test_image_folder_and_validation_split(tmp_path):
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            folder = tmp_path / "d" / split / name
            folder.mkdir(parents=True)
            picture(len(name + split)).save(folder / "1.png")
    split = load_split(str(tmp_path / "d"), "eval")
    assert (split.name, split.label_names, len(split)) == ("validation", ["cat", "dog"], 2)


def test_larger_images_stay_encoded(tmp_path):
    data = write(tmp_path / "d", images=[picture(i, (80, 70)) for i in range(4)])
    split = load_split(data, "train")
    assert split.pixels is None and split.image(3).size == (80, 70)
    assert np.array_equal(np.asarray(split.image(3)), np.asarray(picture(3, (80, 70))))
    small = load_split(data, "train", size=(16, 16))
    assert small.pixels.shape == (4, 16, 16, 3)


def test_larger_images_are_augmented_by_image_and_epoch(tmp_path):
    split = load_split(write(tmp_path / "d", images=[picture(i, (80, 80)) for i in range(4)]), "train")
    recipe = Recipe(data="d", batch_size=2, workers=0, hflip=True)
    batches = Batches(split, recipe, CONFIG, Shard(CPU))
    first, again = (torch.cat([b.images for b in epoch(batches, 0)]) for _ in range(2))
    assert first.shape == (4, 3, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat([b.images for b in epoch(batches, 1)]))
    (late,) = epoch(batches, 0, first=1)
    assert torch.equal(late.images, first[2:])
    assert sum(len(b.labels) for b in batches.evaluate()) == 4


def test_digits_split_is_fixed():
    train, test = load_split("digits", "train"), load_split("digits", "eval")
    assert (len(train), len(test)) == (1437, 360)
    assert train.pixels.shape[1:] == (32, 32, 3) and train.pixels.dtype == torch.uint8
    assert test.labels.bincount().tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]
    mean, std = train.statistics()
    pixels = train.pixels.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-9)
    assert std == pytest.approx(pixels.flatten(0, 2).std(0, correction=0).tolist(), abs=1e-9)


def test_crop_and_flip_against_a_loop():
    images = torch.arange(4 * 3 * 5 * 6).view(4, 5, 6, 3)
    flip = torch.tensor([True, False, True, False])
    offsets = torch.tensor([[0, 0], [4, 1], [2, 2], [3, 4]])
    result = crop_and_flip(images, 2, flip, offsets)
    for i in range(4):
        padded = torch.nn.functional.pad(images[i], (0, 0, 2, 2, 2, 2))
        row, column = offsets[i].tolist()
        expected = padded[row : row + 5, column : column + 6]
        assert torch.equal(result[i], expected.flip(1) if flip[i] else expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one_process(processes):
    split = load_split("digits", "train", size=(8, 8))
    recipe = Recipe(data="digits", batch_size=64, hflip=True, crop_padding=1)
    whole = epoch(Batches(split, recipe, CONFIG, Shard(CPU)), 3)
    parts = [epoch(Batches(split, recipe, CONFIG, Shard(CPU, r, processes)), 3) for r in range(processes)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([part[step].images for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part[step].labels for part in parts]))
    seen = torch.cat(
        [
            b.labels
            for r in range(processes)
            for b in Batches(split, recipe, CONFIG, Shard(CPU, r, processes)).evaluate()
        ]
    )
    assert seen.bincount().tolist() == split.labels.bincount().tolist()


def test_epochs_differ_and_use_every_image_once():
    split = load_split("digits", "train", size=(8, 8))
    split.labels = torch.arange(len(split))
    batches = Batches(split, Recipe(data="digits", batch_size=100), CONFIG, Shard(CPU))
    first, second = (torch.cat([b.labels for b in epoch(batches, n)]) for n in (0, 1))
    assert len(first) == 1400 == len(first.unique())
    assert not torch.equal(first, second)
    assert torch.equal(first[300:], torch.cat([b.labels for b in epoch(batches, 0, first=3)]))


AUGMENTED = {"data": "digits", "batch_size": 16, "hflip": True, "crop_padding": 1, "reprob": 0.5}


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5-inc1"])
@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_augmentation_depends_neither_on_processes_nor_on_accumulation(processes, accumulation, aa):
    split = load_split("digits", "train", size=(8, 8)).select(torch.arange(32), "train")
    recipe = Recipe(**AUGMENTED, aa=aa, workers=0)
    parted = Recipe(**AUGMENTED, aa=aa, workers=0, accumulation=accumulation)
    whole = epoch(Batches(split, recipe, CONFIG, Shard(CPU)), 1)
    by_rank = [epoch(Batches(split, parted, CONFIG, Shard(CPU, r, processes)), 1) for r in range(processes)]
    for step, batch in enumerate(whole):
        here = slice(step * accumulation, (step + 1) * accumulation)
        assert torch.equal(batch.images, torch.cat([b.images for parts in by_rank for b in parts[here]]))
        assert torch.equal(batch.labels, torch.cat([b.labels for parts in by_rank for b in parts[here]]))


def test_augmix_shifts_as_far_as_timms():
    theirs = create_transform(224, is_training=True, auto_augment="augmix-m3").transforms[2]
    ours = AutoAugment("augmix-m3", (0.5,) * 3, 32).transform
    assert type(ours) is type(theirs)
    assert ours.ops[0].hparams["translate_pct"] == theirs.ops[0].hparams["translate_pct"]


def test_class_labels_beside_a_column_called_label_are_asked_about(tmp_path):
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.Value("string"),
        quality=datasets.ClassLabel(names=["good", "bad"]),
    )
    table = {"image": [encode(picture(i)) for i in range(3)], "label": ["x", "y", "x"], "quality": [0, 1, 1]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "d" / "train.parquet")
    with pytest.raises(DataError, match="no clear label column in image, label, quality: .* --label-column"):
        load_split(str(tmp_path / "d"), "train")
    assert load_split(str(tmp_path / "d"), "train", label_column="label").label_names == ["x", "y"]


def test_worker_processes_change_nothing(tmp_path):
    large = load_split(write(tmp_path / "d", images=[picture(i, (80, 80)) for i in range(4)]), "train")
    small = load_split("digits", "train", size=(8, 8)).select(torch.arange(4), "train")
    for split in (large, small):
        batches = [
            Batches(
                split, Recipe(**{**AUGMENTED, "batch_size": 2}, aa="augmix-m3", workers=w), CONFIG, Shard(CPU)
            )
            for w in (0, 2)
        ]
        for a, b in zip(*(epoch(b, 0) for b in batches), strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_erased_images_are_a_share():
    split = load_split("digits", "train", size=(8, 8))
    plain, erased = (
        torch.cat([b.images for b in epoch(Batches(split, Recipe(**fields), CONFIG, Shard(CPU)), 0)])
        for fields in ({**AUGMENTED, "reprob": 0.0}, AUGMENTED)
    )
    changed = (plain != erased).flatten(1).any(1).double().mean()
    assert 0.4 < changed < 0.6


def test_decoded_images_are_kept_by_content(tmp_path, monkeypatch):
    data = write(tmp_path / "d")
    first = load_split(data, "train")
    decoded = []
    decode = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    elsewhere = write(tmp_path / "elsewhere")
    assert torch.equal(load_split(elsewhere, "train").pixels, first.pixels) and not decoded
    write(tmp_path / "elsewhere", images=[picture(9), *(picture(i) for i in range(1, 6))])
    changed = load_split(elsewhere, "train").pixels
    assert len(decoded) == 6 and np.array_equal(changed[0].numpy(), np.asarray(picture(9)))


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_damaged_cache_is_made_again(harm, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "cache_folder", lambda: tmp_path / "cache")
    data = write(tmp_path / "d")
    load_split(data, "train")
    (file,) = (tmp_path / "cache").iterdir()
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:300])
        with pytest.warns(UserWarning, match="is damaged and made again"):
            split = load_split(data, "train")
    else:
        file.unlink()
        split = load_split(data, "train")
    assert np.array_equal(split.pixels[3].numpy(), np.asarray(picture(3)))
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(pixels, "cache_folder", lambda: tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(load_split(write(tmp_path / "d"), "train")) == 6


def spoiled(size=(8, 8)):
    """Six images, of which 0 and 4 are corrupt."""
    images = [encode(picture(i, size)) for i in range(6)]
    for i in (0, 4):
        images[i] = {"bytes": images[i]["bytes"][:60], "path": None}
    return images


def test_corrupt_small_images_are_left_out_when_asked(tmp_path):
    data = write(tmp_path / "d", images=spoiled())
    split = load_split(data, "train", skip_corrupt=True)
    assert split.labels.tolist() == [1, 2, 0, 2] and split.skipped == 2
    assert np.array_equal(split.pixels[2].numpy(), np.asarray(picture(3)))
    with pytest.raises(DataError, match="row 0 .*--on-corrupt skip"):
        load_split(data, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_larger_images_are_skipped_and_counted_when_asked(workers, tmp_path):
    data = write(tmp_path / "d", images=spoiled((80, 80)))
    split = load_split(data, "train", skip_corrupt=True)
    recipe = Recipe(data="d", batch_size=3, workers=workers, on_corrupt="skip")
    batches = Batches(split, recipe, CONFIG, Shard(CPU))
    trained = epoch(batches, 0)
    assert [len(b.labels) for b in trained] == [3, 3] and sum(b.skipped for b in trained) == 2
    # The next image takes the place of a corrupt one: 1 for 0, 5 for 4.
    assert torch.cat([b.labels for b in trained]).bincount().tolist() == [1, 2, 3]
    evaluated = list(batches.evaluate())
    assert torch.cat([b.labels for b in evaluated]).tolist() == [1, 2, 0, 2]
    assert sum(b.skipped for b in evaluated) == 2
    with pytest.raises(DataError, match="^corrupt or unreadable image in row [04] of"):
        epoch(Batches(split, Recipe(data="d", batch_size=3, workers=workers), CONFIG, Shard(CPU)), 0)


@pytest.mark.parametrize("start", [run_code, partial(python, "-c")])
def test_an_error_that_is_kept_does_not_keep_the_process(start, tmp_path):
    """Its traceback holds the loader, whose workers ignore the signal by which Python ends them."""
    images = [picture(i, (80, 80)) for i in range(6)]
    write(tmp_path / "d", images=[*images[:-1], {"bytes": b"no image", "path": None}])
    code = """
from timm_attn.training import Recipe, train
try:
    fields = {"batch_size": 3, "epochs": 1, "lr": 0.1, "val_fraction": 0.3, "workers": 2}
    train("resnet20", Recipe(data="d", img_size=72, **fields), "run")
except Exception as error:
    kept = error
    print(error)
"""
    result = start(code, cwd=tmp_path)
    assert "corrupt or unreadable image" in result.stdout


def test_photos_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """To know a data set by its content takes a thousand of them."""
    write(tmp_path / "d", images=[picture(i, (80, 80)) for i in range(40)])
    read, cells = [], pixels._cells

    def counted(rows, column, batch_size=1000):
        read.append(batch_size)
        return cells(rows, column, batch_size)

    monkeypatch.setattr(pixels, "_cells", counted)
    assert load_split(str(tmp_path / "d"), "train").fingerprint and max(read) <= 16


def test_pixels_are_on_the_device_only_if_they_are_taken_from_there(tmp_path):
    split = load_split(write(tmp_path / "d"), "train")
    for policy, there in (("rand-m9", False), (None, True)):
        recipe = Recipe(data="d", batch_size=2, workers=0, aa=policy)
        batches = Batches(split, recipe, CONFIG, Shard(CPU))
        assert next(batches.train()).images.shape == (2, 3, 8, 8)
        assert ("pixels" in vars(batches)) == there


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_ends_leaves_its_parents_workers_alone(tmp_path):
    write(tmp_path / "d", images=[picture(i, (80, 80)) for i in range(6)])
    code = """
import os, sys, torch
from timm_attn.training import Recipe
from timm_attn.training.batches import Batches, Shard
from timm_attn.training.data import load_split
config = {"input_size": (3, 72, 72), "mean": (0.5,) * 3, "std": (0.5,) * 3}
recipe = Recipe(data="d", batch_size=2, workers=1)
batches = Batches(load_split("d", "train"), recipe, config, Shard(torch.device("cpu"))).train()
next(batches)
child = os.fork()
if not child:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print(sum(len(next(batches).labels) for _ in range(20)))
"""
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "40"


# ---------------------------------------------------------------------------------------------- bad input


def corrupt(folder):
    write(folder, images=[picture(0), {"bytes": b"no image", "path": None}, picture(2)])
    return "row 1 .*corrupt|corrupt image in row 1"


def no_image(folder):
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(folder / "train-0.parquet")
    return "no image column among text, label.*--image-column"


def no_label(folder):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": [encode(picture(0))], "text": ["a"]}, features=features)
    table.to_parquet(folder / "train-0.parquet")
    return "no clear label column in image, text.*--label-column"


def empty_split(folder):
    write(folder, images=[], labels=[])
    return "a split of .* is empty"


def empty_folder(folder):
    folder.mkdir()
    return "cannot read .* as a data set"


def unlabelled(folder):
    write(folder, labels=[-1] * 6)
    return "label -1 in row 0 .*out of range 0 to 2"


def out_of_range(folder):
    write(folder, names=("a", "b", "c", "d", "e", "f", "g"), labels=[0, 1, 2, 3, 4, 5])
    table = datasets.load_dataset(str(folder))["train"].cast_column("label", datasets.Value("int64"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    arrow = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=features))
    arrow.to_parquet(folder / "train-00000-of-00001.parquet")
    return "label 2 in row 2 .*out of range 0 to 1"


def only_test(folder):
    write(folder, split="test")
    return "no split train, only test.*--train-split"


def mixed_sizes(folder):
    write(folder, images=[picture(0), picture(1, (9, 8)), picture(2)])
    return "row 1 .*9×8 pixels, the first row 8×8: give --img-size"


BAD = [
    corrupt,
    no_image,
    no_label,
    empty_split,
    empty_folder,
    unlabelled,
    out_of_range,
    only_test,
    mixed_sizes,
]


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_data_is_named(spoil, tmp_path):
    message = spoil(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        load_split(str(tmp_path / "d"), "train")


def test_a_corrupt_larger_image_is_named_when_it_is_read(tmp_path):
    images = [picture(0, (80, 80)), {"bytes": encode(picture(1, (80, 80)))["bytes"][:200], "path": None}]
    split = load_split(write(tmp_path / "d", images=images), "train")
    with pytest.raises(DataError, match="corrupt or unreadable image in row 1"):
        split.image(1)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", ""])
def test_a_missing_folder_is_named(name):
    with pytest.raises(DataError, match="not a folder|no data"):
        load_split(name, "train")


def test_unknown_columns_and_splits(tmp_path):
    data = write(tmp_path / "d")
    with pytest.raises(DataError, match="no column 'x'; it has image, label"):
        load_split(data, "train", image_column="x")
    with pytest.raises(DataError, match="holds .*, not images"):
        load_split(data, "train", image_column="label")
    with pytest.raises(DataError, match="no split nope, only train"):
        load_split(data, "train", "nope")


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path):
    grey = (np.arange(64, dtype=np.uint32) * 65535 // 63).astype(np.uint16).reshape(8, 8)
    for name in ("a", "b"):
        (tmp_path / "d" / "train" / name).mkdir(parents=True)
        Image.fromarray(grey).save(tmp_path / "d" / "train" / name / "1.png")
    pixels = load_split(str(tmp_path / "d"), "train").pixels[0, :, :, 0]
    assert np.array_equal(pixels.numpy(), grey // 257)
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "d" / "train" / "a" / "2.tiff")
    with pytest.raises(DataError, match="mode F, which has no fixed range"):
        load_split(str(tmp_path / "d"), "train")


def test_parquet_without_the_image_type(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "d").mkdir()
    table = pyarrow.table({"picture": [encode(picture(i))["bytes"] for i in range(3)], "label": [0, 1, 0]})
    parquet.write_table(table, tmp_path / "d" / "train-0.parquet")
    split = load_split(str(tmp_path / "d"), "train")
    assert np.array_equal(split.pixels[2].numpy(), np.asarray(picture(2)))
    assert split.label_names == ["0", "1"] and not split.named


def test_missing_labels_are_named(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "d").mkdir()
    table = pyarrow.table({"image": [encode(picture(i))["bytes"] for i in range(2)], "label": ["a", None]})
    parquet.write_table(table, tmp_path / "d" / "train-0.parquet")
    with pytest.raises(DataError, match="1 rows of .* have no label"):
        load_split(str(tmp_path / "d"), "train")


def test_datasets_does_not_ask_a_silent_hub_unless_the_cache_has_the_data(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: asked.append(args) or 1 / 0)
    use_hub(monkeypatch, "http://127.0.0.1:9")
    for name in ("cifar11", "me/MyData"):
        with pytest.raises(DataError, match=f"'{name}'.* no folder .* http://127.0.0.1:9 does not answer"):
            load_split(name, "train")
    assert not asked
    (tmp_path / "me___my_data").mkdir()
    with pytest.raises(DataError, match="ZeroDivisionError"):
        load_split("me/MyData", "train")
    with HubServer() as server:  # what answers is asked further, whatever it says
        use_hub(monkeypatch, server.endpoint)
        with pytest.raises(DataError, match="ZeroDivisionError"):
            load_split("cifar11", "train")
    assert len(asked) == 2


def test_a_corrupt_image_of_a_part_is_named_by_its_row_in_the_whole(tmp_path):
    images = [picture(i, (80, 80)) for i in range(10)]
    images[7] = {"bytes": b"nothing", "path": None}
    split = load_split(write(tmp_path / "d", images=images), "train")
    kept, out = hold_out(split, 0.5)
    part = next(part for part in (kept, out) if 7 in part.numbers)
    part = part.select(torch.arange(len(part)).flip(0), "again")
    with pytest.raises(DataError, match=r"image in row 7 of .* \(again\)"):
        for i in range(len(part)):
            part.image(i)


def test_small_images_are_prepared_as_a_foreign_network_wants_them(tmp_path):
    """Not read whole: those of a network that was trained on timm's crops."""
    pictures = [picture(i, (40, 40)) for i in range(4)]
    data = write(tmp_path / "d", split="test", images=pictures)
    model = timm.create_model("resnet20", num_classes=3)
    cfg = {"crop_pct": 0.875, "interpolation": "bicubic", "num_classes": 3, "label_names": ["a", "b", "c"]}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    images, labels, _ = evaluation_images(model, Recipe(data=data, workers=0), 4)
    wanted = create_transform(**resolve_model_data_config(model))
    expected = torch.stack([wanted(image) for image in pictures])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(images, expected[order])
    assert labels.tolist() == [int(i) % 3 for i in order]
