"""Packing of ragged batches."""

from __future__ import annotations

import torch
from fusenc.kernels import attention
from fusenc.packing import Packing, PaddedPacking
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SAME_ALGORITHM


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(0, 8), st.integers(0, 999))
def test_round_trip(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, length, generator=generator) > 0.4
    x = torch.randn(batch, length, 3, generator=generator)
    packing = PaddedPacking(keep)
    packed = packing.pack(x)
    assert packed.shape == (int(keep.sum()), 3)
    assert torch.equal(packing.unpack(packed), x * keep[..., None])


def test_where_sequences_begin():
    packing = Packing([2, 2, 0, 5])
    assert packing.cu_seqlens.tolist() == [0, 2, 4, 4, 9] and packing.longest == 5
    keep = torch.arange(6) < torch.tensor([[3], [6], [3], [0]])
    assert PaddedPacking(keep).cu_seqlens.tolist() == [0, 0, 3, 6, 12]  # longest last


def test_attention_stays_inside_each_sequence():
    keep = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[2] = False
    qkv = torch.randn(3, 5, 9, 2, 8, requires_grad=True)
    packing = PaddedPacking(keep)
    packed = packing.attend(*(packing.pack(t) for t in qkv))
    q, k, v = (t.transpose(1, 2) for t in qkv)
    dense = attention(q, k, v, keep[:, None, None, :]).transpose(1, 2)
    torch.testing.assert_close(packed, packing.pack(dense), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    (got,), (expected,) = (torch.autograd.grad(t.pow(2).sum(), qkv) for t in (packed, packing.pack(dense)))
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_nothing_but_padding():
    packing = PaddedPacking(torch.zeros(2, 3, dtype=torch.bool))
    packed = packing.pack(torch.randn(2, 3, 2, 4))
    assert packing.attend(packed, packed, packed).shape == (0, 2, 4)
    assert (packing.unpack(packed) == 0).all()
