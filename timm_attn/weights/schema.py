"""What an index and a configuration may say: both can come from anybody.

A check takes a value and where it stands, and raises a ``WeightsError`` that names both.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Check = Callable[[Any, str], None]

#: No index or configuration is as large as this, in bytes.
LARGEST = 64 * 1024**2


class WeightsError(RuntimeError):
    """Pretrained weights are missing, damaged or unknown."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        WeightsError: It cannot be read, is too large, or is no JSON (NaN and infinity are none).
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}. Restore it, or name another folder") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _refuse(value: Any, where: str, wanted: str) -> WeightsError:
    shown = repr(value)
    return WeightsError(f"{where} is {shown[:60]}{'…' if len(shown) > 60 else ''}: it must be {wanted}")


def text(pattern: str = r"[^\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]{0,2000}", wanted: str = "text") -> Check:
    """A string that a pattern matches whole; by default, short text without control characters."""
    compiled = re.compile(pattern)

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise _refuse(value, where, wanted)

    return check


def number(low: float, high: float) -> Check:
    """A finite number within bounds."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _refuse(value, where, f"a number from {low:g} to {high:g}")

    return check


def whole(low: int, high: int) -> Check:
    """A whole number within bounds."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(value, where, f"a whole number from {low} to {high}")

    return check


def one_of(*values: Any) -> Check:
    """One of a few values."""

    def check(value: Any, where: str) -> None:
        # 1 == True in Python, not here.
        if not any(type(value) is type(known) and value == known for known in values):
            raise _refuse(value, where, f"one of {', '.join(map(repr, values))}")

    return check


def either(*checks: Check) -> Check:
    """What one of several checks lets pass."""

    def check(value: Any, where: str) -> None:
        refusals = []
        for one in checks:
            try:
                return one(value, where)
            except WeightsError as refusal:
                refusals.append(str(refusal).rpartition(": it must be ")[2])
        raise _refuse(value, where, ", or ".join(refusals))

    return check


def list_of(item: Check, low: int, high: int) -> Check:
    """A list of some length."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise _refuse(value, where, f"a list of {low} to {high}" if low < high else f"a list of {low}")
        for i, element in enumerate(value):
            item(element, f"{where}[{i}]")

    return check


def table(key: Check, item: Check, most: int) -> Check:
    """A JSON object with keys of one kind and values of one kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise _refuse(value, where, f"an object of at most {most}")
        for name, element in value.items():
            key(name, f"a key of {where}")
            item(element, f"{where}.{name}")

    return check


