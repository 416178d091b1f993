"""Memory traffic under the interpreter, and the kernels held to what they must move."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = [pytest.mark.kernel, pytest.mark.interpreter]


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("counts accesses of the interpreter: run with TRITON_INTERPRET=1 --device interpreter")


@pytest.fixture(scope="module")
def passes(_interpreted):
    from fusenc.bench import traffic

    return {p.name: p for p in traffic.passes()}


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * STEP, mask=offsets < n)
    tl.store(out_ptr + offsets, x, mask=offsets < n)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), 0))


@pytest.mark.parametrize(("step", "sectors"), [(1, 13), (8, 100)], ids=["dense", "every eighth element"])
def test_bytes_of_a_copy_are_exact(step, sectors):
    from fusenc.bench.traffic import count_traffic

    x, out = torch.zeros(1024), torch.zeros(100)
    assert x.data_ptr() % 32 == 0
    with count_traffic() as launches:
        copy_kernel[(1,)](x, out, 100, step, 128)
    (launch,) = launches
    read, written = launch.arguments["x_ptr"], launch.arguments["out_ptr"]
    assert launch.kernel == "copy_kernel" and launch.dot_flops == 0
    assert (read.loaded, read.loaded_once, read.load_sectors, read.stored) == (400, 400, sectors, 0)
    assert (written.stored, written.stored_once, written.loaded) == (400, 400, 0)


def test_two_programs_that_read_the_same_are_counted_twice():
    from fusenc.bench.traffic import count_traffic

    x, out = torch.zeros(100), torch.zeros(1)
    with count_traffic() as launches:
        sum_kernel[(3,)](x, out, 100, 128)
    read = launches[0].arguments["x_ptr"]
    assert (read.loaded, read.loaded_once) == (1200, 400) and launches[0].arguments["out_ptr"].atomics == 3


def test_attention_reads_queries_once_and_keys_once_per_query_block(passes):
    from fusenc.kernels.attention import configs

    block = configs.FORWARD._general[2, 64].block_m
    (launch,) = passes["attention 2x2x256x64, forward"].launches
    arguments = launch.arguments
    query = next(a for name, a in arguments.items() if name.startswith("tensors[0]"))
    assert query.loaded == query.loaded_once == 2 * 2 * 256 * 64 * 2
    for name in ("tensors[1]", "tensors[2]"):  # key and value
        assert arguments[name].loaded == (256 // block) * arguments[name].loaded_once
    assert launch.dot_flops == 4 * 256 * 256 * 64 * 4  # 4 L^2 D for each of 4 heads
    assert all(a.atomics == 0 for p in passes.values() for each in p.launches for a in each.arguments.values())


def test_causal_attention_skips_the_blocks_above_the_diagonal(passes):
    (full,) = passes["attention 2x2x256x64, forward"].launches
    (causal,) = passes["attention 1x2x256x64, causal, forward"].launches
    assert causal.dot_flops < 0.8 * full.dot_flops / 2  # half the batch, and fewer blocks


def test_attentions_backward_does_seven_products(passes):
    launches = {launch.kernel: launch for launch in passes["attention 2x2x256x64, backward"].launches}
    product = 2 * 256 * 256 * 64 * 4
    assert launches["attention_dkdv_kernel"].dot_flops == 4 * product
    assert launches["attention_dq_kernel"].dot_flops == 3 * product
    keys, queries = ("tensors[1]", "tensors[2]"), ("tensors[0]", "dout_ptr")
    for kernel, once in (("attention_dkdv_kernel", keys), ("attention_dq_kernel", queries)):
        for name, a in launches[kernel].arguments.items():
            if name.split("|")[0] in once or a.stored:
                assert a.loaded == a.loaded_once and a.stored == a.stored_once, f"{kernel} {name}"


@pytest.mark.parametrize(
    "kernel",
    [
        "add_norm_forward_kernel",
        "add_norm_backward_kernel",
        "column_sums_kernel",
        "epilogue_kernel",
        "epilogue_gradient_kernel",
        "embed_norm_forward_kernel",
        "embed_norm_backward_kernel",
        "rotary_kernel",
    ],
)
def test_memory_bound_kernels_ask_for_little_more_than_once(passes, kernel):
    launches = [launch for p in passes.values() for launch in p.launches if launch.kernel == kernel]
    assert launches
    for launch in launches:
        assert launch.asked <= 1.05 * launch.once, f"{launch.asked / launch.once:.3f}"


def test_gate_and_up_read_the_input_once_for_both(passes):
    plain, gated = (passes[f"ffn 256x128x512{kind}, forward"].launches[0] for kind in ("", ", gated"))
    assert gated.dot_flops == 2 * plain.dot_flops == 2 * 256 * 128 * 1024
    assert gated.arguments["weight_ptr"].loaded_once == 2 * plain.arguments["weight_ptr"].loaded_once
    (back,) = (each for each in passes["ffn 256x128x512, gated, backward"].launches if each.dot_flops)
    assert back.dot_flops == 2 * 256 * 128 * 512  # one product gives both halves' gradients


def test_the_hidden_layers_products_store_each_element_once(passes):
    for p in passes.values():
        for launch in p.launches:
            for name, a in launch.arguments.items():
                assert a.stored == a.stored_once, f"{p.name}, {launch.kernel}, {name}"


def test_what_a_pass_moves_is_near_its_least(passes):
    """Beyond inputs, outputs and saved tensors only what passes between its kernels, each byte once a kernel."""
    for name in ("attention 2x2x256x64, forward", "add_norm 512x256, forward", "add_norm 512x1024, dropout, forward"):
        assert sum(launch.once for launch in passes[name].launches) <= 1.05 * passes[name].least, name


@pytest.mark.parametrize(
    "option", ["1024x768", "1024x192, rms", "2048x192, x_bias", "1024x192, recompute", "1024x192, float32 sum"]
)
def test_add_norm_moves_its_least_forward_and_backward(passes, option):
    """All launches of a pass together, the partial sums of parameters' gradients and their second reading included."""
    for direction in ("forward", "backward"):
        p = passes[f"add_norm {option}, {direction}"]
        ratio = sum(launch.asked for launch in p.launches) / p.least
        assert ratio <= 1.05, f"{p.name}: {ratio:.3f}"


