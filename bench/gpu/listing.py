"""How a part's list of cases is made: which providers take part, and in which order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

from ..cases.case import Case

Item = TypeVar("Item")


def only(case: Case, stock: Sequence[str], ours: Sequence[str]) -> Case:
    """A case with some of its providers; its yardstick is the fastest of the stock ones."""
    kept = {name: of for name, of in case.providers.items() if name in (*stock, *ours)}
    return dataclasses.replace(case, providers=kept, against=tuple(name for name in kept if name in stock))


def through_compiler(case: Case, stock: Sequence[str], compiled: str) -> Case:
    """The case once more for a provider that compiles for seconds, with the stock ones that do not, and ours."""
    return once_more(case, (*stock, compiled), ("fusenc",), compiled)


def once_more(case: Case, stock: Sequence[str], ours: Sequence[str], what: str) -> Case:
    """The case once more with some of its providers, under a name of its own."""
    return dataclasses.replace(only(case, stock, ours), name=f"{case.name}, {what}")


def in_turns(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first of each list, then the second of each, and so on."""
    return [item for row in itertools.zip_longest(*lists) for item in row if item is not None]
