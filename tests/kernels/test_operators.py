"""The operators of torch.compile, and the eager path's gradients."""

from __future__ import annotations

import pytest
import torch
from fusenc.kernels import (
    BlockMask,
    add_norm,
    alibi_slopes,
    attention,
    attention_varlen,
    attention_weights,
    attention_with_weights,
    ffn,
    linear_act,
)
from fusenc.kernels.add_norm.arguments import Options as AddNormOptions
from fusenc.kernels.add_norm.arguments import Tensors as AddNormTensors
from fusenc.kernels.add_norm.op import ADD_NORM
from fusenc.kernels.attention.arguments import Options, Tensors
from fusenc.kernels.attention.op import ATTENTION, WITH_WEIGHTS
from fusenc.kernels.ffn.arguments import LinearOptions
from fusenc.kernels.ffn.arguments import Options as FfnOptions
from fusenc.kernels.ffn.arguments import Tensors as FfnTensors
from fusenc.kernels.ffn.op import FFN, LINEAR_ACT
from tolerances import HALF_PRECISION, SAME_ALGORITHM

SEED = torch.tensor([5])


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


ALL5 = [True] * 5


def attention_arguments(dtype=torch.float32, seed=None, options=(), packed=False, sizes=(5, 7), needs=ALL5, **tensors):
    shapes = ((8, 3, 8), (11, 3, 8)) if packed else ((2, 3, 5, 8), (2, 3, 7, 8))
    q, k, v = (randn(*shape, dtype=dtype) for shape in (shapes[0], shapes[1], shapes[1]))
    numbers = Options(0.4, 0.3 if seed is not None else 0.0, packed=packed, return_lse=len(sizes) == 2)
    numbers = numbers._replace(**dict(options))
    return *Tensors(q, k, v, seed=seed, **tensors), *numbers, *sizes, needs


KEEP = torch.arange(7) < torch.tensor([[7], [0]])
BLOCKS_5_7 = BlockMask.from_function(lambda q, k: (q - k).abs() < 4, 5, 7, block_size=16)
CU_Q, CU_K = torch.tensor([0, 5, 5, 8]), torch.tensor([0, 4, 10, 11])
ATTENTIONS = {
    "plain": attention_arguments(),
    "mask": attention_arguments(attn_mask=KEEP[:, None, None, :]),
    "dropout": attention_arguments(seed=SEED),
    "window, softcap": attention_arguments(options={"left": 1, "right": 2, "bottom_right": True, "softcap": 2.0}),
    "biases": attention_arguments(
        attn_mask=randn(1, 3, 1, 7), relative_bias=randn(3, 5), alibi_slopes=torch.rand(1, 3), seed=SEED
    ),
    "lengths": attention_arguments(
        seqlens_q=torch.tensor([5, 2], dtype=torch.int32), seqlens_k=torch.tensor([0, 6], dtype=torch.int32)
    ),
    "packed": attention_arguments(
        packed=True, seqlens_q=torch.tensor([0, 5, 8], dtype=torch.int32),
        seqlens_k=torch.tensor([0, 4, 11], dtype=torch.int32), attn_mask=randn(2, 1, 5, 7),
    ),
}  # fmt: skip
WITH_WEIGHTS_CASES = {
    "each head": attention_arguments(sizes=(5, 7, 0, 5), seed=SEED),
    "average": attention_arguments(
        sizes=(5, 7, 0, 5), options={"average": True, "right": 0}, attn_mask=randn(1, 1, 5, 7)
    ),
    "some queries": attention_arguments(sizes=(5, 7, 2, 3), needs=[False] * 5),
}  # fmt: skip


def add_norm_arguments(shape, residual=True, x_bias=False, seed=None, needs=ALL5, **numbers):
    x, r, xb = randn(*shape), randn(*shape) if residual else None, randn(shape[-1]) if x_bias else None
    return x, r, randn(shape[-1]), randn(shape[-1]), xb, seed, *AddNormOptions(**numbers), needs


ADD_NORMS = {
    "full": add_norm_arguments((4, 6), return_sum=True),
    "plain norm": add_norm_arguments((4, 6), residual=False, return_sum=True),
    "dropout": add_norm_arguments((2, 4, 6), x_bias=True, seed=SEED, dropout_p=0.3),
    "recompute": add_norm_arguments(
        (4, 6), x_bias=True, seed=SEED, dropout_p=0.3, rms=True, zero_centered=True, recompute=True
    ),
}  # fmt: skip


