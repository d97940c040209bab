"""One image: what cameras, scanners and damaged files hold, and what is made of it."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features
from test_labels import TEST, TINY, TRAIN, image_folder, picture

from timm_attn import images as images_module
from timm_attn.cli import main
from timm_attn.images import DataError, decode
from timm_attn.load import load_model
from timm_attn.publish import export
from timm_attn.training import Recipe, validate
from timm_attn.training.data import load_split


def saved(image: Image.Image, kind: str = "PNG", **options) -> dict:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


def png16(values: np.ndarray, colour: int) -> dict:
    """A PNG of sixteen bits a channel, which Pillow writes of greys only. colour: PNG's number of the kind."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "path": None}


def pixels(cell: dict) -> np.ndarray:
    image = decode(cell, "row 0")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


COLOURED = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("orientation", "seen"),
    [
        (1, COLOURED),
        (2, COLOURED[:, ::-1]),
        (3, COLOURED[::-1, ::-1]),
        (4, COLOURED[::-1]),
        (5, COLOURED.transpose(1, 0, 2)),
        (6, np.rot90(COLOURED, -1)),
        (7, COLOURED.transpose(1, 0, 2)[::-1, ::-1]),
        (8, np.rot90(COLOURED)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation, seen, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    cell = saved(Image.fromarray(COLOURED), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(cell), seen)


def test_damaged_exif_is_no_damaged_image():
    cell = saved(Image.fromarray(COLOURED), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(pixels(cell), COLOURED)


def test_what_is_transparent_lies_on_white():
    half = np.dstack([COLOURED, np.full((6, 4), 128, np.uint8)])
    half[0, :, 3] = 0
    got = pixels(saved(Image.fromarray(half)))
    assert (got[0] == 255).all()
    assert np.abs(got[1:] - (COLOURED[1:] * (128 / 255) + 255 * (127 / 255))).max() <= 1
    palette = Image.fromarray(COLOURED).quantize(4)
    assert (pixels(saved(palette, "GIF", transparency=palette.getpixel((0, 0))))[0, 0] == 255).all()
    grey = Image.fromarray(np.dstack([COLOURED[..., 0], np.zeros((6, 4), np.uint8)]))
    assert grey.mode == "LA" and (pixels(saved(grey)) == 255).all()
    keyed = saved(Image.fromarray(COLOURED), transparency=tuple(map(int, COLOURED[0, 0])))
    assert (pixels(keyed)[0, 0] == 255).all() and np.array_equal(pixels(keyed)[1], COLOURED[1])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bits_are_scaled_by_the_depth_that_is_used(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (6, 4, 3))
    values[0, 0] = 2**bits - 1
    cell = png16(values[..., :1], 0)
    assert np.abs(pixels(cell) - values[..., :1] / (2**bits - 1) * 255).max() <= 1
    assert decode(cell, "row 0").info == {"bits": bits}
    for kind in ("TIFF", "PPM"):
        grey = saved(Image.fromarray(values[..., 0].astype(np.uint16)), kind)
        assert np.abs(pixels(grey)[..., 0] - values[..., 0] / (2**bits - 1) * 255).max() <= 1
    if bits == 8:
        with pytest.raises(DataError, match="use the lower eight only"):
            decode(png16(values, 2), "row 0")
        return
    # Of colours Pillow reads the upper eight bits of sixteen: a step of them is the error.
    step = 255 / (2 ** (bits - 8) - 1)
    assert np.abs(pixels(png16(values, 2)) - values / (2**bits - 1) * 255).max() <= step + 1
    assert decode(png16(values, 2), "row 0").info == {"bits": bits}
    with_alpha = np.dstack([values, np.full((6, 4), 65535)])
    with_alpha[0, :, 3] = 0
    got = pixels(png16(with_alpha, 6))
    assert (got[0] == 255).all() and np.array_equal(got[1:], pixels(png16(values, 2))[1:])
    assert (pixels(png16(with_alpha[..., [0, 3]], 4))[0] == 255).all()


def test_pixels_without_a_fixed_range_are_refused():
    with pytest.raises(DataError, match="mode I do not fit sixteen bits"):
        decode(saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "row 0")
    with pytest.raises(DataError, match="mode F, which has no fixed range"):
        decode(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "row 0")


def test_one_warning_for_a_split_of_sixteen_bits(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(png16(np.full((8, 8, 1), 4000), 0)["bytes"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_split(str(tmp_path), "train")
    assert [str(w.message).partition(")")[2] for w in caught] == [
        " have sixteen bits a channel, of which the first uses 12: each is scaled to eight by its own depth"
    ]


def avif() -> dict:
    cell = saved(Image.fromarray(np.zeros((16, 16, 3), np.uint8)), "AVIF")
    damaged = bytearray(cell["bytes"])
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    return {"bytes": bytes(damaged), "path": None}


def dds() -> dict:
    """A DDS file in a pixel format that Pillow does not know."""
    header = struct.pack("<7I", 124, 0x1007, 4, 4, 16, 0, 0) + bytes(44)
    return {
        "bytes": b"DDS " + header + struct.pack("<2I4s5I", 32, 4, b"XXXX", *[0] * 5) + bytes(84),
        "path": None,
    }


def cut(kind: str) -> dict:
    cell = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    return {"bytes": cell["bytes"][: len(cell["bytes"]) // 3], "path": None}


BROKEN = {
    "DDS": dds,
    "bomb": lambda: {"bytes": huge_header(), "path": None},
    **{
        f"cut {kind}": lambda kind=kind: cut(kind)
        for kind in ("JPEG", "PNG", "TIFF", "WEBP", "JPEG2000", "GIF", "ICO", "TGA")
    },
    "empty": lambda: {"bytes": b"", "path": None},
    "text": lambda: {"bytes": b"<svg></svg>", "path": None},
    "nothing": lambda: None,
    "missing file": lambda: {"bytes": None, "path": "/nowhere.png"},
    "folder": lambda: {"bytes": None, "path": "/"},
    **({"AVIF": avif} if features.check("avif") else {}),
}


def huge_header() -> bytes:
    """A PNG that claims 400 gigapixels in sixty bytes."""
    whole = png16(np.zeros((1, 1, 1)), 0)["bytes"]
    header = struct.pack(">IIBBBBB", 2**21, 2**21, 16, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return whole[:16] + header + crc + whole[33:]


@pytest.mark.parametrize("kind", BROKEN)
def test_every_broken_image_is_a_data_error(kind):
    with pytest.raises(DataError, match="^corrupt or unreadable image in row 3 of d.*--on-corrupt skip"):
        decode(BROKEN[kind](), "row 3 of d")


def test_a_large_honest_scan_is_read_where_memory_allows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a scan of 179 megapixels would take seconds
    scan = saved(Image.new("1", (300, 200), 1))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(scan["bytes"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(scan) == 255).all()
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(images_module, "_physical_memory", lambda: 300 * 200 * 8 * 8 - 8)
    with pytest.raises(DataError, match="300×200 pixels take 0.0 GiB, over an eighth of memory"):
        decode(scan, "row 0")


def test_what_training_skips_validate_and_export_skip(tmp_path, capsys):
    for split, names in (("train", TRAIN), ("test", TEST)):
        image_folder(tmp_path / "d", split, names)
        (tmp_path / "d" / split / "cat" / "x.png").write_bytes(b"no image")
        picture("cat").save(tmp_path / "d" / split / "cat" / "y.png")
    run, data = str(tmp_path / "run"), str(tmp_path / "d")
    main(["train", "resnet20", "--data", data, "--out", run, "--on-corrupt", "skip", *TINY])
    with pytest.raises(SystemExit):
        main(["validate", run, "--data", data])
    assert "--on-corrupt skip, of train and validate" in capsys.readouterr().err
    main(["validate", run, "--data", data, "--on-corrupt", "skip"])
    assert "1 corrupt images are left out" in capsys.readouterr().out
    (checkpoint, *_) = export(tmp_path / "run", "t", tmp_path / "hub", dataset="a/b", dataset_license="mit")
    recipe = Recipe(data=data, on_corrupt="skip", batch_size=8)
    figures = validate(load_model(run), recipe)
    assert figures["images"] == checkpoint.metrics["images"] == len(TEST) + 1
    assert figures["skipped"] == checkpoint.metrics["skipped"] == 1
