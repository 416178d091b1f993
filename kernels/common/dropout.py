"""Counter-based dropout: the same mask in every kernel, in the backward pass and on the eager path.

Element (row, column) of a tensor seen as ``[rows, columns]`` takes lane ``column % 4`` of
Philox4x32 at counter ``(column // 4, row low, row high, 0)`` under a 64-bit key drawn from
PyTorch's generator. An element is kept when the lane's upper 31 bits reach ``p * 2**31``.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds, the
fewest that pass BigCrush there; flash-attention uses seven too.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def new_seed(x: Tensor) -> Tensor:
    """A fresh key from PyTorch's generator: int64 ``[1]`` on the device of `x`, so that nothing waits for a GPU."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)


def threshold(dropout_p: float) -> int:
    """An element is dropped when its 31 random bits are below this."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 for p = 1, where everything is dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # The product of two 32-bit numbers fills an int64 to the last bit; its wrapped bits are the right ones.
    product = b * a
    return (product >> 32).bitwise_and_(_LOW), product.bitwise_and_(_LOW)


def keep_mask(seed: Tensor, shape: torch.Size, dropout_p: float) -> Tensor:
    """The elements that are kept: bool, of `shape`; rows are all dimensions but the last."""
    columns = shape[-1]
    rows = shape.numel() // columns if columns else 0
    groups = (columns + 3) // 4
    row = torch.arange(rows, device=seed.device).view(-1, 1)
    group = torch.arange(groups, device=seed.device).view(1, -1)
    c0 = group.expand(rows, groups)
    c1 = (row & _LOW).expand(rows, groups)
    c2 = (row >> 32).expand(rows, groups)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(PHILOX_ROUNDS):
        hi_b, lo_b = _mul_hi_lo(_ROUND_B, c2)
        hi_a, lo_a = _mul_hi_lo(_ROUND_A, c0)
        c0, c1 = hi_b.bitwise_xor_(c1).bitwise_xor_(k0), lo_b
        c2, c3 = hi_a.bitwise_xor_(c3).bitwise_xor_(k1), lo_a
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    bits = torch.stack((c0, c1, c2, c3), dim=-1).view(rows, 4 * groups)[:, :columns]
    return ((bits >> 1) >= threshold(dropout_p)).reshape(shape)


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """`x` with dropout applied under `seed`; differentiable. `seed` None means no dropout."""
    if seed is None:
        return x
    return (x * keep_scale(dropout_p)).masked_fill(~keep_mask(seed, x.shape, dropout_p), 0.0)
