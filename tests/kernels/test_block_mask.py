"""BlockMask and the biases by distance."""

from __future__ import annotations

import pytest
import torch
from fusenc.kernels import BlockMask, alibi_slopes, attention, t5_relative_bias
from fusenc.kernels.common import backend
from tolerances import SAME_ALGORITHM


@pytest.mark.parametrize(
    ("len_q", "len_k", "size"), [(70, 90, 16), (64, 64, 64), (1, 200, 128), (0, 5, 16), (5, 0, 16)]
)
def test_dense_and_back(len_q, len_k, size):
    mask = torch.rand(2, 3, len_q, len_k, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[..., :16] = True
    mask[:, 1, :, 16:48] = False
    assert torch.equal(BlockMask.from_mask(mask, size).to_dense(), mask)


def test_the_lists_name_each_live_block_once():
    mask = BlockMask.from_mask(torch.ones(100, 100, dtype=torch.bool).tril(), 32)
    assert mask.block_map[0, 0].tolist() == [[2, 0, 0, 0], [1, 3, 0, 0], [1, 1, 4, 0], [1, 1, 1, 5]]
    assert mask.blocks_of_query[0, 0, 2].tolist()[:5] == [2, 1, 0, 1, 2]
    assert mask.blocks_of_key[0, 0, 2].tolist()[:4] == [1, 1, 3, 2]


def test_patterns():
    distance = (torch.arange(300)[:, None] - torch.arange(300)).abs()
    longformer = BlockMask.sliding_window(300, 40, global_tokens=2, block_size=32).to_dense()[0, 0]
    expected = distance <= 40
    expected[:2] = expected[:, :2] = True
    assert torch.equal(longformer, expected)

    documents = BlockMask.documents(torch.tensor([[0] * 100 + [1] * 50, [3] * 70 + [4] * 80]), 64)
    assert documents.shape == (2, 1, 150, 150)
    assert documents.to_dense().sum((1, 2, 3)).tolist() == [100**2 + 50**2, 70**2 + 80**2]

    bird = BlockMask.big_bird(32 * 64, window_blocks=3, global_blocks=1, random_blocks=2, block_size=64)
    live = bird.block_map[0, 0] > 0
    assert live[0].all() and live[:, 0].all() and live.diagonal().all()
    assert live[5:-5].sum(1).max() == 1 + 3 + 2  # global, window, random


def test_memory_grows_with_the_live_blocks():
    for length in (1024, 2048):
        mask = BlockMask.sliding_window(length, 64, block_size=64)
        assert (
            mask.tiles.numel() == (3 * length // 64 - 2 - length // 64) * 64 * 64
        )  # two edges a row; the middle is full


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((torch.ones(5, 5),), TypeError, "mask"),
        ((torch.ones(5, dtype=torch.bool),), ValueError, "mask"),
        ((torch.ones(5, 5, dtype=torch.bool), 100), ValueError, "block_size"),
        ((torch.ones(5, 5, dtype=torch.bool), 8), ValueError, "block_size"),
    ],
)
def test_bad_masks(arguments, error, named):
    with pytest.raises(error, match=f"^{named}: expected"):
        BlockMask.from_mask(*arguments)


def test_bad_functions():
    with pytest.raises(TypeError, match=r"^function: expected"):
        BlockMask.from_function(lambda q, k: q - k, 5, 5)
    with pytest.raises(ValueError, match=r"^function: expected"):
        BlockMask.from_function(lambda q, k: torch.ones(3, 3, dtype=torch.bool), 5, 5)
    with pytest.raises(ValueError, match=r"^len_q, len_k: expected"):
        BlockMask.from_function(lambda q, k: q == k, -1, 5)
    with pytest.raises(ValueError, match=r"^ids: expected"):
        BlockMask.documents(torch.zeros(1, 1, 1))


@pytest.mark.parametrize("nhead", [1, 4, 8, 12, 20])
def test_alibi_slopes(nhead):
    """As the authors' recursion has them: https://github.com/ofirpress/attention_with_linear_biases"""

    def power_of_two(n):
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    closest = 1 << (nhead.bit_length() - 1)
    expected = power_of_two(closest) + power_of_two(2 * closest)[0::2][: nhead - closest]
    torch.testing.assert_close(alibi_slopes(nhead), torch.tensor(expected))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_is_that_of_transformers(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    table = torch.randn(32, 4)
    bias = t5_relative_bias(table, bidirectional=bidirectional)
    distance = torch.arange(300) - torch.arange(300)[:, None]
    buckets = t5.T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    expected = table[buckets].permute(2, 0, 1)
    got = bias[:, distance.clamp(-128, 128) + 128]
    assert torch.equal(got, expected)


def test_t5_bias_has_a_gradient():
    table = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(
        lambda table: attention(q, k, v, relative_bias=t5_relative_bias(table, max_distance=6)), (table,)
    )


def test_bad_tables():
    for table in (torch.randn(3), torch.randn(2, 4)):
        with pytest.raises(ValueError, match=r"^table: expected"):
            t5_relative_bias(table)
    with pytest.raises(ValueError, match=r"^max_distance: expected"):
        t5_relative_bias(torch.randn(32, 4), max_distance=8)
    with pytest.raises(ValueError, match=r"^nhead: expected"):
        alibi_slopes(0)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"return_lse": True}, {"window": (900, None)}], ids=str)
def test_long_sequences_in_parts_on_the_cpu(monkeypatch, options):
    """Where the scores would fill the memory, eager attention takes some queries at a time, with the same result."""
    from fusenc.kernels.attention import eager

    inputs = [torch.randn(2, 2, 60, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run():
        torch.manual_seed(0)
        out = attention(*inputs, dropout_p=0.2, is_causal=True, **options)
        out = torch.cat([out[0], out[1][..., None]], -1) if isinstance(out, tuple) else out
        return out, *torch.autograd.grad(out.sum(), inputs)

    with backend.use_backend("eager"):
        whole = run()
        monkeypatch.setattr(eager, "_SCORES_AT_A_TIME", 7 * 2 * 2 * 60)
        parts = run()
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
