"""fusenc.kernels.add_norm against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract, compare
from fusenc.kernels import add_norm, last_backend
from fusenc.kernels.add_norm import eager
from fusenc.kernels.add_norm.arguments import Options, Tensors
from fusenc.kernels.add_norm.op import ADD_NORM
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, size_of_a_sum

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(rows, width, device):
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (rows, width), (width,), (width,))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def plain(x, residual, weight, bias):
    return F.layer_norm(x + residual, x.shape[-1:], weight, bias)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 64, 100, 768])
@pytest.mark.essential
def test_layer_norm_of_a_sum(device, backend, dtype, width):
    assert_contract(add_norm, plain, tensors(37, width, device), dtype)
    assert last_backend() == backend


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_rows(device, rows):
    assert_contract(add_norm, plain, tensors(rows, 100, device), torch.float32)


@pytest.mark.parametrize("width", [4096, 5000, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows(device, width, dtype):
    assert_contract(add_norm, plain, tensors(3, width, device), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
@pytest.mark.essential
def test_dropout_uses_the_documented_mask(device, dtype, dropout_p):
    inputs = tensors(20, 50, device)
    torch.manual_seed(3)
    dropped = dropout.drop_mask(dropout.new_seed(inputs[0]), inputs[0].shape, dropout_p)
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0

    def kernel(x, *rest):
        torch.manual_seed(3)
        return add_norm(x, *rest, dropout_p=dropout_p)

    def reference(x, residual, weight, bias):
        return plain((x * factor).masked_fill(dropped, 0.0), residual, weight, bias)

    assert_contract(kernel, reference, inputs, dtype)


def test_no_dropout_in_evaluation(device):
    x, r, w, b = tensors(5, 8, device)
    torch.testing.assert_close(
        add_norm(x, r, w, b, dropout_p=0.9, training=False), add_norm(x, r, w, b), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.essential
def test_sum_is_returned_and_differentiable(device, dtype):
    def kernel(x, r, w, b):
        normed, total = add_norm(x, r, w, b, return_sum=True)
        return torch.cat([normed, total])

    assert_contract(kernel, lambda x, r, w, b: torch.cat([plain(x, r, w, b), x + r]), tensors(20, 50, device), dtype)


def test_sum_without_residual_is_the_input(device):
    x, _, w, b = tensors(20, 50, device)

    def kernel(x, w, b):
        normed, total = add_norm(x, None, w, b, return_sum=True)
        return torch.cat([normed, total])

    assert_contract(kernel, lambda x, w, b: torch.cat([F.layer_norm(x, (50,), w, b), x]), (x, w, b), torch.float32)


def test_no_residual_no_weight_no_bias(device):
    x, r, w, _ = tensors(20, 50, device)
    assert_contract(lambda x: add_norm(x, None, None), lambda x: F.layer_norm(x, (50,)), [x], torch.float32)
    assert_contract(lambda x, w: add_norm(x, None, w), lambda x, w: F.layer_norm(x, (50,), w), [x, w], torch.float32)
    assert_contract(lambda x, r: add_norm(x, r, None), lambda x, r: F.layer_norm(x + r, (50,)), [x, r], torch.float32)


def test_bias_without_weight(device):
    x, _, _, b = tensors(20, 50, device)
    assert_contract(
        lambda x, b: add_norm(x, None, None, b), lambda x, b: F.layer_norm(x, (50,), None, b), [x, b], torch.float32
    )


def test_eps(device):
    x, r, w, b = tensors(20, 50, device)
    assert_contract(
        lambda *t: add_norm(*t, eps=0.1),
        lambda x, r, w, b: F.layer_norm(x + r, (50,), w, b, 0.1),
        [x * 0.1, r * 0.1, w, b],
        torch.float32,
    )


def test_large_mean_loses_no_accuracy(device):
    x, r, w, b = tensors(20, 500, device)
    assert_contract(add_norm, plain, [x + 100, r, w, b], torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "column step"])
def test_strides(device, layout):
    x, r, w, b = tensors(24, 60, device)
    if layout == "transposed":
        x = x.view(4, 6, 60).transpose(0, 1)
        r = r.view(6, 4, 60)
    elif layout == "sliced":
        x = torch.randn(24, 200, device=device)[:, 20:80]
    elif layout == "expanded":
        r = r[:1].expand(24, 60)
    else:
        x = torch.randn(24, 120, device=device)[:, ::2]
    assert_contract(add_norm, plain, [x, r, w, b], torch.float32)


def test_constant_row_is_finite(device):
    x = torch.ones(4, 32, device=device, requires_grad=True)
    out = add_norm(x, None, None)
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_two_runs_give_the_same_bits(device):
    def run():
        inputs = [t.half().requires_grad_() for t in tensors(200, 50, device)]
        out = add_norm(*inputs)
        return out, *torch.autograd.grad(out.sum(), inputs)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty_batch(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    w, b = torch.ones(8, device=device, requires_grad=True), torch.zeros(8, device=device, requires_grad=True)
    out = add_norm(x, x, w, b)
    assert out.shape == shape
    dx, dw, db = torch.autograd.grad(out.sum(), (x, w, b))
    assert dx.shape == shape and (dw == 0).all() and (db == 0).all()


OPTIONS = {
    "rms": {"norm": "rms"},
    "rms, no eps": {"norm": "rms", "eps": 0.0},
    "no eps": {"eps": 0.0},
    "zero-centred weight": {"zero_centered_weight": True},
    "float32 sum": {"residual_in_fp32": True},
    "recompute": {"recompute": True},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "norm": "rms", "dropout_p": 0.3, "zero_centered_weight": True, "residual_in_fp32": True, "recompute": True,
    },
}  # fmt: skip


def check_options(device, rows, width, dtype, present=("residual", "weight", "bias", "x_bias"), float32=(), **options):
    """Hold a call with any options to the contract, the mask included; inputs named in `float32` are."""
    shapes = {"residual": (rows, width), "weight": (width,), "bias": (width,), "x_bias": (width,)}
    generator = torch.Generator().manual_seed(5)
    names = ["x", *present]
    inputs = [torch.randn(shapes.get(name, (rows, width)), generator=generator).to(device) for name in names]
    return_sum, p = options.get("return_sum", False), options.get("dropout_p", 0.0)
    torch.manual_seed(3)
    dropped = dropout.drop_mask(dropout.new_seed(inputs[0]), inputs[0].shape, p)
    wide = options.get("residual_in_fp32", False) or "residual" in float32

    def as_given(args):
        given_ = dict(zip(names, args, strict=True))
        return {n: t.float() if n in float32 and t.dtype != torch.float64 else t for n, t in given_.items()}

    def kernel(*args):
        torch.manual_seed(3)
        g = as_given(args)
        x, residual, weight = g.pop("x"), g.pop("residual", None), g.pop("weight", None)
        out = add_norm(x, residual, weight, **g, **options)
        if not return_sum:
            return out
        assert out[1].dtype == (torch.float32 if wide else x.dtype)
        return torch.cat([out[0], out[1].to(x.dtype)])

    def reference(*args):
        g = as_given(args)
        x, dtype_ = g["x"], g["x"].dtype
        z = x.float() if wide and dtype_ != torch.float64 else x
        if "x_bias" in g:
            z = z + g["x_bias"]
        if p:
            z = (z / (1 - p)).masked_fill(dropped, 0.0)
        z = z + g["residual"] if "residual" in g else z
        z = z if wide else z.to(dtype_)
        weight, bias = (None if g.get(name) is None else g[name].to(z.dtype) for name in ("weight", "bias"))
        if weight is not None and options.get("zero_centered_weight"):
            weight = 1 + weight
        eps = options.get("eps", 1e-5)
        if options.get("norm") == "rms":
            out = F.rms_norm(z, (width,), weight, eps)
            out = out if bias is None else out + bias
        else:
            out = F.layer_norm(z, (width,), weight, bias, eps)
        return torch.cat([out, z]).to(dtype_) if return_sum else out.to(dtype_)

    summed = {i: rows for i, name in enumerate(names) if name in ("weight", "bias", "x_bias")}
    assert_contract(kernel, reference, inputs, dtype, summed=summed)


@pytest.mark.interpreter
@pytest.mark.parametrize("return_sum", [False, True], ids=["", "sum"])
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.essential
def test_options(device, option, return_sum):
    check_options(device, 37, 72, torch.float16, return_sum=return_sum, **OPTIONS[option])


@pytest.mark.interpreter
@pytest.mark.parametrize("float32", [("residual",), ("weight", "bias", "x_bias"), ("bias",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_beside_half_precision(device, dtype, float32):
    check_options(device, 19, 72, dtype, float32=float32, return_sum=True, dropout_p=0.2)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [16, 17, 192, 257, 384, 513, 769, 1536, 4104, 8192, 8200, 16384, 16392])
@pytest.mark.essential
def test_widths_around_the_borders_of_the_designs(device, width, norm):
    check_options(device, 5, width, torch.float16, norm=norm, return_sum=width % 2 == 0)


@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["plain", "everything"])
def test_the_widest_rows(device, options):
    check_options(device, 2, 65536, torch.float16, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [100, 9000])
@pytest.mark.parametrize("float32", [False, True], ids=["", "float32 sum"])
def test_recomputing_gives_the_same_bits(device, width, float32):
    inputs = [t.half().requires_grad_() for t in (*tensors(21, width, device), torch.randn(width, device=device))]

    def run(recompute):
        torch.manual_seed(3)
        x, residual, weight, bias, x_bias = inputs
        out = add_norm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=0.2, residual_in_fp32=float32, recompute=recompute
        )
        return out, *torch.autograd.grad(
            out, inputs, torch.linspace(-1, 1, out.numel(), device=device).view_as(out).half()
        )

    for saved, again in zip(run(False), run(True), strict=True):
        assert torch.equal(saved, again)


def test_recomputing_does_not_save_the_sum(device):
    x, residual, w, b = (t.requires_grad_() for t in tensors(21, 100, device))

    def saved(**options):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            add_norm(x, residual, w, b, **options)
        return {p for p in kept if p not in (x.data_ptr(), residual.data_ptr(), w.data_ptr(), b.data_ptr())}

    if last_backend() != "eager":
        assert len(saved(recompute=True)) == len(saved()) - 1


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [32, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_constant_row_without_eps_is_finite(device, norm, width, dtype):
    x = torch.zeros(3, width, device=device, dtype=dtype)
    x[1] = torch.linspace(-1, 1, width)
    weight, bias = torch.ones(width, device=device, dtype=dtype), torch.full((width,), 2.0, device=device, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = add_norm(x, None, weight, bias, norm=norm, eps=0.0)
    assert (out[::2] == 2).all() and out.isfinite().all() and out[1].std() > 0.5
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves, torch.ones_like(out)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [32, 20000])
def test_what_is_not_finite_spreads_over_its_row_as_in_torch(device, width, norm, value):
    """A NaN that became a number would pass a gradient scaler."""
    x = torch.randn(3, width, device=device)
    x[1, 3] = value
    for eps in (1e-5, 0.0):
        out = add_norm(x, None, None, norm=norm, eps=eps)
        expected = F.rms_norm(x, (width,), None, eps) if norm == "rms" else F.layer_norm(x, (width,), None, None, eps)
        assert torch.equal(out.isnan(), expected.isnan())


def test_large_mean_in_wide_rows(device):
    x, r, w, b = tensors(2, 20000, device)
    assert_contract(add_norm, plain, [x + 100, r, w, b], torch.float32, summed={2: 2, 3: 2})


@pytest.mark.interpreter
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (1, 4), (0, 2)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_only_some_inputs_need_gradients(device, needed, dropout_p):
    """Each gradient is the same whichever others are wanted."""
    base = [*tensors(21, 48, device), torch.randn(48, generator=torch.Generator().manual_seed(2)).to(device)]

    def run(wanted):
        torch.manual_seed(3)
        x, residual, weight, bias, x_bias = leaves = [
            t.detach().requires_grad_(i in wanted) for i, t in enumerate(base)
        ]
        out = add_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=dropout_p)
        upstream = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        return dict(
            zip(sorted(wanted), torch.autograd.grad(out, [leaves[i] for i in sorted(wanted)], upstream), strict=True)
        )

    everything = run((0, 1, 2, 3, 4))
    for i, grad in run(needed).items():
        torch.testing.assert_close(grad, everything[i], rtol=1e-6, atol=1e-6)


def test_gradients_have_their_inputs_dtypes(device):
    x = torch.randn(6, 40, device=device, dtype=torch.float16, requires_grad=True)
    residual = torch.randn(6, 40, device=device, requires_grad=True)
    weight = torch.ones(40, device=device, requires_grad=True)
    out, total = add_norm(x, residual, weight, return_sum=True)
    assert out.dtype == torch.float16 and total.dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum() + total.sum(), (x, residual, weight))
    assert [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float32]


def random_combinations(test):
    return given(
        rows=st.integers(1, 70), width=st.integers(1, 700), dtype=st.sampled_from(DTYPES),
        present=st.sets(st.sampled_from(["residual", "weight", "bias", "x_bias"])),
        float32=st.sets(st.sampled_from(["residual", "weight", "bias", "x_bias"])),
        norm=st.sampled_from(["layer", "rms"]), dropout_p=st.sampled_from([0.0, 0.4]), return_sum=st.booleans(),
        zero_centered_weight=st.booleans(), residual_in_fp32=st.booleans(), recompute=st.booleans(),
    )(test)  # fmt: skip


def check_combination(request, rows, width, dtype, present, float32, **options):
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    present = [name for name in ("residual", "weight", "bias", "x_bias") if name in present]
    # A row of one or two elements is all rounding where it has next to no variance.
    options["eps"] = 0.1 if width < 4 else 1e-5
    check_options(
        device, rows, width, dtype, present, () if dtype == torch.float32 else float32 & set(present), **options
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@random_combinations
def test_some_random_combinations(request, **arguments):
    check_combination(request, **arguments)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@random_combinations
def test_random_combinations(request, **arguments):
    check_combination(request, **arguments)


# What a layer under autocast asks of its norms: products are 16 bit, parameters and the residual stream float32.
STREAM = {"float32_sum": True, "float32_residual": True}
PLACES = {
    "post-norm": lambda half: Options(dtype=half, out_dtype=torch.float32, also_dtype=half, **STREAM),
    "pre-norm, first": lambda half: Options(out_dtype=half),
    "pre-norm, second": lambda half: Options(dtype=half, return_sum=True, **STREAM),
}


def norm_of_a_layer(place, rows, width, dtype, device, absent=(), **options):
    """Tensors and options of a call; those named in `absent` are not there."""
    options = PLACES[place](dtype)._replace(**options)
    generator, shapes = torch.Generator().manual_seed(5), ((rows, width), (rows, width), *[(width,)] * 3)
    x, *others = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    seed = torch.tensor([5], device=device) if options.dropout_p else None
    absent = ("residual", "x_bias", "seed") if place == "pre-norm, first" else absent
    return Tensors(x.to(options.dtype), *others, seed)._replace(**dict.fromkeys(absent)), options


def plain_norm(tensors, options):
    """Output, sum and second copy by PyTorch's own functions."""
    x, residual, weight, bias, x_bias, seed = tensors
    z = x if x.dtype == torch.float64 else x.float()
    z = z if x_bias is None else z + x_bias
    z = dropout.dropout(z, seed, options.dropout_p)
    z = z if residual is None else z + residual
    size, eps = x.shape[-1:], options.eps
    out = F.rms_norm(z, size, weight, eps) if options.rms else F.layer_norm(z, size, weight, None, eps)
    out = out if bias is None else out + bias
    dtypes = [options.out_dtype or x.dtype, z.dtype, options.also_dtype]
    return [t and u.to(z.dtype if z.dtype == torch.float64 else t) for t, u in zip(dtypes, (out, z, out), strict=True)]


