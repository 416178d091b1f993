"""Argument checks: each raises for a bad argument, and names it, what was expected and what came."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
HALF = frozenset({torch.float16, torch.bfloat16})


def describe(value: Any) -> str:
    """A short description of an argument for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def fail_value(argument: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {describe(got)}")


def fail_type(argument: str, expected: str, got: Any) -> NoReturn:
    raise TypeError(f"{argument}: expected {expected}, got {describe(got)}")


def floating_tensor(argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is a float32, float64, float16 or bfloat16 tensor."""
    if not isinstance(value, Tensor):
        fail_type(argument, "a tensor", value)
    if value.dtype not in DTYPES:
        fail_type(argument, "a float32, float64, float16 or bfloat16 tensor", value)


def differ(a: torch.Size, b: torch.Size) -> bool:
    """Inequality of shapes for use under torch.compile, where ``a != b`` would fix every size to its present value."""
    return len(a) != len(b) or any(m != n for m, n in zip(a, b, strict=True))


def integer_tensor(argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is an int32 or int64 tensor."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        fail_type(argument, "an int64 or int32 tensor", value)


def same_kind(argument: str, value: Any, reference_name: str, reference: Tensor, or_float32: bool = False) -> None:
    """Raise unless `value` has the dtype (TypeError) and device (ValueError) of `reference`; with `or_float32` float32
    goes with a half-precision reference too."""
    floating_tensor(argument, value)
    wider = or_float32 and reference.dtype in HALF
    if value.dtype != reference.dtype and not (wider and value.dtype == torch.float32):
        expected = f"dtype {reference.dtype}, that of {reference_name}{', or torch.float32' if wider else ''}"
        fail_type(argument, expected, value)
    if value.device != reference.device:
        fail_value(argument, f"device {reference.device}, that of {reference_name}", value)


def dropout_probability(value: Any, argument: str = "dropout_p") -> None:
    """Raise unless `value` is a number in [0, 1]."""
    if not isinstance(value, (int, float)):
        fail_type(argument, "a number in [0, 1]", value)
    if not 0.0 <= value <= 1.0:  # also catches NaN
        fail_value(argument, "a number in [0, 1]", value)


def one_of(argument: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not isinstance(value, (str, bool, type(None))) or value not in allowed:
        fail_value(argument, f"one of {', '.join(map(str, allowed))}", value)


def not_negative(argument: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number that is not negative."""
    if not isinstance(value, (int, float)) or not value >= 0.0:
        fail_value(argument, "a number that is not negative", value)
