"""Every option of fusenc.kernels.attention, alone and together, dense and packed, against float64."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import pytest
import torch
from contract import assert_contract
from fusenc.kernels import (
    BlockMask,
    alibi_slopes,
    attention,
    attention_varlen,
    attention_weights,
    attention_with_weights,
)
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import LEAST_GRADIENT, SAME_ALGORITHM
from torch import Tensor

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclasses.dataclass
class Case:
    """Options of a call, and the same written out element by element."""

    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alignment: str = "top_left"
    softcap: float | None = None
    alibi: bool = False
    mask: Tensor | None = None
    """bool, or floating without gradient"""
    blocks: BlockMask | None = None
    dropout_p: float = 0.0
    lengths: tuple[list[int], list[int]] | None = None

    def arguments(self, device: str, nhead: int) -> dict[str, Any]:
        options: dict[str, Any] = {
            "is_causal": self.is_causal, "window": self.window, "alignment": self.alignment, "softcap": self.softcap,
            "alibi_slopes": alibi_slopes(nhead, device) if self.alibi else None, "dropout_p": self.dropout_p,
            "attn_mask": None if self.mask is None else self.mask.to(device),
            "block_mask": None if self.blocks is None else self.blocks.to(device),
        }  # fmt: skip
        return options

    def reference(self, q, k, v, bias=None, relative=None, dropped=None):
        """Attention of one batch of sequences of equal lengths; returns output and log-sum-exp."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        len_q, len_k = q.shape[2], k.shape[2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        last = len_k - len_q if self.alignment == "bottom_right" else 0
        position = torch.arange(len_q, device=q.device)[:, None] + last
        distance = torch.arange(len_k, device=q.device) - position
        allowed = torch.ones(scores.shape, dtype=torch.bool, device=q.device)
        if self.alibi:
            scores = scores - alibi_slopes(q.shape[1]).to(scores)[:, None, None] * distance.abs()
        if relative is not None:
            reach = relative.shape[1] // 2
            scores = scores + relative[:, distance.clamp(-reach, reach) + reach]
        if self.is_causal:
            allowed = allowed & (distance <= 0)
        if self.window is not None:
            left, right = self.window
            allowed = allowed if left is None else allowed & (distance >= -left)
            allowed = allowed if right is None else allowed & (distance <= right)
        for mask in (self.mask, bias):
            if mask is not None:
                mask = mask.to(q.device)
                mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
                mask = mask[:, :, : len_q if mask.shape[2] > 1 else 1, : len_k if mask.shape[3] > 1 else 1]
                if mask.dtype == torch.bool:
                    allowed = allowed & mask
                else:
                    scores = scores + mask.to(scores.dtype)
                    allowed = allowed & (mask > float("-inf"))
        if self.blocks is not None:
            allowed = allowed & self.blocks.to_dense().to(q.device)[:, :, :len_q, :len_k]
        nothing = ~allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed & ~nothing, float("-inf"))
        p = scores.softmax(-1).masked_fill(nothing, 0.0)
        if dropped is not None:
            p = (p / (1 - self.dropout_p)).masked_fill(dropped, 0.0)
        return p @ v, scores.logsumexp(-1).masked_fill(nothing[..., 0], float("-inf"))


