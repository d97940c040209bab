"""Where pretrained weights are found: folders that the user names, what ships with the package, the Hub."""

from ..files import sha256
from .checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint
from .config import fetch_folder, fetch_timm, read_config, read_folder
from .fetch import NoSuchFile, fetch, hub_unreachable, without_tokens
from .index import read_index, write_index
from .schema import WeightsError
from .signature import SIGNATURE, SIGNER, check_signature, sign
from .store import SOURCES, add_folder, check_chosen, checkpoints, pretrained_cfgs, resolve, shipped_folder

__all__ = [
    "CONFIG",
    "INDEX",
    "SIGNATURE",
    "SIGNER",
    "SOURCES",
    "WEIGHTS",
    "Checkpoint",
    "NoSuchFile",
    "WeightsError",
    "add_folder",
    "check_chosen",
    "check_signature",
    "checkpoints",
    "fetch",
    "fetch_folder",
    "fetch_timm",
    "hub_unreachable",
    "pretrained_cfgs",
    "read_config",
    "read_folder",
    "read_index",
    "resolve",
    "sha256",
    "shipped_folder",
    "sign",
    "without_tokens",
    "write_index",
]
