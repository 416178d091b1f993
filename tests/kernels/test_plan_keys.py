"""Pairs of calls with much of a signature in common: what was made for the first must not serve the second wrongly."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from contract import assert_same, layer_shapes, results
from fusenc.kernels import (
    LayerWeights,
    add_norm,
    attention,
    attention_varlen,
    encoder_layer,
    ffn,
    use_backend,
)
from fusenc.kernels.add_norm.op import ADD_NORM
from fusenc.kernels.attention.op import ATTENTION
from fusenc.kernels.common import compat, plan

pytest.importorskip("triton")
WIDTH, HEADS, HIDDEN, SIZE = 32, 2, 64, 16


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Calls:
    """The calls of the pairs, on a device."""

    def __init__(self, device):
        self.device = device
        shapes = layer_shapes(WIDTH, HIDDEN)
        weights = LayerWeights(**{name: random(*shape) / shape[-1] ** 0.5 for name, shape in shapes.items()})
        self.weights = [t.to(device) for t in weights if t is not None]

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def mask(self, *shape):
        return (random(*shape) > 0).to(self.device)

    def attention(self, query, **options):
        """Of query, key and value that are one tensor ``[B, H, L, D]``."""
        return results(lambda x: attention(x, x, x, **options), query)

    def fused_varlen(self, starts):
        """Of the projections ``[T, 3, H, D]``."""
        starts = self.tensor(starts)

        def call(qkv):
            query, key, value = qkv.unbind(1)
            return attention_varlen(query, key, value, starts, starts, 10, 10)

        return results(call, random(int(starts[-1]), 3, HEADS, SIZE).to(self.device))

    def layer(self, *shape, **options):
        return results(
            lambda x, *weights: encoder_layer(x, LayerWeights(*weights), HEADS, **options),
            random(*shape, WIDTH).to(self.device), *self.weights,
        )  # fmt: skip

    def heads(self, batch):
        return random(batch, HEADS, 8, SIZE).to(self.device)

    def in_projections(self):
        """``[B, H, L, D]`` in the memory order of the projections ``[B, L, 3, H, D]``."""
        return random(2, 8, 3, HEADS, SIZE).to(self.device)[:, :, 0].transpose(1, 2)

    def in_wide_rows(self):
        """The same, with the same stride of rows, in the order of its dimensions."""
        return random(2, HEADS, 8, 3 * HEADS * SIZE).to(self.device)[..., :SIZE]

    def autocast(self, call, *arguments, **options):
        with torch.autocast(self.device, torch.bfloat16):
            return call(*arguments, **options)


def of_everything(mask):
    return mask.expand(2, 1, 8, 8)


PAIRS = {
    "a mask of keys, then of queries and keys": lambda c: (
        lambda: c.attention(c.in_projections(), attn_mask=of_everything(c.mask(2, 1, 1, 8))),
        lambda: c.attention(c.in_projections(), attn_mask=c.mask(2, 1, 8, 8)),
    ),
    "a layer's mask of keys, then of queries and keys": lambda c: (
        lambda: c.layer(2, 8, attn_mask=of_everything(c.mask(2, 1, 1, 8))),
        lambda: c.layer(2, 8, attn_mask=c.mask(2, 1, 8, 8)),
    ),
    "one token, then several": lambda c: (
        lambda: c.fused_varlen([0, 1]), lambda: c.fused_varlen([0, 10, 17])
    ),
    "no token, then several": lambda c: (
        lambda: c.fused_varlen([0, 0]), lambda: c.fused_varlen([0, 10, 17])
    ),
    "one token, then several, under autocast": lambda c: (
        lambda: c.autocast(c.fused_varlen, [0, 1]), lambda: c.autocast(c.fused_varlen, [0, 10, 17])
    ),
    "one token, then several, layer under autocast": lambda c: (
        lambda: c.autocast(c.layer, 1, cu_seqlens=c.tensor([0, 1]), max_seqlen=10),
        lambda: c.autocast(c.layer, 17, cu_seqlens=c.tensor([0, 10, 17]), max_seqlen=10),
    ),
    "another order of dimensions": lambda c: (
        lambda: c.attention(c.in_projections()), lambda: c.attention(c.in_wide_rows())
    ),
    "another order of dimensions, scale below 0": lambda c: (
        lambda: c.attention(c.in_projections(), scale=-0.5), lambda: c.attention(c.in_wide_rows(), scale=-0.5)
    ),
    "another order of dimensions, under autocast": lambda c: (
        lambda: c.autocast(c.attention, c.in_projections()), lambda: c.autocast(c.attention, c.in_wide_rows())
    ),
    "the strided length of one sequence, then of three": lambda c: (
        lambda: c.attention(c.heads(1), seqlens_k=c.tensor([[5, 1]])[:, 0]),
        lambda: c.attention(c.heads(3), seqlens_k=c.tensor([[5, 1], [7, 1], [3, 1]])[:, 0]),
    ),
    "strided starts of no sequence, then of two": lambda c: (
        lambda: c.layer(17, cu_seqlens=c.tensor([[0, 9]])[:, 0], max_seqlen=10),
        lambda: c.layer(17, cu_seqlens=c.tensor([[0, 9], [10, 9], [17, 9]])[:, 0], max_seqlen=10),
    ),
}  # fmt: skip


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("pair", list(PAIRS))
def test_the_second_call_gives_what_it_gives_alone(pair, device):
    first, second = PAIRS[pair](Calls(device))
    plan.forget()
    with contextlib.suppress(ValueError):  # on a CPU starts of no sequence beside 17 tokens are refused
        first()
    got = second()
    plan.forget()
    assert_same(got, second(), 0.0)


HOOKED = {
    "attention": (lambda qkv: attention(*qkv.chunk(3, -1)), [(2, HEADS, 8, 3 * SIZE)]),
    "add_norm": (
        lambda x, w: add_norm(x[:, :WIDTH], x[:, WIDTH:], w, recompute=True), [(8, 2 * WIDTH), (WIDTH,)]
    ),
    "ffn": (lambda x, w1, w2: ffn(x, w1, None, w2.t(), None), [(8, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH)]),
}  # fmt: skip


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(HOOKED))
def test_hooks_may_return_saved_tensors_in_another_memory_order(name, device):
    """As `torch.autograd.graph.save_on_cpu(pin_memory=True)` does."""
    call, shapes = HOOKED[name]
    tensors = [random(*shape).to(device) for shape in shapes]
    expected = results(call, *tensors)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t), lambda t: t
    ):
        assert_same(results(call, *tensors), expected, 0.0)


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("operator", [False, True], ids=["function", "operator"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_autocast_around_the_backward_pass_changes_nothing(fused, operator, device, backend):
    if backend == "eager" and not operator:
        pytest.skip("autocast changes what torch's own operators do in a backward pass")
    shapes = [(8, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN)]
    leaves = [random(*shape).to(device).requires_grad_() for shape in shapes]

    def gradients(enabled):
        if operator:
            from fusenc.kernels.ffn.op import FFN

            options = FFN.options(0.0, 0.0, "gelu", False, fused, True, True)
            out = FFN.operator(*leaves, None, None, None, None, *options, [True] * 4 + [False] * 2)[0]
        else:
            out = ffn(*leaves, None, fused=fused)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(out.sum(), leaves)

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_starts_without_an_entry_fail_after_a_good_call():
    heads = random(17, HEADS, SIZE)
    attention_varlen(*[heads] * 3, *[torch.tensor([0, 10, 17])] * 2, 10, 10)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected one dimension"):
        attention_varlen(*[heads] * 3, *[torch.tensor([], dtype=torch.int64)] * 2, 10, 10)


def test_a_tensor_among_the_options_is_read_in_each_call():
    x = random(1, HEADS, 8, SIZE)
    causal = torch.tensor(True)
    attention(x, x, x, is_causal=causal)  # type: ignore[arg-type]
    causal.fill_(False)
    assert torch.equal(attention(x, x, x, is_causal=causal), attention(x, x, x))  # type: ignore[arg-type]


def test_a_backend_set_by_another_thread_meanwhile_leaves_no_plan(monkeypatch):
    x, weight = random(8, WIDTH), random(WIDTH)
    entered, go, check = threading.Event(), threading.Event(), ADD_NORM.check

    def slow(*arguments):
        entered.set()
        go.wait(5)
        return check(*arguments)

    plan.forget()
    monkeypatch.setattr(ADD_NORM, "check", slow)
    thread = threading.Thread(target=lambda: add_norm(x, None, weight))
    thread.start()
    entered.wait(5)
    with use_backend("eager"):
        go.set()
        thread.join()
    assert not ADD_NORM.plans.found


def test_the_switch_of_tf32_is_part_of_each_key(monkeypatch):
    from fusenc.bench.stub_driver import stubbed_driver
    from fusenc.kernels.attention import backward

    switch, made, operators = [False], [], []
    original = backward.attention_backward
    monkeypatch.setattr(compat, "tf32_allowed", lambda: switch[0])
    monkeypatch.setattr(backward, "attention_backward", lambda *a, **k: made.append(switch[0]) or original(*a, **k))
    options = ATTENTION.options(0.25)
    x = random(1, HEADS, 8, SIZE).requires_grad_()
    with stubbed_driver():
        for allowed in (False, True, False):
            switch[0] = False
            out = attention(x, x, x)
            switch[0] = allowed
            torch.autograd.grad(out.sum(), x)
            ATTENTION.operator(*ATTENTION.tensors(*[x.detach()] * 3), *options, 8, 8, [False] * 5)
            operators.append(ATTENTION._raw_plans.misses)
    assert made == [False, True]
    assert operators[0] < operators[1] == operators[2]
