"""A wrong argument raises at the call, by name; nothing is silently ignored."""

from __future__ import annotations

import pytest
import torch
from fusenc.kernels import (
    BlockMask,
    LayerWeights,
    add_norm,
    attention,
    attention_varlen,
    attention_weights,
    attention_with_weights,
    decoder_layer,
    encoder_layer,
    ffn,
    get_backend,
    last_backend,
    set_backend,
    use_backend,
)

Q = torch.randn(2, 3, 5, 8)
X, W = torch.randn(4, 6), torch.randn(6)
W1, W2 = torch.randn(10, 6), torch.randn(6, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((Q[0], Q, Q), ValueError, "query"),
        ((Q, Q[0], Q), ValueError, "key"),
        ((Q, Q, Q[0]), ValueError, "value"),
        (("q", Q, Q), TypeError, "query"),
        ((Q.long(), Q, Q), TypeError, "query"),
        ((Q, Q.long(), Q), TypeError, "key"),
        ((Q.long(), Q.long(), Q.long()), TypeError, "query"),
        ((Q, Q.half(), Q), TypeError, "key"),
        ((Q, Q, Q.double()), TypeError, "value"),
        ((Q.to(torch.complex64),) * 3, TypeError, "query"),
        ((Q.to(torch.float8_e4m3fn),) * 3, TypeError, "query"),
        ((Q, Q.to("meta"), Q), ValueError, "key"),
        ((Q, Q[:, :2], Q), ValueError, "key"),
        ((Q, Q[:1], Q[:1]), ValueError, "key"),
        ((Q, Q[..., :4], Q), ValueError, "key"),
        ((Q, Q, Q[:, :, :3]), ValueError, "value"),
        ((Q[:, :0], Q[:, :0], Q[:, :0]), ValueError, "query"),
        ((Q[..., :0], Q[..., :0], Q), ValueError, "query"),
        ((Q, Q, Q, torch.ones(4, 5, dtype=torch.bool)), ValueError, "attn_mask"),
        ((Q, Q, Q, torch.ones(1, 2, 3, 5, 5, dtype=torch.bool)), ValueError, "attn_mask"),
        ((Q, Q, Q, torch.ones(3, 1, 5, 5)), ValueError, "attn_mask"),
        ((Q, Q, Q, torch.ones(5, 5, dtype=torch.int64)), TypeError, "attn_mask"),
        ((Q, Q, Q, torch.ones(5, 5, device="meta")), ValueError, "attn_mask"),
        ((Q, Q, Q, [[True]]), TypeError, "attn_mask"),
        ((Q, Q, Q, None, -0.1), ValueError, "dropout_p"),
        ((Q, Q, Q, None, 1.1), ValueError, "dropout_p"),
        ((Q, Q, Q, None, float("nan")), ValueError, "dropout_p"),
        ((Q, Q, Q, None, "0.1"), TypeError, "dropout_p"),
    ],
)
def test_attention(arguments, error, named):
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        attention(*arguments)