def record(fields: Mapping[str, Check], required: tuple[str, ...] = (), others: Check | None = None) -> Check:
    """A JSON object with known fields; ``others`` checks further ones, which a newer writer may have."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refuse(value, where, "an object")
        missing = [name for name in required if name not in value]
        if missing:
            raise WeightsError(f"{where} has no {', '.join(missing)}")
        for name, element in value.items():
            if name not in fields and others is None:
                known = ", ".join(fields)
                raise WeightsError(f"{where} has {name[:60]!r}, which is none of {known}")
            (fields.get(name) or others or anything)(element, f"{where}.{name}")

    return check


def never(value: Any, where: str) -> None:
    """No value at all."""
    raise _refuse(value, where, "left out")


def anything(value: Any, where: str) -> None:
    """Whatever JSON may say, if it is not deep and its text can be written again."""
    _walk(value, where, 8)


def _walk(value: Any, where: str, depth: int) -> None:
    if not depth:
        raise WeightsError(f"{where} is nested too deep")
    if isinstance(value, dict):
        for name, element in value.items():
            TEXT(name, f"a key of {where}")
            _walk(element, f"{where}.{name}", depth - 1)
    elif isinstance(value, list):
        for i, element in enumerate(value):
            _walk(element, f"{where}[{i}]", depth - 1)
    elif isinstance(value, str):
        TEXT(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _refuse(value, where, "finite")


NONE, FLAG, TEXT = one_of(None), one_of(True, False), text()
#: A name that is a folder's too: no separators, no leading dot.
NAME = text(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", "a name of letters, digits, '_', '.' and '-'")
#: A file of a checkpoint, by its path within the checkpoint's folder.
FILE = text(
    r"(\.eval_results/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", "the name of a file in the checkpoint's folder"
)
_PART = r"[A-Za-z0-9]([\w.-]{0,94}[A-Za-z0-9])?"
REPO = text(rf"(?!.*(--|\.\.|\.git(/|$))){_PART}/{_PART}", "ORG/NAME")
REVISION = text(r"[0-9a-f]{40}", "a commit id of 40 hexadecimal digits")
DIGEST = text(r"[0-9a-f]{64}", "a sha256 of 64 hexadecimal digits")
_SIDE = whole(1, 4096)
_SIZE = list_of(_SIDE, 3, 3)
_CHANNELS = list_of(number(-1000, 1000), 1, 64)
CLASSES = whole(0, 1_000_000)
_LABEL = text(
    r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]{0,10000}",
    "a class name of at most 10,000 characters without control characters",
)
_LABELS = either(NONE, list_of(_LABEL, 0, 1_000_000))
_DESCRIPTIONS = either(NONE, table(_LABEL, _LABEL, 1_000_000))

#: timm's pretrained configuration. It must not send timm to another source of weights.
PRETRAINED_CFG = record(
    {
        "custom_load": one_of(False),
        "input_size": _SIZE,
        "test_input_size": either(NONE, _SIZE),
        "min_input_size": either(NONE, _SIZE),
        "fixed_input_size": FLAG,
        "interpolation": one_of("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random"),
        "crop_pct": number(0.01, 2),
        "test_crop_pct": either(NONE, number(0.01, 2)),
        "crop_mode": one_of("center", "squash", "border"),
        "mean": _CHANNELS,
        "std": list_of(number(1e-6, 1000), 1, 64),
        "num_classes": CLASSES,
        "label_offset": either(NONE, whole(0, 1000)),
        "label_names": _LABELS,
        "label_descriptions": _DESCRIPTIONS,
        "pool_size": either(NONE, list_of(_SIDE, 2, 2)),
        "test_pool_size": either(NONE, list_of(_SIDE, 2, 2)),
        # Several, where a network has more than one stem or head.
        **dict.fromkeys(("first_conv", "classifier"), either(NONE, TEXT, list_of(TEXT, 0, 100))),
        **dict.fromkeys(("license", "tag", "description"), either(NONE, TEXT)),
        **dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"), never),
    },
    others=anything,
)

#: What would send timm to other weights, or change what is made of them.
FORBIDDEN = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
        *("pretrained_strict", "pretrained_filter_fn", "kwargs_filter", "checkpoint_path", "cache_dir"),
        *("scriptable", "exportable", "no_jit", "device", "dtype"),
        *("features_only", "feature_cfg", "feature_cls", "model_cfg", "model_cls", "variant"),
    )
)
_KEY = text(r"[A-Za-z_][A-Za-z0-9_]{0,63}", "an argument's name")
# No dot, colon or slash: nothing that could be imported, fetched or opened.
_WORD = text(r"[A-Za-z0-9_+, -]{0,64}", "a word of letters, digits, '_', '+', ',', '-' and spaces")


def _argument(value: Any, where: str, depth: int = 4) -> None:
    """What a constructor of timm may be given: a number, a word, nothing, or lists and objects of these."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        _WORD(value, where)
    elif isinstance(value, int):
        whole(-100_000, 100_000)(value, where)
    elif isinstance(value, float):
        number(-1e6, 1e6)(value, where)
    elif isinstance(value, list | dict) and depth:
        if len(value) > 256:
            raise _refuse(value, where, "of at most 256 elements")
        for name, element in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                _KEY(name, f"a key of {where}")
            inner = f"{where}.{name}" if isinstance(value, dict) else f"{where}[{name}]"
            _argument(element, inner, depth - 1)
    else:
        raise _refuse(value, where, "a number, a word, null, or a list or an object of these, at most 4 deep")


