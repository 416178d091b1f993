"""fusenc.kernels.attention against float64."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_contract
from fusenc.kernels import attention, last_backend
from fusenc.kernels.common import device as gpu
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import LEAST_GRADIENT
from torch import Tensor

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def reference(mask=None, is_causal=False, scale=None, dropped=None, dropout_p=0.0):
    """Attention written out, with the library's rule for rows that have nothing to attend to."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        allowed = torch.ones(scores.shape, dtype=torch.bool, device=q.device)
        if is_causal:
            allowed = allowed.tril()
        if mask is not None and mask.dtype == torch.bool:
            allowed = allowed & mask
        elif mask is not None:
            scores = scores + mask.to(scores.dtype)
            allowed = allowed & (mask > float("-inf"))
        nothing = ~allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed & ~nothing, float("-inf"))
        p = scores.softmax(-1).masked_fill(nothing, 0.0)
        if dropped is not None:
            p = (p / (1 - dropout_p)).masked_fill(dropped, 0.0)
        return p @ v

    return run


def qkv(batch=2, heads=2, len_q=70, len_k=70, head_dim=32, value_dim=None, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shapes = ((len_q, head_dim), (len_k, head_dim), (len_k, value_dim or head_dim))
    return [torch.randn(batch, heads, *shape, generator=generator).to(device) for shape in shapes]


def check(inputs, dtype=torch.float32, mask=None, is_causal=False, scale=None, backend=None, least=0.0):
    def kernel(q, k, v):
        return attention(q, k, v, mask, 0.0, is_causal, scale)

    assert_contract(kernel, reference(mask, is_causal, scale), inputs, dtype, least_gradient=least)
    if backend is not None:
        assert last_backend() == backend


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.essential
def test_plain_self_attention(device, backend, dtype):
    check(qkv(device=device), dtype, backend=backend)


@pytest.mark.interpreter
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 128, 256])
@pytest.mark.essential
def test_head_sizes(device, head_dim):
    check(qkv(1, 1, 40, 70, head_dim, device=device), torch.float16)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 128, 256])
def test_head_sizes_in_float32(device, head_dim):
    check(qkv(1, 1, 40, 70, head_dim, device=device), torch.float32)


@pytest.mark.parametrize("value_dim", [8, 48])
def test_value_head_size_differs(device, value_dim):
    check(qkv(head_dim=32, value_dim=value_dim, device=device))


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (1, 130), (130, 1), (63, 65), (128, 64), (200, 129)])
def test_lengths_that_are_no_multiple_of_a_block(device, len_q, len_k):
    check(qkv(1, 2, len_q, len_k, device=device), least=LEAST_GRADIENT if len_k == 1 else 0.0)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("len_q", "len_k"), [(150, 150), (70, 200), (200, 70)], ids=["square", "wide", "tall"])
@pytest.mark.essential
def test_causal_is_aligned_at_the_top_left(device, dtype, len_q, len_k):
    check(qkv(1, 2, len_q, len_k, device=device), dtype, is_causal=True)


MASK_SHAPES = [(2, 1, 1, 90), (1, 1, 70, 90), (2, 2, 70, 90), (70, 90), (90,), (1, 2, 70, 1)]


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.essential
def test_masks_of_any_broadcast(device, shape, kind):
    keep = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4).to(device)
    mask = keep if kind == "bool" else torch.randn(shape).to(device).masked_fill(~keep, float("-inf"))
    check(qkv(len_k=90, device=device), mask=mask)


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [-1e4, -1e5, -1e9, -1e30, torch.finfo(torch.float32).min], ids=str)
def test_rows_masked_by_a_finite_number_are_no_empty_rows(device, value):
    """As in torch the softmax of such a row goes on without the number; some rows have an unmasked key, some none."""
    mask = torch.zeros(70, 90, device=device)
    mask[:30, 20:] = value
    mask[30:50] = value
    check(qkv(1, 2, len_k=90, device=device), mask=mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.essential
def test_a_row_with_every_key_masked_gives_zeros(device, kind, dtype):
    q, k, v = (t.to(dtype).requires_grad_() for t in qkv(device=device))
    keep = torch.ones(2, 1, 70, 70, dtype=torch.bool, device=device)
    keep[0, 0, 3] = False  # one query
    keep[1] = False  # a whole sequence
    mask = keep if kind == "bool" else torch.zeros(keep.shape, device=device).masked_fill(~keep, float("-inf"))
    out, lse = attention(q, k, v, mask, return_lse=True)
    assert (out[0, :, 3] == 0).all() and (out[1] == 0).all()
    assert (lse[0, :, 3] == float("-inf")).all() and (lse[1] == float("-inf")).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, :, 3] == 0).all() and all((g[1] == 0).all() for g in grads)
    check(qkv(device=device), dtype, mask=mask)