BLOCKS = BlockMask.from_mask(torch.ones(5, 5, dtype=torch.bool), 16)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"window": 3}, TypeError, "window"),
        ({"window": (1.0, 2)}, TypeError, "window"),
        ({"window": (-1, 2)}, ValueError, "window"),
        ({"window": (1, -1)}, ValueError, "window"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": "1"}, ValueError, "softcap"),
        ({"alignment": "left"}, ValueError, "alignment"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"alibi_slopes": torch.ones(4)}, ValueError, "alibi_slopes"),
        ({"alibi_slopes": torch.ones(3, dtype=torch.int64)}, TypeError, "alibi_slopes"),
        ({"alibi_slopes": torch.ones(3, requires_grad=True)}, ValueError, "alibi_slopes"),
        ({"alibi_slopes": torch.ones(3, device="meta")}, ValueError, "alibi_slopes"),
        ({"relative_bias": torch.ones(3, 4)}, ValueError, "relative_bias"),
        ({"relative_bias": torch.ones(2, 5)}, ValueError, "relative_bias"),
        ({"relative_bias": torch.ones(5)}, ValueError, "relative_bias"),
        ({"relative_bias": [0.0]}, TypeError, "relative_bias"),
        ({"seqlens_k": torch.tensor([5])}, ValueError, "seqlens_k"),
        ({"seqlens_k": torch.tensor([5, 6])}, ValueError, "seqlens_k"),
        ({"seqlens_q": torch.tensor([5, -1])}, ValueError, "seqlens_q"),
        ({"seqlens_q": torch.tensor([5.0, 1.0])}, TypeError, "seqlens_q"),
        ({"seqlens_q": [5, 1]}, TypeError, "seqlens_q"),
        ({"block_mask": torch.ones(5, 5)}, TypeError, "block_mask"),
        ({"block_mask": BlockMask.from_mask(torch.ones(5, 6, dtype=torch.bool), 16)}, ValueError, "block_mask"),
        ({"block_mask": BLOCKS.to("meta")}, ValueError, "block_mask"),
    ],
)
def test_attention_options(options, error, named):
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        attention(Q, Q, Q, **options)


def test_heads_that_do_not_divide():
    for heads, grouped in ((1, False), (2, True), (0, True)):
        with pytest.raises(ValueError, match=r"^key: expected .*, got "):
            attention(Q, Q[:, :heads], Q[:, :heads], enable_gqa=grouped)


