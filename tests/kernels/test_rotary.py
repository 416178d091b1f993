"""fusenc.kernels.rotary against float64."""

from __future__ import annotations

import pytest
import torch
from contract import assert_contract
from fusenc.kernels import last_backend, rotary, rotary_tables
from fusenc.kernels.rotary.op import ROTARY
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SAME_ALGORITHM

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
kernel = pytest.mark.kernel


def plain(x, cos, sin, interleaved=False):
    """Hugging Face's composition; cos and sin broadcast to `x` with half of the rotated columns."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    size = 2 * cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        turned = torch.cat((-rotated[..., size // 2 :], rotated[..., : size // 2]), -1)
    return torch.cat((rotated * cos + turned * sin, rest), -1)


def heads(device, batch=2, q=3, k=1, length=9, size=24):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, n, length, size, generator=generator).to(device) for n in (q, k)]


def joined(outs):
    return torch.cat([out.flatten() for out in outs if out is not None])


def hold(inputs, dtype, cos, sin, rows=None, interleaved=False, **options):
    """`rows`: the cosines and sines that `plain` takes, if not those of the call."""
    c, s = rows or (cos, sin)

    def ours(q, k=None):
        return joined(rotary(q, k, cos, sin, interleaved=interleaved, **options))

    assert_contract(ours, lambda *t: joined([plain(x, c, s, interleaved) for x in t]), inputs, dtype)


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("rotated", [2, 16, 24])
@pytest.mark.essential
def test_query_and_key(device, backend, dtype, interleaved, rotated):
    cos, sin = (t.to(dtype).to(device) for t in rotary_tables(12, rotated))
    hold(heads(device), dtype, cos, sin, (cos[:9], sin[:9]), interleaved)
    assert last_backend() == backend


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "each sequence its own"])
def test_hugging_faces_form(device, shared):
    cos, sin = torch.randn(2, 1 if shared else 2, 9, 8, device=device)
    hold(
        heads(device), torch.float32, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), (cos[:, None], sin[:, None])
    )


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_position_ids(device, shape, dtype):
    cos, sin = rotary_tables(20, 24, device=device)
    ids = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(3)).to(device)
    rows = [t[ids] if len(shape) == 1 else t[ids][:, None] for t in (cos, sin)]
    hold(heads(device), torch.float32, cos, sin, rows, position_ids=ids.to(dtype))


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("with_ids", [False, True])
def test_packed(device, with_ids):
    query, key = (torch.randn(70, n, 16, generator=torch.Generator().manual_seed(n)).to(device) for n in (4, 2))
    cos, sin = rotary_tables(80, 12, device=device)
    ids = torch.cat((torch.arange(30), torch.arange(40))).to(device) if with_ids else None
    rows = [(t[:70] if ids is None else t[ids])[:, None] for t in (cos, sin)]
    hold([query, key], torch.float32, cos, sin, rows, position_ids=ids)


@kernel
@pytest.mark.parametrize("layout", ["[B, L, H, D]", "fused projection", "column step", "expanded"])
def test_strides(device, layout):
    query, key = heads(device)
    if layout == "[B, L, H, D]":
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    elif layout == "fused projection":
        query, key, _ = torch.randn(2, 9, 3, 3, 24, device=device).permute(2, 0, 3, 1, 4).unbind(0)
    elif layout == "column step":
        query = torch.randn(2, 3, 9, 48, device=device)[..., ::2]
    else:
        key = key[:1].expand(2, 1, 9, 24)
    cos, sin = rotary_tables(9, 20, device=device)
    out, _ = rotary(query, key, cos, sin)
    if layout in ("[B, L, H, D]", "fused projection"):
        assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, plain(query, cos, sin), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    leaves = [t.detach().requires_grad_() for t in (query, key)]
    weights = [torch.randn(t.shape, device=device) for t in leaves]
    got = torch.autograd.grad(rotary(*leaves, cos, sin), leaves, weights)
    want = torch.autograd.grad([plain(t, cos, sin) for t in leaves], leaves, weights)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@kernel
@pytest.mark.parametrize("form", ["table", "ids", "Hugging Face's", "packed"])
@pytest.mark.parametrize("size", [6, 32])
def test_a_plan_serves_other_batches_and_lengths(device, form, size):
    generator = torch.Generator().manual_seed(1)
    for batch, length in ((1, 1), (0, 4), (3, 1), (2, 7), (1, 5), (2, 4)):
        query, key = (torch.randn(batch, length, n, size, generator=generator).to(device) for n in (2, 1))
        ids, tables = None, rotary_tables(9, size, device=device)
        rows = [t[:length] for t in tables]
        if form == "packed":
            query, key = query.flatten(0, 1), key.flatten(0, 1)
            tables = [t.repeat(batch, 1) for t in rows]
            rows = [t[:, None] for t in tables]
        else:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        if form == "ids":
            ids = torch.randint(9, (batch, length), generator=generator).to(device)
            rows = [t[ids][:, None] for t in tables]
        elif form == "Hugging Face's":
            rows = [torch.randn(batch, 1, length, size // 2, generator=generator).to(device) for _ in range(2)]
            tables = [torch.cat((t[:, 0], t[:, 0]), -1) for t in rows]
        for got, x in zip(rotary(query, key, *tables, position_ids=ids), (query, key), strict=True):
            torch.testing.assert_close(got, plain(x, *rows), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@kernel
def test_no_key_and_one_gradient(device):
    query, key = heads(device)
    cos, sin = rotary_tables(9, 24, device=device)
    hold([query], torch.float32, cos, sin)
    assert rotary(query, None, cos, sin)[1] is None
    key.requires_grad_()
    (grad,) = torch.autograd.grad(rotary(query, key, cos, sin)[1].sin().sum(), key)
    (want,) = torch.autograd.grad(plain(key, cos, sin).sin().sum(), key)
    torch.testing.assert_close(grad, want, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@kernel
def test_second_derivative(device):
    query = heads(device, length=3)[0].requires_grad_()
    cos, sin = rotary_tables(3, 24, device=device)

    def penalty(function):
        (grad,) = torch.autograd.grad(function(query).sin().sum(), query, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), query)[0]

    got, want = (penalty(f) for f in (lambda q: rotary(q, None, cos, sin)[0], lambda q: plain(q, cos, sin)))
    torch.testing.assert_close(got, want, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@kernel
@pytest.mark.parametrize("value", [-1, 20, 2**33])
def test_positions_out_of_range(device, request, value):
    query, key = heads(device)
    ids = torch.arange(9, device=device)
    ids[4] = value
    cos, sin = rotary_tables(20, 24, device=device)
    if request.config.getoption("--device") == "cpu":
        with pytest.raises(IndexError, match=f"^position_ids: expected ids from 0 to 19, got {value}"):
            rotary(query, key, cos, sin, position_ids=ids)
        return
    for out in rotary(query, key, cos, sin, position_ids=ids):
        assert out[:, :, 4].isnan().all() and not out[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@kernel
def test_two_runs_give_the_same_bits_and_nothing_is_written_in_place(device):
    query, key = heads(device)
    before = query.clone()
    cos, sin = rotary_tables(9, 24, device=device)
    for a, b in zip(rotary(query, key, cos, sin), rotary(query, key, cos, sin), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(query, before)


@kernel
@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (0, 2, 8)])
def test_empty(device, shape):
    query = torch.empty(shape, device=device, requires_grad=True)
    out, _ = rotary(query, None, *rotary_tables(5, 8, device=device))
    assert out.shape == shape and torch.autograd.grad(out.sum(), query)[0].shape == shape


@kernel
@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), q=st.integers(1, 6), k=st.integers(0, 3), length=st.integers(1, 90),
    half=st.integers(1, 40), rest=st.integers(0, 9), interleaved=st.booleans(), dtype=st.sampled_from(DTYPES),
    doubled=st.booleans(),
)  # fmt: skip
def test_random_combinations(request, batch, q, k, length, half, rest, interleaved, dtype, doubled):
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    inputs = list(heads(device, batch, q, max(k, 1), length, 2 * half + rest))[: 2 if k else 1]
    cos, sin = (t.to(dtype) for t in rotary_tables(length, 2 * half, device=device))
    given_ = [torch.cat((t, t), -1)[None] for t in (cos, sin)] if doubled else (cos, sin)
    hold(inputs, dtype, *given_, (cos, sin), interleaved)


Q, K = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
COS, SIN = rotary_tables(6, 8)
IDS = torch.arange(5)


@pytest.mark.parametrize(
    ("arguments", "position_ids", "error", "named"),
    [
        (("q", K, COS, SIN), None, TypeError, "query"),
        ((Q.long(), K, COS, SIN), None, TypeError, "query"),
        ((Q[0, 0], K, COS, SIN), None, ValueError, "query"),
        ((Q, K.half(), COS, SIN), None, TypeError, "key"),
        ((Q, K[:1], COS, SIN), None, ValueError, "key"),
        ((Q, K[:, :, :4], COS, SIN), None, ValueError, "key"),
        ((Q, K[..., :4], COS, SIN), None, ValueError, "key"),
        ((Q, K, COS[:3], SIN[:3]), None, ValueError, "cos"),
        ((Q, K, torch.randn(6, 5), torch.randn(6, 5)), None, ValueError, "cos"),
        ((Q, K, COS.clone().requires_grad_(), SIN), None, ValueError, "cos"),
        ((Q, K, COS, SIN.clone().requires_grad_()), None, ValueError, "sin"),
        ((Q, K, COS, SIN.half()), None, TypeError, "sin"),
        ((Q, K, COS, SIN[:5]), None, ValueError, "sin"),
        ((Q, K, COS.to("meta"), SIN), None, ValueError, "cos"),
        ((Q, K, torch.randn(3, 5, 8), torch.randn(3, 5, 8)), None, ValueError, "cos"),
        ((Q, K, torch.randn(2, 5, 8), torch.randn(2, 5, 8)), IDS, ValueError, "position_ids"),
        ((Q, K, COS, SIN), IDS.float(), TypeError, "position_ids"),
        ((Q, K, COS, SIN), IDS[:4], ValueError, "position_ids"),
        ((Q, K, COS, SIN), IDS.repeat(3, 1), ValueError, "position_ids"),
    ],
)
def test_bad_input(arguments, position_ids, error, named):
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        rotary(*arguments, position_ids=position_ids)


def test_tables():
    cos, sin = rotary_tables(4, 6, dtype=torch.float64)
    assert cos.shape == sin.shape == (4, 3)
    torch.testing.assert_close(sin[3, 1], torch.tensor(3 / 10000 ** (2 / 6), dtype=torch.float64).sin())
    for name, value in (("length", -1), ("rotary_dim", 5), ("rotary_dim", 0), ("base", 0.0), ("base", "10")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            rotary_tables(**({"length": 3, "rotary_dim": 4} | {name: value}))
    for dtype in (torch.int64, None):
        with pytest.raises(TypeError, match=r"^dtype: expected float32"):
            rotary_tables(3, 4, dtype=dtype)


OPERANDS = {
    "plain": (COS, SIN, None, False, False), "neighbours, back": (COS, SIN, None, True, True),
    "ids": (COS, SIN, IDS[None], False, False),
}  # fmt: skip


@pytest.mark.parametrize("case", list(OPERANDS))
def test_opcheck(case):
    query, key = Q.clone().requires_grad_(), K.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(ROTARY.operator, (query, key, *OPERANDS[case], [True, True]))
    torch.library.opcheck(ROTARY.operator, (query, None, *OPERANDS[case], [True, False]))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole_with_the_same_result(dynamic):
    torch._dynamo.reset()

    def call(q, k, cos, sin):
        return rotary(q, k, cos, sin, interleaved=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 7):
        leaves = [t.requires_grad_() for t in heads("cpu", length=length)]
        tables = rotary_tables(10, 24)
        both = [function(*leaves, *tables) for function in (compiled, call)]
        grads = [torch.autograd.grad(joined(out).sin().sum(), leaves) for out in both]
        for got, want in zip((*both[0], *grads[0]), (*both[1], *grads[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_autocast_meta_and_gradcheck():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rotary(Q, K, COS, SIN)[0].dtype == torch.float32
    assert rotary(Q.to("meta"), None, COS.to("meta"), SIN.to("meta"))[0].is_meta
    leaves = [t.double().requires_grad_() for t in (Q, K)]
    assert torch.autograd.gradcheck(lambda *t: rotary(*t, COS.double(), SIN.double()), leaves)
