"""Choices that `fusenc tune` measured on this machine's GPU, where there are any; docs/tuning.md.

A table is a JSON file. The one that the environment variable FUSENC_TUNED names comes first, then the user's cache.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from . import device, plan

VERSION = 1
"""Of the tables' form and of what their choices mean: raised when a name no longer stands for the same code."""

ENVIRONMENT = "FUSENC_TUNED"

_LARGEST = 1 << 62

# Of each device: the choices of its tables by text, and of each call seen so far what they say. The second serves
# the call path, one lookup; None stands for "nothing was measured" there.
_choices: dict[int | None, dict[str, str]] = {}
_answers: dict[tuple[str, int | None, torch.dtype, tuple[int, ...]], str | None] = {}
_MOST_ANSWERS = 1 << 16


def choice(operation: str, device_index: int | None, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """What was measured to be fastest for an operation, None where nothing was measured.

    Tables are read at the first call for a device; later ones look up one dictionary entry.
    """
    try:
        return _answers[operation, device_index, dtype, sizes]
    except KeyError:
        return _first_answer(operation, device_index, dtype, sizes)


def forget() -> None:
    """Read the tables anew at the next call."""
    _choices.clear()
    _answers.clear()
    plan.change_switches()


def _first_answer(operation: str, device_index: int | None, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    if device_index not in _choices:
        _choices[device_index] = _read_tables(device_index)
    answer = _choices[device_index].get(text_of(operation, dtype, sizes))
    if len(_answers) >= _MOST_ANSWERS:  # ragged batches bring ever new sizes
        _answers.clear()
    _answers[operation, device_index, dtype, sizes] = answer
    return answer


def bucket(size: int) -> int:
    """The power of two that stands for a size: the least one that is not below it."""
    return device.power_of_2(min(size, _LARGEST))


def text_of(operation: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """How a table writes an operation on such sizes: ``ffn_forward float16 4096 1024 4096``."""
    return " ".join((operation, str(dtype).removeprefix("torch."), *(str(bucket(size)) for size in sizes)))


def section_of(gpu: str) -> str:
    """Under what a table keeps the choices of a GPU: they hold for that GPU, table version and version of Triton."""
    return f"{gpu} | fusenc table {VERSION} | Triton {_triton_version()}"


@functools.cache
def _triton_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cache_file() -> Path:
    """The user's own table."""
    import platformdirs  # only where there is a GPU, or when asked

    return Path(platformdirs.user_cache_dir("fusenc")) / "tuned.json"


def read_table(file: Path) -> dict[str, dict[str, str]]:
    """The sections of a table, each a dictionary from `text_of` to a candidate's name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table, or one of another version.
    """
    table = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or "fusenc_table" not in table:
        raise ValueError("it is no table of fusenc")
    if table["fusenc_table"] != VERSION:
        raise ValueError(f"its version is {table['fusenc_table']!r}, this fusenc reads {VERSION}")
    sections = table.get("choices")
    if not isinstance(sections, dict) or not all(_is_section(section) for section in sections.values()):
        raise ValueError("its choices are not as a table's are")
    return sections


def _is_section(section: Any) -> bool:
    return isinstance(section, dict) and all(isinstance(name, str) for name in section.values())


def _read_tables(device_index: int | None) -> dict[str, str]:
    gpu = device.name(device_index)
    if gpu is None:
        return {}
    named = os.environ.get(ENVIRONMENT)
    found: dict[str, str] = {}
    tables = [_sections(cache_file(), required=False)]
    if named:
        tables.append(_sections(Path(named), required=True))
    for table in tables:  # the later wins
        found |= table.get(section_of(gpu), {})
    return found


def _sections(file: Path, required: bool) -> dict[str, dict[str, str]]:
    try:
        return read_table(file)
    except FileNotFoundError:
        if required:
            _warn(file, f"there is no such file, though {ENVIRONMENT} names it")
    except (OSError, ValueError, RecursionError) as error:
        _warn(file, str(error))
    return {}


@functools.cache
def _warn(file: Path, reason: str) -> None:
    warnings.warn(f"fusenc: the table {file} is ignored: {reason}", RuntimeWarning, stacklevel=6)
