"""What one command writes the next one reads: train, fold, validate, export, load; of timm's networks, too."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_data import picture, write
from test_labels import INT, STRING, parquet

from timm_attn.cli import main
from timm_attn.errors import UserError
from timm_attn.publish import export
from timm_attn.training import Recipe, train
from timm_attn.training.run import read_results
from timm_attn.weights import WeightsError, read_config, read_folder, read_index

#: Architectures, arguments that make them tiny, and the one whose name no list of ours has.
NETWORKS = {
    "vit_tiny_patch16_224": ("img_size=32", "depth=1", "embed_dim=12", "num_heads=3"),
    "swin_tiny_patch4_window7_224": ("img_size=32", "window_size=4", "depths=[1,1]", "num_heads=[1,2]", "embed_dim=8"),
    "convnext_atto": ("conv_mlp=true", "depths=[1,1,1,1]", "dims=[8,8,8,8]"),
    "mobilenetv3_small_050": ("bn_eps=0.002", "bn_momentum=0.05"),
    "resnet20_asr": ("layers=[1,1,1]", "delta=2", "drop_path_rate=0.1", "act_layer=hard_swish"),
    "resnet20_dia": ("layers=[1,1,1]", "drop_block_rate=0.1", "reduction=3"),
}  # fmt: skip


def data(folder, names=("ant", "bee", "cat"), feature=STRING):
    """Two splits of a class each; the names are what the labels hold."""
    colours = ["ant", "bee", "cat", "dog"]
    for split in ("train", "test"):
        parquet(folder, split, colours[: len(names)] * 2, list(names) * 2, feature)
    return ["--data", str(folder)]


def recipe(*kwargs):
    size = ["--img-size", "32"] if any("img_size" in k or "conv_mlp" in k for k in kwargs) else []
    small = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--lr", "0.01"]
    return [*small, *size, "--model-kwargs", *kwargs]


@pytest.mark.parametrize("architecture", NETWORKS)
def test_any_argument_of_any_network_is_read_again(architecture, tmp_path, capsys):
    run, given = tmp_path / "run", data(tmp_path / "d")
    main(["train", architecture, *given, "--out", str(run), *recipe(*NETWORKS[architecture])])
    main(["validate", str(run), *given])
    main(["export", str(run), "--tag", "t", "--hub", str(tmp_path / "hub"), "--dataset", "a/b", "--dataset-license", "mit"])  # fmt: skip
    if architecture.startswith("resnet20"):
        main(["fold", str(run)])
        assert read_config(run / "folded" / "config.json")
    exported = tmp_path / "hub" / f"{architecture}.t"
    main(["validate", str(exported), *given])
    first = NETWORKS[architecture][0].partition("=")[0]
    assert first in read_folder(exported)["model_args"]
    a, b = (timm.create_model(f"local-dir:{f}", pretrained=True).eval() for f in (run, exported))
    x = torch.randn(2, *a.pretrained_cfg["input_size"])
    assert torch.equal(a(x), b(x))
    assert "error" not in capsys.readouterr().err


NAMES = {
    "empty, long and tab": ["", "a" * 3000, "a\tb", "a b"],
    "line break": ["a\nb", "a\r\nb", "c"],
    "markup and other scripts": ["[bold]", "<b>&amp;", "| a |", "蟻🐜ἄ"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_any_class_name_is_read_again(names, tmp_path, capsys):
    run, given = tmp_path / "run", data(tmp_path / "d", names)
    main(["train", "resnet20_asr", *given, "--out", str(run), *recipe("layers=[1,1,1]", "channels=[8,8,8]")])
    main(["validate", str(run), *given])
    main(["fold", str(run)])
    main(["export", str(run), "--tag", "t", "--hub", str(tmp_path / "hub"), "--dataset", "a/b", "--dataset-license", "mit"])  # fmt: skip
    for folder in (run, run / "folded", tmp_path / "hub" / "resnet20_asr.t"):
        assert read_folder(folder)["label_names"] == sorted(names)


@pytest.mark.parametrize("labels", [[7, 2000, 1000003], [1, 2, 3], [0, 1, 10**15]], ids=str)
def test_any_numbers_are_read_again(labels, tmp_path):
    run, given = tmp_path / "run", data(tmp_path / "d", labels, INT)
    main(["train", "resnet20_dia", *given, "--out", str(run), *recipe("layers=[1,1,1]", "channels=[8,8,8]")])
    config = read_folder(run)
    assert config["num_classes"] == 3 and config["label_names"] == [str(label) for label in labels]
    main(["validate", str(run), *given])
    main(["fold", str(run)])


@pytest.mark.parametrize(
    ("kwargs", "names", "reason"),
    [
        (("layers=[1,1,1]",), ["a\0b", "c"], "class name"),
        (("layers=[1,1,1]",), ["a" * 10_001, "c"], "class name"),
        (("layers=[1,1,1]", "aux_weight=1.0e+300"), ["a", "b"], "aux_weight is 1e"),
    ],
    ids=["control character", "too long", "a number"],
)
def test_what_could_not_be_read_is_refused_before_the_first_step(kwargs, names, reason, tmp_path):
    data(tmp_path / "d", names)
    made = Recipe(data=str(tmp_path / "d"), epochs=1, batch_size=4, model_kwargs=kwargs)
    with pytest.raises(UserError, match=f"the trained network could not be loaded again: .*{reason}"):
        train("resnet20_ssia", made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_small_file_does_not_make_a_large_network(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_attn.weights.config.MOST_MODULES", 5_000)  # to make 50,000 takes seconds
    run = tmp_path / "run"
    main(["train", "resnet20", *data(tmp_path / "d"), "--out", str(run), *recipe("layers=[1,1,1]")])
    config = json.loads((run / "config.json").read_text())
    for arguments in ({"channels": [5000] * 3, "layers": [1, 1, 1]}, {"layers": [40000, 1, 1]}):
        config["model_args"] = arguments
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="these are not its weights"):
            read_folder(run)


def test_a_network_that_was_counted_is_compared_with_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_attn.weights.config._SPARE", 0)
    model = timm.create_model("resnet20", layers=[1, 1, 1])
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert read_folder(tmp_path)["architecture"] == "resnet20"
    save_file({"fc.bias": torch.zeros(10)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="holds 10 values, .* these are not its weights"):
        read_folder(tmp_path)


def test_a_run_without_a_test_split_is_evaluated_on_what_it_held_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d", images=[picture(i) for i in range(440)])
    given, tiny = ["--data", "d"], ["layers=[1,1,1]", "channels=[16,16,16]"]
    held_out = ["--val-fraction", "0.5"]
    main(["train", "resnet20_se", *given, *held_out, "--out", "run", *recipe(*tiny), "--batch-size", "64"])
    expected = read_results(tmp_path / "run")
    main(["export", "run", "--tag", "t", "--hub", "hub", "--dataset", "a/b", "--dataset-license", "mit"])
    main(["freeze", "hub/resnet20_se.t", *given, "--out", "frozen", "--all", "--recover", "2"])
    main(["export", "frozen", "--tag", "f", "--hub", "hub"])
    main(["report", "run", *given])
    main(["look", "stripes", "run", *given, "--out", "look"])
    (exported,) = (c for c in read_index(tmp_path / "hub") if c.name == "resnet20_se.t")
    assert exported.metrics["top1"] == pytest.approx(expected["top1"])
    assert exported.metrics["images"] == expected["images"] == 220
    capsys.readouterr()
    for source, options in (("run", []), ("hub/resnet20_se.t", []), ("frozen", held_out)):
        main(["validate", source, *given, *options])
        output = capsys.readouterr().out
        assert "evaluated on 220 images of d (train, held out)" in output, source
        assert f"{expected['top1']:.2f}" in output or source == "frozen"
    for arguments, message in (
        (["frozen"], "or give the --val-fraction that the model was trained with"),
        (["run", "--val-fraction", "0.2"], "run was trained with --val-fraction 0.5, not 0.2: leave it out"),
        (["frozen", "--split", "held out"], "'held out' of d needs --val-fraction"),
    ):
        with pytest.raises(SystemExit):
            main(["validate", *arguments, *given])
        assert message in " ".join(capsys.readouterr().err.split())
    write(tmp_path / "d", split="test", images=[picture(i) for i in range(3)])
    main(["validate", "run", *given])
    assert "held out" not in capsys.readouterr().out
    main(["export", "run", "--tag", "u", "--hub", "hub", "--dataset", "a/b", "--dataset-license", "mit"])
    (again,) = (c for c in read_index(tmp_path / "hub") if c.name == "resnet20_se.u")
    assert again.metrics["images"] == 220 and again.dataset["split"] == "train, held out"
    write(tmp_path / "d", images=[picture(i) for i in range(441)])  # others would be held out
    with pytest.raises(SystemExit):
        main(["validate", "run", "--split", "train, held out", *given])
    assert "the split train of d is not, or no longer, what run was trained on" in capsys.readouterr().err
    main(["validate", "run", *given])


def test_a_reported_split_that_has_changed_is_not_exported(tmp_path):
    data = write(tmp_path / "d", images=[picture(i) for i in range(64)])
    write(tmp_path / "d", split="test", images=[picture(i) for i in range(3)])
    tiny = ("layers=[1,1,1]", "channels=[16,16,16]")
    train("resnet20_se", Recipe(data=data, batch_size=32, epochs=1, model_kwargs=tiny), tmp_path / "run")
    write(tmp_path / "d", split="test", images=[picture(i) for i in range(1, 4)])
    with pytest.raises(UserError, match="the split test of .*d has changed since .*run was evaluated on it"):
        export(tmp_path / "run", "t", tmp_path / "hub", "a/b", dataset_license="mit")
    assert not (tmp_path / "hub").exists()