def model_args(value: Any, where: str) -> None:
    """Keyword arguments of an architecture, any one's: bounded in structure and size, not by name.

    How large a network they ask for is found out by ``check_size``.
    """
    table(_KEY, anything, 100)(value, where)
    for name, element in value.items():
        if name in FORBIDDEN:
            raise WeightsError(f"{where}.{name} must be left out: it would change which weights are loaded")
        (_SIZED.get(name) or _argument)(element, f"{where}.{name}")


_SIZED = {"num_classes": CLASSES, "in_chans": whole(1, 64)}

#: config.json as timm writes it.
CONFIG = record(
    {
        "architecture": NAME,
        "num_classes": CLASSES,
        "num_features": whole(1, 1_000_000),
        "global_pool": either(NONE, TEXT),
        "label_names": _LABELS,
        "label_descriptions": _DESCRIPTIONS,
        "model_args": model_args,
        "pretrained_cfg": PRETRAINED_CFG,
    },
    required=("architecture", "num_classes", "pretrained_cfg"),
    others=anything,
)
_LARGEST_FLOAT = sys.float_info.max
_REAL = number(-_LARGEST_FLOAT, _LARGEST_FLOAT)
_FIGURE = record(
    {
        "mean": _REAL,
        "std": either(NONE, number(0, _LARGEST_FLOAT)),
        "n": whole(1, 10_000),
        "values": list_of(_REAL, 1, 10_000),
    },
    required=("mean", "std", "n"),
)
_FROZEN_FIGURES = record(
    {
        **dict.fromkeys(("top1", "agreement"), number(0, 100)),
        **dict.fromkeys(("kl", "milliseconds", "parameters"), _REAL),
    },
    required=("top1", "agreement", "kl", "milliseconds"),
)
_COUNT, SEED = whole(0, 10**12), whole(0, 2**63 - 1)

#: One checkpoint of an index.
ENTRY = record(
    {
        "architecture": NAME,
        "tag": NAME,
        "repo_id": either(NONE, REPO),
        "revision": either(NONE, REVISION),
        "pretrained_cfg": PRETRAINED_CFG,
        "model_args": model_args,
        "files": table(FILE, record({"sha256": DIGEST, "size": _COUNT}, required=("sha256", "size")), 100),
        "metrics": record(
            {
                **dict.fromkeys(("top1", "top5"), number(0, 100)),
                "loss": _REAL,
                **dict.fromkeys(("images", "epoch", "parameters"), _COUNT),
                "seed": SEED,
                "logit_difference": number(0, 1e9),
            },
            others=anything,
        ),
        "over_seeds": record(
            {"seeds": list_of(SEED, 1, 10_000), **dict.fromkeys(("top1", "top5", "loss"), _FIGURE)}
        ),
        "recipe": anything,
        "dataset": record(
            {
                **dict.fromkeys(("id", "license"), TEXT),
                "split": TEXT,
                "images": table(TEXT, _COUNT, 100),
            }
        ),
        "training": anything,
        "mechanism": NAME,
        "paper": record(dict.fromkeys(("title", "arxiv", "url"), TEXT)),
        "caveats": list_of(TEXT, 0, 20),
        "controls": list_of(NAME, 0, 100),
        "runtimes": table(FILE, number(0, 1e9), 10),
        "folded_from": either(NONE, NAME),
        "folded": either(NONE, NAME),
        "frozen_from": either(NONE, NAME),
        "frozen": record(
            {
                **dict.fromkeys(("gates", "frozen", "steps", "images", "batch_size"), _COUNT),
                "budget": either(NONE, number(0, 100)),
                **dict.fromkeys(("means", "split"), TEXT),
                **dict.fromkeys(("before", "after"), _FROZEN_FIGURES),
                "hardware": TEXT,
            }
        ),
    },
    required=("architecture", "tag"),
    others=anything,
)
