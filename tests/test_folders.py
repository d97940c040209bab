"""Folders of images and files: which file is in which split, whatever the folders are called."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq
from test_labels import TEST, TRAIN, class_labels, image_folder, strings

from timm_attn.images import DataError
from timm_attn.load import load_model
from timm_attn.training import Recipe, data, train, validate
from timm_attn.training.data import load_split
from timm_attn.training.folders import image_splits


def place(root: Path, *paths: str) -> None:
    """An image of its own at each path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, path))
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(root / path)


def found(root: Path) -> dict[str, set[str]]:
    """The split's images below the root."""
    return {
        split: {os.path.relpath(i.path, root) for i in images} for split, images in image_splits(root).items()
    }


def in_split(root: Path, *splits: str) -> set[str]:
    return {str(p.relative_to(root)) for s in splits for p in (root / s).rglob("*.png")}


def test_a_class_called_train_does_not_take_test_images(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        place(tmp_path, *(f"{split}/{c}/{i}.png" for c in ("bus", "car", "train") for i in range(n)))
    assert found(tmp_path) == {s: in_split(tmp_path, s) for s in ("train", "test")}
    train, test = (load_split(str(tmp_path), role) for role in ("train", "eval"))
    assert (len(train), len(test)) == (9, 6) and train.label_names == ["bus", "car", "train"]


@pytest.mark.parametrize(
    "names", [("a", "test"), ("a", "b", "val"), ("a", "train"), ("dev", "eval", "x"), ("test", "val")]
)
def test_a_flat_folder_of_classes_is_a_training_split(names, tmp_path):
    place(tmp_path, *(f"{c}/{i}.png" for c in names for i in range(2)))
    split = load_split(str(tmp_path), "train")
    assert (split.label_names, len(split)) == (sorted(names), 2 * len(names))
    with pytest.raises(DataError, match="no split test or validation, only train"):
        load_split(str(tmp_path), "eval")


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val"), {"train": "train", "val": "validation"}),
        (("Train", "Test"), {"Train": "train", "Test": "test"}),
        (
            ("training", "validation", "testing"),
            {"training": "train", "validation": "validation", "testing": "test"},
        ),
        (("val",), {"val": "validation"}),  # all that somebody needs who validates
        (("pets/train", "pets/test"), {"pets/train": "train", "pets/test": "test"}),
        (("train", "test", "notes"), {"train": "train", "test": "test"}),
    ],
)
def test_split_folders(folders, splits, tmp_path):
    # Words that `datasets` takes for splits, in classes and files.
    place(
        tmp_path,
        *(
            f"{f}/{c}/{n}"
            for f in folders
            for c in ("dev-kit", "test_tube")
            for n in ("train.png", "1-val.png")
        ),
    )
    assert found(tmp_path) == {split: in_split(tmp_path, folder) for folder, split in splits.items()}


def test_the_place_of_the_folder_does_not_matter(tmp_path):
    root = tmp_path / "test" / "my-train [1]" / "validation"
    place(root, "train/a/1.png", "train/b/1.png", "test/a/2.png")
    assert {s: len(i) for s, i in found(root).items()} == {"train": 2, "test": 1}
    assert load_split(str(root), "eval").label_names == ["a"]


