"""A run that goes on: its data may have moved, and must be the same."""

import shutil

import pytest
from helpers import Stopped, same, stop_at, timeless
from safetensors.torch import load_file
from test_labels import TEST, TRAIN, image_folder, picture, strings

from timm_attn.cli import main
from timm_attn.errors import UserError
from timm_attn.publish import export
from timm_attn.training import Recipe, resume, train
from timm_attn.training.seeds import resume_seeds

RECIPE = {"epochs": 2, "batch_size": 4, "model_kwargs": ("layers=[1,1,1]",), "lr": 0.01}


def write(folder, kind=strings):
    for split, names in (("train", TRAIN), ("test", TEST)):
        kind(folder, split, names)
    return str(folder)


def stopped(tmp_path, **fields):
    """A run of four steps that was killed after the third, on data that then moves."""
    data = write(tmp_path / "d")
    with pytest.raises(Stopped):
        train("resnet20", Recipe(data=data, **RECIPE, **fields), tmp_path / "run", on_step=stop_at(3))
    shutil.move(data, tmp_path / "moved")
    return tmp_path / "run", str(tmp_path / "moved")


def test_a_killed_run_goes_on_where_its_data_lies_now(tmp_path):
    run, moved = stopped(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        resume(run)
    with pytest.raises(Stopped):
        resume(run, on_step=stop_at(3), data=moved)
    main(["train", "--resume", str(run)])  # it is noted where the data lies
    train("resnet20", Recipe(data=moved, **RECIPE), tmp_path / "whole")
    assert same(*(load_file(r / "model.safetensors") for r in (run, tmp_path / "whole")))
    assert timeless(run / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")
    assert export(run, "t", tmp_path / "hub", dataset="a/b", dataset_license="mit")


def test_the_command_takes_the_new_place_and_nothing_else(tmp_path, capsys):
    run, moved = stopped(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(run), "--data", moved, "--epochs", "3"])
    assert "it takes --data and nothing else" in capsys.readouterr().err
    main(["train", "--resume", str(run), "--data", moved])
    assert (run / "model.safetensors").is_file()


def test_runs_of_several_seeds_move_too(tmp_path):
    data = write(tmp_path / "d")
    arguments = ["--epochs", "1", "--batch-size", "4", "--model-kwargs", "layers=[1,1,1]"]
    main(["train", "resnet20", "--data", data, "--out", str(tmp_path / "s"), "--seeds", "0", "1", *arguments])
    shutil.rmtree(tmp_path / "s" / "seed-1")
    shutil.move(data, tmp_path / "moved")
    main(["train", "--resume", str(tmp_path / "s"), "--data", str(tmp_path / "moved")])
    assert (tmp_path / "s" / "seed-1" / "model.safetensors").is_file()


def test_seeds_that_are_left_have_the_data_of_the_others(tmp_path):
    arguments = ["--epochs", "1", "--batch-size", "4", "--model-kwargs", "layers=[1,1,1]"]
    data = write(tmp_path / "d")
    main(["train", "resnet20", "--data", data, "--out", str(tmp_path / "s"), "--seeds", "0", "1", *arguments])
    shutil.rmtree(tmp_path / "s" / "seed-1")
    relabelled(tmp_path / "d")
    with pytest.raises(UserError, match=r"has changed since .*seed-0 was started"):
        resume_seeds(tmp_path / "s")
    assert not (tmp_path / "s" / "seed-1").exists()


def test_seeds_that_were_trained_where_the_data_is_now_say_where_that_is(tmp_path):
    arguments = ["--epochs", "1", "--batch-size", "4", "--model-kwargs", "layers=[1,1,1]"]
    data, out = write(tmp_path / "d"), tmp_path / "s"
    main(["train", "resnet20", "--data", data, "--out", str(out), "--seeds", "0", "1", "2", *arguments])
    for seed in (1, 2):
        shutil.rmtree(out / f"seed-{seed}")
    shutil.move(data, tmp_path / "moved")
    resume_seeds(out, data=str(tmp_path / "moved"))
    shutil.rmtree(out / "seed-2")
    (out / "seed-0" / "recipe.yaml").write_text("no recipe")
    with pytest.raises(UserError, match="seed-0"):
        resume_seeds(out)  # the others are resumed all the same
    assert (out / "seed-2" / "model.safetensors").is_file()


def relabelled(data):
    strings(data, "train", [*TRAIN[1:], TRAIN[0]])


def other_images(data):
    for split, names in (("train", TRAIN), ("test", TEST)):
        strings(data, split, names)
    image = picture("dog", 99)  # one of them is another
    import datasets

    table = datasets.Dataset.from_parquet(str(data / "test-0.parquet"))
    rows = [dict(row) for row in table]
    rows[1]["image"] = image
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(str(data / "test-0.parquet"))


@pytest.mark.parametrize("change", [relabelled, other_images])
def test_data_of_the_same_names_and_counts_that_has_changed_is_refused(change, tmp_path):
    run, moved = stopped(tmp_path)
    before = (run / "environment.json").read_bytes()
    change(tmp_path / "moved")
    with pytest.raises(UserError, match=r"has changed since .* \(its images or labels\): restore it"):
        resume(run, data=moved)
    assert (run / "environment.json").read_bytes() == before


def test_image_folders_are_known_by_content(tmp_path):
    from timm_attn.training.data import load_split

    a, b = (load_split(write(tmp_path / name, image_folder), "train").fingerprint for name in "ab")
    assert a == b
    picture("dog", 5).save(next((tmp_path / "b" / "train" / "cat").glob("*.png")))
    assert load_split(str(tmp_path / "b"), "train").fingerprint != a