def randn(*shape: int, device: str = "cpu", seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def seeded_mask(device, shape, dropout_p, first_rows=None):
    if not dropout_p:
        return None
    torch.manual_seed(3)
    return dropout.drop_mask(dropout.new_seed(torch.empty(0, device=device)), torch.Size(shape), dropout_p, first_rows)


def dense_inputs(device, batch=2, heads=2, key_heads=None, len_q=70, len_k=90, dim=32, value_dim=None):
    key_heads = key_heads or heads
    return [
        randn(batch, heads, len_q, dim, device=device),
        randn(batch, key_heads, len_k, dim, device=device, seed=2),
        randn(batch, key_heads, len_k, value_dim or dim, device=device, seed=3),
    ]


def usual(device: str) -> torch.dtype:
    """float32 shows more; but for a GPU, which ttsem pretends to be, it takes twice as long to compile, and other tests
    have it."""
    return torch.float16 if device == "cuda" else torch.float32


def check_dense(device, case, inputs, dtype=None, bias=None, relative=None, least=0.0):
    q, k, _ = inputs
    batch, heads, len_q = q.shape[:3]
    len_k = k.shape[2]
    dtype = dtype or usual(device)
    arguments = case.arguments(device, heads)
    if case.lengths is not None:
        lengths = [torch.tensor(lengths, device=device) for lengths in case.lengths]
        arguments |= {"seqlens_q": lengths[0], "seqlens_k": lengths[1]}
    dropped = seeded_mask(device, (batch, heads, len_q, len_k), case.dropout_p)
    extra = [t for t in (bias, relative) if t is not None]

    def unpack(tensors):
        tensors = list(tensors)
        return (tensors.pop(0) if bias is not None else None), (tensors.pop(0) if relative is not None else None)

    def kernel(q, k, v, *rest):
        b, r = unpack(rest)
        torch.manual_seed(3)
        options = arguments | ({} if b is None else {"attn_mask": b})
        out, lse = attention(q, k, v, **options, relative_bias=r, enable_gqa=True, return_lse=True)
        return torch.cat([out, lse[..., None].to(out.dtype).masked_fill(lse[..., None].isinf(), 0.0)], -1)

    def plain(q, k, v, *rest):
        b, r = unpack(rest)
        if case.lengths is None:
            out, lse = case.reference(q, k, v, b, r, dropped)
        else:
            outs = []
            for i, (n, m) in enumerate(zip(*case.lengths, strict=True)):
                of_one = dataclasses.replace(case, mask=None if case.mask is None else of_sequence(case.mask, i))
                out, lse = of_one.reference(
                    q[i : i + 1, :, :n], k[i : i + 1, :, :m], v[i : i + 1, :, :m], of_sequence(b, i), r,
                    None if dropped is None else dropped[i : i + 1, :, :n, :m],
                )  # fmt: skip
                pad = torch.nn.functional.pad
                outs.append((pad(out, (0, 0, 0, len_q - n)), pad(lse, (0, len_q - n), value=float("-inf"))))
            out, lse = (torch.cat(parts) for parts in zip(*outs, strict=True))
        return torch.cat([out, lse[..., None].masked_fill(lse[..., None].isinf(), 0.0)], -1)

    assert_contract(kernel, plain, [*inputs, *extra], dtype, least_gradient=least)


def of_sequence(mask, i):
    return mask if mask is None or mask.dim() < 4 or mask.shape[0] == 1 else mask[i : i + 1]


def check_packed(device, case, lengths_q, lengths_k, heads=2, key_heads=2, dtype=None, bias=None,
                 relative=None, dim=32, value_dim=16, least=0.0):  # fmt: skip
    starts_q, starts_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    dtype = dtype or usual(device)
    total, longest = int(starts_q[-1]), (max(lengths_q), max(lengths_k))
    inputs = [
        randn(total, heads, dim, device=device),
        randn(int(starts_k[-1]), key_heads, dim, device=device, seed=2),
        randn(int(starts_k[-1]), key_heads, value_dim, device=device, seed=3),
    ]
    arguments = case.arguments(device, heads)
    extra = [t for t in (bias, relative) if t is not None]

    def unpack(tensors):
        tensors = list(tensors)
        return (tensors.pop(0) if bias is not None else None), (tensors.pop(0) if relative is not None else None)

    def kernel(q, k, v, *rest):
        b, r = unpack(rest)
        torch.manual_seed(3)
        options = arguments | ({} if b is None else {"attn_mask": b})
        out, lse = attention_varlen(
            q, k, v, starts_q.to(device), starts_k.to(device), *longest, **options, relative_bias=r, return_lse=True
        )
        lse = lse.transpose(0, 1)[..., None]
        return torch.cat([out, lse.to(out.dtype).masked_fill(lse.isinf(), 0.0)], -1)

    def plain(q, k, v, *rest):
        b, r = unpack(rest)
        parts = []
        for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            s, t = int(starts_q[i]), int(starts_k[i])
            one = [x[None].transpose(1, 2) for x in (q[s : s + n], k[t : t + m], v[t : t + m])]
            rows = [h * total + s for h in range(heads)]
            dropped = seeded_mask(device, (1, heads, n, m), case.dropout_p, rows)
            of_one = dataclasses.replace(case, mask=None if case.mask is None else of_sequence(case.mask, i))
            out, lse = of_one.reference(*one, of_sequence(b, i), r, dropped)
            parts.append(
                torch.cat([out, lse[..., None].masked_fill(lse[..., None].isinf(), 0.0)], -1)[0].transpose(0, 1)
            )
        return torch.cat(parts)

    assert_contract(kernel, plain, [*inputs, *extra], dtype, least_gradient=least)


CASES = {
    "causal, bottom right": Case(is_causal=True, alignment="bottom_right"),
    "window": Case(window=(10, 5)),
    "window, bottom right, left side": Case(window=(7, None), alignment="bottom_right"),
    "window that reaches one key past a block": Case(window=(1, 1)),
    "causal window": Case(is_causal=True, window=(20, None)),
    "softcap": Case(softcap=2.0),
    "ALiBi": Case(alibi=True, alignment="bottom_right"),
    "dropout and window": Case(window=(30, 30), dropout_p=0.2),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(CASES))
def test_option(device, name):
    check_dense(device, CASES[name], dense_inputs(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["window", "softcap", "ALiBi"])
@pytest.mark.essential
def test_option_in_half_precision(device, name, dtype):
    check_dense(device, CASES[name], dense_inputs(device), dtype)


def test_bottom_right_where_queries_outnumber_keys(device):
    """The first queries see nothing: output and gradients 0."""
    case = Case(is_causal=True, alignment="bottom_right")
    inputs = dense_inputs(device, len_q=90, len_k=40)
    check_dense(device, case, inputs)
    assert (attention(*inputs, is_causal=True, alignment="bottom_right")[:, :, :50] == 0).all()


def test_a_window_of_one(device):
    q, k, v = dense_inputs(device, len_k=70)
    torch.testing.assert_close(attention(q, k, v, window=(0, 0)), v, rtol=0, atol=SAME_ALGORITHM)


@pytest.mark.interpreter
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.essential
def test_heads_share_keys(device, key_heads):
    check_dense(device, Case(), dense_inputs(device, heads=4, key_heads=key_heads, value_dim=20))


BIASES = {"whole": (2, 2, 70, 90), "heads": (1, 2, 70, 90), "batch": (2, 1, 70, 90), "plane": (70, 90),
          "keys": (2, 1, 1, 90), "queries": (1, 2, 70, 1), "one number": (1, 1, 1, 1)}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(BIASES))
def test_gradient_of_a_bias_of_any_broadcast(device, name):
    shape = BIASES[name]
    least = LEAST_GRADIENT * (90 * 70 if 1 in shape[-2:] else 1)  # the gradients of one row add up to 0
    case = Case(dropout_p=0.2) if name == "heads" else Case()
    check_dense(device, case, dense_inputs(device), bias=randn(*shape, device=device, seed=4), least=least)


def test_a_bias_with_forbidden_keys_gets_gradient_0_there(device):
    q, k, v = dense_inputs(device)
    bias = torch.zeros(1, 1, 70, 90, device=device)
    bias[..., 40:] = float("-inf")
    bias[:, :, 3] = float("-inf")
    bias.requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v, bias).pow(2).sum(), bias)
    assert (grad[..., 40:] == 0).all() and (grad[:, :, 3] == 0).all() and grad[..., :40].abs().max() > 0