def test_causal_and_mask_both_apply(device):
    keep = torch.arange(150, device=device) < torch.tensor([[150], [90]], device=device)
    check(qkv(2, 1, 150, 150, device=device), mask=keep[:, None, None, :], is_causal=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(device, scale):
    check(qkv(device=device), scale=scale)


def test_large_scores_do_not_overflow(device):
    q, k, v = qkv(device=device)
    check([q * 2, k * 2, v])
    inputs = [t.requires_grad_() for t in (q * 1e3, k * 1e3, v)]
    out = attention(*inputs)
    assert out.isfinite().all() and out.abs().max() <= v.abs().max() * 1.001
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("layout", ["heads last", "one projection", "reversed", "expanded"])
def test_strides(device, layout):
    if layout == "heads last":
        inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(device=device)]
    elif layout == "one projection":
        inputs = list(torch.randn(2, 70, 3, 2, 32, device=device).permute(2, 0, 3, 1, 4).unbind(0))
    elif layout == "reversed":
        inputs = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in qkv(device=device)]
    else:
        inputs = [t[:1, :1].expand(2, 2, 70, 32) for t in qkv(device=device)]
    check(inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
@pytest.mark.essential
def test_dropout_uses_the_documented_mask(device, dtype, dropout_p):
    inputs = qkv(1, 2, 70, 90, device=device)
    torch.manual_seed(3)
    seed = dropout.new_seed(inputs[0])
    dropped = dropout.drop_mask(seed, torch.Size((1, 2, 70, 90)), dropout_p)

    def kernel(q, k, v):
        torch.manual_seed(3)
        return attention(q, k, v, dropout_p=dropout_p)

    plain = reference(dropped=dropped, dropout_p=min(dropout_p, 0.5))  # any finite factor serves where all is dropped
    assert_contract(kernel, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.essential
def test_log_sum_exp_and_its_gradient(device, dtype):
    def lse_of(q, k, v):
        out, lse = attention(q, k, v, is_causal=True, return_lse=True)
        assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        return torch.cat([out, lse.unsqueeze(-1).to(out.dtype)], -1)

    def plain(q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        allowed = torch.ones(scores.shape, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
        return torch.cat([scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)], -1)

    assert_contract(lse_of, plain, qkv(device=device), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_configurations_of_an_architecture(device, monkeypatch, arch, head_dim):
    monkeypatch.setattr(gpu, "architecture", lambda index: arch)
    check(qkv(1, 2, 300, 300, head_dim, device=device), torch.float16, is_causal=True)


@pytest.mark.essential
def test_two_runs_give_the_same_bits(device):
    def run():
        q, k, v = (t.half().requires_grad_() for t in qkv(2, 2, 150, 150, device=device))
        out = attention(q, k, v, is_causal=True)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_without_gradients_gives_the_same_output(device):
    q, k, v = qkv(device=device)
    expected = attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), expected, rtol=0, atol=0)


def test_a_mask_with_gradient(device):
    bias = torch.randn(1, 2, 70, 70, device=device)
    inputs = [*qkv(device=device), bias]

    def plain(q, k, v, bias):
        return (q @ k.transpose(-1, -2) / math.sqrt(32) + bias).softmax(-1) @ v

    assert_contract(lambda q, k, v, bias: attention(q, k, v, bias), plain, inputs, torch.float32)


@pytest.mark.parametrize(("batch", "len_q", "len_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_inputs(device, batch, len_q, len_k):
    q, k, v = (t.requires_grad_() for t in qkv(batch, 2, len_q, len_k, device=device))
    out = attention(q, k, v)
    assert out.shape == (batch, 2, len_q, 32) and (out == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(grads, (q, k, v), strict=True))


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 2), len_q=st.integers(1, 150), len_k=st.integers(1, 150),
    head_dim=st.sampled_from([8, 16, 17, 33, 64, 96]), value_dim=st.sampled_from([8, 16, 40]),
    dtype=st.sampled_from(DTYPES), is_causal=st.booleans(),
    mask=st.sampled_from(["none", "bool", "float"]), rows=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_combinations(
    request, batch, heads, len_q, len_k, head_dim, value_dim, dtype, is_causal, mask, rows, seed
):  # fmt: skip
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    attn_mask = None
    if mask != "none":
        generator = torch.Generator().manual_seed(seed)
        keep = (torch.rand(batch, 1, len_q if rows else 1, len_k, generator=generator) > 0.3).to(device)
        attn_mask = keep if mask == "bool" else torch.zeros(keep.shape, device=device).masked_fill(~keep, float("-inf"))
    inputs = qkv(batch, heads, len_q, len_k, head_dim, value_dim, device)
    check(inputs, dtype, attn_mask, is_causal, least=LEAST_GRADIENT)  # few keys are among the cases
