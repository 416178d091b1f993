"""fusenc.kernels.encoder_layer against float64, and against the chain of the functions it stands for."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract, assert_same, compare, output_and_gradients
from fusenc.kernels import LayerWeights, decoder_layer, encoder_layer, last_backend, rotary_tables, use_backend
from fusenc.kernels.common import plan
from fusenc.kernels.encoder_layer import neighbours, op, parts
from fusenc.kernels.encoder_layer.decoder import _DECODER_LAYER
from fusenc.kernels.encoder_layer.op import ENCODER_LAYER
from layers import HEADS, gated, separate, tensors
from tolerances import AUTOCAST, FORWARD_FACTOR, GRADIENT_FACTOR, SAME_ALGORITHM, size_of_a_sum

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def lay_together(weights):
    """Query, key and value one behind the other, and gate and up."""
    for kind in ("weight", "bias"):
        neighbours.lay_together([getattr(weights, f"{name}_{kind}") for name in ("in_proj", "k_proj", "v_proj")])
        if weights.up_weight is not None:
            neighbours.lay_together([getattr(weights, f"{kind}1"), getattr(weights, f"up_{kind}")])
    return weights


def plain(
    src, w, *, attn_mask=None, is_causal=False, batch_first=True, norm_first=False, no_norm1=False, norm="layer",
    activation="gelu", gated=False, eps1=1e-5, eps2=1e-5, scale=None, window=None, softcap=None, relative_bias=None,
    rotary=None, recompute=False, memory=None, across=None, across_eps=1e-5,
):  # fmt: skip
    """The layer in plain PyTorch."""
    x = src if batch_first else src.transpose(0, 1)
    b, n, e = x.shape
    d = w.out_proj_weight.shape[1] // HEADS
    act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation]

    def projections(w):
        weights = [t for t in (w.in_proj_weight, w.k_proj_weight, w.v_proj_weight) if t is not None]
        biases = [
            x.new_zeros(len(of)) if t is None else t
            for t, of in zip((w.in_proj_bias, w.k_proj_bias, w.v_proj_bias), weights, strict=False)
        ]
        return torch.cat(weights), torch.cat(biases)

    def attend_to_memory(x):
        (q, kv), (q_bias, kv_bias) = (t.tensor_split([HEADS * d]) for t in projections(across))
        q, kv = F.linear(x, q, q_bias), F.linear(memory, kv, kv_bias)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return F.linear(out.transpose(1, 2).reshape(b, n, -1), across.out_proj_weight, across.out_proj_bias)

    def attend(x):
        rows = F.linear(x, *projections(w)).view(b, n, -1, d).transpose(1, 2)
        others = (rows.shape[1] - HEADS) // 2
        q, k, v = rows.split((HEADS, others, others), 1)
        if rotary is not None:
            cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in rotary)
            q, k = (t * cos + torch.cat((-t[..., d // 2 :], t[..., : d // 2]), -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(HEADS // others, 1) for t in (k, v))
        added, seen = torch.zeros(n, n, dtype=x.dtype, device=x.device), None
        distance = torch.arange(n, device=x.device)[None] - torch.arange(n, device=x.device)[:, None]
        if relative_bias is not None:
            reach = relative_bias.shape[1] // 2
            added = added + relative_bias.to(x.dtype)[:, distance.clamp(-reach, reach) + reach]
        seen = distance <= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen = seen & (distance >= -window[0]) & (distance <= window[1])
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            seen = seen & attn_mask
        elif attn_mask is not None:
            added = added + attn_mask.to(x.dtype)
        added = added.masked_fill(~seen, float("-inf"))
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, added, scale=scale)
        else:
            scores = q @ k.transpose(2, 3) * (d**-0.5 if scale is None else scale)
            out = (softcap * torch.tanh(scores / softcap) + added).softmax(-1) @ v
        return F.linear(out.transpose(1, 2).reshape(b, n, -1), w.out_proj_weight, w.out_proj_bias)

    def feed_forward(x):
        hidden = F.linear(x, w.weight1, w.bias1)
        gate, up = hidden, None
        if w.up_weight is not None:
            up = F.linear(x, w.up_weight, w.up_bias)
        elif gated:
            gate, up = hidden.chunk(2, -1)
        hidden = act(gate) if up is None else act(gate) * up
        return F.linear(hidden, w.weight2, w.bias2)

    def normed(x, weight, bias, eps):
        if norm == "layer":
            return F.layer_norm(x, (e,), weight, bias, eps)
        out = F.rms_norm(x, (e,), weight, eps)
        return out if bias is None else out + bias

    parts = [(attend, (w.norm1_weight, w.norm1_bias, eps1), (w.post_norm1_weight, w.post_norm1_bias, eps1))]
    if across is not None:
        parts.append((
            attend_to_memory, (across.norm1_weight, across.norm1_bias, across_eps),
            (across.post_norm1_weight, across.post_norm1_bias, across_eps),
        ))  # fmt: skip
    parts.append((
        feed_forward, (w.norm2_weight, w.norm2_bias, eps2), (w.post_norm2_weight, w.post_norm2_bias, eps2)
    ))  # fmt: skip
    for part, before, after in parts:
        if norm_first:
            out = part(x if no_norm1 and part is attend else normed(x, *before))
            x = x + (out if after[0] is None else normed(out, *after))
        else:
            x = normed(x + part(x), *before)
    return x if batch_first else x.transpose(0, 1)


def split(weights):
    """The parameters that there are, and how to put them back."""
    present = [i for i, t in enumerate(weights) if t is not None]

    def join(given):
        whole = [None] * len(weights)
        for i, t in zip(present, given, strict=True):
            whole[i] = t
        return LayerWeights(*whole)

    return [weights[i] for i in present], join


def hold(src, weights, dtype, **options):
    given, join = split(weights)
    # The gradient of a key's bias is 0 by nature, and of the others' many small terms: the floor counts their sum.
    rows = src.numel() // src.shape[-1]
    assert_contract(
        lambda src, *given: encoder_layer(src, join(given), HEADS, **options),
        lambda src, *given: plain(src, join(given), **options),
        [src, *given], dtype, summed={1 + i: rows for i in range(len(given))},
    )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_layer(device, backend, dtype, norm_first):
    hold(*tensors((2, 35, 48), device=device), dtype, norm_first=norm_first)
    assert last_backend() == backend


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(
    "case",
    ["bool mask", "float mask", "causal", "sequence first", "relu", "no biases", "one token", "eps of each norm"],
)
def test_option(device, case, norm_first):
    src, weights = tensors((2, 35, 48), device=device, biases=case != "no biases")
    options = {
        "bool mask": {"attn_mask": (torch.arange(35) < torch.tensor([[35], [11]]))[:, None, None, :].to(device)},
        "float mask": {"attn_mask": torch.linspace(-2, 2, 35 * 35).view(35, 35).to(device)},
        "causal": {"is_causal": True},
        "sequence first": {"batch_first": False},
        "relu": {"activation": "relu"},
        "eps of each norm": {"eps1": 0.1, "eps2": 2.0},
    }.get(case, {})
    hold(src[:1, :1] if case == "one token" else src, weights, torch.float32, norm_first=norm_first, **options)


FORMS = {
    "rms": (lambda w: w._replace(norm1_bias=None, norm2_bias=None), {"norm": "rms"}),
    "gated": (gated, {"gated": True, "activation": "silu"}),
    "gate and up apart": (lambda w: gated(w, True), {"gated": True}),
    "query, key and value apart": (separate, {}),
    "no bias of the key": (lambda w: separate(w)._replace(k_proj_bias=None), {}),
    "fewer heads of key and value": (lambda w: separate(w, 1), {}),
    "fewer heads in one weight": (
        lambda w: w._replace(in_proj_weight=w.in_proj_weight[:80], in_proj_bias=w.in_proj_bias[:80]), {},
    ),
    "rotary": (lambda w: w, {"rotary": rotary_tables(35, 16)}),
    "rotary, fewer heads": (lambda w: separate(w, 1), {"rotary": rotary_tables(35, 16)}),
    "window": (lambda w: w, {"window": (4, 7)}),
    "softcap and scale": (lambda w: w, {"softcap": 1.5, "scale": 0.4}),
    "relative bias": (lambda w: w, {"relative_bias": torch.linspace(-2, 2, HEADS * 13).view(HEADS, 13)}),
    "recompute": (lambda w: w, {"recompute": True}),
    "recompute gated": (gated, {"gated": True, "recompute": True}),
    "norms without parameters": (
        lambda w: w._replace(norm1_weight=None, norm1_bias=None, norm2_weight=None, norm2_bias=None), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("form", "norm_first"), [(form, i % 2 == 0) for i, form in enumerate(FORMS)])
def test_form(device, backend, form, norm_first):
    change, options = FORMS[form]
    src, weights = tensors((2, 35, 48), device=device)
    of_layer = change(weights)
    placed = {
        name: tuple(t.to(device) for t in value) if name == "rotary" else value.to(device)
        if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }  # fmt: skip
    hold(src, of_layer, torch.float32, norm_first=norm_first, **placed)
    assert last_backend() == backend


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("change", [separate, lambda w: gated(separate(w, 1), True)], ids=["", "gated, fewer heads"])
def test_weights_that_lie_together(device, change, norm_first):
    """As apart; moved apart again; and where saved tensors come back apart, or not as they were before."""
    src, weights = tensors((2, 35, 48), device=device)
    given, join = split(change(weights))
    options = {"norm_first": norm_first, "gated": len(given) > 16}

    def run(leaves, restore=None):
        hooks = contextlib.nullcontext()
        if restore is not None:
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, restore)
        with hooks:
            out = encoder_layer(leaves[0], join(leaves[1:]), HEADS, **options)
        return output_and_gradients(out, leaves)

    leaves = [t.clone().requires_grad_() for t in (src, *given)]
    expected = run(leaves)
    before = [id(t) for t in leaves]
    weights = lay_together(join(leaves[1:]))
    assert before == [id(t) for t in leaves] and not any(t._base is not None for t in leaves)
    assert neighbours.find((weights.in_proj_weight, weights.k_proj_weight, weights.v_proj_weight))[0]
    for restore in (None, lambda t: t, torch.clone, lambda t: t):
        assert_same(run(leaves, restore), expected, SAME_ALGORITHM)
    with torch.no_grad():
        weights.k_proj_weight.data = weights.k_proj_weight.clone()
    assert not neighbours.find((weights.in_proj_weight, weights.k_proj_weight, weights.v_proj_weight))[0]
    assert_same(run(leaves), expected, SAME_ALGORITHM)


def test_only_memory_of_their_own_is_moved():
    def fresh():
        return [torch.randn(4, 4).requires_grad_() for _ in range(3)]

    together = fresh()
    neighbours.lay_together(together)
    assert neighbours.find(together)[0] and not neighbours.find(together[::-1])[0]
    assert not neighbours.find([together[0], together[1].detach(), together[2]])[0]
    for spoil in (
        lambda t: t.detach(), lambda t: t.detach().numpy(), lambda t: t.share_memory_(),
        lambda t: setattr(t, "data", t.t()), lambda t: setattr(t, "data", torch.randn(8, 4)[4:]),
        lambda t: setattr(t, "data", t.half()),
    ):  # fmt: skip
        tensors = fresh()
        at, held = [t.data_ptr() for t in tensors], spoil(tensors[1])
        at[1] = tensors[1].data_ptr()
        neighbours.lay_together(tensors)
        assert [t.data_ptr() for t in tensors] == at and not neighbours.find(tensors)[0], held
    kept = len(neighbours._wholes)
    together[0].data = together[0].data.clone()
    assert not neighbours.find(together)[0]
    neighbours.lay_together(together)
    assert neighbours.find(together)[0] and len(neighbours._wholes) == kept
    del together
    assert len(neighbours._wholes) == kept - 1


def test_a_tangent_of_weights_that_lie_together(backend):
    """no_grad does not stop forward-mode differentiation."""
    if backend != "eager":
        pytest.skip("kernels are differentiated backward")
    src, weights = tensors((2, 5, 48))
    weights = lay_together(LayerWeights(*(None if t is None else t.clone() for t in separate(weights))))
    tangent = torch.ones_like(weights.v_proj_weight)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = weights._replace(v_proj_weight=torch.autograd.forward_ad.make_dual(weights.v_proj_weight, tangent))
        out = encoder_layer(src, dual, HEADS, softcap=50.0)  # which torch's own attention does not serve
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None


def test_the_output_may_be_changed_in_place(device):
    src, weights = tensors((2, 5, 48), device=device)
    out = encoder_layer(src.requires_grad_(), weights, HEADS)
    out += 1
    assert out.sum().backward() is None


def test_the_first_layer_without_a_norm(device):
    src, weights = tensors((2, 35, 48), device=device)
    weights = weights._replace(norm1_weight=None, norm1_bias=None)
    hold(src, weights, torch.float32, norm_first=True, no_norm1=True)


@pytest.mark.parametrize("form", ["rotary", "window", "relative bias", "fewer heads of key and value"])
def test_packed_form(device, form):
    change, options = FORMS[form]
    src, weights = tensors((70, 48), device=device)
    starts = torch.tensor([0, 33, 33, 70], device=device)
    if form == "rotary":
        positions = torch.cat([torch.arange(33), torch.arange(37)]).clamp(max=34)
        options = {"rotary": tuple(t[positions].to(device) for t in options["rotary"])}
    elif form == "relative bias":
        options = {"relative_bias": options["relative_bias"].to(device)}
    options = options | {"cu_seqlens": starts, "max_seqlen": 37}
    chain, one = chain_and_one(src, change(weights), **options)
    assert_same(one, chain, SAME_ALGORITHM)


def with_norms_after(weights):
    """The same with norms after the parts too."""
    generator = torch.Generator().manual_seed(3)
    names = [f"post_{name}" for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")]
    drawn = [torch.randn(weights.bias2.shape, generator=generator).to(weights.bias2) for _ in names]
    return weights._replace(**dict(zip(names, drawn, strict=True)))


@pytest.mark.parametrize(("norm", "starts"), [("layer", None), ("rms", (0, 4, 4, 9))], ids=["dense", "packed, rms"])
def test_norms_before_and_after_the_parts(device, norm, starts):
    """Values and all gradients; the eps of either norm of a part is the same."""
    options = {"norm_first": True, "norm": norm, "eps1": 0.1, "eps2": 2.0}
    src, weights = tensors((2, 9, 48) if starts is None else (9, 48), device=device)
    given, join = split(with_norms_after(weights))
    packed = {} if starts is None else {"cu_seqlens": torch.tensor(starts, device=device), "max_seqlen": 5}

    def reference(src, *given):
        if starts is None:
            return plain(src, join(given), **options)
        return torch.cat([plain(x[None], join(given), **options)[0] for x in src.split((4, 5))])

    assert_contract(
        lambda src, *given: encoder_layer(src, join(given), HEADS, **packed, **options), reference, [src, *given],
        torch.float32, summed={1 + i: 18 for i in range(len(given))},
    )  # fmt: skip


ACROSS = {
    "one weight": (lambda w: w, lambda w: w, {"eps1": 0.1, "across_eps": 0.5, "eps2": 2.0}),
    "fewer heads in one weight": (
        lambda w: w, lambda w: w._replace(in_proj_weight=w.in_proj_weight[:80], in_proj_bias=w.in_proj_bias[:80]),
        {"norm_first": True},
    ),
    "weights apart, norms after the parts": (
        with_norms_after, lambda w: with_norms_after(separate(w)),
        {"norm_first": True, "eps1": 0.1, "across_eps": 0.5, "eps2": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", list(ACROSS))
def test_decoder_layer(device, form):
    change, change_across, options = ACROSS[form]
    (src, weights), (memory, across) = (tensors((2, n, 48), device=device) for n in (9, 7))
    across = change_across(across._replace(in_proj_weight=-across.in_proj_weight, norm1_bias=2 * across.norm1_bias))
    not_read = ("weight1", "bias1", "weight2", "bias2", "norm2_weight", "norm2_bias", "post_norm2_weight",
                "post_norm2_bias")  # fmt: skip
    given, join = split(change(weights))
    given_across, join_across = split(across._replace(**dict.fromkeys(not_read)))

    def parts(leaves):
        return join(leaves[: len(given)]), join_across(leaves[len(given) :])

    def ours(src, memory, *leaves):
        weights, across = parts(leaves)
        return decoder_layer(src, weights, HEADS, memory, across, **options)

    def reference(src, memory, *leaves):
        weights, across = parts(leaves)
        return plain(src, weights, memory=memory, across=across, **options)

    leaves = [src, memory, *given, *given_across]
    assert_contract(ours, reference, leaves, torch.float32, summed=dict.fromkeys(range(2, len(leaves)), 18))


def test_a_decoder_layer_checks_once_a_signature(device, backend):
    """Not of new sizes of batches and lengths; what fits them no longer is found."""
    if backend != "eager":
        pytest.skip("the checks are the same")
    _, weights = tensors((1, 1, 48), device=device)

    def call(batch, length, of_memory, memory_batch=None, keys=None, **options):
        src, memory = (torch.randn(b, n, 48, device=device) for b, n in (
            (batch, length), (batch if memory_batch is None else memory_batch, of_memory)
        ))  # fmt: skip
        mask = torch.ones(batch, 1, 1, of_memory if keys is None else keys, dtype=torch.bool, device=device)
        return decoder_layer(src, weights, HEADS, memory, weights, memory_mask=mask, **options)

    call(3, 9, 7)
    misses = _DECODER_LAYER.plans.misses
    for sizes in ((3, 9, 7), (5, 3, 11), (4, 2, 9)):
        assert call(*sizes).shape == (*sizes[:2], 48)
    assert _DECODER_LAYER.plans.misses == misses
    call(3, 9, 7, modules={"out_proj": lambda x: x})
    for bad, named in (({"memory_batch": 2}, "memory"), ({"keys": 6}, "memory_mask"),
                       ({"modules": {"k_proj": None}}, "modules")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{named}: "):
            call(3, 9, 7, **bad)


def test_key_and_value_of_a_memory_that_lie_together(device, backend, monkeypatch):
    """In inference they take one product, as those of one weight do."""
    if backend != "eager":
        pytest.skip("the products are PyTorch's")
    (src, weights), (memory, across) = (tensors((2, n, 48), device=device) for n in (9, 7))
    apart, products, product = separate(across), [], parts._linear
    monkeypatch.setattr(parts, "_linear", lambda *arguments: products.append(1) or product(*arguments))
    results, counts = [], []
    with torch.no_grad():
        for prepare in (lambda w: w, lay_together):
            products.clear()
            results.append(decoder_layer(src, weights, HEADS, memory, prepare(apart)))
            counts.append(len(products))
    torch.testing.assert_close(*results, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    assert counts == [6, 5]


def test_modules_in_the_place_of_products(device):
    src, weights = tensors((2, 9, 48), device=device)
    expected = encoder_layer(src, weights, HEADS)
    pairs = {
        "in_proj": (weights.in_proj_weight, weights.in_proj_bias), "weight1": (weights.weight1, weights.bias1),
        "out_proj": (weights.out_proj_weight, weights.out_proj_bias), "weight2": (weights.weight2, weights.bias2),
    }  # fmt: skip
    for name, pair in pairs.items():
        calls = []
        module = {name: lambda x, pair=pair, calls=calls: calls.append(1) or F.linear(x, *pair)}
        out = encoder_layer(src, weights, HEADS, modules=module)
        torch.testing.assert_close(out, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
        assert calls == [1]


def in_autocast(src, weights, dtype, layers=1, **options):
    """Output and all gradients of some layers one after the other, whose parameters are the same, under autocast."""
    given, join = split(weights)
    leaves = [t.detach().clone().requires_grad_() for t in (src, *given)]
    with torch.autocast("cpu" if src.is_cpu else "cuda", dtype):
        x = leaves[0]
        for _ in range(layers):
            x = encoder_layer(x, join(leaves[1:]), HEADS, **options)
    return output_and_gradients(x, leaves)


@pytest.mark.parametrize(
    ("form", "norm_first"),
    [
        ("", False), ("", True), ("rms", False), ("gate and up apart", True), ("query, key and value apart", False),
        ("rotary", True), ("no bias of the key", False), ("relative bias", True),
    ],
)  # fmt: skip
def test_autocast(device, backend, norm_first, form):
    """Results and gradients in float32, about as far from those without autocast as eager PyTorch's under it."""
    change, options = FORMS.get(form, (lambda w: w, {}))
    src, weights = tensors((2, 35, 48), device=device)
    # The backward pass takes rowsum(dO O) of an output in 16 bit, as FlashAttention-2 does; what that was rounded by
    # counts in dQ times the mean of the keys, which eager's softmax does not know. So the keys have none.
    weights.in_proj_bias[48:96] = 0.0
    weights = change(weights)
    options = {
        name: tuple(t.to(device) for t in value) if name == "rotary" else value.to(device)
        if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    } | {"norm_first": norm_first, "layers": 2}  # fmt: skip
    got = in_autocast(src, weights, torch.bfloat16, **options)
    assert last_backend() == backend
    with use_backend("eager"):
        eager = in_autocast(src, weights, torch.bfloat16, **options)
        exact = in_autocast(src.double(), LayerWeights(*(t if t is None else t.double() for t in weights)),
                            torch.bfloat16, **options)  # fmt: skip
    for i, (g, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        assert g.dtype == torch.float32
        least = size_of_a_sum(2 * 70) if i > 1 else 0.0  # of parameters, over the rows of both layers
        compare(f"result {i}", g, x, e, GRADIENT_FACTOR if i else FORWARD_FACTOR, torch.bfloat16, least)


def test_autocast_in_inference_mode(device, backend):
    """And training in the same region, with the same casts."""
    if backend == "eager":
        pytest.skip("torch's own casts of inference mode cannot always be kept for a backward pass")
    src, weights = tensors((2, 35, 48), device=device)
    given, join = split(weights)
    leaves = [t.detach().requires_grad_() for t in (src, *given)]

    def run():
        return encoder_layer(encoder_layer(leaves[0], join(leaves[1:]), HEADS), join(leaves[1:]), HEADS)

    with torch.autocast("cpu" if src.is_cpu else "cuda", torch.bfloat16):
        with torch.inference_mode():
            inferred = run()
        trained = run()
        assert torch.equal(inferred, trained.detach())
        output_and_gradients(trained, leaves)
        with torch.inference_mode():
            leaves[1].mul_(2.0)
            assert not torch.equal(run(), inferred)


def test_autocast_with_dropout_is_that_of_the_parts(device):
    options = {"attn_dropout_p": 0.3, "dropout1_p": 0.2, "dropout_p": 0.4, "dropout2_p": 0.1}
    src, weights = tensors((2, 35, 48), device=device)
    for norm_first in (False, True):
        torch.manual_seed(5)
        got = in_autocast(src, weights, torch.bfloat16, norm_first=norm_first, **options)
        torch.manual_seed(5)
        with use_backend("eager"):
            parts = in_autocast(src, weights, torch.bfloat16, norm_first=norm_first, **options)
        assert_same(got, parts, AUTOCAST)


def test_recompute_keeps_less():
    """In units of tokens x width: 16.1 are kept, and with `recompute` 12.1."""
    kept = []
    src, weights = tensors((2, 64, 48), hidden=192)
    leaves = [src.requires_grad_(), *[t.requires_grad_() for t in weights if t is not None]]
    own = {t.untyped_storage().data_ptr() for t in leaves[1:]}
    for recompute in (False, True):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            encoder_layer(leaves[0], LayerWeights(*leaves[1:]), HEADS, recompute=recompute)
        kept.append(sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in own) / src.nbytes)
    assert kept[1] <= kept[0] - 3.9


