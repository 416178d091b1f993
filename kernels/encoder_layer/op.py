"""encoder_layer as an operation: one autograd function, in which no gradient of a bias, a norm or a residual costs a
launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_norm.arguments import Options as NormOptions
from ..add_norm.arguments import Saved as NormSaved
from ..add_norm.arguments import Tensors as NormTensors
from ..attention.arguments import UNITS
from ..attention.arguments import Saved as AttentionSaved
from ..attention.arguments import Tensors as AttentionTensors
from ..attention.op import check_mask, check_starts, four_dimensions, of_mask
from ..common import checks, compat, plan
from ..common.operator import Operation, Prepare
from ..ffn.arguments import Options as FfnOptions
from ..ffn.arguments import Saved as FfnSaved
from ..ffn.eager import ACTIVATIONS
from . import chain, eager
from .arguments import (
    LayerWeights,
    Options,
    Tensors,
    as_heads,
    as_rows,
    attention_options,
    attention_tensors,
    views,
)

_WEIGHTS = len(LayerWeights._fields)
_FIELDS = len(Tensors._fields)
_RESULTS = 12
_VECTORS = tuple(Tensors._fields.index(name) for name in (
    "out_proj_bias", "norm1_weight", "norm1_bias", "bias1", "bias2", "norm2_weight", "norm2_bias", "cu_seqlens",
))  # fmt: skip
_DROPOUTS = ("attention_p", "projection_p", "hidden_p", "output_p")


def _signature(src: Tensor, *rest: Any) -> Hashable:
    *weights, attn_mask, cu_seqlens, max_seqlen, batch_second = rest
    shape, starts, mask = src.shape, None, None
    if cu_seqlens is not None:
        batch, length, starts = cu_seqlens.shape[0] - 1, max_seqlen, plan.of_vector(cu_seqlens)
    else:
        batch, length = (shape[1], shape[0]) if batch_second else shape[:2]
    if attn_mask is not None:
        heads = attn_mask.shape[-3] if len(attn_mask.shape) > 2 else 1
        mask = heads, of_mask(attn_mask, (batch, heads, length, length))
    width = shape[-1]
    return (
        plan.of_rows(src), len(shape), batch_second and batch, UNITS[3 * length * width & 15],
        starts is None and length & 15 == 0,  # as attention's signature
        (src.numel() // (width or 1)).bit_length(), (length - 1).bit_length(), starts, mask,
        src.dtype is torch.float32 and compat.tf32_allowed(), plan.of_parameters(weights),
    )  # fmt: skip


def _check(tensors: Any, options: Any, sizes: tuple[int, ...], autocast: bool) -> tuple[Prepare, Options]:
    src, attn_mask, cu_seqlens = tensors[0], tensors[_WEIGHTS + 1], tensors[_WEIGHTS + 2]
    weights = LayerWeights(*tensors[1 : _WEIGHTS + 1])
    nhead, batch_first, norm_first, activation, eps1, eps2, is_causal, *dropout_ps = options
    if not callable(activation):
        checks.one_of("activation", activation, ACTIVATIONS)
    for name, p in zip(("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p"), dropout_ps, strict=True):
        checks.dropout_probability(p, name)
    checks.not_negative("eps1", eps1)
    checks.not_negative("eps2", eps2)
    checks.floating_tensor("src", src)
    if src.dim() != (3 if cu_seqlens is None else 2):
        expected = "[B, L, E] without cu_seqlens" if cu_seqlens is None else "[T, E] beside cu_seqlens"
        checks.fail_value("src", expected, src)
    width = src.shape[-1]
    if not isinstance(nhead, int) or nhead < 1 or width == 0 or width % nhead:
        checks.fail_value("nhead", f"a number that divides the width, {width}", nhead)
    checks.floating_tensor("weights.weight1", weights.weight1)
    hidden, vector = weights.weight1.shape[0], (width,)
    shapes = (
        (3 * width, width), (3 * width,), (width, width), vector, vector, vector,
        (hidden, width), (hidden,), (width, hidden), vector, vector, vector,
    )  # fmt: skip
    for name, value, shape in zip(weights._fields, weights, shapes, strict=True):
        if value is None:
            continue
        checks.floating_tensor(f"weights.{name}", value)
        if len(value.shape) != len(shape) or any(a != b for a, b in zip(value.shape, shape, strict=True)):
            checks.fail_value(f"weights.{name}", f"shape {list(shape)}", value)
        if value.device != src.device:
            checks.fail_value(f"weights.{name}", f"device {src.device}, that of src", value)
        if not autocast and "norm" not in name:  # a norm's may be float32 beside 16 bit
            checks.same_kind(f"weights.{name}", value, "src", src)
    prepare: list[Any] = []
    if cu_seqlens is not None:
        check_starts("cu_seqlens", cu_seqlens, "max_seqlen", sizes[0], src)
        batch, length = cu_seqlens.shape[0] - 1, sizes[0]
    else:
        batch, length = src.shape[:2] if batch_first else (src.shape[1], src.shape[0])
    if attn_mask is not None:
        check_mask(attn_mask, src, (batch, nhead, length, length))
        if attn_mask.dim() != 4:
            prepare.append((_WEIGHTS + 1, four_dimensions))
    numbers = Options(
        nhead, bool(batch_first), bool(norm_first), activation, float(eps1), float(eps2), bool(is_causal),
        *map(float, dropout_ps),
    )  # fmt: skip
    return tuple(prepare), numbers


def _instead(tensors: Tensors, options: Options, autocast: bool) -> Callable[..., tuple[Tensor]] | None:
    """The chain of functions, for what the kernels do not do in one call."""
    src = tensors.src
    mixed = any(t is not None and t.dtype != src.dtype for t in tensors[1 : _WEIGHTS + 1])
    whole = isinstance(options.activation, str) and src.numel() > 0 and not (autocast or mixed)
    return None if whole and not torch.compiler.is_compiling() else chained(options)


def chained(options: Options) -> Callable[..., tuple[Tensor]]:
    """A function of tensors and sizes that runs the chain of functions."""

    def run(*arguments: Any) -> tuple[Tensor]:
        return (chain.encoder_layer(Tensors(*arguments[:_FIELDS]), options, arguments[_FIELDS]),)

    return run


def _norm_options(o: Options, dtype: torch.dtype) -> tuple[NormOptions, NormOptions]:
    first, second = (0.0, o.projection_p) if o.norm_first else (o.projection_p, o.output_p)
    return (
        NormOptions(first, o.eps1, dtype=dtype),
        NormOptions(second, o.eps2, return_sum=o.norm_first, dtype=dtype),
    )  # fmt: skip


def _forward(like: Tensors, o: Options, sizes: tuple[int, ...], needs: tuple[bool, ...]) -> Callable[..., Any]:
    from ..add_norm.forward import add_norm_forward
    from ..attention.forward import attention_forward
    from ..ffn.forward import linear_act_forward, output_forward

    dtype, width, save = like.src.dtype, like.src.shape[-1], len(needs) > 0
    keep = (True,) * 5 if save else ()
    norm_options = _norm_options(o, dtype)
    numbers = attention_options(width, like.cu_seqlens is not None, o)
    norm1, norm2 = (
        plan.once(lambda *t, of=of: add_norm_forward(NormTensors(*t), of, keep)) for of in norm_options
    )  # fmt: skip
    attend = plan.once(lambda *t: attention_forward(AttentionTensors(*t[:-2]), numbers, t[-2:], keep))
    act = plan.once(
        lambda x, w, b, seed: linear_act_forward(x, w, b, seed, o.hidden_p, o.activation, False, None, save)
    )
    output = plan.once(lambda x, w, b, residual, seed: output_forward(x, w, b, residual, seed, o.output_p, None))

    def run(
        src: Tensor, in_weight: Tensor, in_bias: Any, out_weight: Tensor, out_bias: Any, norm1_weight: Any,
        norm1_bias: Any, weight1: Tensor, bias1: Any, weight2: Tensor, bias2: Any, norm2_weight: Any, norm2_bias: Any,
        attn_mask: Any, cu_seqlens: Any, attention_seed: Any, projection_seed: Any, hidden_seed: Any, output_seed: Any,
        max_seqlen: int, _: int,
    ) -> Any:  # fmt: skip
        shape = src.shape
        x = src.reshape(-1, width)
        normed, statistics1 = x, None
        if o.norm_first:
            normed, _, statistics1, _ = norm1(x, None, norm1_weight, norm1_bias, None, None)
        qkv = F.linear(normed, in_weight, in_bias)
        query, key, value = views(qkv, shape, o)
        length = max_seqlen if cu_seqlens is not None else query.shape[2]
        attended, _, statistics = attend(
            query, key, value, attn_mask, None, None, cu_seqlens, cu_seqlens, None, None, None, None, attention_seed,
            length, length,
        )  # fmt: skip
        # The projection's bias is added in the norm's kernel, whose backward pass sums its gradient.
        projected = F.linear(as_rows(attended, o), out_weight)
        if o.norm_first:
            between, sum2, statistics2, _ = norm2(projected, x, norm2_weight, norm2_bias, out_bias, projection_seed)
            activated, hidden = act(between, weight1, bias1, hidden_seed)
            out, sum1 = output(activated, weight2, bias2, sum2, output_seed), x
        else:
            between, sum1, statistics1, _ = norm1(projected, x, norm1_weight, norm1_bias, out_bias, projection_seed)
            activated, hidden = act(between, weight1, bias1, hidden_seed)
            out2 = F.linear(activated, weight2)
            out, sum2, statistics2, _ = norm2(out2, between, norm2_weight, norm2_bias, bias2, output_seed)
        return (
            out.view(shape), normed, qkv, attended, statistics, sum1, statistics1, between, hidden, activated, sum2,
            statistics2,
        )  # fmt: skip

    return run


def _keep(tensors: Sequence[Any], results: Sequence[Any], options: Options) -> tuple[Any, ...]:
    return (*tensors[1:], *results[1:])


def _backward(
    grads: Sequence[Any], saved: Sequence[Any], o: Options, sizes: tuple[int, ...], needs: Sequence[bool]
) -> Callable[..., Any]:
    """Sums over rows (norms' parameters, biases) are collected and added up by the programs of the last attention
    kernel, or at the end; a key's bias has the gradient 0."""
    from ..add_norm.backward import add_norm_backward
    from ..attention.backward import attention_backward
    from ..common.column_sums import ColumnSums
    from ..ffn.backward import ffn_backward

    need: Any = Tensors._make([*needs, *[False] * (_FIELDS - len(needs))])
    dtype, width = grads[0].dtype, grads[0].shape[-1]
    norm_options = _norm_options(o, dtype)
    wanted1, wanted2 = (
        (True, True, need.norm1_weight, need.norm1_bias, need.out_proj_bias and not o.norm_first),
        (True, True, need.norm2_weight, need.norm2_bias, need.out_proj_bias if o.norm_first else need.bias2),
    )
    if o.norm_first:
        wanted1 = (True, False, *wanted1[2:])
    norm1_backward, norm2_backward = (
        plan.once(lambda g, s, jobs, of=of, wanted=wanted: add_norm_backward(g, s, of, wanted))
        for of, wanted in zip(norm_options, (wanted1, wanted2), strict=True)
    )
    ffn_options = FfnOptions(o.hidden_p, o.output_p if o.norm_first else 0.0, o.activation, False)
    ffn_needs = (True, need.weight1, need.bias1, need.weight2, need.bias2 and o.norm_first)
    ffn_gradients = plan.once(lambda g, s, jobs, add: ffn_backward(g, s, ffn_options, ffn_needs, add is not None))
    below_norm1 = o.norm_first and (need.norm1_weight or need.norm1_bias)
    needs_normed = need.src or below_norm1
    needs_attention = needs_normed or need.attn_mask or need.in_proj_weight or need.in_proj_bias
    attention_needs = (True, True, True, need.attn_mask, False)
    packed = len(grads[0].shape) == 2
    numbers = attention_options(width, packed, o)
    attend = plan.once(
        lambda g, s, *sizes, **others: attention_backward(
            g, s, numbers, sizes, attention_needs, bias_sums=need.in_proj_bias
        )
    )
    sums = ColumnSums()

    def run(grads: Sequence[Any], saved: Sequence[Any], max_seqlen: int, _: int) -> Any:
        (dout,) = grads
        (
            in_weight, in_bias, out_weight, out_bias, norm1_weight, norm1_bias, weight1, bias1, weight2, bias2,
            norm2_weight, norm2_bias, attn_mask, cu_seqlens, attention_seed, projection_seed, hidden_seed, output_seed,
            normed, qkv, attended, statistics, sum1, statistics1, between, hidden, activated, sum2, statistics2,
        ) = saved  # fmt: skip
        shape = dout.shape
        jobs: list[Any] = []
        do = dout.reshape(-1, width)
        of_ffn = FfnSaved(
            between, weight1, bias1, weight2, bias2, hidden, activated, hidden_seed,
            output_seed if o.norm_first else None,
        )  # fmt: skip
        if o.norm_first:
            dbetween, dweight1, dbias1, dweight2, dbias2 = ffn_gradients(do, of_ffn, jobs, None)
            second = NormSaved(sum2, None, norm2_weight, norm2_bias, out_bias, statistics2, projection_seed)
            dprojected, dsum1, dnorm2_weight, dnorm2_bias, dout_bias = norm2_backward((dbetween, do), second, jobs)
        else:
            second = NormSaved(sum2, None, norm2_weight, norm2_bias, bias2, statistics2, output_seed)
            dout2, dsum2, dnorm2_weight, dnorm2_bias, dbias2 = norm2_backward((do, None), second, jobs)
            dbetween, dweight1, dbias1, dweight2, _ = ffn_gradients(dout2, of_ffn, jobs, dsum2)
            first = NormSaved(sum1, None, norm1_weight, norm1_bias, out_bias, statistics1, projection_seed)
            dprojected, dsum1, dnorm1_weight, dnorm1_bias, dout_bias = norm1_backward((dbetween, None), first, jobs)
        dsrc = din_weight = din_bias = dout_weight = dmask = None
        if need.out_proj_weight:
            dout_weight = torch.mm(dprojected.t(), as_rows(attended, o))
        if o.norm_first:
            dnorm1_weight = dnorm1_bias = None
        if needs_attention:
            inputs = attention_tensors(qkv, shape, attn_mask, cu_seqlens, attention_seed, o)
            length = max_seqlen if packed else inputs.query.shape[2]
            dattended = as_heads(torch.mm(dprojected, out_weight), attended, o)
            dqkv = torch.empty_like(qkv)
            if need.in_proj_bias:
                din_bias = torch.empty_like(in_bias)
            dmask = attend(
                (dattended, None), AttentionSaved(*inputs, attended, statistics), length, length,
                into=views(dqkv, shape, o), jobs=jobs, dbias=din_bias,
            )[3]  # fmt: skip
            if need.in_proj_weight:
                din_weight = torch.mm(dqkv.t(), normed)
            if o.norm_first and needs_normed:
                dnormed = torch.mm(dqkv, in_weight)
                first = NormSaved(sum1, None, norm1_weight, norm1_bias, None, statistics1, None)
                dsrc, _, dnorm1_weight, dnorm1_bias, _ = norm1_backward((dnormed, dsum1), first, jobs)
            elif need.src:
                dsrc = torch.addmm(dsum1, dqkv, in_weight)
        sums(jobs)
        return (
            None if dsrc is None else dsrc.view(shape), din_weight, din_bias, dout_weight, dout_bias, dnorm1_weight,
            dnorm1_bias, dweight1, dbias1, dweight2, dbias2, dnorm2_weight, dnorm2_bias, dmask,
        )  # fmt: skip

    return run


ENCODER_LAYER = Operation(
    "encoder_layer", Tensors, Options, differentiable=_WEIGHTS + 2, outputs=1, results=_RESULTS, signature=_signature,
    check=_check, eager=eager.encoder_layer, forward=_forward, keep=_keep, backward=_backward,
    sizes=("max_seqlen", "batch_second"), dropouts=_DROPOUTS, instead=_instead, contiguous=_VECTORS,
)  # fmt: skip
