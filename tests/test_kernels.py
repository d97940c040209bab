"""What would crash in a kernel is refused before the first step, with the fix."""

import pytest
from test_labels import TRAIN, image_folder

from timm_attn.cli import main
from timm_attn.training import kernels


def train(folder, out, *options, channels="[4,4,8]", size=64):
    for split in ("train", "test"):
        image_folder(folder, split, TRAIN)
    command = ["train", "resnet20", "--data", str(folder), "--out", str(out), "--img-size", str(size)]
    command += ["--epochs", "1", "--batch-size", "8", "--precision", "no", "--workers", "0"]
    main([*command, "--model-kwargs", f"channels={channels}", "layers=[1,1,1]", *options])


def test_narrow_strided_convolutions_are_refused_where_they_crash(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "_has_such_kernels", lambda: True)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "d", tmp_path / "run")
    message = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert "layer2.0.downsample.0, a strided 1×1 convolution of 4 channels to a map of 1024 pixels" in message
    assert "--no-channels-last" in message


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        (["--no-channels-last"], {}),
        (["--precision", "bf16"], {}),
        ([], {"channels": "[16,16,16]"}),
        ([], {"size": 32}),
    ],
    ids=str,
)
def test_the_fixes_and_smaller_maps_train(options, kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_has_such_kernels", lambda: True)
    train(tmp_path / "d", tmp_path / "run", *options, **kwargs)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("limit", "supported", "crashes"),
    [("", True, True), ("AVX2", True, False), ("SSE41", True, False), ("", False, False), ("AVX512_CORE", True, True)],
)  # fmt: skip
def test_only_kernels_for_avx512_on_a_cpu_do(limit, supported, crashes, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(kernels.torch.cpu, "_is_avx512_supported", lambda: supported)
    monkeypatch.setattr(kernels.torch.accelerator, "is_available", lambda: False)
    assert kernels._has_such_kernels() is crashes
    monkeypatch.setattr(kernels.torch.accelerator, "is_available", lambda: True)
    assert not kernels._has_such_kernels()
