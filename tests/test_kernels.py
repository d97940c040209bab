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


@pytest.mark.parametrize(
    ("instructions", "size", "pixels", "enough"), [("AVX512", 64, 1024, 16), ("AVX2", 32, 256, 8)]
)
def test_narrow_strided_convolutions_are_refused_where_they_crash(
    instructions, size, pixels, enough, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(kernels, "_instructions", lambda: instructions)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "d", tmp_path / "run", size=size)
    message = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    layer = f"layer2.0.downsample.0, a strided 1×1 convolution of 4 channels to a map of {pixels} pixels"
    assert layer in message and f"--no-channels-last, or at least {enough} channels" in message


@pytest.mark.parametrize(
    ("instructions", "options", "kwargs"),
    [
        ("AVX512", ["--no-channels-last"], {}),
        ("AVX512", ["--precision", "bf16"], {}),
        ("AVX512", [], {"channels": "[16,16,16]"}),
        ("AVX512", [], {"channels": "[8,8,8]", "size": 32}),
        ("AVX2", [], {"channels": "[16,16,16]"}),
    ],
    ids=str,
)
def test_the_fixes_and_smaller_maps_train(instructions, options, kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_instructions", lambda: instructions)
    train(tmp_path / "d", tmp_path / "run", *options, **kwargs)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("limit", "widest", "expected"),
    [
        ("", "AVX512", "AVX512"),
        ("AVX512_CORE", "AVX512", "AVX512"),
        ("AVX2", "AVX512", "AVX2"),
        ("avx2_vnni", "AVX512", "AVX2"),
        ("SSE41", "AVX512", ""),
        ("", "AVX2", "AVX2"),
        ("AVX512_CORE", "AVX2", "AVX2"),
        ("", "", ""),
    ],
)
def test_the_kernels_are_those_of_the_cpu_or_fewer(limit, widest, expected, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(kernels.torch.cpu, "_is_avx512_supported", lambda: widest == "AVX512")
    monkeypatch.setattr(kernels.torch.cpu, "_is_avx2_supported", lambda: bool(widest))
    monkeypatch.setattr(kernels, "device_of_process", lambda: kernels.torch.device("cpu"))
    assert kernels._instructions() == expected
    monkeypatch.setattr(kernels, "device_of_process", lambda: kernels.torch.device("cuda"))
    assert not kernels._instructions()