def with_gradients(function, tensors, options, upstream):
    """Results of a function in PyTorch, and the gradients of its tensors."""
    leaves = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in tensors]
    results = function(Tensors(*leaves), options)
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, upstream, strict=True) if g is not None]
    outs, grads = zip(*pairs, strict=True)
    wanted = [t for t in leaves[:5] if t is not None]
    found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True, materialize_grads=True))
    results = [None if r is None else r.detach() for r in results]
    return results, [None if t is None else next(found) for t in leaves[:5]]


def norm_and_gradients(backend, tensors, options, upstream):
    """The same of what is tested."""
    if backend == "eager":
        return with_gradients(eager.add_norm, tensors, options, upstream)
    needs = tuple(t is not None for t in tensors[:5])
    results = ADD_NORM.forward(tensors, options, (), needs)(*tensors)
    saved = ADD_NORM.keep(tensors, results, options)
    return (*results[:2], results[3]), ADD_NORM.backward(upstream, saved, options, (), needs)(upstream, saved)


def check_norm_of_a_layer(backend, tensors, options, given_=("out", "sum", "also")):
    """Hold the results and all gradients to the contract, each in its own dtype."""
    pairs = zip(("out", "sum", "also"), plain_norm(tensors, options), strict=True)
    upstream = [None if r is None or name not in given_ else torch.randn(r.shape).to(r) for name, r in pairs]
    exact = Tensors(*(t if t is None or not t.is_floating_point() else t.double() for t in tensors))
    truth, true_grads = with_gradients(plain_norm, exact, options, upstream)
    plain_results, plain_grads = with_gradients(plain_norm, tensors, options, upstream)
    got, grads = norm_and_gradients(backend, tensors, options, upstream)
    for name, g, t, e in zip(("out", "sum", "also"), got, truth, plain_results, strict=True):
        if g is not None:
            compare(name, g, t, e, FORWARD_FACTOR, g.dtype)
    assert (got[2] is None) == (options.also_dtype is None)
    if got[2] is not None and backend != "interpreter":  # which truncates to bfloat16
        assert torch.equal(got[2], got[0].to(options.also_dtype))
    for name, g, t, e in zip(Tensors._fields, grads, true_grads, plain_grads, strict=False):
        least = size_of_a_sum(0 if name in ("x", "residual") else len(tensors.x))
        assert (g is None) == (getattr(tensors, name) is None)
        if g is not None:
            compare(f"gradient of {name}", g, t, e, GRADIENT_FACTOR, getattr(tensors, name).dtype, least)


