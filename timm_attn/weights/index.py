"""The index of a hub folder: reading it with suspicion, and writing it."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from json import dumps
from pathlib import Path

from ..files import replace_file
from . import schema
from .checkpoint import INDEX, Checkpoint, check_inside
from .schema import WeightsError

_FIELDS = {field.name for field in fields(Checkpoint)} - {"name", "folder"}
_CHECK = schema.record(
    {"checkpoints": schema.table(schema.NAME, schema.ENTRY, 10_000)},
    required=("checkpoints",),
    others=schema.anything,
)


def is_hub(folder: Path) -> bool:
    """Whether a folder has an index of checkpoints, and not another program's file of that name."""
    if not (folder / INDEX).is_file():
        return False
    try:
        content = schema.read_json(folder / INDEX)
    except WeightsError:
        return True  # a damaged one, which whoever reads it names
    return isinstance(content, dict) and "checkpoints" in content


def read_index(folder: str | Path) -> list[Checkpoint]:
    """The checkpoints of a hub folder, in the order of its index.

    Raises:
        WeightsError: The folder has no index, or one that cannot be read or says what it must not.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        if folder.is_file():
            raise WeightsError(f"{folder} is a file: name its folder, {folder.parent}")
        raise WeightsError(
            f"{folder} is no hub folder: it has no {INDEX}. `timm-attn export RUN --hub {folder}` writes one"
        )
    check_inside(path, folder)
    content = schema.read_json(path)
    _CHECK(content, str(path))
    found = []
    for name, entry in content["checkpoints"].items():
        if name != f"{entry['architecture']}.{entry['tag']}":
            raise WeightsError(
                f"{path}: {name} must be named <architecture>.<tag>, {entry['architecture']}.{entry['tag']}"
            )
        if (folder / name).exists():
            check_inside(folder / name, folder)
        known = {key: value for key, value in entry.items() if key in _FIELDS}
        found.append(Checkpoint(name=name, folder=folder / name, **known))
    return found


def write_index(folder: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Replace the index of a hub folder."""
    entries = {}
    for checkpoint in sorted(checkpoints, key=lambda c: c.name):
        entry = asdict(checkpoint)
        entries[checkpoint.name] = {k: v for k, v in entry.items() if k in _FIELDS}
    replace_file(folder / INDEX, (dumps({"checkpoints": entries}, indent=1) + "\n").encode())