@pytest.mark.interpreter
@pytest.mark.parametrize("entries", [1, 21, 401])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.essential
def test_relative_bias_and_its_gradient(device, entries, heads):
    case = Case(alignment="bottom_right" if heads == 2 else "top_left", dropout_p=0.1 if entries == 21 else 0.0)
    relative = randn(heads, entries, device=device, seed=4)
    check_dense(device, case, dense_inputs(device), relative=relative, least=LEAST_GRADIENT * 90)


def test_relative_bias_of_any_strides(device):
    """`t5_relative_bias` gives a transposed one."""
    q, k, v = dense_inputs(device)
    by_distance = randn(9, q.shape[1], device=device, seed=4).t()
    with torch.no_grad():
        got = attention(q, k, v, relative_bias=by_distance, enable_gqa=True)
        expected = attention(q, k, v, relative_bias=by_distance.contiguous(), enable_gqa=True)
    assert torch.equal(got, expected)


@pytest.mark.interpreter
def test_lengths_of_padded_sequences(device):
    case = Case(lengths=([70, 0, 33], [12, 90, 50]))
    check_dense(device, case, dense_inputs(device, batch=3))


def test_lengths_with_options(device):
    case = Case(is_causal=True, alignment="bottom_right", dropout_p=0.2, lengths=([70, 20], [90, 50]))
    bias = randn(2, 1, 70, 90, device=device, seed=4)
    check_dense(device, case, dense_inputs(device), bias=bias, relative=randn(2, 9, device=device, seed=5))


