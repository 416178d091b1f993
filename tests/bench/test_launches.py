"""How many kernels a layer launches."""

from __future__ import annotations

import os

import pytest
import torch
from fusenc.kernels import add_norm, attention, ffn

pytest.importorskip("triton")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not recorded")


@compiles
def test_a_layer_launches_seven_kernels_forward_and_twelve_backward():
    from fusenc.bench.launches import layers

    counts = layers(0.0)
    ours = counts["fusenc"]
    assert ours.forward == {
        "addmm": 1, "attention_forward_kernel": 1, "mm": 2, "add_norm_forward_kernel": 2, "linear_act_kernel": 1,
    }  # fmt: skip
    assert ours.backward == {
        "add_norm_backward_kernel": 2, "hidden_gradient_kernel": 1, "mm": 5, "addmm": 2, "attention_dq_kernel": 1,
        "attention_dkdv_kernel": 1,
    }  # fmt: skip
    assert ours.forward.total() == 7 and ours.backward.total() == 12
    assert counts["torch.nn, plain attention"].forward["bmm"] == 2
    # With dropout a layer draws its keys at once and launches nothing else.
    assert layers(0.1)["fusenc"].forward - ours.forward == {"randint": 1}
    assert layers(0.1)["fusenc"].backward == ours.backward


def launched(call, *shapes, frozen=()):
    from fusenc.bench.machine_code.compiling import record_launches

    inputs = [
        torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=i not in frozen)
        for i, shape in enumerate(shapes)
    ]
    with record_launches() as launches:
        out = call(*inputs)
        out.backward(torch.empty_like(out))
    return launches


@compiles
@pytest.mark.parametrize("lengths", [(7, 40, 100, 129), (16, 48, 128)], ids=["any", "multiples of 16"])
def test_another_length_compiles_nothing_anew(lengths):
    """Two kinds of lengths: where the number of keys is a multiple of 16, masks are read in wide accesses."""
    found = set()
    for n in lengths:
        launches = launched(lambda *t: attention(*(x.transpose(1, 2) for x in t)), *[(2, n, 4, 64)] * 3)
        launches += launched(add_norm, (2, n, 256), (2, n, 256), (256,), (256,))
        launches += launched(ffn, (2, n, 256), (512, 256), (512,), (256, 512), (256,))
        found.add(frozenset(launch.identity for launch in launches))
    assert len(found) == 1


@compiles
def test_frozen_parameters_cost_nothing():
    rows = [(64, 256), (64, 256), (256,), (256,)]
    assert [each.name for each in launched(add_norm, *rows)] == [
        "add_norm_forward_kernel", "add_norm_backward_kernel", "column_sums_kernel",
    ]  # fmt: skip
    assert "column_sums_kernel" not in {each.name for each in launched(add_norm, *rows, frozen=(2, 3))}
    heads = [(2, 4, 64, 64)] * 3
    assert {each.name for each in launched(attention, *heads, frozen=(1, 2))} == {
        "attention_forward_kernel", "attention_dq_kernel",
    }  # fmt: skip
    assert {each.name for each in launched(attention, *heads, frozen=(0,))} == {
        "attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel",
    }  # fmt: skip