def ffn_arguments(shape, d_out, seeds=(None, None), bias=True, residual=False, needs=(True,) * 6, **numbers):
    numbers = FfnOptions(**numbers)
    weights = randn(10, shape[-1]), randn(d_out, 5 if numbers.gated else 10)
    biases = (randn(10), randn(d_out)) if bias else (None, None)
    added = randn(*shape[:-1], d_out) if residual else None
    return randn(*shape), weights[0], biases[0], weights[1], biases[1], added, *seeds, *numbers, list(needs)


NOT_KEPT = {"keep_hidden": False, "keep_activated": False}
FFNS = {
    "full": ffn_arguments((2, 4, 6), 6, residual=True),
    "no bias": ffn_arguments((4, 6), 3, bias=False, activation="relu", fused=True),
    "dropout": ffn_arguments(
        (4, 6), 6, (SEED, SEED + 1), dropout_p=0.3, out_dropout_p=0.2, activation="gelu_tanh", keep_activated=False
    ),
    "gated, nothing kept": ffn_arguments(
        (4, 6), 6, (None, SEED), residual=True, out_dropout_p=0.2, activation="silu", gated=True, **NOT_KEPT
    ),
}  # fmt: skip
LINEAR_ACTS = {
    "full": (
        randn(2, 4, 6), randn(10, 6), randn(10), SEED, *LinearOptions(0.2, "silu", True), [True] * 3,
    ),
    "nothing kept": (
        randn(4, 6), randn(10, 6), None, None, *LinearOptions(activation="relu2", keep_hidden=False), [True] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ATTENTIONS))
def test_opcheck_attention(case):
    torch.library.opcheck(ATTENTION.operator, ATTENTIONS[case])


@pytest.mark.parametrize("case", list(WITH_WEIGHTS_CASES))
def test_opcheck_attention_weights(case):
    torch.library.opcheck(WITH_WEIGHTS.operator, WITH_WEIGHTS_CASES[case])


@pytest.mark.parametrize("case", list(ADD_NORMS))
def test_opcheck_add_norm(case):
    torch.library.opcheck(ADD_NORM.operator, ADD_NORMS[case])


@pytest.mark.parametrize("case", list(FFNS))
def test_opcheck_ffn(case):
    torch.library.opcheck(FFN.operator, FFNS[case])


@pytest.mark.parametrize("case", list(LINEAR_ACTS))
def test_opcheck_linear_act(case):
    torch.library.opcheck(LINEAR_ACT.operator, LINEAR_ACTS[case])


def test_opcheck_inference():
    with torch.no_grad():
        arguments = add_norm_arguments((4, 6), needs=[False] * 5)
        torch.library.opcheck(ADD_NORM.operator, arguments, test_utils="test_faketensor")
        arguments = ffn_arguments((2, 4, 6), 6, residual=True, needs=[False] * 6)
        torch.library.opcheck(FFN.operator, arguments, test_utils="test_faketensor")
        torch.library.opcheck(ATTENTION.operator, attention_arguments(needs=[False] * 5), test_utils="test_faketensor")


def seeded(function):
    def run(*args):
        torch.manual_seed(0)
        return function(*args)

    return run