def random_blocks(len_q=70, len_k=90, size=16, batch=1, heads=1):
    generator = torch.Generator().manual_seed(6)
    grid = torch.rand(batch, heads, -(-len_q // size), -(-len_k // size), generator=generator)
    kind = grid.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :len_q, :len_k]
    partly = torch.rand(batch, heads, len_q, len_k, generator=generator) > 0.5
    return BlockMask.from_mask((kind > 0.7) | ((kind > 0.4) & partly), size)


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.essential
def test_block_mask(device, size):
    check_dense(device, Case(blocks=random_blocks(size=size, batch=2, heads=2)), dense_inputs(device))


def test_block_mask_with_options(device):
    case = Case(blocks=random_blocks(), window=(50, None), softcap=3.0, dropout_p=0.2)
    bias, relative = randn(1, 4, 70, 90, device=device, seed=4), randn(4, 9, device=device, seed=5)
    inputs = dense_inputs(device, heads=4, key_heads=2)
    check_dense(device, case, inputs, bias=bias, relative=relative, least=LEAST_GRADIENT)


PACKED = {
    "plain": Case(),
    "causal, bottom right": Case(is_causal=True, alignment="bottom_right"),
    "window": Case(window=(8, 3)),
    "dropout": Case(dropout_p=0.2),
    "softcap and ALiBi": Case(softcap=2.0, alibi=True),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(PACKED))
@pytest.mark.essential
def test_packed(device, name):
    check_packed(device, PACKED[name], [40, 0, 37, 37, 73], [30, 12, 1, 69, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.essential
def test_packed_in_half_precision(device, dtype):
    check_packed(device, Case(), [40, 37, 73], [30, 1, 69], key_heads=1, dtype=dtype)


def test_packed_with_everything(device):
    case = Case(is_causal=True, window=(40, None), alignment="bottom_right", softcap=3.0, alibi=True, dropout_p=0.2,
                blocks=random_blocks(73, 69))  # fmt: skip
    bias, relative = randn(1, 4, 73, 69, device=device, seed=4), randn(4, 9, device=device, seed=5)
    check_packed(device, case, [40, 37, 73], [30, 38, 69], heads=4, bias=bias, relative=relative, least=LEAST_GRADIENT)


@pytest.mark.interpreter
@pytest.mark.parametrize("average", [False, True], ids=["each head", "average"])
@pytest.mark.essential
def test_weights(device, average):
    q, k, _ = dense_inputs(device, heads=4, key_heads=2)
    keep = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    keep[1] = False
    case = Case(is_causal=True, softcap=2.0, mask=keep)
    expected = case.reference(q.double().cpu(), k.double().cpu(), torch.eye(90).double().expand(2, 2, 90, 90))[0]
    options = {"is_causal": True, "softcap": 2.0, "enable_gqa": True, "average": average}
    got = attention_weights(q, k, keep.to(device), **options).cpu()
    expected = expected.mean(1) if average else expected
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=SAME_ALGORITHM)
    some = attention_weights(q, k, keep.to(device), **options, queries=(30, 41)).cpu()
    torch.testing.assert_close(some, got[..., 30:41, :], rtol=0, atol=SAME_ALGORITHM)


def test_weights_of_padded_sequences(device):
    q, k, _ = dense_inputs(device)
    lengths = torch.tensor([90, 33], device=device)
    got = attention_weights(q, k, seqlens_k=lengths, block_mask=random_blocks().to(device))
    keep = (torch.arange(90, device=device) < lengths[:, None])[:, None, None]
    expected = attention_weights(q, k, keep & random_blocks().to_dense().to(device))
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM)


def test_weights_of_a_packed_batch(device):
    lengths_q, lengths_k = [40, 0, 37], [30, 12, 69]
    starts = [torch.tensor([0, *n]).cumsum(0).to(device) for n in (lengths_q, lengths_k)]
    q, k = randn(77, 4, 16, device=device), randn(111, 2, 16, device=device, seed=2)
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 40, "max_seqlen_k": 69}
    got = attention_weights(q, k, softcap=2.0, **options).cpu()
    expected = torch.zeros(3, 4, 40, 69)
    for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one = [t[int(s[i]) : int(s[i + 1])].transpose(0, 1)[None].cpu() for t, s in zip((q, k), starts, strict=True)]
        eye = torch.eye(m).expand(1, 2, m, m)
        expected[i, :, :n, :m] = Case(softcap=2.0).reference(*one, eye)[0][0]
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM)


