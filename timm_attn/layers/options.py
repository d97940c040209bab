"""Checks of the mechanisms' options: TypeError for a wrong type, ValueError for a value out of range."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Check for an integer of at least ``least``; 4.0 and True are not integers."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any, allowed: str, zero: bool = False) -> None:
    """Check for a finite number above 0, or with ``zero`` of at least 0.

    Args:
        allowed: What is allowed, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = " (as YAML, write 1.0e-2: it reads 1e-2 as text)" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be {allowed}, got {value!r}{hint}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check for one of several names."""
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Check for True or False; the text "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_affine(name: str, norm: Any) -> None:
    """Check for a norm layer with a weight and a bias."""
    if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
        raise ValueError(
            f"{name} needs norm layers with a weight and a bias, got {type(norm).__name__} without: leave "
            "affine=True, or choose another norm_layer"
        )
