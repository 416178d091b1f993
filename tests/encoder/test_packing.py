"""Packing of ragged batches."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from fusenc.kernels import attention, attention_varlen
from fusenc.packing import PackedTokens, PaddedPacking, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SAME_ALGORITHM

nested_warnings = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def sequences(*lengths, requires_grad=False):
    return [torch.randn(n, 3).requires_grad_(requires_grad) for n in lengths]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 7), st.integers(0, 999), st.booleans(), st.booleans())
def test_round_trip(batch, length, seed, batch_first, sort):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(batch, length, generator=generator) < 0.4
    x = torch.randn(batch, length, 3, generator=generator, dtype=torch.float64)
    real = x * ~padding[..., None]
    given_x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    if sort:
        packed = PackedTokens.of_padded(given_x, PaddedPacking(~padding, batch_first=batch_first))
    else:
        packed = pack(given_x, padding, batch_first=batch_first)
        assert packed.lengths.tolist() == (~padding).sum(1).tolist()
    assert packed.data.shape == (int((~padding).sum()), 3) and len(packed) == batch
    assert packed.max_length == max((~padding).sum(1).tolist(), default=0)
    back = unpack(packed)
    assert torch.equal(back, real if batch_first else real.transpose(0, 1))
    assert torch.equal(packed.key_padding_mask(), padding)
    weights = torch.randn(back.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(back, given_x, weights)
    keep = ~padding if batch_first else ~padding.t()
    assert torch.equal(gradient, weights * keep[..., None])


def test_a_packed_value_says_where_sequences_lie():
    packed = pack(torch.arange(12.0).view(3, 4), torch.arange(4) >= torch.tensor([[2], [4], [0]]))
    assert packed.data.tolist() == [0, 1, 4, 5, 6, 7]
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [0, 2, 6, 6]
    assert packed.lengths.tolist() == [2, 4, 0] and packed.max_length == 4
    assert [s.tolist() for s in packed] == [[0, 1], [4, 5, 6, 7], []]
    assert unpack(packed, -1.0).tolist() == [[0, 1, -1, -1], [4, 5, 6, 7], [-1] * 4]


def test_without_a_padded_batch_the_padding_is_behind():
    packed = PackedTokens(torch.arange(6.0), torch.tensor([0, 2, 2, 6]))
    assert unpack(packed).tolist() == [[0, 1, 0, 0], [0] * 4, [2, 3, 4, 5]]
    assert packed.key_padding_mask().tolist() == [[False, False, True, True], [True] * 4, [False] * 4]


def test_pack_without_a_mask_packs_everything():
    x = torch.randn(2, 3, 4)
    assert torch.equal(pack(x).data, x.flatten(0, 1)) and torch.equal(unpack(pack(x)), x)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (([1.0], torch.tensor([0, 1])), TypeError, "data"),
        ((torch.tensor(1.0), torch.tensor([0, 1])), ValueError, "data"),
        ((torch.zeros(5), [0, 5]), TypeError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([[0, 5]])), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([], dtype=torch.int32)), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0, 4])), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([1, 5])), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0, 6, 5])), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0])), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0, 4]), 5), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0, 5], device="meta"), 5), ValueError, "cu_seqlens"),
        ((torch.zeros(5), torch.tensor([0, 5]), 4), ValueError, "max_length"),
        ((torch.zeros(5), torch.tensor([0, 5]), "5"), TypeError, "max_length"),
    ],
)
def test_a_value_that_disagrees_with_itself_raises(arguments, error, names):
    with pytest.raises(error, match=f"^{names}: expected"):
        PackedTokens(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda x: pack([x]), TypeError, "padded"),
        (lambda x: pack(x[0, 0]), ValueError, "padded"),
        (lambda x: pack(x, torch.zeros(2, 5)), TypeError, "key_padding_mask"),
        (lambda x: pack(x, torch.zeros(5, 2, dtype=torch.bool)), ValueError, "key_padding_mask"),
        (lambda x: pack(x, torch.zeros(2, 5, dtype=torch.bool), batch_first=False), ValueError, "key_padding_mask"),
        (lambda x: unpack(x), TypeError, "packed"),
        (lambda x: pack(x).with_data(x[0]), ValueError, "data"),
        (lambda x: pack(x).to_nested(torch.sparse_coo), ValueError, "layout"),
        (lambda x: PackedTokens.from_nested(x), TypeError, "nested"),
        (lambda x: PackedTokens.from_sequences([]), ValueError, "sequences"),
        (lambda x: PackedTokens.from_sequences([x, 3]), TypeError, r"sequences\[1\]"),
        (lambda x: PackedTokens.from_sequences([x, x[..., :2]]), ValueError, r"sequences\[1\]"),
    ],
)
def test_bad_input_names_the_argument(call, error, names):
    with pytest.raises(error, match=f"^{names}: expected"):
        call(torch.randn(2, 5, 3))


@nested_warnings
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_there_and_back(layout):
    leaves = sequences(2, 5, 3, requires_grad=True)
    nested = torch.nested.as_nested_tensor(leaves, layout=layout)
    packed = PackedTokens.from_nested(nested)
    assert torch.equal(packed.data, torch.cat(leaves))
    assert packed.cu_seqlens.tolist() == [0, 2, 7, 10] and packed.max_length == 5
    again = packed.with_data(packed.data * 2).to_nested(layout)
    assert again.layout == layout
    assert all(torch.equal(a, 2 * b) for a, b in zip(again.unbind(), leaves, strict=True))
    sum(t.sum() * (i + 1) for i, t in enumerate(again.unbind())).backward()
    assert [leaf.grad.unique().tolist() for leaf in leaves] == [[2.0], [4.0], [6.0]]


def test_jagged_tensors_with_holes_and_of_other_shapes():
    offsets, lengths = torch.tensor([0, 4, 9]), torch.tensor([2, 5])
    values = torch.randn(9, 3)
    packed = PackedTokens.from_nested(torch.nested.nested_tensor_from_jagged(values, offsets, lengths))
    assert torch.equal(packed.data, values[[0, 1, 4, 5, 6, 7, 8]]) and packed.cu_seqlens.tolist() == [0, 2, 7]
    nested = torch.nested.nested_tensor(sequences(2, 5), layout=torch.jagged)
    with pytest.raises(ValueError, match="nested: expected a ragged second dimension"):
        PackedTokens.from_nested(nested.transpose(1, 2))


def test_from_sequences():
    leaves = sequences(2, 0, 4, requires_grad=True)
    packed = PackedTokens.from_sequences(iter(leaves))
    assert all(torch.equal(a, b) for a, b in zip(packed, leaves, strict=True))
    packed.data.pow(2).sum().backward()
    assert all(torch.equal(leaf.grad, 2 * leaf) for leaf in leaves)


def test_it_moves_and_is_copied_whole():
    packed = pack(torch.randn(2, 5, 3), torch.arange(5) >= torch.tensor([[5], [3]]))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert torch.equal(unpack(other), unpack(packed)) and other.max_length == 5
    wide = packed.to(torch.float64)
    assert wide.data.dtype == torch.float64 and wide.cu_seqlens.dtype == torch.int32
    moved = packed.to("meta")
    parts = (moved.data, moved.cu_seqlens, moved.padding.indices, moved.padding.cu_seqlens)
    assert all(t.is_meta for t in parts) and moved.max_length == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.max_length = 7


def test_the_longest_are_packed_last_for_the_modules():
    packing = PaddedPacking(torch.arange(6) < torch.tensor([[3], [6], [3], [0]]))
    assert packing.cu_seqlens.tolist() == [0, 0, 3, 6, 12] and packing.max_length == 6
    assert packing.order.tolist() == [3, 0, 2, 1]


def attend(packing, query, key, value):
    starts, longest = packing.cu_seqlens, packing.max_length
    return attention_varlen(query, key, value, starts, starts, longest, longest)


def test_attention_stays_inside_each_sequence():
    keep = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[2] = False
    qkv = torch.randn(3, 5, 9, 2, 8, requires_grad=True)
    packing = PaddedPacking(keep)
    packed = attend(packing, *(packing.pack(t) for t in qkv))
    q, k, v = (t.transpose(1, 2) for t in qkv)
    dense = attention(q, k, v, keep[:, None, None, :]).transpose(1, 2)
    torch.testing.assert_close(packed, packing.pack(dense), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    (got,), (expected,) = (torch.autograd.grad(t.pow(2).sum(), qkv) for t in (packed, packing.pack(dense)))
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_nothing_but_padding():
    packing = PaddedPacking(torch.zeros(2, 3, dtype=torch.bool))
    packed = packing.pack(torch.randn(2, 3, 2, 4))
    assert attend(packing, packed, packed, packed).shape == (0, 2, 4)
    assert (packing.unpack(packed) == 0).all()
