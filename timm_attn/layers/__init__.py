"""The attention mechanisms, one a file."""

from .asr import ASR, SEGenerator
from .dia import DIACell

__all__ = ["ASR", "DIACell", "SEGenerator"]
