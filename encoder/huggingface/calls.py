"""Calls of stock classes: their arguments, and what a fused encoder tells its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.attention.eager import require_starts
from ..kernels.attention.op import check_starts
from ..kernels.common import checks
from ..packing import PaddedPacking
from .stock import collected

HARMLESS = frozenset({
    "use_cache", "cache_position", "position_ids", "seq_idx", "output_hidden_states", "return_dict",
    "num_items_in_batch",
})  # fmt: skip
"""Arguments that models hand on to encoders and layers and that change nothing of what these compute. A call that gives
any other argument which its fused forward does not serve runs the stock forward. `seq_idx` says of a flattened batch
what `cu_seq_lens_q` says, for layers that are no attention."""


FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' arguments of a flattened batch: texts that lie one after the other in one row."""


def require_known(given: dict[str, Any], config: Any) -> None:
    """Raise ValueError if a stock forward is given a flattened batch whose attention would mix the texts."""
    way = getattr(config, "_attn_implementation", None)
    if way not in ("eager", "sdpa", None):
        return
    for name in FLATTENED:
        if given.get(name) is not None:
            expected = f"None, since this call does not run fused, and attention implementation {way} mixes the texts"
            checks.fail_value(name, expected, given[name])


def flattened_starts(given: dict[str, Any], query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """These arguments as `attention_varlen` takes them, for ``[1, T, ...]`` queries and keys. A GPU is not waited for:
    a longest text whose number lies there counts as T.

    Raises:
        TypeError: starts that are no integer tensors.
        ValueError: arguments that are missing, disagree with each other or do not fit the batch.
    """
    first = next(name for name in FLATTENED if given.get(name) is not None)
    for name in FLATTENED:
        if given.get(name) is None:
            checks.fail_value(name, f"a value, as {first} is given", None)
    starts: list[Any] = []
    longest: list[int] = []
    for which, t in (("q", query), ("k", key)):
        name, length = f"cu_seq_lens_{which}", given[f"max_length_{which}"]
        if t.shape[0] != 1:
            checks.fail_value(name, f"a batch of one row, in which all texts lie, not of {t.shape[0]}", given[name])
        if isinstance(length, Tensor):
            length = int(length) if readable(length) else t.shape[1]
        elif isinstance(length, int):
            length = min(length, t.shape[1])  # more changes nothing
        check_starts(name, given[name], f"max_length_{which}", length, t)
        if not torch.compiler.is_compiling():
            require_starts(name, given[name], t.shape[1], f"max_length_{which}", length)
        starts.append(given[name])
        longest.append(length)
    of_query, of_key = starts
    same = query.shape[1] == key.shape[1] and readable(of_query) and readable(of_key)
    if of_query.shape != of_key.shape or (same and of_query.tolist() != of_key.tolist()):
        checks.fail_value("cu_seq_lens_k", f"the texts of cu_seq_lens_q, {of_query}", of_key)
    return of_query, of_key, *longest  # type: ignore[return-value]


def readable(t: Tensor) -> bool:
    """True if values can be read without a device sync or a graph break."""
    return t.is_cpu and not t.is_cuda and not torch.compiler.is_compiling()


class Call:
    """What an encoder whose layers all run fused tells them about a call, so that they need not ask."""

    def __init__(self, packing: PaddedPacking | None, is_causal: bool = False, **shared: Any) -> None:
        self.packing, self.is_causal = packing, is_causal
        self.shared: dict[Any, Any] = shared
        """What layers share: biases, tables."""
        self.last: Any = None
        """The layer that unpacks; None: the encoder does. Where the stock forward goes on with ``[B, L, width]``."""


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by the names that the stock forward of a fused module has for them.

    Raises:
        TypeError: more arguments than the stock forward takes, or one given twice.
    """
    given = {**dict(zip(module.stock_arguments, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs):
        raise TypeError(f"{type(module).__name__}: an argument is given twice, or there are too many")
    return given


def asks_for_more(given: dict[str, Any], served: frozenset[str]) -> bool:
    """True if a call gives an argument that its fused forward does not serve, and that may change the results."""
    for name, value in given.items():
        if value is None or value is False or name in served or name in HARMLESS:
            continue
        if type(value) is not int or value:  # no cache has 0 tokens
            return True
    return False


def serves(x: Any, attention_mask: Any, norm_weight: Tensor | None) -> bool:
    """True if the fused forwards do what a call on these hidden states and this mask asks for."""
    if not isinstance(x, Tensor):
        return False
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        return False  # flash and flex attention have masks of their own
    if torch._C._get_tracing_state():
        return False  # a traced graph is made of torch's own operators
    recorded = collected()
    if "attentions" in recorded or "cross_attentions" in recorded:
        return False
    if norm_weight is None or norm_weight.dtype == x.dtype:
        return True
    return torch.is_autocast_enabled(x.device.type)  # under it norms are float32
