"""encoder_layer as an operation: one autograd function, in which no gradient of a bias, a norm or a residual costs a
launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..add_norm.op import NORMS
from ..attention.arguments import UNITS
from ..attention.arguments import Tensors as AttentionTensors
from ..attention.eager import require_starts
from ..attention.op import ATTENTION, check_starts, of_mask
from ..common import backend, checks, compat, dropout, plan
from ..common.operator import Operation, Prepare, autocast_dtype
from ..ffn.eager import ACTIVATIONS
from ..rotary.op import ROTARY, of_tables
from . import parts
from .arguments import LayerWeights, Options, Tensors, attention_options, views
from .neighbours import find
from .products import casts_of_qkv

_WEIGHTS = len(LayerWeights._fields)
_FIELDS = len(Tensors._fields)
_DIFFERENTIABLE = _WEIGHTS + 4
_RESULTS = 19
_OUTPUTS = 2
_VECTORS = tuple(Tensors._fields.index(name) for name in (
    "out_proj_bias", "norm1_weight", "norm1_bias", "bias1", "bias2", "norm2_weight", "norm2_bias", "relative_bias",
    "cu_seqlens",
))  # fmt: skip
_MASK = _WEIGHTS + 1
_DROPOUTS = ("attention_p", "projection_p", "hidden_p", "output_p")


def _signature(src: Tensor, *rest: Any) -> Hashable:
    *weights, attn_mask, relative_bias, src_half, cos, sin, cu_seqlens, max_seqlen, batch_second = rest
    shape, starts, mask, tables = src.shape, None, None, None
    joined: Hashable = None
    if cu_seqlens is not None:
        batch, length, starts = cu_seqlens.shape[0] - 1, max_seqlen, plan.of_vector(cu_seqlens)
    else:
        batch, length = (shape[1], shape[0]) if batch_second else shape[:2]
    if attn_mask is not None:
        heads = attn_mask.shape[-3] if len(attn_mask.shape) > 2 else 1
        mask = heads, of_mask(attn_mask, (batch, heads, length, length))
    if cos is not None:
        tables = of_tables(cos, sin, shape[0] if cu_seqlens is None else 1, length if cu_seqlens is None else shape[0])
    width, rows, inner, k, up = shape[-1], weights[0].shape[0], weights[2].shape[-1], weights[12], weights[16]
    if k is not None:
        rows += 2 * k.shape[0]
        joined = _together((weights[0], k, weights[14])), _together((weights[1], weights[13], weights[15]))
    if up is not None:
        joined = joined, _together((weights[6], up)), _together((weights[7], weights[17]))
    return (
        plan.of_rows(src), len(shape), batch_second and batch, UNITS[length * (rows | inner) & 15],
        starts is None and length & 15 == 0,  # as attention's signature
        (src.numel() // (width or 1)).bit_length(), (length - 1).bit_length(), starts, mask, tables, joined,
        src.dtype is torch.float32 and compat.tf32_allowed(), plan.of_parameters(weights),
        plan.of_parameter(relative_bias), src_half is not None and plan.of_rows(src_half),
    )  # fmt: skip


def _together(tensors: tuple[Tensor | None, ...]) -> bool:
    return find(tensors)[0]


def _check(tensors: Any, options: Any, sizes: tuple[int, ...], autocast: bool) -> tuple[Prepare, Options]:
    src, (attn_mask, relative_bias, _, cos, sin, cu_seqlens) = tensors[0], tensors[_MASK:]
    (
        nhead, batch_first, norm_first, norm, activation, gated, eps1, eps2, scale, is_causal, window, softcap,
        no_norm1, recompute, *dropout_ps,
    ) = options  # fmt: skip
    if not callable(activation):
        checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("norm", norm, NORMS)
    for name, p in zip(("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p"), dropout_ps, strict=True):
        checks.dropout_probability(p, name)
    checks.not_negative("eps1", eps1)
    checks.not_negative("eps2", eps2)
    checks.floating_tensor("src", src)
    packed = cu_seqlens is not None
    if src.dim() != (2 if packed else 3):
        expected = "[T, E] beside cu_seqlens" if packed else "[B, L, E] without cu_seqlens"
        checks.fail_value("src", expected, src)
    weights = LayerWeights(*tensors[1:_MASK])
    head_dim, kv_nhead = check_weights(src, weights, nhead, gated, autocast)
    if weights.post_norm1_weight is not None and not norm_first:
        checks.fail_value("weights.post_norm1_weight", "None without norm_first", weights.post_norm1_weight)
    if packed:
        check_starts("cu_seqlens", cu_seqlens, "max_seqlen", sizes[0], src)
        batch, length = cu_seqlens.shape[0] - 1, sizes[0]
    else:
        batch, length = src.shape[:2] if batch_first else (src.shape[1], src.shape[0])
    if scale is not None and not (isinstance(scale, (int, float)) and scale > 0.0):
        checks.fail_value("scale", "a number above 0, or None", scale)
    query, key = (
        src.new_empty(1).expand((src.shape[0], n, head_dim) if packed else (batch, n, length, head_dim))
        for n in (nhead, kv_nhead)
    )
    prepare, numbers = ATTENTION.check(
        (query, key, key, attn_mask, relative_bias, None, cu_seqlens, cu_seqlens, None, None, None, None),
        (dropout_ps[0], is_causal, scale, True, window, softcap, "bottom_right", packed, None, False, False),
        (length, length), autocast,
    )  # fmt: skip
    if (cos is None) != (sin is None):
        checks.fail_type("rotary", "a pair (cos, sin) of tensors", None)
    if cos is not None:
        ROTARY.check((query, key, cos, sin, None), (False, False), (), autocast)
    return tuple([(_MASK, convert) for _, convert in prepare]), Options(
        nhead, kv_nhead, head_dim, numbers.softmax_scale, bool(batch_first), bool(norm_first),
        bool(norm_first and no_norm1), norm == "rms", activation, bool(gated), float(eps1), float(eps2),
        bool(is_causal), numbers.left, numbers.right, numbers.softcap, bool(recompute),
        autocast_dtype(src) if autocast else None, *map(float, dropout_ps),
    )  # fmt: skip


def check_weights(
    src: Tensor, weights: LayerWeights, nhead: Any, gated: bool, autocast: bool, of: str = "weights"
) -> tuple[int, int]:
    """Raise for parameters that do not fit each other, called `of`; size of a head, and how many key and value have."""
    for name in ("in_proj_weight", "out_proj_weight", "weight1"):
        value = getattr(weights, name)
        checks.floating_tensor(f"{of}.{name}", value)
        if value.dim() != 2:
            checks.fail_value(f"{of}.{name}", "two dimensions", value)
    width, (inner, hidden) = src.shape[-1], (weights.out_proj_weight.shape[1], weights.weight1.shape[0])
    if not isinstance(nhead, int) or nhead < 1 or inner == 0 or inner % nhead:
        checks.fail_value("nhead", f"a number that divides {inner}, the columns of {of}.out_proj_weight", nhead)
    head_dim, rows, of_key = inner // nhead, weights.in_proj_weight.shape[0], weights.k_proj_weight
    if (of_key is None) != (weights.v_proj_weight is None):
        checks.fail_value(f"{of}.v_proj_weight", "a tensor just where k_proj_weight is one", weights.v_proj_weight)
    if weights.up_weight is not None and not gated:
        checks.fail_value(f"{of}.up_weight", "None without gated", weights.up_weight)
    for name, needed in (
        ("up_bias", "up_weight"), ("k_proj_bias", "k_proj_weight"), ("v_proj_bias", "v_proj_weight"),
        ("post_norm1_weight", "post_norm2_weight"), ("post_norm2_weight", "post_norm1_weight"),
        ("post_norm1_bias", "post_norm1_weight"), ("post_norm2_bias", "post_norm2_weight"),
    ):  # fmt: skip
        if getattr(weights, name) is not None and getattr(weights, needed) is None:
            checks.fail_value(f"{of}.{name}", f"None without {needed}", getattr(weights, name))
    if of_key is None:
        kv_rows = max(rows - inner, 0) // 2
    else:
        checks.floating_tensor(f"{of}.k_proj_weight", of_key)
        kv_rows = of_key.shape[0]
    kv_nhead = kv_rows // head_dim
    if kv_nhead == 0 or nhead % kv_nhead:
        kv_nhead = nhead  # the shapes tell
    kv_rows = kv_nhead * head_dim
    rows = inner if of_key is not None else inner + 2 * kv_rows
    if weights.up_weight is not None and (weights.bias1 is None) != (weights.up_bias is None):
        checks.fail_value(f"{of}.up_bias", "a tensor just where bias1 is one", weights.up_bias)
    half = gated and weights.up_weight is None
    if half and hidden % 2:
        checks.fail_value(f"{of}.weight1", "an even number of rows, half of them the gate's", weights.weight1)
    inside = hidden // 2 if half else hidden
    vector = (width,)
    shapes = (
        (rows, width), (rows,), (width, inner), vector, vector, vector, (hidden, width), (hidden,), (width, inside),
        vector, vector, vector, (kv_rows, width), (kv_rows,), (kv_rows, width), (kv_rows,), (inside, width), (inside,),
        vector, vector, vector, vector,
    )  # fmt: skip
    for name, value, shape in zip(weights._fields, weights, shapes, strict=True):
        if value is None:
            continue
        checks.floating_tensor(f"{of}.{name}", value)
        if len(value.shape) != len(shape) or any(a != b for a, b in zip(value.shape, shape, strict=True)):
            checks.fail_value(f"{of}.{name}", f"shape {list(shape)}", value)
        if value.device != src.device:
            checks.fail_value(f"{of}.{name}", f"device {src.device}, that of src", value)
        if not autocast:  # a norm's may be float32 beside 16 bit
            checks.same_kind(f"{of}.{name}", value, "src", src, or_float32="norm" in name)
    return head_dim, kv_nhead


def _instead(t: Tensors, o: Options, autocast: bool) -> Callable[..., tuple[Tensor, None]] | None:
    """The layer part by part, where it is no call of kernels."""
    whole = isinstance(o.activation, str) and t.src.numel() > 0 and t.post_norm1_weight is None
    if autocast:
        float32 = all(w is None or w.dtype is torch.float32 for w in (t.src, *t[1:_MASK]))
        whole = whole and float32 and o.half in checks.HALF
    kernels = backend.would_use_triton if torch.compiler.is_compiling() else backend.use_triton
    return None if whole and kernels(t.src) else by_parts(o)


def by_parts(o: Options) -> Callable[..., tuple[Tensor, None]]:
    """A function of tensors and sizes that runs the layer part by part."""

    def run(*arguments: Any) -> tuple[Tensor, None]:
        t, max_seqlen = Tensors(*arguments[:_FIELDS]), arguments[_FIELDS]
        if t.cu_seqlens is not None and not torch.compiler.is_compiling():
            require_starts("cu_seqlens", t.cu_seqlens, t.src.shape[0], "max_seqlen", max_seqlen)
        return parts.encoder_layer(t, o, max_seqlen), None

    return run


MODULES = {
    **{name: f"{name}_weight" for name in ("in_proj", "k_proj", "v_proj", "out_proj", "up")},
    "weight1": "weight1", "weight2": "weight2",
}  # fmt: skip
"""The weights in whose place there may be a module, by the module's name."""


