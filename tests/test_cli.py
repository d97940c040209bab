"""The command line, as people type it."""

import os
import stat
from pathlib import Path

import pytest
import timm
import torch
from forked import run_code
from test_data import corrupt, empty_split, no_image, out_of_range, write

from timm_attn import cli

FAST = ["--img-size", "8", "--batch-size", "256", "--model-kwargs", "channels=[8,8,8]", "layers=[1,1,1]"]


def run(*arguments: str) -> None:
    cli.main(list(arguments))


def fails(capsys, *arguments: str) -> str:
    """Run a command that must fail; its message."""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_the_way_of_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("train", "resnet20_asr", "--data", "digits", "--epochs", "1", "--seed", "3", "--out", "runs/a", *FAST)
    output = capsys.readouterr().out
    assert "run folder" in output and "runs/a" in output
    run("train", "--resume", "runs/a")
    run("validate", "runs/a", "--data", "digits")
    assert "360" in capsys.readouterr().out
    run("fold", "runs/a")
    assert "max|Δlogit| / max|logit| = " in capsys.readouterr().out
    run("validate", "runs/a/folded", "--data", "digits")
    run("export", "runs/a", "--tag", "sgd_digits")
    out = capsys.readouterr().out
    assert "hub/resnet20_asr.sgd_digits" in out and "hub/resnet20.asr_sgd_digits_folded" in out
    run("validate", "hub/resnet20.asr_sgd_digits_folded", "--data", "digits", "--precision", "bf16")
    message = fails(capsys, "fold", "runs/a")
    assert "runs/a/folded is not empty" in message
    message = fails(capsys, "fold", "hub/resnet20_asr.sgd_digits")  # which holds what its index says
    assert "name a folder for the folded hub/resnet20_asr.sgd_digits with --out" in message
    assert not Path("hub/resnet20_asr.sgd_digits/folded").exists()


def test_a_mechanism_is_put_into_a_named_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["train", "resnet20", "--data", "digits", "--epochs", "1", *FAST, "--attention"]
    run(*given, "asr")
    model = timm.create_model("local-dir:runs/resnet20_asr_digits_s0", pretrained=True)
    assert model.pretrained_cfg["architecture"] == "resnet20_asr"
    assert any(".asr." in key for key in model.state_dict())
    assert "nonsense" in fails(capsys, *given, "nonsense")


def test_list(capsys):
    run("list", "*dia*")
    out = capsys.readouterr().out
    assert "resnet152_dia" in out and "asr" not in out
    assert "nothing matches 'nothing*' and the filters: quote" in fails(capsys, "list", "nothing*")
    assert "choose one of plain, se, dia" in fails(capsys, "list", "--mechanism", "foo")
    assert "choose one of Tiny-ImageNet-200 at 32 pixels, uoft-cs/cifar10" in fails(
        capsys, "list", "--data", "foo", "--weights"
    )
    run("list", "resnet20_asr", "--weights")  # the name that create_model takes, without a tag
    assert capsys.readouterr().out.count("uoft-cs/cifar10") == 1


def test_what_does_not_fold_says_so(tmp_path, capsys):
    run("train", "resnet20", "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "a"), *FAST)
    run("fold", str(tmp_path / "a"))
    assert "nothing to fold in resnet20:" in capsys.readouterr().out
    assert not (tmp_path / "a" / "folded").exists()


def test_norms_are_fused_where_the_attention_stays(tmp_path, capsys):
    run("train", "fmmnet20", "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "a"), *FAST)
    run("fold", str(tmp_path / "a"))
    output = capsys.readouterr().out
    assert "norms stay: there is no convolution before them" in output and "multiply-adds" in output
    model = timm.create_model(f"local-dir:{tmp_path}/a/folded", pretrained=True)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in (model.bn1, model.layer1[0].bn1))


def test_options_override_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "data: digits\nepochs: 2\nimg_size: 8\nbatch_size: 256\nmodel_kwargs: {channels: [8, 8, 8], layers: [1, 1, 1]}\n"
    )
    run("train", "resnet20", "--recipe", "r.yaml", "--epochs", "1")
    resolved = (tmp_path / "runs" / "resnet20_digits_s0" / "recipe.yaml").read_text()
    assert "epochs: 1\n" in resolved and "img_size: 8\n" in resolved