P = torch.randn(10, 4, 8)
CU = torch.tensor([0, 4, 10])


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"query": P[None]}, ValueError, "query"),
        ({"key": P[:, :3]}, ValueError, "key"),
        ({"key": P[..., :4]}, ValueError, "key"),
        ({"value": P[:5]}, ValueError, "value"),
        ({"value": P.half()}, TypeError, "value"),
        ({"cu_seqlens_q": torch.tensor([1, 4, 10])}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 11])}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 4, 10])}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.tensor([0, 10])}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": CU.float()}, TypeError, "cu_seqlens_k"),
        ({"cu_seqlens_k": CU.short()}, TypeError, "cu_seqlens_k"),
        ({"cu_seqlens_k": CU.to("meta")}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": CU[None]}, ValueError, "cu_seqlens_k"),
        ({"max_seqlen_q": 5}, ValueError, "max_seqlen_q"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k"),
        ({"max_seqlen_k": 6.0}, TypeError, "max_seqlen_k"),
        ({"attn_mask": torch.ones(4, 6)}, ValueError, "attn_mask"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
    ],
)
def test_attention_varlen(changes, error, named):
    arguments = {
        "query": P, "key": P, "value": P, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 6, "max_seqlen_k": 6,
    }  # fmt: skip
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        attention_varlen(**(arguments | changes))


@pytest.mark.parametrize("queries", [(0, 6), (-1, 3), (3, 2)])
def test_attention_weights(queries):
    with pytest.raises(ValueError, match=r"^queries: expected .*, got "):
        attention_weights(Q, Q, queries=queries)
    with pytest.raises(TypeError, match=r"^queries: expected .*, got "):
        attention_weights(Q, Q, queries=queries[0])
    with pytest.raises(ValueError, match=r"^key: expected .*, got "):
        attention_weights(Q, Q[..., :4])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((Q, Q[:, :1], Q[:, :1]), "key"), ((Q, Q, Q[:, :, :2]), "value"), ((Q, Q, Q, torch.ones(3, 5)), "attn_mask"),
        ((Q, Q, Q, None, 1.5), "dropout_p"), ((Q, Q, Q, torch.ones(1, 1, 1, 1, 5)), "attn_mask"),
    ],
)  # fmt: skip
def test_attention_with_weights(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        attention_with_weights(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        (([1.0], X, W, W), {}, TypeError, "x"),
        ((X.long(), None, None), {}, TypeError, "x"),
        ((torch.tensor(1.0), None, None), {}, ValueError, "x"),
        ((X[:, :0], None, None), {}, ValueError, "x"),
        ((X, X[:2], W), {}, ValueError, "residual"),
        ((X, X[0], W), {}, ValueError, "residual"),
        ((X, X.half(), W), {}, TypeError, "residual"),
        ((X, X.to("meta"), W), {}, ValueError, "residual"),
        ((X, X, W[:3]), {}, ValueError, "weight"),
        ((X, X, W.double()), {}, TypeError, "weight"),
        ((X, X, W, W[:3]), {}, ValueError, "bias"),
        ((X, X, W, W.to("meta")), {}, ValueError, "bias"),
        ((X, X, W), {"x_bias": W[:3]}, ValueError, "x_bias"),
        ((X, X, W), {"x_bias": W.half()}, TypeError, "x_bias"),
        ((X, X, W), {"x_bias": 1.0}, TypeError, "x_bias"),
        ((X.half(), X.double(), None), {}, TypeError, "residual"),
        ((X.half(), X.bfloat16(), None), {}, TypeError, "residual"),
        ((X.half(), None, W.bfloat16()), {}, TypeError, "weight"),
        ((X, X, W), {"norm": "batch"}, ValueError, "norm"),
        ((X, X, W), {"norm": None}, ValueError, "norm"),
        ((X, X, W), {"eps": -1.0}, ValueError, "eps"),
        ((X, X, W), {"eps": "1"}, ValueError, "eps"),
        ((X, X, W), {"dropout_p": 2}, ValueError, "dropout_p"),
        ((X, X, W), {"dropout_p": None}, TypeError, "dropout_p"),
        ((X, X, W), {"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p"),
        ((X, X, W), {"eps": torch.tensor(0.1), "norm": "rms"}, ValueError, "eps"),
    ],
)
def test_add_norm(arguments, options, error, named):
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        add_norm(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((3, W1, None, W2, None), {}, TypeError, "x"),
        ((X.long(), W1.long(), None, W2.long(), None), {}, TypeError, "x"),
        ((torch.tensor(1.0), W1, None, W2, None), {}, ValueError, "x"),
        ((X[:, :3], W1, None, W2, None), {}, ValueError, "weight1"),
        ((X, W1[0], None, W2, None), {}, ValueError, "weight1"),
        ((X, W1.half(), None, W2, None), {}, TypeError, "weight1"),
        ((X, W1.to("meta"), None, W2, None), {}, ValueError, "weight1"),
        ((X, W1, None, W2[:, :3], None), {}, ValueError, "weight2"),
        ((X, W1, W, W2, None), {}, ValueError, "bias1"),
        ((X, W1, None, W2, W[:2]), {}, ValueError, "bias2"),
        ((X, W1, None, W2, W.half()), {}, TypeError, "bias2"),
        ((X, W1, None, W2, None), {"activation": "swish"}, ValueError, "activation"),
        ((X, W1, None, W2, None), {"dropout_p": -1}, ValueError, "dropout_p"),
        ((X, W1, None, W2, None), {"out_dropout_p": 2.0}, ValueError, "out_dropout_p"),
        ((X, W1, None, W2, None), {"out_dropout_p": "0.1"}, TypeError, "out_dropout_p"),
        ((X, W1, None, W2, None), {"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p"),
        ((X, W1, None, W2, None), {"fused": "yes"}, ValueError, "fused"),
        ((X, W1, None, W2, None), {"recompute": "all"}, ValueError, "recompute"),
        ((X, W1, None, W2, None), {"gated": True}, ValueError, "weight2"),
        ((X, torch.randn(7, X.shape[-1]), None, W2, None), {"gated": True}, ValueError, "weight1"),
        ((X, W1, None, W2, None), {"residual": X[:1]}, ValueError, "residual"),
        ((X, W1, None, W2, None), {"residual": X.half()}, TypeError, "residual"),
        ((X, W1, None, W2, None), {"residual": X.long()}, TypeError, "residual"),
    ],
)
def test_ffn(arguments, options, error, named):
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        ffn(*arguments, **options)


POST_NORMS = {"post_norm1_weight": torch.ones(48), "post_norm2_weight": torch.ones(48)}


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"nhead": 5}, ValueError, "nhead"),
        ({"nhead": 0}, ValueError, "nhead"),
        ({"nhead": 3.0}, ValueError, "nhead"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"activation": 3}, ValueError, "activation"),
        ({"dropout1_p": 1.5}, ValueError, "dropout1_p"),
        ({"attn_dropout_p": "0.1"}, TypeError, "attn_dropout_p"),
        ({"src": torch.randn(5, 48)}, ValueError, "src"),
        ({"src": [1.0]}, TypeError, "src"),
        ({"src": torch.zeros(2, 5, 48, dtype=torch.int64)}, TypeError, "src"),
        ({"src": torch.randn(2, 5, 36)}, ValueError, r"weights\.in_proj_weight"),
        ({"cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5}, ValueError, "src"),
        ({"src": torch.randn(5, 48), "cu_seqlens": torch.tensor([0, 4]), "max_seqlen": 5}, ValueError, "cu_seqlens"),
        ({"attn_mask": torch.zeros(3, 3)}, ValueError, "attn_mask"),
        ({"src": torch.randn(2, 5, 48, dtype=torch.float64)}, TypeError, r"weights\.in_proj_weight"),
        ({"src": torch.randn(2, 5, 48, device="meta")}, ValueError, r"weights\.in_proj_weight"),
        ({"rotary": torch.ones(5, 8)}, TypeError, "rotary"),
        ({"rotary": (torch.ones(5, 8),) * 3}, TypeError, "rotary"),
        ({"rotary": (torch.ones(5, 8), None)}, TypeError, "rotary"),
        ({"weights": (torch.ones(2),) * 12}, TypeError, "weights"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"norm": "batch"}, ValueError, "norm"),
        ({"window": (1, -2)}, ValueError, "window"),
        ({"relative_bias": torch.zeros(3, 4)}, ValueError, "relative_bias"),
        ({"modules": {"q_proj": torch.relu}}, ValueError, "modules"),
        ({"modules": {"k_proj": torch.relu}}, ValueError, "modules"),
        ({"of_weights": {"up_bias": torch.zeros(70)}}, ValueError, r"weights\.up_bias"),
        ({"of_weights": {"v_proj_bias": torch.zeros(48)}}, ValueError, r"weights\.v_proj_bias"),
        ({"of_weights": {"up_weight": torch.zeros(70, 48)}}, ValueError, r"weights\.up_weight"),
        ({"of_weights": {"k_proj_weight": torch.zeros(48, 48)}}, ValueError, r"weights\.v_proj_weight"),
        ({"of_weights": POST_NORMS}, ValueError, r"weights\.post_norm1_weight"),
        (
            {"of_weights": {"post_norm1_weight": torch.ones(48)}, "norm_first": True},
            ValueError,
            r"weights\.post_norm1_weight",
        ),
        (
            {"of_weights": POST_NORMS | {"post_norm2_weight": torch.ones(7)}, "norm_first": True},
            ValueError,
            r"weights\.post_norm2_weight",
        ),
    ],
)
def test_encoder_layer(change, error, names):
    layer = torch.nn.TransformerEncoderLayer(48, 3, 70)
    attn, norm1, norm2 = layer.self_attn, layer.norm1, layer.norm2
    weights = LayerWeights(
        attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias, norm1.weight, norm1.bias,
        layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias, norm2.weight, norm2.bias,
    )  # fmt: skip
    arguments = {"src": torch.randn(2, 5, 48), "weights": weights, "nhead": 3} | change
    if "of_weights" in change:
        arguments["weights"] = weights._replace(**arguments.pop("of_weights"))
    with pytest.raises(error, match=f"^{names}: expected"):
        encoder_layer(**arguments)


