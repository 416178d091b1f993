"""The masks of the eager path against Philox as its paper writes it, one element at a time."""

from __future__ import annotations

import math

import pytest
import torch
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st


def number(key: int, row: int, column: int) -> int:
    """The 16 bits of one element (Salmon et al., SC 2011, seven rounds)."""
    low = 0xFFFFFFFF
    counter = [column // 8, row & low, row >> 32, 0]
    keys = [key & low, key >> 32]
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    return counter[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF


def expected(key: int, shape: tuple[int, ...], dropout_p: float, first_rows: tuple[int, ...] | None) -> torch.Tensor:
    rows = math.prod(shape[:-1])
    firsts, count = (range(1), rows) if first_rows is None else (first_rows, shape[-2])
    limit = round(dropout_p * 2**16)
    dropped = [[number(key, f + i, c) < limit for c in range(shape[-1])] for f in firsts for i in range(count)]
    return torch.tensor(dropped, dtype=torch.bool).reshape(shape)


@st.composite
def sites(draw):
    shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(0, 20)))
    first_rows = None
    if len(shape) > 2 and draw(st.booleans()):
        heads = math.prod(shape[:-2])
        first_rows = tuple(
            draw(st.lists(st.sampled_from([0, 7, 2**32 - 1, 2**40 + 3]), min_size=heads, max_size=heads))
        )
    return shape, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0 - 1e-7, 1.0])), first_rows


@settings(max_examples=60, deadline=None)
@given(sites(), st.integers(0, 2**62 - 1), st.booleans())
def test_every_element_is_philoxs(site, key, in_parts):
    chunk = dropout._CHUNK
    dropout._CHUNK = 2 if in_parts else chunk
    try:
        drawn = dropout.drop_mask(torch.tensor([key]), *site)
    finally:
        dropout._CHUNK = chunk
    assert torch.equal(drawn, expected(key, *site))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dropout_scales_in_the_width_of_the_kernels(dtype):
    """Half precision is multiplied in float32 and rounded once."""
    x, seed = torch.randn(40, 30, dtype=dtype), torch.tensor([12345])
    out = dropout.dropout(x, seed, 0.3)
    assert out.dtype == dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scaled = (x.to(wide) * dropout.keep_scale(0.3)).to(dtype)
    assert torch.equal(out, scaled.masked_fill(dropout.drop_mask(seed, x.shape, 0.3), 0.0))
    assert dropout.dropout(x, None, 0.3) is x
