"""Labels are names: in another order, or of some classes only, they mean the same."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from timm_attn.cli import main
from timm_attn.errors import UserError
from timm_attn.images import DataError
from timm_attn.load import load_model
from timm_attn.training import Recipe, validate
from timm_attn.training.data import load_split
from timm_attn.training.labels import match_classes
from timm_attn.training.splits import load_splits

TINY = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--model-kwargs", "layers=[1,1,1]"]
COLOURS = {"ant": (250, 20, 20), "bee": (20, 250, 20), "cat": (20, 20, 250), "dog": (200, 200, 20)}
COLOURS |= dict.fromkeys(("f\u00e9e", "fe\u0301e"), (20, 200, 200))
STRING, INT = datasets.Value("string"), datasets.Value("int64")


def picture(name: str, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 30, (8, 8, 3))
    return Image.fromarray((np.array(COLOURS[name]) - 15 + noise).clip(0, 255).astype(np.uint8))


def parquet(folder, split, names, labels, feature):
    """One split: an image of each name, and what its label column holds."""
    folder.mkdir(exist_ok=True)
    columns = {"image": [picture(n, i) for i, n in enumerate(names)], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-0.parquet")


def image_folder(folder, split, names):
    for i, name in enumerate(names):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        picture(name, i).save(folder / split / name / f"{i}.png")


def strings(folder, split, names):
    parquet(folder, split, names, list(names), STRING)


def class_labels(folder, split, names):
    """Each split has its own list of names, backwards in the test split."""
    own = sorted(set(names), reverse=split == "test")
    parquet(folder, split, names, [own.index(n) for n in names], datasets.ClassLabel(names=own))


def numbers(folder, split, names):
    """Ids far from 0 to n - 1."""
    parquet(folder, split, names, [{"ant": 7, "bee": 2000, "cat": 1000003}[n] for n in names], INT)


def booleans(folder, split, names):
    parquet(folder, split, names, [n != "ant" for n in names], datasets.Value("bool"))


KINDS = [strings, class_labels, image_folder, numbers]
TRAIN, TEST = ["cat", "ant", "bee", "cat"] * 2, ["cat", "bee", "cat"]  # no ant


def splits(folder):
    return load_splits(Recipe(data=str(folder)), Accelerator(cpu=True))


@pytest.mark.parametrize("write", KINDS)
def test_a_test_split_of_some_classes_is_matched_by_name(write, tmp_path):
    write(tmp_path / "d", "train", TRAIN)
    write(tmp_path / "d", "test", TEST)
    read = splits(tmp_path / "d")
    assert read.train.label_names == read.eval.label_names and len(read.train.label_names) == 3
    by_colour = {}
    for split in (read.train, read.eval):
        colours = split.pixels.float().mean((1, 2)).argmax(1).tolist()
        for colour, label in zip(colours, split.labels.tolist(), strict=True):
            by_colour.setdefault(colour, set()).add(split.label_names[label])
    assert len(by_colour) == 3 and all(len(names) == 1 for names in by_colour.values())


@pytest.mark.parametrize("write", [strings, class_labels, image_folder])
def test_a_letter_with_an_accent_is_the_same_in_one_sign_and_in_two(write, tmp_path):
    """As a folder of a Mac's and the table of a Linux machine have it."""
    one, two = "f\u00e9e", "fe\u0301e"
    write(tmp_path / "d", "train", [one, "ant", *([two] if write is strings else [])])
    write(tmp_path / "d", "test", [two])
    read = splits(tmp_path / "d")
    assert read.train.label_names == ["ant", one]
    assert read.train.labels.sort().values.tolist() == [0, 1, *([1] if write is strings else [])]
    assert read.eval.labels.tolist() == [1]


@pytest.mark.parametrize("write", [strings, class_labels, image_folder])
def test_a_class_that_training_does_not_know_is_refused_with_its_name(write, tmp_path):
    write(tmp_path / "d", "train", TRAIN)
    write(tmp_path / "d", "test", [*TEST, "dog"])
    with pytest.raises(UserError, match=r"images of dog \(1\), not among the classes ant, bee, cat \(3\)"):
        splits(tmp_path / "d")


def test_sparse_numbers_and_booleans_are_few_classes(tmp_path):
    numbers(tmp_path / "d", "train", TRAIN)
    split = load_split(str(tmp_path / "d"), "train")
    assert split.label_names == ["7", "2000", "1000003"] and split.labels.unique().tolist() == [0, 1, 2]
    booleans(tmp_path / "b", "train", TRAIN)
    split = load_split(str(tmp_path / "b"), "train")
    assert split.label_names == ["False", "True"] and split.labels.tolist() == [
        int(n != "ant") for n in TRAIN
    ]


