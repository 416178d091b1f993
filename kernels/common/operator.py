"""Registration of the ``torch.library`` operators that ``torch.compile`` sees, and the autocast rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fusenc", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define ``fusenc::<schema>`` for every device; with a backward formula it also gets its autocast rule."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusenc::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fusenc, name).default
    if backward is not None:
        torch.library.register_autograd(f"fusenc::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        for device_type in ("cpu", "cuda"):
            _LIBRARY.impl(name, _autocast_rule(operator, device_type), f"Autocast{device_type.upper()}")
    return operator


def _autocast_rule(operator: Any, device_type: str) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        cast = autocast_inputs(device_type, *args)
        with torch.autocast(device_type, enabled=False):
            return operator(*cast)

    return rule


def autocast_inputs(device_type: str, *args: Any) -> tuple[Any, ...]:
    """The floating tensors among `args` in the dtype of the autocast in force, as for torch's own matrix products."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a for a in args
    )
