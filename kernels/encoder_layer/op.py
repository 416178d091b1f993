"""encoder_layer as an operation: one autograd function, in which no gradient of a bias, a norm or a residual costs a
launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_norm.arguments import Options as NormOptions
from ..add_norm.arguments import Saved as NormSaved
from ..add_norm.arguments import Tensors as NormTensors
from ..add_norm.op import NORMS
from ..attention.arguments import UNITS
from ..attention.arguments import Saved as AttentionSaved
from ..attention.arguments import Tensors as AttentionTensors
from ..attention.eager import require_starts
from ..attention.op import ATTENTION, check_starts, of_mask
from ..common import backend, checks, compat, plan
from ..common.operator import Operation, Prepare
from ..ffn.arguments import Options as FfnOptions
from ..ffn.arguments import Saved as FfnSaved
from ..ffn.eager import ACTIVATIONS
from ..rotary.eager import Options as RotaryOptions
from ..rotary.eager import Tensors as RotaryTensors
from ..rotary.op import ROTARY, of_tables
from . import parts
from .arguments import (
    LayerWeights,
    Options,
    Tensors,
    as_heads,
    as_rows,
    attention_options,
    lie_together,
    stacked,
    together,
    views,
)

_WEIGHTS = len(LayerWeights._fields)
_FIELDS = len(Tensors._fields)
_DIFFERENTIABLE = _WEIGHTS + 3
_RESULTS = 12
_VECTORS = tuple(Tensors._fields.index(name) for name in (
    "out_proj_bias", "norm1_weight", "norm1_bias", "bias1", "bias2", "norm2_weight", "norm2_bias", "relative_bias",
    "cu_seqlens",
))  # fmt: skip
_MASK = _WEIGHTS + 1
_DROPOUTS = ("attention_p", "projection_p", "hidden_p", "output_p")


def _signature(src: Tensor, *rest: Any) -> Hashable:
    *weights, attn_mask, relative_bias, cos, sin, cu_seqlens, max_seqlen, batch_second = rest
    shape, starts, mask, tables, joined = src.shape, None, None, None, None
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
        joined = lie_together((weights[0], k, weights[14])), lie_together((weights[1], weights[13], weights[15]))
    if up is not None:
        joined = joined, lie_together((weights[6], up)), lie_together((weights[7], weights[17]))
    return (
        plan.of_rows(src), len(shape), batch_second and batch, UNITS[length * (rows | inner) & 15],
        starts is None and length & 15 == 0,  # as attention's signature
        (src.numel() // (width or 1)).bit_length(), (length - 1).bit_length(), starts, mask, tables, joined,
        src.dtype is torch.float32 and compat.tf32_allowed(), plan.of_parameters(weights),
        plan.of_parameter(relative_bias),
    )  # fmt: skip


def _check(tensors: Any, options: Any, sizes: tuple[int, ...], autocast: bool) -> tuple[Prepare, Options]:
    src, attn_mask, relative_bias, cos, sin, cu_seqlens = tensors[0], *tensors[_MASK:]
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
    head_dim, kv_nhead = _check_weights(src, weights, nhead, gated, autocast)
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
        bool(is_causal), numbers.left, numbers.right, numbers.softcap, bool(recompute), *map(float, dropout_ps),
    )  # fmt: skip


def _check_weights(src: Tensor, weights: LayerWeights, nhead: Any, gated: bool, autocast: bool) -> tuple[int, int]:
    """Raise for parameters that do not fit each other; size of a head, and how many key and value have."""
    for name in ("in_proj_weight", "out_proj_weight", "weight1"):
        value = getattr(weights, name)
        checks.floating_tensor(f"weights.{name}", value)
        if value.dim() != 2:
            checks.fail_value(f"weights.{name}", "two dimensions", value)
    width, (inner, hidden) = src.shape[-1], (weights.out_proj_weight.shape[1], weights.weight1.shape[0])
    if not isinstance(nhead, int) or nhead < 1 or inner == 0 or inner % nhead:
        checks.fail_value("nhead", f"a number that divides {inner}, the columns of weights.out_proj_weight", nhead)
    head_dim, rows, of_key = inner // nhead, weights.in_proj_weight.shape[0], weights.k_proj_weight
    if (of_key is None) != (weights.v_proj_weight is None):
        checks.fail_value("weights.v_proj_weight", "a tensor just where k_proj_weight is one", weights.v_proj_weight)
    if weights.up_weight is not None and not gated:
        checks.fail_value("weights.up_weight", "None without gated", weights.up_weight)
    if of_key is None:
        kv_rows = max(rows - inner, 0) // 2
    else:
        checks.floating_tensor("weights.k_proj_weight", of_key)
        kv_rows = of_key.shape[0]
    kv_nhead = kv_rows // head_dim
    if kv_nhead == 0 or nhead % kv_nhead:
        kv_nhead = nhead  # the shapes tell
    kv_rows = kv_nhead * head_dim
    rows = inner if of_key is not None else inner + 2 * kv_rows
    if weights.up_weight is not None and (weights.bias1 is None) != (weights.up_bias is None):
        checks.fail_value("weights.up_bias", "a tensor just where bias1 is one", weights.up_bias)
    half = gated and weights.up_weight is None
    if half and hidden % 2:
        checks.fail_value("weights.weight1", "an even number of rows, half of them the gate's", weights.weight1)
    inside = hidden // 2 if half else hidden
    vector = (width,)
    shapes = (
        (rows, width), (rows,), (width, inner), vector, vector, vector, (hidden, width), (hidden,), (width, inside),
        vector, vector, vector, (kv_rows, width), (kv_rows,), (kv_rows, width), (kv_rows,), (inside, width), (inside,),
    )  # fmt: skip
    for name, value, shape in zip(weights._fields, weights, shapes, strict=True):
        if value is None:
            continue
        checks.floating_tensor(f"weights.{name}", value)
        if len(value.shape) != len(shape) or any(a != b for a, b in zip(value.shape, shape, strict=True)):
            checks.fail_value(f"weights.{name}", f"shape {list(shape)}", value)
        if value.device != src.device:
            checks.fail_value(f"weights.{name}", f"device {src.device}, that of src", value)
        if not autocast:  # a norm's may be float32 beside 16 bit
            checks.same_kind(f"weights.{name}", value, "src", src, or_float32="norm" in name)
    return head_dim, kv_nhead


def _instead(t: Tensors, o: Options, autocast: bool) -> Callable[..., tuple[Tensor]] | None:
    """The layer part by part, where it is no call of kernels."""
    whole = isinstance(o.activation, str) and t.src.numel() > 0 and not autocast and not torch.compiler.is_compiling()
    return None if whole and backend.use_triton(t.src) else by_parts(o)


def by_parts(o: Options) -> Callable[..., tuple[Tensor]]:
    """A function of tensors and sizes that runs the layer part by part."""

    def run(*arguments: Any) -> tuple[Tensor]:
        t, max_seqlen = Tensors(*arguments[:_FIELDS]), arguments[_FIELDS]
        if t.cu_seqlens is not None and not torch.compiler.is_compiling():
            require_starts("cu_seqlens", t.cu_seqlens, t.src.shape[0], "max_seqlen", max_seqlen)
        return (parts.encoder_layer(t, o, max_seqlen),)

    return run


def checked(tensors: tuple[Any, ...], options: tuple[Any, ...], max_seqlen: int) -> tuple[Tensors, Options]:
    """The arguments of a call as the parts take them."""
    prepare, numbers = _check(tensors, options, (max_seqlen, 0), backend.autocast_enabled(tensors[0]))
    for i, convert in prepare:
        tensors = (*tensors[:i], convert(tensors[i]), *tensors[i + 1 :])
    return Tensors(*tensors), numbers


def _norm_options(o: Options, dtype: torch.dtype) -> tuple[NormOptions, NormOptions]:
    first, second = (0.0, o.projection_p) if o.norm_first else (o.projection_p, o.output_p)
    return (
        NormOptions(first, o.eps1, o.rms, dtype=dtype),
        NormOptions(second, o.eps2, o.rms, return_sum=o.norm_first, dtype=dtype),
    )  # fmt: skip


class _Projections:
    """Products of the same rows with several weights, side by side in one matrix: query, key and value."""

    def __init__(self, weights: Sequence[Any], biases: Sequence[Any]) -> None:
        there = [i for i, w in enumerate(weights) if w is not None]
        self.at, self.widths = there, [weights[i].shape[0] for i in there]
        self.one = lie_together([weights[i] for i in there]) and lie_together([biases[i] for i in there])
        self.ends = list(itertools.accumulate(self.widths))
        self.fills = [biases[i] is not None for i in there]

    def forward(self, x: Tensor, weights: Sequence[Any], biases: Sequence[Any]) -> Tensor:
        """``[T, widths of all]``"""
        weights, biases = [weights[i] for i in self.at], [biases[i] for i in self.at]
        if self.one:
            return F.linear(x, together(weights), together(biases))  # type: ignore[arg-type]
        out = x.new_empty((x.shape[0], self.ends[-1]))
        for weight, bias, part in zip(weights, biases, out.split(self.widths, 1), strict=True):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        return out

    def of_input(self, dout: Tensor, weights: Sequence[Any], added_to: Tensor | None) -> Tensor:
        """The gradient of `x`, added to another one if there is one."""
        weights = [weights[i] for i in self.at]
        pairs = [(dout, together(weights))] if self.one else zip(dout.split(self.widths, 1), weights, strict=True)
        for part, weight in pairs:
            added_to = torch.mm(part, weight) if added_to is None else torch.addmm(added_to, part, weight)
        return added_to  # type: ignore[return-value]

    def of_weights(self, dout: Tensor, x: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Those of the weights, at their places."""
        found: list[Tensor | None] = [None] * len(needs)
        if self.one and any(needs):
            self._put(found, torch.mm(dout.t(), x).split(self.widths), needs)
        else:
            for i, part in zip(self.at, dout.split(self.widths, 1), strict=True):
                found[i] = torch.mm(part.t(), x) if needs[i] else None
        return found

    def of_biases(self, dbias: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Those of the biases, from the one of all."""
        found: list[Tensor | None] = [None] * len(needs)
        self._put(found, dbias.split(self.widths), needs)
        return found

    def _put(self, found: list[Tensor | None], gradients: Sequence[Tensor], needs: Sequence[bool]) -> None:
        for i, gradient in zip(self.at, gradients, strict=True):
            if needs[i]:
                found[i] = gradient


def _forward(like: Tensors, o: Options, sizes: tuple[int, ...], needs: tuple[bool, ...]) -> Callable[..., Any]:
    from ..add_norm.forward import add_norm_forward
    from ..attention.forward import attention_forward
    from ..ffn.forward import linear_act_forward, output_forward
    from ..rotary.forward import rotate

    dtype, width, save = like.src.dtype, like.src.shape[-1], len(needs) > 0
    keep = (True,) * 5 if save else ()
    numbers = attention_options(like.cu_seqlens is not None, o)
    project = _Projections(*_of_qkv(like))
    norm1, norm2 = (
        plan.once(lambda *t, of=of: add_norm_forward(NormTensors(*t), of, keep)) for of in _norm_options(o, dtype)
    )
    attend = plan.once(lambda *t: attention_forward(AttentionTensors(*t[:-2]), numbers, t[-2:], keep))
    turn = plan.once(lambda *t: rotate(RotaryTensors(*t), _FORTH, in_place=True))
    act = plan.once(
        lambda x, w, b, seed: linear_act_forward(x, w, b, seed, o.hidden_p, o.activation, o.gated, None, save)
    )
    output = plan.once(lambda x, w, b, residual, seed: output_forward(x, w, b, residual, seed, o.output_p, None))

    def run(*arguments: Any) -> Any:
        *arguments, max_seqlen, _ = arguments
        t = Tensors._make(arguments)
        src, cu_seqlens = t.src, t.cu_seqlens
        shape = src.shape
        x = src.reshape(-1, width)
        normed, statistics1 = x, None
        if o.norm_first and not o.no_norm1:
            normed, _, statistics1, _ = norm1(x, None, t.norm1_weight, t.norm1_bias, None, None)
        qkv = project.forward(normed, *_of_qkv(t))
        query, key, value = views(qkv, shape, o)
        if t.cos is not None:
            turn(query, key, t.cos, t.sin, None)
        length = max_seqlen if cu_seqlens is not None else query.shape[2]
        attended, _, statistics = attend(
            query, key, value, t.attn_mask, t.relative_bias, None, cu_seqlens, cu_seqlens, None, None, None, None,
            t.attention_seed, length, length,
        )  # fmt: skip
        # The projection's bias is added in the norm's kernel, whose backward pass sums its gradient.
        projected = F.linear(as_rows(attended, o), t.out_proj_weight)
        weight1, bias1 = stacked((t.weight1, t.up_weight)), stacked((t.bias1, t.up_bias))
        if o.norm_first:
            between, sum2, statistics2, _ = norm2(
                projected, x, t.norm2_weight, t.norm2_bias, t.out_proj_bias, t.projection_seed
            )
            activated, hidden = act(between, weight1, bias1, t.hidden_seed)
            out, sum1 = output(activated, t.weight2, t.bias2, sum2, t.output_seed), x
        else:
            between, sum1, statistics1, _ = norm1(
                projected, x, t.norm1_weight, t.norm1_bias, t.out_proj_bias, t.projection_seed
            )
            activated, hidden = act(between, weight1, bias1, t.hidden_seed)
            out2 = F.linear(activated, t.weight2)
            out, sum2, statistics2, _ = norm2(out2, between, t.norm2_weight, t.norm2_bias, t.bias2, t.output_seed)
        return (
            out.view(shape), normed, qkv, attended, statistics, sum1, statistics1, between, hidden,
            None if o.recompute else activated, sum2, statistics2,
        )  # fmt: skip

    return run


_FORTH, _BACK = RotaryOptions(False, False), RotaryOptions(False, True)


def _of_qkv(t: Tensors) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (t.in_proj_weight, t.k_proj_weight, t.v_proj_weight), (t.in_proj_bias, t.k_proj_bias, t.v_proj_bias)


def _keep(tensors: Sequence[Any], results: Sequence[Any], options: Options) -> tuple[Any, ...]:
    return (*tensors, *results[1:])


def _backward(
    grads: Sequence[Any], saved: Sequence[Any], o: Options, sizes: tuple[int, ...], needs: Sequence[bool]
) -> Callable[..., Any]:
    """Sums over rows (norms' parameters, biases) are collected and added up by the programs of the last attention
    kernel, or at the end; a key's bias has the gradient 0."""
    from ..add_norm.backward import add_norm_backward
    from ..attention.backward import attention_backward
    from ..common.column_sums import ColumnSums
    from ..ffn.backward import ffn_backward
    from ..rotary.forward import rotate

    need: Any = Tensors._make([*needs, *[False] * (_FIELDS - len(needs))])
    like: Any = Tensors._make(saved[:_FIELDS])
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
    ffn_options = FfnOptions(o.hidden_p, o.output_p if o.norm_first else 0.0, o.activation, o.gated)
    need_weight1, need_bias1 = need.weight1 or need.up_weight, need.bias1 or need.up_bias
    ffn_needs = (True, need_weight1, need_bias1, need.weight2, need.bias2 and o.norm_first)
    ffn_gradients = plan.once(lambda g, s, jobs, add: ffn_backward(g, s, ffn_options, ffn_needs, add is not None))
    project = _Projections(*_of_qkv(like))
    (need_qkv, need_qkv_biases), packed = _of_qkv(need), len(grads[0].shape) == 2
    below_norm1 = o.norm_first and (need.norm1_weight or need.norm1_bias)
    needs_normed = need.src or below_norm1
    needs_bias = any(need_qkv_biases)
    needs_attention = needs_normed or need.attn_mask or need.relative_bias or any(need_qkv) or needs_bias
    attention_needs = (True, True, True, need.attn_mask, need.relative_bias)
    # Sums of dQ, dK and dV as attention gives them; rotated and capped scores do depend on a key's bias.
    bias_sums = needs_bias and like.cos is None and not o.softcap
    numbers = attention_options(packed, o)
    attend = plan.once(
        lambda g, s, *sizes, **others: attention_backward(g, s, numbers, sizes, attention_needs, bias_sums=bias_sums)
    )
    turn_back = plan.once(lambda *t: rotate(RotaryTensors(*t), _BACK, in_place=True))
    sums = ColumnSums()

    def run(grads: Sequence[Any], saved: Sequence[Any], max_seqlen: int, _: int) -> Any:
        (dout,) = grads
        t = Tensors._make(saved[:_FIELDS])
        (
            normed, qkv, attended, statistics, sum1, statistics1, between, hidden, activated, sum2, statistics2,
        ) = saved[_FIELDS:]  # fmt: skip
        shape = dout.shape
        jobs: list[Any] = []
        do = dout.reshape(-1, width)
        of_ffn = FfnSaved(
            between, stacked((t.weight1, t.up_weight)), stacked((t.bias1, t.up_bias)), t.weight2, t.bias2, hidden,
            activated, t.hidden_seed, t.output_seed if o.norm_first else None,
        )  # fmt: skip
        if o.norm_first:
            dbetween, dweight1, dbias1, dweight2, dbias2 = ffn_gradients(do, of_ffn, jobs, None)
            second = NormSaved(
                sum2, None, t.norm2_weight, t.norm2_bias, t.out_proj_bias, statistics2, t.projection_seed
            )
            dprojected, dsum1, dnorm2_weight, dnorm2_bias, dout_bias = norm2_backward((dbetween, do), second, jobs)
            dnorm1_weight = dnorm1_bias = None
        else:
            second = NormSaved(sum2, None, t.norm2_weight, t.norm2_bias, t.bias2, statistics2, t.output_seed)
            dout2, dsum2, dnorm2_weight, dnorm2_bias, dbias2 = norm2_backward((do, None), second, jobs)
            dbetween, dweight1, dbias1, dweight2, _ = ffn_gradients(dout2, of_ffn, jobs, dsum2)
            first = NormSaved(sum1, None, t.norm1_weight, t.norm1_bias, t.out_proj_bias, statistics1, t.projection_seed)
            dprojected, dsum1, dnorm1_weight, dnorm1_bias, dout_bias = norm1_backward((dbetween, None), first, jobs)
        dsrc = dout_weight = dmask = drelative = dbias = None
        dqkv_weights = dqkv_biases = (None,) * 3
        if need.out_proj_weight:
            dout_weight = torch.mm(dprojected.t(), as_rows(attended, o))
        if needs_attention:
            query, key, value = views(qkv, shape, o)
            inputs = AttentionTensors(
                query, key, value, t.attn_mask, t.relative_bias, seqlens_q=t.cu_seqlens, seqlens_k=t.cu_seqlens,
                seed=t.attention_seed,
            )  # fmt: skip
            length = max_seqlen if packed else query.shape[2]
            dattended = as_heads(torch.mm(dprojected, t.out_proj_weight), attended, o)
            dqkv = torch.empty_like(qkv)
            if bias_sums:
                dbias = qkv.new_empty(qkv.shape[1])
            into = views(dqkv, shape, o)
            *_, dmask, drelative = attend(
                (dattended, None),
                AttentionSaved(*inputs, attended, statistics),
                length,
                length,
                into=into,
                jobs=jobs,
                dbias=dbias,
            )
            if t.cos is not None:
                turn_back(*into[:2], t.cos, t.sin, None)
            if needs_bias and not bias_sums:
                dbias = dqkv.sum(0)
            if needs_bias:
                dqkv_biases = project.of_biases(dbias, need_qkv_biases)
            dqkv_weights = project.of_weights(dqkv, normed, need_qkv)
            weights = (t.in_proj_weight, t.k_proj_weight, t.v_proj_weight)
            if o.norm_first and needs_normed and not o.no_norm1:
                dnormed = project.of_input(dqkv, weights, None)
                first = NormSaved(sum1, None, t.norm1_weight, t.norm1_bias, None, statistics1, None)
                dsrc, _, dnorm1_weight, dnorm1_bias, _ = norm1_backward((dnormed, dsum1), first, jobs)
            elif need.src:
                dsrc = project.of_input(dqkv, weights, dsum1)
        sums(jobs)
        dgate, dup = (dweight1, None) if t.up_weight is None or dweight1 is None else dweight1.chunk(2)
        dgate_bias, dup_bias = (dbias1, None) if t.up_bias is None or dbias1 is None else dbias1.chunk(2)
        (din_weight, dk_weight, dv_weight), (din_bias, dk_bias, dv_bias) = dqkv_weights, dqkv_biases
        return (
            None if dsrc is None else dsrc.view(shape), din_weight, din_bias, dout_weight, dout_bias, dnorm1_weight,
            dnorm1_bias, dgate, dgate_bias, dweight2, dbias2, dnorm2_weight, dnorm2_bias, dk_weight, dk_bias,
            dv_weight, dv_bias, dup, dup_bias, dmask, drelative,
        )  # fmt: skip

    return run


ENCODER_LAYER = Operation(
    "encoder_layer", Tensors, Options, differentiable=_DIFFERENTIABLE, outputs=1, results=_RESULTS,
    signature=_signature, check=_check, eager=lambda t, o, *sizes: by_parts(o)(*t, *sizes), forward=_forward,
    keep=_keep, backward=_backward, sizes=("max_seqlen", "batch_second"), dropouts=_DROPOUTS, instead=_instead,
    contiguous=_VECTORS,
)  # fmt: skip