@pytest.mark.parametrize("gradient", ["bias", "relative"])
def test_two_runs_give_the_same_bits(device, gradient):
    def run():
        q, k, v = (t.half().requires_grad_() for t in dense_inputs(device, len_q=150, len_k=150))
        bias = randn(2, 301, device=device).half() if gradient == "relative" else randn(150, 150, device=device).half()
        bias.requires_grad_()
        options = {"relative_bias": bias} if gradient == "relative" else {"attn_mask": bias}
        out = attention(q, k, v, **options)
        return out, *torch.autograd.grad(out.sum(), (q, k, v, bias))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_numbers_stay_where_they_are(device, bad):
    """NaN or infinity in one sequence: it comes out there, as in torch, and nowhere else."""
    q, k, v = dense_inputs(device)
    v[0, 0, 3] = bad
    q[1, 1, 5] = bad
    out = attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.cpu() for t in (q, k, v)))
    assert torch.equal(out.isfinite().cpu(), expected.isfinite())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_empty_batches(device, dtype):
    none = torch.empty(0, 2, 8, dtype=dtype, device=device, requires_grad=True)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    out = attention_varlen(none, none, none, starts, starts, 0, 0)
    assert out.shape == (0, 2, 8)
    assert torch.autograd.grad(out.sum(), none)[0].shape == none.shape
    two = torch.zeros(3, dtype=torch.int32, device=device)
    assert attention_varlen(none, none, none, two, two, 0, 0).shape == (0, 2, 8)


