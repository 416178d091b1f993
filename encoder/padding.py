"""When an encoder leaves padding out: the one rule of `TransformerEncoder` and of the Hugging Face encoders.

An encoder's `padding` is one of

- ``"auto"``: real tokens only, where that is expected to save time;
- ``"remove"``: real tokens only, wherever that can be done;
- ``"keep"``: the padding goes through the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .kernels.common import device
from .kernels.common.backend import would_use_triton

SETTINGS = ("auto", "remove", "keep")

FULLEST = 0.85
"""Share of real tokens up to which removing padding saves time on a CPU (docs/torch_nn.md has the measurement)."""
LEAST_WORK = 3_000_000
"""Multiply-adds that a layer's products must spend on the padding of a sequence, on average, for removing it to save
time on a CPU: attention of a sequence of its own costs as much."""
WAIT_ON_GPU = 3_000_000_000
"""Multiply-adds that the products of all layers must spend on padding for removing it to save time on a GPU.

The host must know how many tokens are real, so it waits once a call, some 30 microseconds; a GPU does some 1e14
multiply-adds a second in 16-bit products; hence 30e-6 * 1e14. No GPU has measured this assumption yet. It does
not count that the wait drains the queue of launches, nor that float32 products are several times slower. Models of
transformers wait in each call with a mask, to see whether it hides anything: there any padding is removed."""


class RealTokens(NamedTuple):
    """The real tokens of a padded batch, with their numbers known on the host."""

    keep: Tensor
    """Bool ``[B, L]``, True where a token is real."""
    lengths: Tensor
    """Real tokens of each row, ``[B]``, where `keep` is."""
    counts: list[int]
    """The same on the host."""

    @classmethod
    def read(cls, keep: Tensor, conditions: Sequence[Tensor] = ()) -> RealTokens | None:
        """Count the tokens; None if one of the `conditions`, bool tensors of one element, is False.

        One copy to the host holds everything, so a GPU is waited for once.
        """
        lengths = keep.sum(1)
        facts = torch.cat([lengths, *(condition.reshape(1).to(lengths) for condition in conditions)]).tolist()
        counts = facts[: keep.shape[0]]
        return cls(keep, lengths, counts) if all(facts[keep.shape[0] :]) else None

    @property
    def hidden(self) -> int:
        """How many tokens are not real."""
        return self.keep.numel() - sum(self.counts)


def require_setting(padding: object) -> None:
    """Raise ValueError for a `padding` that is none of the settings."""
    if padding not in SETTINGS:
        raise ValueError(f"padding: expected one of {', '.join(map(repr, SETTINGS))}, got {padding!r}")


def may_remove(padding: str, *tensors: Tensor) -> bool:
    """True if padding can be removed from a call on these tensors: their values may be read, and the setting allows it.

    A graph that is captured, compiled or traced would keep the numbers of this batch; tensors under vmap or of a fake
    mode have no numbers.
    """
    if padding == "keep" or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta or t.device != tensors[0].device for t in tensors):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in _WITHOUT_VALUES):
        return False
    if tensors[0].is_cuda:
        return not device.is_capturing()
    return padding == "remove" or tensors[0].is_cpu  # elsewhere attention of packed tokens waits in each layer


_WITHOUT_VALUES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
"""Modes under which tensors have no values to read."""


def real_tokens(
    padding: str, keep: Tensor, weight: Tensor, *, products: int, num_layers: int, conditions: Sequence[Tensor] = (),
    known: RealTokens | None = None, waits_anyway: bool = False,
) -> RealTokens | None:  # fmt: skip
    """The real tokens of a batch whose padding can and should be removed, or that is found to have none; else None.
    `may_remove` comes first.

    Args:
        padding: "auto" or "remove".
        keep: bool ``[B, L]``, True where a token is real.
        weight: a weight of a layer.
        products: multiply-adds of a layer's matrix products for a token.
        num_layers: how many layers run.
        conditions: bool tensors of one element, which must be True for padding to be removed.
        known: the tokens, if they are counted already and all conditions hold.
        waits_anyway: a GPU is waited for in such a call even if padding is kept, so that to wait costs nothing.
    """
    decides = padding == "auto" and not (waits_anyway and keep.is_cuda)
    if padding == "auto" and keep.is_cuda and not would_use_triton(weight):
        return None  # eager attention of packed tokens waits in each layer
    if decides and not _saves_time(keep, keep.numel(), products, num_layers):
        return None  # not even if nothing were real
    tokens = RealTokens.read(keep, conditions) if known is None else known
    if tokens is None or (decides and tokens.hidden and not _saves_time(keep, tokens.hidden, products, num_layers)):
        return None
    return tokens


def _saves_time(keep: Tensor, saved: int, products: int, num_layers: int) -> bool:
    """True if it is expected to save time that layers compute `saved` rows less."""
    if keep.is_cuda:
        return saved * products * num_layers >= WAIT_ON_GPU
    return saved >= (1.0 - FULLEST) * keep.numel() and saved * products >= LEAST_WORK * keep.shape[0]
