"""Launch plans: what is in their keys and what is not, and that they keep nothing and never serve a wrong call."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from contract import assert_same, layer_shapes, results
from fusenc.kernels import (
    LayerWeights,
    add_norm,
    attention,
    attention_varlen,
    embed_norm,
    encoder_layer,
    ffn,
    last_backend,
    linear_act,
    rotary,
    rotary_tables,
    use_backend,
)
from fusenc.kernels.add_norm.op import ADD_NORM
from fusenc.kernels.common import plan
from fusenc.kernels.common.plan import Plan, Plans
from tolerances import SAME_ALGORITHM
from torch import Tensor

triton = pytest.importorskip("triton")
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
WIDTH, HEADS, HIDDEN = 32, 2, 64


def rows(*shape):
    return torch.randn(*shape, WIDTH, requires_grad=True)


def layer_weights():
    shapes = layer_shapes(WIDTH, HIDDEN)
    return LayerWeights(**{name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()})


def test_the_least_recently_used_plan_goes():
    plans = Plans(most=3)
    for key in "abc":
        plans.add(key, Plan(None)).recent = False
    plans.found["a"].recent = True
    plans.add("d", Plan(None))
    assert set(plans.found) == {"a", "c", "d"} and plans.misses == 4
    for i in range(100):
        plans.add(i, Plan(None))
    assert len(plans.found) == 3


CALLS = {
    "add_norm": lambda x: add_norm(x, x, torch.ones(WIDTH), torch.zeros(WIDTH)),
    "linear_act": lambda x: linear_act(x, torch.ones(HIDDEN, WIDTH)),
    "ffn": lambda x: ffn(x, torch.ones(HIDDEN, WIDTH), None, torch.ones(WIDTH, HIDDEN), None),
    "attention": lambda x: attention(*[x.view(2, 3, HEADS, -1).transpose(1, 2)] * 3),
    "embed_norm": lambda x: embed_norm(torch.tensor([[1, 0], [1, 1]]), x.view(-1, WIDTH)),
    "rotary": lambda x: rotary(x.view(2, 3, HEADS, -1).transpose(1, 2), None, *rotary_tables(3, 8))[0],
    "encoder_layer": lambda x: encoder_layer(x, layer_weights(), HEADS),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_plan_keeps_no_tensor(name, training):
    x = rows(2, 3)
    kept = weakref.ref(x)
    with torch.set_grad_enabled(training):
        out = CALLS[name](x)
        if training:
            out.sum().backward()
    del x, out
    gc.collect()
    assert kept() is None


@compiled
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_plan_of_kernels_keeps_no_tensor(name, training):
    from fusenc.bench.stub_driver import stubbed_driver

    with stubbed_driver():
        test_a_plan_keeps_no_tensor(name, training)


def first_call():
    """A call whose plan is cached afterwards."""
    x, weight, bias = torch.randn(4, WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH)
    add_norm(x, x, weight, bias)
    misses = ADD_NORM.plans.misses
    add_norm(x, x, weight, bias)
    assert ADD_NORM.plans.misses == misses
    return x, weight, bias


@pytest.mark.parametrize(
    "spoil, error, text",
    [
        (lambda x, w, b: (x, x, w.to("meta"), b), ValueError, "weight: expected device cpu"),
        (lambda x, w, b: (x, x.to("meta"), w, b), ValueError, "residual: expected device cpu"),
        (lambda x, w, b: (x, x, w, b.double()), TypeError, "bias: expected dtype torch.float32"),
        (lambda x, w, b: (x, x.half(), w, b), TypeError, "residual: expected dtype torch.float32"),
        (lambda x, w, b: (x, x[:3], w, b), ValueError, r"residual: expected shape \[4, 32\]"),
        (lambda x, w, b: (x, x, w[:-1], b), ValueError, r"weight: expected shape \[32\]"),
        (lambda x, w, b: (x.long(), x, w, b), TypeError, "x: expected a float32"),
    ],
)
def test_a_bad_call_fails_though_a_good_one_has_a_plan(spoil, error, text):
    with pytest.raises(error, match=text):
        add_norm(*spoil(*first_call()))


def test_another_dtype_form_or_option_has_another_plan():
    x, weight, bias = first_call()
    for again in (
        lambda: add_norm(x.half(), x.half(), weight.half(), bias.half()),
        lambda: add_norm(x.t().contiguous().t(), x, weight, bias),
        lambda: add_norm(x, None, weight, bias),
        lambda: add_norm(x, x, weight, bias, eps=1e-3),
        lambda: add_norm(x, x, weight, bias, norm="rms"),
    ):
        misses = ADD_NORM.plans.misses
        first = again()
        assert ADD_NORM.plans.misses == misses + 1
        assert torch.equal(again(), first) and ADD_NORM.plans.misses == misses + 1


@compiled
def test_a_misaligned_tensor_has_a_kernel_of_its_own():
    from fusenc.bench.stub_driver import stubbed_driver
    from fusenc.kernels.add_norm.forward import add_norm_forward_kernel

    def variants():
        return len(add_norm_forward_kernel.device_caches["stub"][0])

    whole = torch.randn(5 * WIDTH + 1)
    weight = torch.ones(WIDTH)
    with stubbed_driver():
        add_norm(whole[:-1].view(5, WIDTH), None, weight)
        before, misses = variants(), ADD_NORM.plans.misses
        add_norm(whole[1:].view(5, WIDTH), None, weight)
        assert ADD_NORM.plans.misses == misses + 1 and variants() == before + 1


def test_backends_do_not_share_plans():
    x, weight, bias = first_call()
    with use_backend("eager"):
        add_norm(x, x, weight, bias)
        assert last_backend() == "eager"
    if os.environ.get("TRITON_INTERPRET") != "1":
        with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' is forced"):
            add_norm(x, x, weight, bias)


@compiled
def test_a_launch_asks_for_the_stream_each_time_and_obeys_hooks(monkeypatch):
    from fusenc.bench.stub_driver import stubbed_driver
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    x, weight = torch.randn(4, WIDTH), torch.ones(WIDTH)
    with stubbed_driver() as utils:
        streams = itertools.count()
        monkeypatch.setattr(driver._active, "get_current_stream", lambda device: next(streams))
        for _ in range(3):
            add_norm(x, x, weight)
        assert next(streams) == utils.launches == 3
        through_jit = []
        original = CompiledKernel.launch_metadata
        monkeypatch.setattr(
            CompiledKernel, "launch_metadata", lambda *arguments: through_jit.append(original(*arguments))
        )
        add_norm(x, x, weight)
        assert utils.launches == 4 and not through_jit
        hook = lambda metadata: None  # noqa: E731
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            add_norm(x, x, weight)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert utils.launches == 5 and len(through_jit) == 1


def test_threads_share_plans():
    """Eight threads with calls of their own, while plans come and go."""
    weight, bias, wrong = torch.randn(WIDTH), torch.randn(WIDTH), []

    def work(seed):
        generator = random.Random(seed)
        for _ in range(60):
            x = torch.randn(generator.randint(1, 9), WIDTH)
            eps = generator.choice([1e-5, 1e-3, 1e-2])
            expected = F.layer_norm(x + x, (WIDTH,), weight, bias, eps)
            if not torch.allclose(add_norm(x, x, weight, bias, eps=eps), expected, atol=SAME_ALGORITHM):
                wrong.append(eps)
            if generator.random() < 0.1:
                plan.forget()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@compiled
def test_a_stream_of_ragged_batches_compiles_and_plans_once_per_size_class():
    """200 batches of random numbers and lengths of sequences, packed and padded, forward and backward."""
    from fusenc.bench.stub_driver import stubbed_driver
    from fusenc.kernels.attention.op import ATTENTION
    from fusenc.kernels.embed_norm.op import EMBED_NORM
    from fusenc.kernels.encoder_layer.op import ENCODER_LAYER
    from fusenc.kernels.ffn.op import FFN
    from fusenc.kernels.rotary.op import ROTARY
    from triton.runtime.jit import JITFunction

    operations = (ADD_NORM, ATTENTION, EMBED_NORM, ENCODER_LAYER, FFN, ROTARY)
    compiles = []
    original = JITFunction._do_compile

    def count(self, *arguments, **others):
        compiles.append(self.__name__)
        return original(self, *arguments, **others)

    generator = random.Random(0)
    weights, block = (
        layer_weights(),
        [torch.randn(s, requires_grad=True) for s in ((HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN))],
    )
    tables = [torch.randn(n, WIDTH, requires_grad=True) for n in (50, 128)]
    cos, sin = rotary_tables(128, WIDTH // HEADS)
    norm = [torch.randn(WIDTH, requires_grad=True) for _ in range(2)]

    def batch():
        lengths = [generator.randint(1, 100) for _ in range(generator.randint(1, 12))]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        total, longest = sum(lengths), max(lengths)
        packed, padded = rows(total), rows(len(lengths), longest)
        heads = packed.view(total, HEADS, -1)
        in_heads = padded.view(*padded.shape[:2], HEADS, -1).transpose(1, 2)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        outs = [
            encoder_layer(packed, weights, HEADS, cu_seqlens=starts, max_seqlen=longest),
            encoder_layer(padded, weights, HEADS, attn_mask=mask[:, None, None]),
            attention_varlen(heads, heads, heads, starts, starts, longest, longest),
            attention(*[in_heads] * 3, seqlens_k=torch.tensor(lengths)),
            add_norm(packed, packed, *norm),
            ffn(packed, *block, None),
            embed_norm(torch.randint(50, (total,)), *tables, position_ids=torch.arange(total) % 128),
            embed_norm(torch.randint(50, padded.shape[:2]), *tables),
            rotary(in_heads, None, cos, sin)[0],
        ]  # fmt: skip
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])

    with stubbed_driver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", count)
        for _ in range(100):
            batch()
        misses, kernels = sum(o.plans.misses for o in operations), len(compiles)
        for _ in range(100):
            batch()
        later = sum(o.plans.misses for o in operations) - misses
    assert later <= 20, f"{later} new plans in the second hundred, {misses} in the first"
    # Only masks have variants by length: its alignment, and whether there is one sequence or one token.
    assert len(compiles) <= 80 and len(compiles) - kernels <= 20, compiles[kernels:]


@pytest.mark.kernel
@pytest.mark.interpreter
def test_a_single_row_says_nothing_of_the_stride_of_rows(device):
    """A row cut out of a wider matrix is contiguous, whatever its stride; its plan serves whole matrices as well."""
    x, weight = torch.randn(3, WIDTH, device=device), torch.randn(WIDTH, device=device)
    plan.forget()
    add_norm(torch.randn(1, 5 * WIDTH, device=device)[:, :WIDTH], None, weight)
    out = add_norm(x, None, weight)
    torch.testing.assert_close(out, F.layer_norm(x, (WIDTH,), weight), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def strided(*shape):
    """Every second of more elements: not contiguous."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