def test_what_lies_beside_a_folder_of_folders_counts(tmp_path):
    """An archive is unpacked into one folder, but not everything with one folder is an archive."""
    images = [f"images/{camera}/{i}.png" for camera in ("camA", "camB") for i in range(2)]
    place(tmp_path / "metadata", *images)
    lines = [f"{image},{('cat', 'dog')[i % 2]}" for i, image in enumerate(images)]
    (tmp_path / "metadata" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    split = load_split(str(tmp_path / "metadata"), "train")
    assert split.label_names == ["cat", "dog"] and split.labels.tolist() == [0, 1, 0, 1]
    place(tmp_path / "table", "previews/good/1.png", "previews/bad/1.png")
    png = (tmp_path / "table" / "previews" / "bad" / "1.png").read_bytes()
    pq.write_table(pa.table({"image": [png] * 4, "label": [3, 4] * 2}), tmp_path / "table" / "train.parquet")
    assert load_split(str(tmp_path / "table"), "train").label_names == ["3", "4"]
    place(
        tmp_path / "archive", "pets-main/train/a/1.png", "pets-main/train/b/1.png", "pets-main/test/a/1.png"
    )
    (tmp_path / "archive" / "LICENSE").write_text("MIT")
    assert len(load_split(str(tmp_path / "archive"), "train")) == 2


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_encoded_images_of_either_binary_type_are_images(kind, tmp_path):
    place(tmp_path, "1.png")
    pngs = pa.array([(tmp_path / "1.png").read_bytes()] * 2, kind)
    (tmp_path / "t").mkdir()
    pq.write_table(pa.table({"picture": pngs, "label": [0, 1]}), tmp_path / "t" / "train.parquet")
    assert load_split(str(tmp_path / "t"), "train").pixels.shape == (2, 8, 8, 3)


def test_small_images_keep_their_size_however_many_they_are(tmp_path, monkeypatch):
    place(tmp_path, *(f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(4)))
    fields = {"batch_size": 4, "epochs": 1, "lr": 0.01, "workers": 0}
    recipe = Recipe(data=str(tmp_path), model_kwargs=("layers=[1,1,1,1]",), **fields)
    train("resnet18", recipe, tmp_path / "few")
    monkeypatch.setattr(data, "MEMORY", 8 * 8 * 8 * 3 - 1)
    train("resnet18", recipe, tmp_path / "many")
    for name in ("few", "many"):
        cfg = load_model(str(tmp_path / name)).pretrained_cfg
        assert (tuple(cfg["input_size"]), cfg["crop_pct"]) == ((3, 8, 8), 1.0)
    validate(load_model(str(tmp_path / "many")), Recipe(data=str(tmp_path)))


def test_a_folder_that_is_two_classes_is_refused(tmp_path):
    place(tmp_path, "pool/1.png", "data/train/a/1.png", "data/test/a/1.png")
    for name in "bc":
        (tmp_path / "data" / "train" / name).symlink_to(tmp_path / "pool")
    with pytest.raises(DataError, match=r"b/1.png and .*c/1.png are one image in two classes: take one away"):
        load_split(str(tmp_path / "data"), "train")
    (tmp_path / "data" / "train" / "c").unlink()
    assert load_split(str(tmp_path / "data"), "train").label_names == ["a", "b"]


def test_a_folder_may_be_reached_by_a_link_in_itself(tmp_path):
    place(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "latest").symlink_to(".")
    assert len(image_splits(tmp_path / "latest")["train"]) == 2


def test_a_folder_that_links_lead_to_twice_counts_once(tmp_path):
    place(tmp_path, "train/one/a/1.png", "train/one/b/1.png", "train/two/b/2.png", "test/one/a/1.png")
    (tmp_path / "train" / "two" / "a").symlink_to(tmp_path / "train" / "one" / "a")
    (tmp_path / "train" / "two" / "b" / "3.png").symlink_to(
        tmp_path / "train" / "one" / "b" / "1.png"
    )  # on purpose
    images = image_splits(tmp_path)["train"]
    assert [str(Path(image.path).relative_to(tmp_path / "train")) for image in images] == [
        "one/a/1.png",
        "one/b/1.png",
        "two/b/2.png",
        "two/b/3.png",
    ]


def test_links_to_one_another_come_to_an_end(tmp_path):
    place(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png")
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    assert len(load_split(str(tmp_path), "train")) == 2
    (tmp_path / "train" / "a" / "up").unlink()
    (tmp_path / "train" / "a" / "x").symlink_to(tmp_path / "train" / "b")
    (tmp_path / "train" / "b" / "y").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(DataError, match="lie at different depths"):
        load_split(str(tmp_path), "train")


def test_images_of_several_sizes_have_none_that_is_their_own(tmp_path, monkeypatch):
    """However many they are."""
    place(tmp_path, *(f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(4)))
    Image.new("RGB", (9, 8)).save(tmp_path / "train" / "b" / "2.png")
    for memory in (data.MEMORY, 1):
        monkeypatch.setattr(data, "MEMORY", memory)
        with pytest.raises(DataError, match="row 6 .* has 9×8 pixels, the first row 8×8: give --img-size"):
            load_split(str(tmp_path), "train")
        assert len(load_split(str(tmp_path), "train", size=(8, 8))) == 8


def test_what_is_hidden_or_no_image_is_passed_over(tmp_path):
    place(tmp_path, "train/a/1.png", "train/b/1.PNG", "test/b/2.png")
    for path in (
        "train/.cache/x.png",
        "__MACOSX/train/a/._1.png",
        "train/a/._1.png",
        "train/Thumbs.db",
        "notes.csv",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    assert found(tmp_path) == {"train": {"train/a/1.png", "train/b/1.PNG"}, "test": {"test/b/2.png"}}


def link(target: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=target.is_dir())


@pytest.mark.parametrize("what", ["train/a/1.png", "train/a", "train"])
def test_an_image_in_two_splits_stops(what, tmp_path):
    place(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/2.png")
    goal = tmp_path / what.replace("train", "val" if what == "train" else "test")
    link(tmp_path / what, goal)
    with pytest.raises(
        DataError, match="is in the splits (test and train|train and validation): remove one of the links"
    ):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["train/a/1.png", "train/b/1.png", "train/stray.png", "test/a/1.png"],
            "stray.png lies in no class folder",
        ),
        (["train/a/1.png", "train/b/deep/1.png", "test/a/1.png"], "lie at different depths"),
        (["stray.png", "pets/a/1.png", "pets/b/1.png"], "stray.png lies in no class folder"),
        (["a/train/1.png", "a/test/1.png", "b/train/1.png", "b/test/1.png"], "lie in the class folders"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "would both be the split validation"),
    ],
)
def test_folders_whose_classes_are_not_clear_are_refused(paths, message, tmp_path):
    place(tmp_path, *paths)
    with pytest.raises(DataError, match=message):
        load_split(str(tmp_path), "train")


def test_parquet_files_whose_names_are_of_two_splits_stop(tmp_path):
    (tmp_path / "d").mkdir()
    strings(tmp_path / "d" / "more-train", "part", TRAIN)
    strings(tmp_path / "d" / "more-train-test", "part", TEST)
    with pytest.raises(DataError, match="would be in the splits"):
        load_split(str(tmp_path / "d"), "train")


def test_parquet_files_of_a_split_with_other_class_names_stop(tmp_path):
    class_labels(tmp_path / "d", "train", TRAIN)
    os.rename(tmp_path / "d" / "train-0.parquet", tmp_path / "d" / "train-1.parquet")
    class_labels(tmp_path / "d", "train", TEST)
    with pytest.raises(DataError, match="have other class names"):
        load_split(str(tmp_path / "d"), "train")


@pytest.mark.parametrize("write", [strings, image_folder])
@pytest.mark.parametrize("how", ["split folders", "class folders", "brackets", "a loop"])
def test_links_and_brackets_are_read(how, write, tmp_path):
    data = tmp_path / ("d [v1]" if how == "brackets" else "d")
    data.mkdir()
    for split, names in (("train", TRAIN), ("test", TEST)):
        place_ = tmp_path / "real" / split if how != "brackets" else data / split
        place_.mkdir(parents=True)
        write(place_, "part", names) if write is strings else image_folder(place_.parent, split, names)
        if how == "split folders":
            link(place_, data / split)
        elif how != "brackets":
            for inner in place_.iterdir():
                link(inner, data / split / inner.name)
    if how == "a loop":
        link(data / "train", data / "train" / "again")
    assert [len(load_split(str(data), role)) for role in ("train", "eval")] == [len(TRAIN), len(TEST)]


def test_errors_of_datasets_say_why(tmp_path, monkeypatch):
    place(tmp_path / "d", "train/a/1.png", "train/b/1.png")
    shutil.make_archive(str(tmp_path / "z" / "train"), "zip", tmp_path / "d" / "train")
    with pytest.raises(DataError, match="Invalid string class label.*unpacked") as error:
        load_split(str(tmp_path / "z"), "train")
    assert error.value.__cause__ is not None
    with pytest.raises(DataError, match=r"train.zip is not a folder \(an archive is to be unpacked\)"):
        load_split(str(tmp_path / "z" / "train.zip"), "train")
    strings(tmp_path / "p", "train", TRAIN)
    (tmp_path / "cache").write_text("a file where the cache should be")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match="cache") as error:
        load_split(str(tmp_path / "p"), "train")
    assert isinstance(error.value.__cause__, OSError)


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    place(tmp_path, "train/b/1.png", "test/b/2.png")
    latin = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    try:
        os.mkdir(latin)
    except OSError as error:
        pytest.skip(f"no such name on this file system: {error}")
    shutil.copy(tmp_path / "train" / "b" / "1.png", latin + b"/1.png")
    with pytest.raises(DataError, match=r"caf\\xe9/1.png' is not UTF-8: rename it"):
        load_split(str(tmp_path), "train")


def test_a_configuration_is_chosen(tmp_path):
    data = tmp_path / "d"
    for config, names in (("one", TRAIN), ("two", TEST)):
        (data / config).mkdir(parents=True)
        strings(data / config, "train", names)
    card = "---\nconfigs:\n- config_name: one\n  data_dir: one\n- config_name: two\n  data_dir: two\n---\n"
    (data / "README.md").write_text(card)
    assert len(load_split(str(data), "train", config="two")) == len(TEST)
    with pytest.raises(DataError, match="Config name is missing.*--data-config"):
        load_split(str(data), "train")
    with pytest.raises(DataError, match="three"):
        load_split(str(data), "train", config="three")