def require_modules(modules: parts.Modules, weights: LayerWeights) -> None:
    """Raise ValueError for a module that takes the place of no weight."""
    there = [name for name, weight in MODULES.items() if getattr(weights, weight) is not None]
    for name in modules:
        if name not in there:
            checks.fail_value("modules", f"names of weights that are there: {', '.join(there)}", name)


def checked(tensors: tuple[Any, ...], options: tuple[Any, ...], max_seqlen: int) -> tuple[Tensors, Options]:
    """The arguments of a call as the parts take them."""
    prepare, numbers = _check(tensors, options, (max_seqlen, 0), backend.autocast_enabled(tensors[0]))
    for i, convert in prepare:
        tensors = (*tensors[:i], convert(tensors[i]), *tensors[i + 1 :])
    return Tensors(*tensors), numbers


def _forward(tensors: Tensors, options: Options, sizes: Any, needs: tuple[bool, ...]) -> Callable[..., Any]:
    from .forward import layer_forward

    return layer_forward(tensors, options, sizes, needs)


def _keep(tensors: Sequence[Any], results: Sequence[Any], options: Options) -> tuple[Any, ...]:
    needs_source = (options.norm_first and not options.no_norm1) or options.half is None  # else its copy is enough
    return (tensors[0] if needs_source else None, *tensors[1:], *results[2:])