STRIDED = {
    "add_norm": (
        lambda x, w, b, x_bias: add_norm(x, x, w, b, x_bias=x_bias, recompute=True), [(5, WIDTH), *[(WIDTH,)] * 3],
    ),
    "ffn": (
        lambda *t: ffn(*t, fused=True), [(5, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)],
    ),
    "attention": (
        lambda q, bias: attention(q, q, q, relative_bias=bias, seqlens_k=torch.tensor([5, 0, 3, 0]).to(q.device)[::2]),
        [(2, HEADS, 5, 16), (HEADS, 5)],
    ),
    "embed_norm": (
        lambda *t: embed_norm(torch.tensor([[1, 0, 2]]).to(t[0].device), t[0], norm_weight=t[1], norm_bias=t[2]),
        [(3, WIDTH), (WIDTH,), (WIDTH,)],
    ),
    "encoder_layer": (
        lambda x, *w: encoder_layer(x, LayerWeights(*w), HEADS),
        [(2, 5, WIDTH), *[t.shape for t in layer_weights()[:12]]],
    ),
    "encoder_layer, packed": (
        lambda x, *w: encoder_layer(
            x, LayerWeights(*w), HEADS, max_seqlen=4,
            cu_seqlens=torch.tensor([0, 9, 3, 9, 7, 9], dtype=torch.int32).to(x.device)[::2],
        ),
        [(7, WIDTH), *[t.shape for t in layer_weights()[:12]]],
    ),
}  # fmt: skip


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(STRIDED))
def test_arguments_need_not_be_contiguous(name, device):
    """Kernels read vectors along by one; gradients tell as well as outputs."""
    call, shapes = STRIDED[name]
    inputs = [strided(*shape).to(device) for shape in shapes]
    got = results(call, *inputs)
    with use_backend("eager"):
        assert_same(got, results(call, *map(Tensor.contiguous, inputs)), SAME_ALGORITHM)


@pytest.mark.kernel
@pytest.mark.interpreter
def test_an_operators_arguments_need_not_be_contiguous(device):
    """The registered operator, which keeps the copies for its backward pass."""
    tensors = [t.to(device) for t in (torch.randn(5, WIDTH), strided(WIDTH), strided(WIDTH))]
    options = ADD_NORM.options(0.0, 1e-5, False, False, False, False, True, False, torch.float32)

    def call(x, weight, bias):
        return ADD_NORM.operator(x, None, weight, bias, None, None, *options, [True, False, True, True, False])[0]

    assert_same(results(call, *tensors), results(call, *map(Tensor.contiguous, tensors)), 0.0)