def chain_and_one(src, weights, backend="auto", **options):
    """Results and gradients of the chain on eager PyTorch and of the one call, with the same dropout."""
    given, join = split(weights)
    results = []
    for used, chained in (("eager", True), (backend, False)):
        leaves = [t.detach().clone().requires_grad_() for t in (src, *given)]
        torch.manual_seed(5)
        with use_backend(used), pytest.MonkeyPatch.context() as patch:
            if chained:
                patch.setattr(ENCODER_LAYER, "instead", lambda tensors, numbers, autocast: op.by_parts(numbers))
            plan.forget()
            out = encoder_layer(leaves[0], join(leaves[1:]), HEADS, **options)
            results.append(output_and_gradients(out, leaves))
    return results


@pytest.mark.interpreter
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_dropout_is_that_of_the_chain(device, norm_first):
    options = {"attn_dropout_p": 0.3, "dropout1_p": 0.2, "dropout_p": 0.4, "dropout2_p": 0.1}
    src, weights = tensors((2, 35, 48), device=device)
    chain, one = chain_and_one(src, weights, norm_first=norm_first, **options)
    assert_same(one, chain, SAME_ALGORITHM)
    for place in options:
        chain, one = chain_and_one(src, weights, norm_first=norm_first, **{place: 0.3})
        assert_same(one, chain, SAME_ALGORITHM)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_packed_batch(device, norm_first):
    src, weights = tensors((70, 48), device=device)
    starts = torch.tensor([0, 33, 33, 70], device=device)
    options = {"cu_seqlens": starts, "max_seqlen": 37, "norm_first": norm_first}
    for case in ({"attn_dropout_p": 0.2}, {"is_causal": True}):
        chain, one = chain_and_one(src, weights, **options, **case)
        assert_same(one, chain, SAME_ALGORITHM)