@pytest.mark.interpreter
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.essential
def test_norms_of_a_layer_under_autocast(device, backend, place, dtype, rms):
    check_norm_of_a_layer(backend, *norm_of_a_layer(place, 37, 75, dtype, device, rms=rms, dropout_p=0.3))


@pytest.mark.parametrize("width", [1, 16, 513, 768, 4104, 16401])
@pytest.mark.parametrize("place", list(PLACES))
def test_widths_of_a_layer_under_autocast(device, backend, place, width):
    rows, rms, eps = 5 if width > 1000 else 70, width == 768, 0.1 if width == 1 else 1e-5
    check_norm_of_a_layer(backend, *norm_of_a_layer(place, rows, width, torch.bfloat16, device, rms=rms, eps=eps))


@pytest.mark.interpreter
@pytest.mark.parametrize("given_", [("out",), ("also",), ("sum",), ("out", "also"), ("also", "sum")], ids="+".join)
@pytest.mark.parametrize("absent", [("x_bias",), ("weight", "bias", "x_bias")], ids=["weight, bias", "neither"])
def test_either_gradient_of_an_output_in_two_dtypes(device, backend, given_, absent):
    tensors_, options = norm_of_a_layer("post-norm", 37, 75, torch.float16, device, absent)
    check_norm_of_a_layer(backend, tensors_, options, given_)


@pytest.mark.parametrize("width", [60, 9000])
def test_strides_of_the_gradients_of_an_output_in_two_dtypes(device, backend, width):
    tensors_, options = norm_of_a_layer("post-norm", 6, width, torch.float16, device, dropout_p=0.2)
    dout, dalso = torch.randn(6, width + 4, device=device), torch.randn(1, width, device=device).half()
    upstream = dout[:, 4:], None, dalso.expand(6, width)
    strided = norm_and_gradients(backend, tensors_, options, upstream)[1]
    dense = [None if g is None else g.contiguous() for g in upstream]
    for g, e in zip(strided, norm_and_gradients(backend, tensors_, options, dense)[1], strict=True):
        assert torch.equal(g, e)
