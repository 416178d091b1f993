"""How many kernels a layer launches."""

from __future__ import annotations

import os

import fusenc
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


@compiles
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_a_decoder_layer_launches_twelve_kernels_forward(norm_first):
    """One product for the query, key and value of itself and one for the key and value of the memory; of the biases
    that a norm adds no sums of their own."""
    from fusenc.bench.launches import _counting

    layer = fusenc.TransformerDecoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    tgt, memory = (torch.randn(2, n, 64, requires_grad=True) for n in (16, 7))
    upstream = torch.ones_like(tgt)
    with _counting() as forward:
        out = layer(tgt, memory)
    with _counting() as backward:
        torch.autograd.grad(out, [tgt, memory, *layer.parameters()], upstream)
    assert forward() == {
        "addmm": 3, "mm": 2 if norm_first else 3, "attention_forward_kernel": 2, "add_norm_forward_kernel": 3,
        "linear_act_kernel": 2 if norm_first else 1,
    }  # fmt: skip
    assert forward().total() == 12 and backward().total() == (34 if norm_first else 35), backward()
    assert backward()["sum"] == (4 if norm_first else 3)


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


def launches_of_a_bert_layer(autocast, packed):
    """By name, forward and backward: those of three layers less those of two, dropouts off."""
    from fusenc.bench.launches import _counting

    transformers = pytest.importorskip("transformers")
    found = []
    for layers in (3, 2):
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=128, vocab_size=50,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        encoder = transformers.BertModel(config, add_pooling_layer=False).encoder
        assert not fusenc.fuse(encoder, padding="remove").left
        keep = torch.arange(16) < torch.tensor([[16], [7]])
        mask = keep[:, None, None].expand(-1, 1, 16, -1) if packed else None
        x = torch.randn(2, 16, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), _counting() as forward:
            out = encoder(x, attention_mask=mask).last_hidden_state
        with _counting() as backward:
            out.backward(torch.ones_like(out))
        found.append((forward(), backward()))
    (more, more_back), (less, less_back) = found
    return more - less, more_back - less_back


@compiles
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_hugging_face_layer_launches_seven_kernels_forward_and_twelve_backward(autocast, packed):
    """Query, key and value take one product. Casts of weights and of their gradients are counted apart."""
    forward, backward = launches_of_a_bert_layer(autocast, packed)
    casts, casts_back = forward.pop("_to_copy", 0), backward.pop("_to_copy", 0)
    assert forward.total() == 7 and backward.total() == 12, (forward, backward)
    assert (casts, casts_back) == ((6, 4) if autocast else (0, 0))  # of four weights and of two biases
