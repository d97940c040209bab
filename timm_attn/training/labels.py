"""Class labels: read as names, and matched by name."""

from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import torch
from torch import Tensor

from ..errors import UserError
from ..images import DataError

if TYPE_CHECKING:
    import datasets

    from .data import Split

#: More values than this are no class labels.
MOST_CLASSES = 100_000


def read_labels(rows: "datasets.Dataset", column: str, where: str) -> tuple[Tensor, list[str], bool]:
    """The labels of a column.

    Args:
        rows: Of one split.
        column: Class labels of Hugging Face `datasets`, text, whole numbers or booleans.
        where: What errors call the rows.

    Returns:
        Class indices, int64, shape (N,); the names of the classes, in which text and numbers are sorted; and
        whether they have names, or are numbers only.

    Raises:
        DataError: Rows have no label, or one that is out of range or no class.
    """
    import datasets
    import pyarrow as pa

    feature = rows.features[column]
    table: Any = rows.select_columns([column]).with_format("arrow")[:]
    values = table.column(0)
    if values.null_count:
        raise DataError(f"{values.null_count} rows of {where} have no {column}: remove or label them")
    if isinstance(feature, datasets.ClassLabel):
        labels = torch.tensor(values.to_numpy(), dtype=torch.int64)
        _check_range(labels, len(feature.names), where)
        return labels, list(map(composed, feature.names)), True
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    numbers, text = pa.types.is_integer(kind), pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (numbers or text or pa.types.is_boolean(kind)):
        raise DataError(f"column {column!r} of {where} holds {feature}, not class labels")
    encoded = values.cast(kind).combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    if numbers and min(found) < 0:
        _check_range(torch.tensor(values.to_numpy(), dtype=torch.int64), max(found) + 1, where)
    if len(found) > MOST_CLASSES:
        raise DataError(
            f"column {column!r} of {where} has {len(found):,} different values, too many for classes: name "
            "another with --label-column"
        )
    found = [composed(value) if text else value for value in found]
    place = {value: i for i, value in enumerate(sorted(set(found)))}
    rank = torch.tensor([place[value] for value in found], dtype=torch.int64)
    labels = rank[torch.tensor(encoded.indices.to_numpy(), dtype=torch.int64)]
    return labels, list(map(str, place)), not numbers


def composed(name: str) -> str:
    """A name with its accents in their letters: file systems and programs write é in one sign or in two."""
    return normalize("NFC", name)


def _check_range(labels: Tensor, classes: int, where: str) -> None:
    bad = ((labels < 0) | (labels >= classes)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"label {int(labels[row])} in row {row} of {where} is out of range 0 to {classes - 1} "
            "(-1 usually marks a split without labels): choose another split or repair the column"
        )


def match_classes(split: "Split", names: list[str]) -> None:
    """Give a split the classes of a training split or a model, by their names.

    A split may have images of some of the classes only, and its own order of them. Bare numbers stand for
    classes of that name or, where the classes have other names, for their places.

    Raises:
        UserError: The split has images of a class that is not among them, or whose name stands there twice.
    """
    if split.label_names == names:
        return
    known = list(map(composed, names))
    places = {name: i for i, name in enumerate(known)}
    if not split.named and not all(name.isdecimal() for name in names):
        places = {str(i): i for i in range(len(names))}
    used = split.labels.unique().tolist()
    unknown = [split.label_names[i] for i in used if split.label_names[i] not in places]
    if unknown:
        raise UserError(
            f"{split.data} ({split.name}) has images of {some(unknown)}, not among the classes "
            f"{some(names)}: choose data with the same classes"
        )
    twice = [split.label_names[i] for i in used if known.count(split.label_names[i]) > 1]
    if twice:
        raise UserError(f"several classes are called {some(twice)}: give them names of their own")
    table = torch.zeros(len(split.label_names), dtype=torch.int64)
    for i in used:
        table[i] = places[split.label_names[i]]
    split.labels, split.label_names = table[split.labels], names


def some(names: list[str]) -> str:
    """The first few names, and how many there are."""
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''} ({len(names)})"
