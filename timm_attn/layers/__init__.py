"""The attention mechanisms, one per file."""

from .asr import ASR, ECAGenerator, IEGenerator, ScaleGenerator, SEGenerator, SPAGenerator, SRMGenerator
from .conam import ConAM
from .dia import DIACell
from .fmm import FMM
from .gate import ConstantGate
from .sem import SEM
from .spem import SPEM
from .ssia import SSIA

__all__ = [
    "ASR",
    "FMM",
    "SEM",
    "SPEM",
    "SSIA",
    "ConAM",
    "ConstantGate",
    "DIACell",
    "ECAGenerator",
    "IEGenerator",
    "SEGenerator",
    "SPAGenerator",
    "SRMGenerator",
    "ScaleGenerator",
]