def test_bad_input_is_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "resnet20", "--out", "out", "--data"]
    assert "unknown model 'resnet2'" in fails(capsys, "train", "resnet2", "--data", "digits", "--out", "out")
    assert "no data: give --data" in fails(capsys, "train", "resnet20", "--out", "out")
    assert "name a model to train" in fails(capsys, "train")
    assert "it takes --data and nothing else" in fails(capsys, "train", "--resume", "out", "--epochs", "3")
    for spoil in (corrupt, no_image, empty_split, out_of_range):
        folder = tmp_path / spoil.__name__
        spoil(folder)
        assert "error:" in fails(capsys, *train, str(folder))
    assert "not a folder" in fails(capsys, *train, "./nowhere")
    assert "is not a run folder" in fails(capsys, "train", "--resume", "nowhere")
    assert "is not a run folder" in fails(capsys, "export", "nowhere", "--tag", "x")
    assert "unknown model 'resnet20_dai'" in fails(capsys, "validate", "resnet20_dai", "--data", "digits")
    assert "unknown model 'resnet20_dai.x'" in fails(capsys, "validate", "resnet20_dai.x", "--data", "digits")
    message = fails(capsys, "report", "nowhere", "--data", "digits")
    assert message == "error: unknown model 'nowhere': there is no folder of that name here, either\n"
    message = fails(capsys, *train, "digits", "--init", "graft:resnet50.a1_in1kk")
    assert "resnet50 has no weights 'a1_in1kk': choose from a1_in1k, a1h_in1k, " in message
    assert "no pretrained weights for fmmnet152" in fails(capsys, "validate", "fmmnet152", "--data", "digits")
    assert "is no hub folder" in fails(capsys, "publish", str(tmp_path), "--to", "me")
    message = fails(capsys, *train, "digits", "--epochs", "0")
    assert message.startswith("error: epochs must be at least 1, got 0")
    assert not (tmp_path / "out").exists()
    run(*train, "digits", "--epochs", "1", *FAST)
    export = ["export", "out", "--tag", "x", "--hub"]
    for license_ in ("", "my own"):
        given = ["--dataset", "me/mine", "--dataset-license", license_]
        assert f"--dataset-license is {license_!r}" in fails(capsys, *export, "hub", *given)
    assert "is a file: name a folder" in fails(capsys, *export, "out/results.json")
    assert not (tmp_path / "hub").exists()
    umask = os.umask(0)
    os.umask(umask)
    for name in ("model.safetensors", "config.json"):
        assert stat.S_IMODE(os.stat(f"out/{name}").st_mode) == 0o666 & ~umask


def test_a_data_set_smaller_than_a_batch(tmp_path, capsys):
    data = write(tmp_path / "d")
    write(tmp_path / "d", split="test")
    message = fails(capsys, "train", "resnet20", "--data", data, "--out", str(tmp_path / "a"))
    assert "batch_size 128 is larger than the 6 images" in message


def test_the_installed_command_and_the_module_are_one(tmp_path):
    code = "import runpy\nrunpy.run_module('timm_attn', run_name='__main__', alter_sys=True)"
    result = run_code(code, "list", "resnet20_dia", cwd=tmp_path)
    assert result.returncode == 0 and "resnet20_dia" in result.stdout, result.stderr
    command = os.path.join(os.path.dirname(os.sys.executable), "timm-attn")
    code = f"import runpy\nrunpy.run_path({command!r}, run_name='__main__')"
    assert run_code(code, "list", "resnet20_dia", cwd=tmp_path).stdout == result.stdout


def test_recipe_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("data: digits\nepochs: 1\nimg_size: 8\nbatch_size: 300\n")
    run("train", "resnet20", "--recipe=r.yaml", "--out", "a", "--model-kwargs", "channels=[8,8,8]")
    assert "batch_size: 300" in (tmp_path / "a" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("--out=~/runs/a", "--out=HOME/runs/a"),
        ("--out=~", "--out=HOME"),
        ("~/runs/a", "HOME/runs/a"),
        ("local-dir:~/a", "local-dir:HOME/a"),
        ("graft:local-dir:~/a", "graft:local-dir:HOME/a"),
        ("--keep=~x", "--keep=~x"),
        ("a~/b", "a~/b"),
        ("--model-kwargs=a=~/b", "--model-kwargs=a=~/b"),
    ],
)
def test_a_tilde_that_the_shell_left_is_the_home_folder(typed, meant, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.setenv("USERPROFILE", "HOME")
    given = []
    monkeypatch.setattr(cli, "_take_recipe", lambda arguments: given.extend(arguments) or (["list"], None))
    cli.main([typed])
    assert given == [meant]


def test_a_file_where_a_folder_should_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fails(
        capsys, "train", "resnet20", "--data", "digits", "--out", str(tmp_path / "file" / "run"), *FAST
    )
    assert "file" in message


def test_a_network_of_timm_is_not_called_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(
        "train",
        "mobilenetv3_small_050",
        "--data",
        "digits",
        "--batch-size",
        "512",
        "--epochs",
        "1",
        "--out",
        "a",
    )
    run("export", "a", "--tag", "x")
    card = (tmp_path / "hub" / "mobilenetv3_small_050.x" / "README.md").read_text()
    assert "A network of timm" in card and "Deep Residual" not in card


def test_doctor_says_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "unused")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:secret@host")
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for part in (
        timm.__version__,
        torch.__version__,
        "extra train",
        "CPU",
        "installed",
        "self-test: resnet20_asr loads and folds",
    ):
        assert part in out
    assert "secret" not in out