def test_rows_wider_than_registers_ask_for_some_tensors_twice(passes):
    """Forward the sum, backward the sum and the upstream gradient; docs/add_norm.md says why."""
    for direction, limit in (("forward", 1.35), ("backward", 1.85)):  # 5/3, and partial sums of so few rows
        p = passes[f"add_norm 16x20000, {direction}"]
        ratio = sum(launch.once for launch in p.launches) / p.least
        assert ratio <= limit, f"{p.name}: {ratio:.3f}"


@pytest.mark.parametrize("kind", ["window", "block mask"])
def test_sparse_attention_costs_what_is_live(_interpreted, kind):
    """Twice the length is twice the live blocks, forward and backward, and four times all blocks."""
    from fusenc.bench.traffic import count_traffic
    from fusenc.kernels import BlockMask, attention

    flops, key_bytes = {}, {}
    for length in (512, 1024):
        options = {"window": (32, 32)}
        if kind == "block mask":
            options = {"block_mask": BlockMask.sliding_window(length, 32, block_size=64)}
        q, k, v = (torch.randn(1, 1, length, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
        with count_traffic() as launches:
            torch.autograd.grad(attention(q, k, v, **options).sum(), (q, k, v))
        flops[length] = sum(launch.dot_flops for launch in launches)
        key_bytes[length] = sum(launch.arguments["tensors[1]"].loaded for launch in launches if launch.dot_flops)
    assert flops[1024] <= 2.3 * flops[512] and key_bytes[1024] <= 2.3 * key_bytes[512]


def test_a_biass_gradient_is_stored_once_and_nothing_of_its_size_times_the_batch(_interpreted):
    from fusenc.bench.traffic import count_traffic
    from fusenc.kernels import attention

    q, k, v = (torch.randn(3, 2, 70, 16, dtype=torch.float16) for _ in range(3))
    bias = torch.randn(1, 2, 70, 70, dtype=torch.float16, requires_grad=True)
    out = attention(q, k, v, bias)
    with count_traffic() as launches:
        torch.autograd.grad(out.sum(), bias)
    assert [launch.kernel for launch in launches] == ["attention_dq_kernel", "attention_plane_kernel"]
    written = {name: a.stored for name, a in launches[1].arguments.items() if a.stored}
    assert written == {"out_ptr": 2 * 70 * 70 * 2}  # in the bias's own dtype, for all three sequences together
