"""What Triton's IR cannot be executed for: tensors that reach past 2**31 elements, whose storage would be copied.

Under the interpreter such tensors cost nothing, as untouched memory is never given to the process. It checks no
bounds, so inputs lie between guards of NaN and outputs between guards of a pattern that must survive.
"""

from __future__ import annotations

import os

import pytest
import torch
from fusenc.kernels import add_norm, attention, embed_norm, ffn, rotary, rotary_tables

pytestmark = [pytest.mark.kernel, pytest.mark.interpreter]
GUARD = 64
PATTERN = 12345.0
FAR = 2**31 + 16
"""Elements between two rows or batches, more than 32 bits can count."""


@pytest.fixture(autouse=True)
def _interpreted(device):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("guards are for the interpreter, which checks no bounds; ttsem does: run with --device interpreter")


def guarded(t: torch.Tensor) -> torch.Tensor:
    """A copy of `t` between NaNs."""
    whole = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype)
    inside = whole[GUARD:-GUARD].view(t.shape)
    inside.copy_(t)
    return inside


@pytest.fixture
def outputs(monkeypatch):
    """Every floating tensor that launchers allocate lies between patterns; gives the list of the whole buffers."""
    buffers = []
    empty = torch.empty

    def guarded_empty(*shape, dtype=torch.float32, device=None, **options):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        if not dtype.is_floating_point:
            return empty(shape, dtype=dtype, device=device, **options)
        whole = torch.full((shape.numel() + 2 * GUARD,), PATTERN, dtype=torch.float32).to(dtype)
        buffers.append(whole)
        return whole[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: guarded_empty(t.shape, dtype=t.dtype))
    return buffers


def intact(buffers):
    assert buffers
    for whole in buffers:
        value = torch.tensor(PATTERN).to(whole.dtype)
        assert (whole[:GUARD] == value).all() and (whole[-GUARD:] == value).all()


CALLS = {
    "attention": (attention, [(2, 2, 19, 24), (2, 2, 33, 24), (2, 2, 33, 40)]),
    "causal attention": (lambda q, k, v: attention(q, k, v, is_causal=True), [(1, 2, 33, 16)] * 3),
    "add_norm": (add_norm, [(7, 100), (7, 100), (100,), (100,)]),
    "add_norm, every option": (
        lambda x, r, w, b, x_bias: add_norm(x, r, w, b, x_bias=x_bias, norm="rms", dropout_p=0.2, recompute=True),
        [(7, 200), (7, 200), (200,), (200,), (200,)],
    ),
    "add_norm, wide": (add_norm, [(3, 20001), (3, 20001), (20001,), (20001,)]),
    "ffn": (ffn, [(33, 24), (70, 24), (70,), (20, 70), (20,)]),
    "embed_norm": (
        lambda *tables: embed_norm(torch.tensor([[3, 1, 3], [0, 4, 4]]), *tables), [(5, 40), (3, 40), (2, 40), (40,)],
    ),
    "rotary": (lambda q: rotary(q, None, *rotary_tables(7, 12))[0], [(2, 3, 7, 20)]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_nothing_outside_a_tensor_is_read_or_written(name, outputs):
    call, shapes = CALLS[name]
    plain = [torch.randn(shape) for shape in shapes]
    leaves = [guarded(t).requires_grad_() for t in plain]
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, guarded(torch.ones(out.shape)))
    assert not any(t.isnan().any() for t in (out, *grads))
    intact(outputs)


def test_the_guards_catch_an_overrun(outputs):
    """The control: a write one element past the end must be seen."""
    out = torch.empty(8)
    out.as_strided((9,), (1,), out.storage_offset())[8] = 0.0
    with pytest.raises(AssertionError):
        intact(outputs)


def far(t: torch.Tensor, dimension: int = 0, step: int = FAR) -> torch.Tensor:
    """A copy of `t` one of whose dimensions steps over `step` elements; what lies between stays untouched."""
    whole = torch.empty((t.shape[dimension] - 1) * step + t.numel(), dtype=t.dtype)
    view = whole.as_strided(t.shape, [step if d == dimension else n for d, n in enumerate(t.stride())])
    view.copy_(t)
    return view


@pytest.mark.parametrize("width", [40, 16400])
def test_rows_beyond_2_to_the_31_elements(width):
    """Forward, and backward with an upstream gradient as far, that forms its sum of x and residual again."""
    shapes = ((2, width), (2, width), (width,), (width,))
    x, residual, weight, bias = (torch.randn(shape).half() for shape in shapes)
    upstream = torch.randn(2, width).half()
    results = []
    for place in (far, lambda t: t):
        leaves = [place(x).requires_grad_(), place(residual).requires_grad_(), weight.requires_grad_(), bias]
        out = add_norm(*leaves, recompute=True)
        results.append([out, *torch.autograd.grad(out, leaves[:3], place(upstream))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batches_beyond_2_to_the_31_elements():
    q, k, v = (torch.randn(2, 1, 20, 16).half() for _ in range(3))
    assert torch.equal(attention(far(q), far(k), far(v)), attention(q, k, v))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dimension", range(4), ids=["batches", "heads", "tokens", "columns"])
def test_heads_beyond_2_to_the_31_elements(dimension, interleaved):
    q = torch.randn(2, 2, 2, 4).half()
    cos, sin = rotary_tables(2, 4 if interleaved else 2)
    step = FAR // 2 if dimension == 3 else FAR  # the third column is then beyond
    near = rotary(q, q.flip(0), cos, sin, interleaved=interleaved)
    away = [far(t, dimension, step) for t in (q, q.flip(0))]
    assert all(torch.equal(a, b) for a, b in zip(rotary(*away, cos, sin, interleaved=interleaved), near, strict=True))
