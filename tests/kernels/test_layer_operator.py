"""The whole layer as one operator: what torch.compile sees of it on a GPU. Elsewhere it sees the parts."""

from __future__ import annotations

import contextlib

import fusenc
import pytest
import torch
from contract import assert_same
from fusenc.kernels import encoder_layer, use_backend
from fusenc.kernels.encoder_layer import op
from layers import HEADS, gated, separate, tensors
from tolerances import AUTOCAST, SAME_ALGORITHM

pytestmark = [pytest.mark.kernel, pytest.mark.interpreter]
SHAPE = (2, 5, 24)
DROPOUTS = dict.fromkeys(("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p"), 0.2)
CASES = {
    "dropout": {**DROPOUTS, "batch_first": False},
    "packed": {"norm_first": True, "norm": "rms", "activation": "silu", "recompute": True},
    "autocast": {"autocast": True},
    "autocast, no first norm": {"autocast": True, "norm_first": True, "no_norm1": True, "gated": True},
}


@pytest.fixture(autouse=True)
def _compiles(request):
    if request.config.getoption("--device") == "ttsem":
        pytest.skip("its tensors are on a GPU that fake tensors know to be none")


@pytest.fixture(params=list(CASES))
def case(request, device):
    """Source, weights, options, and the autocast around the call."""
    name, options = request.param, dict(CASES[request.param])
    autocast = options.pop("autocast", False)
    src, weights = tensors((7, SHAPE[2]) if name == "packed" else SHAPE, 20, device)
    if name != "dropout":
        weights = separate(weights)
    if name == "autocast":
        weights, options["relative_bias"] = weights._replace(k_proj_bias=None), torch.rand(HEADS, 3, device=device)
    if name == "packed":
        starts = torch.tensor([0, 5, 7], dtype=torch.int32, device=device)
        options.update(cu_seqlens=starts, max_seqlen=5)
    if options.get("gated"):
        weights = gated(weights, True)
    for t in (src, *weights):
        if t is not None:
            t.requires_grad_()
    around = torch.autocast(src.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    return src, weights, options, around


def test_compiled(case, backend):
    src, weights, options, around = case
    seen = []

    def compiler(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "fusenc" in str(node.target))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def layer(src, weights):
        return encoder_layer(src, weights, HEADS, **options)

    torch._dynamo.reset()
    found = []
    for run in (torch.compile(layer, fullgraph=True, backend=compiler), layer):
        torch.manual_seed(2)
        with around:
            out = run(src, weights)
        leaves = [src, *(t for t in weights if t is not None)]
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        found.append((out, *torch.autograd.grad(out, leaves, upstream, materialize_grads=True, allow_unused=True)))
    assert backend == "eager" or seen == ["fusenc.encoder_layer.default"]
    tolerance = AUTOCAST if around.__class__ is torch.autocast else SAME_ALGORITHM
    assert_same(*found, tolerance)


def arguments(src, weights, options, around):
    """Of the operator."""
    options = dict(options)
    in_order = {
        "batch_first": True, "norm_first": False, "norm": "layer", "activation": "gelu", "gated": False, "eps1": 1e-5,
        "eps2": 1e-5, "scale": None, "is_causal": False, "window": None, "softcap": None, "no_norm1": False,
        "recompute": False, **dict.fromkeys(DROPOUTS, 0.0),
    }  # fmt: skip
    starts, longest, bias = (options.pop(name, None) for name in ("cu_seqlens", "max_seqlen", "relative_bias"))
    longest = longest or 0
    with around:
        given = (src, *weights, None, bias, None, None, None, starts)
        found, numbers = op.checked(given, (HEADS, *{**in_order, **options}.values()), longest)
    keys = [torch.tensor([i], device=src.device) if options.get("dropout_p") else None for i in range(4)]
    needs = [t is not None and t.requires_grad for t in found[: op.ENCODER_LAYER.differentiable]]
    return *found[:-4], *keys, *numbers, longest, not numbers.batch_first, needs


def test_opcheck(case):
    torch.library.opcheck(op.ENCODER_LAYER.operator, arguments(*case))


def test_on_another_backend(case, backend):
    """The same dropout, and a backward pass that does not read what the other backend has kept."""
    given = arguments(*case)
    out, *_ = op.ENCODER_LAYER.operator(*given)
    with use_backend("eager"):
        eager, *_ = op.ENCODER_LAYER.operator(*given)
        tolerance = AUTOCAST if case[3].__class__ is torch.autocast else SAME_ALGORITHM
        assert_same([out, out], [eager, eager], tolerance)
        if backend != "eager":
            with pytest.raises(RuntimeError, match="backend was changed"):
                out.sum().backward()


def test_compiled_after_a_layer_that_is_not(device):
    kind = fusenc.TransformerEncoderLayer
    layers = [kind(24, 3, 20, batch_first=True, dropout=0.0, device=device) for _ in range(2)]
    compiled, x = torch.compile(layers[1], fullgraph=True, backend="aot_eager"), torch.randn(2, 5, 24, device=device)
    with torch.autocast(x.device.type, torch.bfloat16):  # the first one leaves a copy of its output
        first = layers[0](x)
        assert_same([compiled(first)] * 2, [layers[1](first)] * 2, AUTOCAST)
