"""What `fusenc bench` measures, one module a suite."""

from __future__ import annotations

from collections.abc import Callable

from . import attention, embed, encoder, ffn, host, model, norm
from .case import Case

SUITES: dict[str, Callable[[], list[Case]]] = {
    "host": host.cases,
    "norm": norm.cases,
    "embed": embed.cases,
    "attention": attention.cases,
    "ffn": ffn.cases,
    "model": model.cases,
    "encoder": encoder.cases,
}