def test_bare_numbers_are_places_among_names_and_names_among_numbers(tmp_path):
    def read(labels):
        parquet(tmp_path / "d", "train", TRAIN[: len(labels)], labels, INT)
        return load_split(str(tmp_path / "d"), "train")

    split = read([2, 0])
    match_classes(split, ["x", "y", "z"])
    assert split.labels.tolist() == [2, 0]
    split = read([10, 2])
    match_classes(split, ["1", "10", "2"])  # as folders are sorted
    assert split.labels.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"images of 3 \(1\)"):
        match_classes(read([3, 0]), ["x", "y", "z"])


def test_a_name_that_stands_for_two_classes_is_refused_unless_the_lists_are_the_same(tmp_path):
    strings(tmp_path / "d", "train", ["ant", "bee"])
    split = load_split(str(tmp_path / "d"), "train")
    with pytest.raises(UserError, match=r"several classes are called ant"):
        match_classes(split, ["ant", "ant", "bee"])
    split.label_names = ["ant", "ant"]
    match_classes(split, ["ant", "ant"])
    assert split.labels.tolist() == [0, 1]


def test_negative_numbers_and_too_many_are_no_classes(tmp_path):
    parquet(tmp_path / "d", "train", TRAIN[:2], [0, -1], INT)
    with pytest.raises(DataError, match="label -1 in row 1 "):
        load_split(str(tmp_path / "d"), "train")
    parquet(tmp_path / "f", "train", TRAIN[:2], [0.0, 1.0], datasets.Value("float32"))
    with pytest.raises(DataError, match="holds .*float32.*, not class labels"):
        load_split(str(tmp_path / "f"), "train")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on string labels of three classes, and the model's own answers."""
    folder = tmp_path_factory.mktemp("labels")
    strings(folder / "d", "train", TRAIN)
    strings(folder / "d", "test", TEST)
    main(["train", "resnet20", "--data", str(folder / "d"), "--out", str(folder / "run"), *TINY])
    return folder / "run"


@torch.no_grad()
def own_top1(run, names):
    model = load_model(str(run))
    cfg = model.pretrained_cfg
    images = torch.stack([torch.from_numpy(np.array(picture(n, i))) for i, n in enumerate(names)]) / 255
    images = (images - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    guessed = [cfg["label_names"][i] for i in model(images.permute(0, 3, 1, 2).float()).argmax(1)]
    return 100 * np.mean([a == b for a, b in zip(guessed, names, strict=True)])


@pytest.mark.parametrize("write", [strings, class_labels, image_folder])
def test_validate_matches_by_name(write, run, tmp_path):
    names = ["cat", "bee", "cat", "cat", "bee"]
    write(tmp_path / "v", "test", names)
    figures = validate(load_model(str(run)), Recipe(data=str(tmp_path / "v"), workers=0, batch_size=8))
    assert figures["images"] == 5 and figures["top1"] == pytest.approx(own_top1(run, names))


def test_validate_refuses_other_classes(run, tmp_path, capsys):
    strings(tmp_path / "v", "test", ["dog", "dog"])
    with pytest.raises(SystemExit):
        main(["validate", str(run), "--data", str(tmp_path / "v")])
    assert "images of dog (1), not among the classes ant, bee, cat (3)" in capsys.readouterr().err


def test_init_takes_a_classifier_by_name(run, tmp_path, capsys):
    def start(names):
        strings(tmp_path / names[0], "train", names)
        strings(tmp_path / names[0], "test", names)
        recipe = Recipe(data=str(tmp_path / names[0]), init=str(run), model_kwargs=("layers=[1,1,1]",))
        from timm_attn.training.network import build

        network, _ = build("resnet20", recipe, load_split(recipe.data, "train"))
        return network.fc.weight, capsys.readouterr().out

    trained = load_model(str(run)).fc.weight
    assert torch.equal(start(["ant", "bee", "cat"])[0], trained)
    some, said = start(["cat", "bee"])
    assert torch.equal(some, trained[[1, 2]]) and not said
    other, said = start(["bee", "cat", "dog"])  # as many, others
    assert "has the classes ant, bee, cat (3), not bee, cat, dog (3): its classifier goes" in said
    assert not torch.isclose(other[:, None], trained[None]).all(2).any()


def test_export_matches_by_name(run, tmp_path):
    """The evaluation split in other order and of some classes, where the run had all."""
    strings(tmp_path / "v", "test", ["cat", "cat", "bee"])
    strings(tmp_path / "v", "train", TRAIN)
    from timm_attn.publish import export

    (checkpoint, *_) = export(
        run, "t", tmp_path / "hub", data=str(tmp_path / "v"), dataset="a/b", dataset_license="mit"
    )
    assert checkpoint.metrics["top1"] == pytest.approx(own_top1(run, ["cat", "cat", "bee"]))