WHOLE = {"in_proj_weight": torch.zeros(144, 48), "k_proj_weight": None, "v_proj_weight": None}


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"memory": None}, TypeError, "memory"),
        ({"memory": torch.randn(2, 7, 48).half()}, TypeError, "memory"),
        ({"memory": torch.randn(3, 7, 48)}, ValueError, "memory"),
        ({"across": None}, TypeError, "across"),
        ({"across": {"k_proj_weight": None}}, ValueError, r"across\.v_proj_weight"),
        ({"across": {"k_proj_weight": None, "v_proj_weight": None}}, ValueError, r"across\.in_proj_weight"),
        ({"across": {"v_proj_weight": torch.randn(48, 32)}}, ValueError, r"across\.v_proj_weight"),
        ({"of_weights": POST_NORMS, "norm_first": True}, ValueError, r"across\.post_norm1_weight"),
        ({"across": WHOLE, "across_modules": {"in_proj": torch.relu}}, ValueError, "across_modules"),
        ({"memory_mask": torch.zeros(5, 9)}, ValueError, "memory_mask"),
        ({"memory_scale": -1.0}, ValueError, "memory_scale"),
        ({"memory_dropout_p": 2.0}, ValueError, "memory_dropout_p"),
    ],
)
def test_decoder_layer(change, error, names):
    w, vector = torch.randn(48, 48), torch.randn(48)
    weights = LayerWeights(w, None, w, None, vector, None, w, None, w, None, vector, None, w, None, w, None)
    arguments = {"src": torch.randn(2, 5, 48), "nhead": 3, "memory": torch.randn(2, 7, 48), **change}
    across = arguments.pop("across", {})
    if across is not None:
        across = weights._replace(**across)
    weights = weights._replace(**arguments.pop("of_weights", {}))
    with pytest.raises(error, match=f"^{names}: "):
        decoder_layer(weights=weights, across=across, **arguments)


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match="gelu, gelu_tanh, quick_gelu, relu, silu, relu2"):
        ffn(X, W1, None, W2, None, activation="swish")


