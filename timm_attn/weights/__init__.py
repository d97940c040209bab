"""Where pretrained weights are found: a folder that the user names, then what ships with the package."""

from .store import (
    INDEX,
    Checkpoint,
    WeightsError,
    checkpoints,
    pretrained_cfgs,
    read_index,
    resolve,
    sha256,
    shipped_folder,
)

__all__ = [
    "INDEX",
    "Checkpoint",
    "WeightsError",
    "checkpoints",
    "pretrained_cfgs",
    "read_index",
    "resolve",
    "sha256",
    "shipped_folder",
]