CALLS = {
    "attention": (
        lambda q, k, v: attention(q, k, v, KEEP[:, None, None, :], dropout_p=0.2, return_lse=True),
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    ),
    "attention, causal": (
        lambda q, k, v: attention(q, k, v, is_causal=True), [(1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3)],
    ),
    "attention, mask with gradient": (
        lambda q, k, v, bias: attention(q, k, v, bias), [(1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3), (2, 1, 7)],
    ),
    "attention, everything": (
        lambda q, k, v, m, r: attention(
            q, k, v, m, 0.2, True, None, True, window=(3, 1), relative_bias=r, softcap=2.0, alignment="bottom_right",
            alibi_slopes=torch.tensor([0.1, 0.2]), seqlens_k=torch.tensor([7]), block_mask=BLOCKS_5_7, return_lse=True,
        )[0],
        [(1, 2, 5, 4), (1, 1, 7, 4), (1, 1, 7, 3), (2, 5, 7), (2, 5)],
    ),
    "attention, packed": (
        lambda q, k, v: attention_varlen(q, k, v, CU_Q, CU_K, 5, 7, is_causal=True, dropout_p=0.2),
        [(8, 2, 4), (11, 2, 4), (11, 2, 3)],
    ),
    "attention with weights": (
        lambda q, k, v: attention_with_weights(q, k, v, KEEP[:, None, None, :], 0.2, average=True),
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    ),
    "add_norm": (
        lambda x, r, w, b: add_norm(x, r, w, b, dropout_p=0.2, return_sum=True), [(4, 6), (4, 6), (6,), (6,)],
    ),
    "add_norm, everything": (
        lambda x, r, w, b, xb: add_norm(
            x, r, w, b, x_bias=xb, norm="rms", dropout_p=0.2, zero_centered_weight=True, recompute=True,
            return_sum=True, eps=0.0,
        ),
        [(4, 6), (4, 6), (6,), (6,), (6,)],
    ),
    "ffn": (lambda *t: ffn(*t, dropout_p=0.2), [(4, 6), (10, 6), (10,), (3, 10), (3,)]),
    "ffn, everything": (
        lambda *t: ffn(
            *t[:5], residual=t[5], gated=True, activation="silu", dropout_p=0.2, out_dropout_p=0.1,
            recompute="activation" if t[0].dtype == torch.float32 else False,
        ),
        [(4, 6), (10, 6), (10,), (3, 5), (3,), (4, 3)],
    ),
    "linear_act": (
        lambda *t: linear_act(*t, "quick_gelu", gated=True, dropout_p=0.2), [(4, 6), (10, 6), (10,)],
    ),
    "ffn, relu": (lambda *t: ffn(*t, activation="relu"), [(4, 6), (10, 6), (10,), (3, 10), (3,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_gradcheck_in_float64(name):
    call, shapes = CALLS[name]
    inputs = [randn(*shape, dtype=torch.float64) for shape in shapes]
    if name == "attention":  # some of its rows have log-sum-exp -inf, which finite differences cannot take
        lse = seeded(call)(*inputs)[1]
        assert lse.dtype == torch.float64
        assert torch.autograd.gradcheck(lambda *t: seeded(call)(*t)[0], inputs)
    else:
        assert torch.autograd.gradcheck(seeded(call), inputs)


@pytest.mark.parametrize("operator", ["attention", "add_norm", "ffn"])
def test_backward_formula_agrees_with_autograd(operator):
    """The operator's own backward formula against autograd through the eager path, dropout on."""
    cases, op = {
        "attention": (ATTENTIONS, ATTENTION.operator),
        "add_norm": (ADD_NORMS, ADD_NORM.operator),
        "ffn": (FFNS, FFN.operator),
    }[operator]
    from fusenc.kernels.add_norm import eager as add_norm_eager
    from fusenc.kernels.attention import eager as attention_eager
    from fusenc.kernels.ffn import eager as ffn_eager

    eager = {
        "attention": lambda *a: attention_eager.attention(Tensors(*a[:13]), Options(*a[13:-3]), *a[-3:-1])[0],
        "add_norm": lambda *a: add_norm_eager.add_norm(AddNormTensors(*a[:6]), AddNormOptions(*a[6:-1]))[0],
        "ffn": lambda *a: ffn_eager.ffn(FfnTensors(*a[:8]), FfnOptions(*a[8:-1])),
    }[operator]
    for arguments in cases.values():
        arguments = [
            a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) and a.requires_grad else a
            for a in arguments
        ]
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        got, expected = op(*arguments)[0], eager(*arguments)
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        for g, e in zip(
            torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("name", list(CALLS))
def test_compiles_whole_with_the_same_result(name):
    torch._dynamo.reset()
    call, shapes = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [randn(*shape) for shape in shapes]
    if name == "attention, mask with gradient":
        got, expected = compiled(*inputs), call(*inputs)
    else:
        got, expected = seeded(compiled)(*inputs), seeded(call)(*inputs)
    got, expected = (out if isinstance(out, tuple) else (out,) for out in (got, expected))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    grads = [torch.autograd.grad(out[0].sum(), inputs) for out in (got, expected)]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_dynamic_shapes_do_not_recompile():
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def block(q, k, v, x, w, b):
        return attention(q, k, v).sum() + add_norm(x, x, w, b).sum() + ffn(x, x.t() @ x, w, x, None).sum()

    w, b = randn(6), randn(6)
    compiled = []
    for n in (5, 9, 12):
        block(*(randn(2, 3, n, 8) for _ in range(3)), randn(n, 6), w, b).backward()
        compiled.append(counter.frame_count)
    assert compiled[0] > 0 and compiled == [compiled[0]] * 3


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_options_compile_with_any_sizes(dynamic):
    torch._dynamo.reset()
    blocks = BlockMask.sliding_window(7, 2, block_size=16)

    def block(q, lengths):
        return attention(
            q, q, q, window=(5, None), alibi_slopes=alibi_slopes(3), seqlens_k=lengths, block_mask=blocks, scale=-1.0
        )

    q, lengths = randn(2, 3, 7, 8), torch.tensor([7, 4])
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(q, lengths), block(q, lengths), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q = randn(1, 2, 5, 8)
    x, w, b = randn(5, 8), randn(8), randn(8)
    with torch.autocast("cpu", dtype=dtype):
        assert attention(q, q, q).dtype == dtype
        slopes = torch.rand(1, 2)
        arguments = *Tensors(q, q, q, alibi_slopes=slopes), *Options(0.3), 5, 5, ALL5
        assert ATTENTION.operator(*arguments)[0].dtype == dtype
        assert ffn(x, randn(10, 8), None, randn(8, 10), None).dtype == dtype
        assert FFN.operator(*ffn_arguments((5, 8), 8))[0].dtype == dtype
        normed = add_norm(x.to(dtype), x, w, b)
        assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x.to(dtype) + x, (8,), w, b))
    assert attention(q, q, q).dtype == torch.float32


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_norm_compiles_with_every_option(recompute, residual_dtype):
    def block(x, residual, weight, x_bias):
        return add_norm(
            x, residual, weight, x_bias=x_bias, norm="rms", zero_centered_weight=True, residual_in_fp32=True,
            return_sum=True, recompute=recompute,
        )  # fmt: skip

    inputs = [randn(5, 8, dtype=torch.bfloat16), randn(5, 8, dtype=residual_dtype), randn(8), randn(8)]
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    outputs = [compiled(*inputs), block(*inputs)]
    for got, expected in zip(*outputs, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
    upstream = [torch.randn_like(t) for t in outputs[0]]
    grads = [torch.autograd.grad(out, inputs, upstream) for out in outputs]
    for got, expected in zip(*grads, strict=True):
        # bfloat16 with different roundings on the way: eager autograd's against the formula's.
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_meta_tensors_give_shapes_without_memory():
    q = torch.empty(2, 3, 5, 8, device="meta", requires_grad=True)
    x, w = torch.empty(4, 8, device="meta"), torch.empty(8, 8, device="meta")
    attention(q, q, q, dropout_p=0.1).sum().backward()
    assert q.grad.shape == q.shape and q.grad.is_meta
    assert attention_weights(q, q, softcap=1.0).is_meta and attention(q, q, q, window=(1, 1)).is_meta
    assert add_norm(x, x, w[0], w[0], dropout_p=0.1).is_meta and ffn(x, w, None, w, None, dropout_p=0.1).is_meta


def test_eager_attention_computes_in_float32_under_autocast():
    """Whatever path the eager implementation takes; the compiled one returns the same."""
    q = torch.randn(1, 2, 40, 16) * 4
    plain, lse = attention(q, q, q, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, got = attention(q, q, q, return_lse=True)
        _, compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, q, q, return_lse=True)
    assert out.dtype == torch.bfloat16 and got.dtype == compiled.dtype == torch.float32
    rounded = attention(*[q.bfloat16().float()] * 3, return_lse=True)
    torch.testing.assert_close(got, rounded[1], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    torch.testing.assert_close(out.float(), rounded[0], rtol=HALF_PRECISION, atol=HALF_PRECISION)
    assert plain.dtype == lse.dtype == torch.float32


def test_a_mask_with_gradient_and_dropout_compiles():
    torch._dynamo.reset()
    q, bias = randn(1, 2, 5, 8), randn(5, 5)

    def loss(q, bias):
        return attention(q, q, q, bias, dropout_p=0.3).sum()

    expected = torch.autograd.grad(seeded(loss)(q, bias), (q, bias))
    compiled = torch.autograd.grad(seeded(torch.compile(loss, fullgraph=True, backend="aot_eager"))(q, bias), (q, bias))
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