def test_unknown_norm_lists_the_known_ones():
    with pytest.raises(ValueError, match="layer, rms"):
        add_norm(X, X, W, norm="batch")


def test_float64_runs_eager():
    assert attention(Q.double(), Q.double(), Q.double()).dtype == torch.float64
    assert last_backend() == "eager"


def test_backend_can_be_forced_and_asked_for():
    assert get_backend() == "auto"
    with use_backend("triton"):
        assert get_backend() == "triton"
        with pytest.raises(RuntimeError, match="needs a CUDA or ROCm tensor"):
            attention(Q, Q, Q)
    assert get_backend() == "auto"
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, triton, eager"):
        set_backend("cuda")


@pytest.mark.kernel
def test_kernels_refuse_what_they_cannot_do(device, backend):
    if backend == "eager":
        assert attention(*[torch.randn(1, 1, 3, 300)] * 3).shape == (1, 1, 3, 300)
        return
    with pytest.raises(ValueError, match="at most 256"):
        attention(*[torch.randn(1, 1, 3, 300, device=device)] * 3)
    with pytest.raises(ValueError, match="at most 65536"):
        add_norm(torch.randn(1, 65537, device=device), None, None)


@pytest.mark.kernel
@pytest.mark.parametrize("function", ["attention", "add_norm", "ffn"])
def test_second_derivatives_are_refused_on_the_kernels(device, backend, function):
    """Also where the incoming gradient is a constant, so that nothing but the saved inputs could be differentiated."""
    x = torch.randn(1, 1, 3, 8, device=device, requires_grad=True)
    weight = torch.randn(8, 8, device=device)
    out = {
        "attention": lambda: attention(x, x, x),
        "add_norm": lambda: add_norm(x, x, weight[0], weight[1]),
        "ffn": lambda: ffn(x, weight, None, weight, None),
    }[function]()
    (grad,) = torch.autograd.grad(out.pow(2).sum() if function == "add_norm" else out.sum(), x, create_graph=True)
    if backend == "eager" and function != "attention":
        assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()
        return
    # Eager attention is torch's own on a CPU, which has no second derivative either and says so.
    with pytest.raises(RuntimeError, match="first derivative only" if backend != "eager" else "not implemented"):
        grad.sum().backward()