def test_activation_checkpointing_draws_the_same_dropout(request, device):
    if request.config.getoption("--device") == "ttsem":
        pytest.skip("checkpointing saves the state of a GPU's generator, which ttsem has not")
    from torch.utils.checkpoint import checkpoint

    inputs = [t.requires_grad_() for t in dense_inputs(device)]

    def gradients(call):
        torch.manual_seed(3)
        return torch.autograd.grad(call(*inputs).sum(), inputs)

    def layer(q, k, v):
        return attention(q, k, v, dropout_p=0.3)

    expected = gradients(layer)
    got = gradients(lambda *t: checkpoint(layer, *t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_vmap_works_or_says_what_to_do(device, backend):
    q, k, v = dense_inputs(device, batch=3)
    call = torch.func.vmap(lambda q, k, v: attention(q[None], k[None], v[None], is_causal=True)[0])
    if backend == "eager":
        torch.testing.assert_close(call(q, k, v), attention(q, k, v, is_causal=True))
    else:
        with pytest.raises(RuntimeError, match="vmap"):
            call(q, k, v)


# Each combination is compiled anew, five seconds; Triton's interpreter needs none of that.
EXAMPLES = 10 if os.environ.get("TRITON_INTERPRET") == "1" else 15


@pytest.mark.slow
@pytest.mark.interpreter
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_combinations_of_options(request, data):
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    draw = data.draw
    packed = draw(st.booleans(), "packed")
    batch, heads, group = (
        draw(st.integers(1, 3), "batch"),
        draw(st.integers(1, 2), "key heads"),
        draw(st.integers(1, 2)),
    )
    side = st.one_of(st.none(), st.integers(0, 60))
    case = Case(
        is_causal=draw(st.booleans(), "causal"), window=draw(st.one_of(st.none(), st.tuples(side, side)), "window"),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])), softcap=draw(st.sampled_from([None, 3.0])),
        alibi=draw(st.booleans(), "alibi"), dropout_p=draw(st.sampled_from([0.0, 0.3]), "dropout"),
    )  # fmt: skip
    sizes = [draw(st.lists(st.integers(0, 80), min_size=batch, max_size=batch)) for _ in range(2)]
    longest = [max(1, *n, 1) for n in sizes]
    sizes[0][0], sizes[1][0] = longest
    if draw(st.booleans(), "blocks"):
        case.blocks = random_blocks(*longest)
    bias = relative = None
    kind = draw(st.sampled_from(["none", "bool", "bias"]), "mask")
    if kind == "bool":
        case.mask = torch.rand(batch, 1, *longest, generator=torch.Generator().manual_seed(7)) > 0.3
    elif kind == "bias":
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads * group, *longest)]
        bias = randn(*shape, device=device, seed=4)
    if draw(st.booleans(), "relative"):
        relative = randn(draw(st.sampled_from([1, heads * group])), 2 * draw(st.integers(0, 70)) + 1, device=device)
    dtype, dim = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([8, 17, 32]))
    least = LEAST_GRADIENT * longest[0] * longest[1]
    if packed:
        check_packed(device, case, *sizes, heads * group, heads, dtype, bias, relative, dim, 16, least)
    else:
        case.lengths = (sizes[0], sizes[1]) if draw(st.booleans(), "lengths") else None
        inputs = dense_inputs(device, batch, heads * group, heads, *longest, dim, 16)
        check_dense(device, case, inputs, dtype, bias, relative, least)


@pytest.mark.interpreter
@pytest.mark.parametrize("average", [False, True], ids=["each head", "average"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_output_and_weights_of_one_call(device, dropout_p, average):
    keep = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    keep[1, ..., :3] = False  # with the causal mask the first queries see nothing
    case = Case(is_causal=True, mask=keep, dropout_p=dropout_p)
    inputs = dense_inputs(device)
    dropped = seeded_mask(device, (2, 2, 70, 90), dropout_p)

    def kernel(q, k, v):
        torch.manual_seed(3)
        out, weights = attention_with_weights(q, k, v, keep.to(device), dropout_p, True, average=average)
        assert weights.dtype == torch.promote_types(q.dtype, torch.float32)
        return torch.cat([out.flatten(), weights.to(out.dtype).flatten()])

    def plain(q, k, v):
        out, _ = case.reference(q, k, v, dropped=dropped)
        weights, _ = case.reference(q, k, torch.eye(90).to(q).expand(2, 2, 90, 90), dropped=dropped)
        return torch.cat([out.flatten(), (weights.mean(1) if average else weights).flatten()])

    assert_contract(kernel, plain, inputs, usual(device))
    if average:  # weights of which nothing is computed leave the backward pass to the kernels
        leaves = [t.requires_grad_() for t in inputs]
        arguments = (*leaves, keep.to(device), dropout_p, True)
        grads = []
        for call in (attention, attention_with_weights):
            torch.manual_seed(3)
            out = call(*arguments)
            grads.append(torch.autograd.grad((out if call is attention else out[0]).square().sum(), leaves))
        for got, expected in zip(*reversed(grads), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM)
