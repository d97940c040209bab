"""The attention mechanisms, one a file."""

from .asr import ASR, ECAGenerator, IEGenerator, SEGenerator, SRMGenerator
from .conam import ConAM
from .dia import DIACell
from .fmm import FMM
from .ssia import SSIA

__all__ = [
    "ASR",
    "FMM",
    "SSIA",
    "ConAM",
    "DIACell",
    "ECAGenerator",
    "IEGenerator",
    "SEGenerator",
    "SRMGenerator",
]