@pytest.mark.essential
def test_a_row_without_keys_gives_its_value_bias_nothing(device):
    """The value bias's gradient is summed from rows of dO, which count only if they attended to something."""
    src, weights = tensors((2, 35, 48), device=device)
    mask = torch.ones(2, 1, 35, 35, dtype=torch.bool, device=device)
    mask[0, 0, :5] = False
    for p in (0.0, 0.3):
        chain, one = chain_and_one(src, weights, attn_mask=mask, attn_dropout_p=p)
        assert_same(one, chain, SAME_ALGORITHM)


def test_gradient_of_a_mask(device):
    src, weights = tensors((2, 35, 48), device=device)
    bias = torch.linspace(-2, 2, 35 * 35).view(1, 1, 35, 35).to(device)
    grads = []
    for backend in ("eager", "auto"):
        leaf = bias.clone().requires_grad_()
        with use_backend(backend):
            out = encoder_layer(src, weights, HEADS, attn_mask=leaf)
            grads.append(output_and_gradients(out, [leaf]))
    assert_same(grads[1], grads[0], SAME_ALGORITHM)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("wanted", ["src", "in_proj_bias", "norm1_weight", "bias2", "weight1", "out_proj_bias"])
def test_only_some_inputs_need_gradients(device, norm_first, wanted):
    src, weights = tensors((2, 35, 48), device=device)
    named = {"src": src, **weights._asdict()}
    results = []
    for backend in ("eager", "auto"):
        leaf = named[wanted].detach().clone().requires_grad_()
        given = named | {wanted: leaf}
        with use_backend(backend):
            out = encoder_layer(given.pop("src"), LayerWeights(**given), HEADS, norm_first=norm_first)
            results.append(output_and_gradients(out, [leaf]))
    assert_same(results[1], results[0], SAME_ALGORITHM)


def test_two_runs_give_the_same_bits(device):
    src, weights = tensors((3, 70, 48), device=device)
    weights = LayerWeights(*(t if t is None else t.half() for t in weights))
    runs = [chain_and_one(src.half(), weights)[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inference_gives_the_same_bits_as_training(device):
    src, weights = tensors((2, 35, 48), device=device)
    out = encoder_layer(src, weights, HEADS)
    assert torch.equal(encoder_layer(src.requires_grad_(), weights, HEADS), out)


def test_empty_batch(device):
    src, weights = tensors((0, 5, 48), device=device)
    assert encoder_layer(src.requires_grad_(), weights, HEADS).shape == (0, 5, 48)


def test_a_function_as_activation_is_that_of_the_name(device):
    src, weights = tensors((2, 5, 48), device=device)
    expected = encoder_layer(src, weights, HEADS, activation="gelu")
    torch.testing.assert_close(
        encoder_layer(src, weights, HEADS, activation=F.gelu), expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM
    )