def _backward(grads: Any, saved: Any, options: Options, sizes: Any, needs: Sequence[bool]) -> Callable[..., Any]:
    from .backward import layer_backward

    return layer_backward(grads, saved, options, sizes, needs)


def _eager(t: Tensors, o: Options, *sizes: int) -> tuple[Tensor, Tensor | None]:
    """Of the operator where no kernels run. The parts take the keys in the order of the fields."""
    keys = [key for key in t[-len(_DROPOUTS) :] if key is not None]
    with dropout.given(keys), torch.autocast(t.src.device.type, o.half, enabled=o.half is not None):
        out, _ = by_parts(o)(*t, *sizes)
    return out, None if o.half is None or o.norm_first else out.to(o.half)


def _fake(t: Tensors, o: Options, sizes: Any, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    src, rows, dtype = t.src, math.prod(t.src.shape[:-1]), o.half or t.src.dtype

    def empty(columns: int, dtype: torch.dtype = dtype) -> Tensor:
        return src.new_empty((rows, columns), dtype=dtype)

    outputs = src.new_empty(src.shape), src.new_empty(src.shape, dtype=dtype) if o.half and not o.norm_first else None
    if not needs:
        return outputs
    width, norms1, inner = src.shape[-1], o.norm_first and not o.no_norm1, o.nhead * o.head_dim
    qkv = empty((o.nhead + 2 * o.kv_nhead) * o.head_dim)
    query, key, value = views(qkv, src.shape, o)
    attention = AttentionTensors(query, key, value, t.attn_mask, t.relative_bias, seqlens_q=t.cu_seqlens)
    *_, statistics = ATTENTION.fake(attention, attention_options(t.cu_seqlens is not None, o), sizes, (True,))  # type: ignore[misc]
    first = t.weight1.shape[0] + (0 if t.up_weight is None else t.up_weight.shape[0])
    hidden = t.weight2.shape[1]
    of_norm1, of_norm2 = (src.new_empty(rows if o.rms else 2 * rows, dtype=torch.float32) for _ in range(2))
    kept: list[Tensor | None] = [None] * 6
    if o.half is not None:
        groups, _ = casts_of_qkv(t)
        shapes = [(sum(weight.shape[0] for weight in group), width) for group in groups]
        kept[: len(shapes)] = [src.new_empty(shape, dtype=dtype) for shape in shapes]
        kept[3:] = [src.new_empty(shape, dtype=dtype) for shape in ((width, inner), (first, width), (width, hidden))]
    return (
        *outputs, empty(width) if norms1 or (o.half is not None and t.src_half is None) else None, qkv, empty(inner),
        statistics, None if o.norm_first else empty(width, src.dtype), None if o.no_norm1 else of_norm1, empty(width),
        empty(first), None if o.recompute else empty(hidden), empty(width, src.dtype), of_norm2, *kept,
    )  # fmt: skip


ENCODER_LAYER = Operation(
    "encoder_layer", Tensors, Options, differentiable=_DIFFERENTIABLE, outputs=_OUTPUTS, results=_RESULTS,
    signature=_signature, check=_check, eager=_eager, forward=_forward, keep=_keep, backward=_backward, fake=_fake,
    sizes=("max_seqlen", "batch_second"), dropouts=_DROPOUTS, instead=_instead, contiguous=_VECTORS,
)  # fmt: skip
