"""The layer's backward pass: twelve launches without dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..add_norm.arguments import Saved as NormSaved
from ..add_norm.backward import add_norm_backward
from ..attention.arguments import Saved as AttentionSaved
from ..attention.arguments import Tensors as AttentionTensors
from ..attention.backward import attention_backward
from ..common import plan
from ..common.column_sums import ColumnSums
from ..ffn.arguments import Options as FfnOptions
from ..ffn.arguments import Saved as FfnSaved
from ..ffn.backward import ffn_backward
from ..rotary.eager import Options as RotaryOptions
from ..rotary.eager import Tensors as RotaryTensors
from ..rotary.forward import rotate
from .arguments import Options, Tensors, as_heads, attention_options, views
from .neighbours import stacked
from .products import Projections, all_three, norm_options, operands

_FIELDS = len(Tensors._fields)


def layer_backward(
    grads: Sequence[Any], saved: Sequence[Any], o: Options, sizes: tuple[int, ...], needs: Sequence[bool]
) -> Callable[..., Any]:
    """Sums over rows (norms' parameters, biases) are collected and added up by the programs of the last attention
    kernel, or at the end; a key's bias has the gradient 0."""
    need: Any = Tensors._make([*needs, *[False] * (_FIELDS - len(needs))])
    like: Any = Tensors._make(saved[:_FIELDS])
    first_grad = next(g for g in grads if g is not None)
    width, half, parameter = first_grad.shape[-1], o.half, like.in_proj_weight.dtype
    of_norms = norm_options(o, torch.float32 if half is not None else first_grad.dtype)
    wanted1, wanted2 = (
        (True, True, need.norm1_weight, need.norm1_bias, need.out_proj_bias and not o.norm_first),
        (True, True, need.norm2_weight, need.norm2_bias, need.out_proj_bias if o.norm_first else need.bias2),
    )
    if o.norm_first:
        wanted1 = (True, False, *wanted1[2:])
    norm1_backward, norm2_backward = (
        plan.once(lambda g, s, jobs, of=of, wanted=wanted: add_norm_backward(g, s, of, wanted))
        for of, wanted in zip(of_norms, (wanted1, wanted2), strict=True)
    )
    ffn_options = FfnOptions(o.hidden_p, o.output_p if o.norm_first else 0.0, o.activation, o.gated)
    need_weight1, need_bias1 = need.weight1 or need.up_weight, need.bias1 or need.up_bias
    ffn_needs = (True, need_weight1, need_bias1, need.weight2, need.bias2 and o.norm_first)
    ffn_gradients = plan.once(lambda g, s, jobs, add: ffn_backward(g, s, ffn_options, ffn_needs, add is not None))
    project, packed = Projections(like), len(first_grad.shape) == 2
    need_qkv, need_qkv_biases = ([bool(n) for n in of[: len(project.widths)]] for of in all_three(need))
    below_norm1 = o.norm_first and (need.norm1_weight or need.norm1_bias)
    needs_src = need.src or need.src_half
    needs_normed = needs_src or below_norm1
    needs_bias = any(need_qkv_biases)
    needs_attention = needs_normed or need.attn_mask or need.relative_bias or any(need_qkv) or needs_bias
    attention_needs = (True, True, True, need.attn_mask, need.relative_bias)
    # Sums of dQ, dK and dV as attention gives them; rotated and capped scores do depend on a key's bias.
    bias_sums = needs_bias and like.cos is None and not o.softcap
    numbers = attention_options(packed, o)
    attend = plan.once(
        lambda g, s, *sizes, **others: attention_backward(g, s, numbers, sizes, attention_needs, bias_sums=bias_sums)
    )
    turn_back = plan.once(lambda *t: rotate(RotaryTensors(*t), RotaryOptions(False, True), in_place=True))
    sums = ColumnSums()

    def run(grads: Sequence[Any], saved: Sequence[Any], max_seqlen: int, _: int) -> Any:
        dout, dout_half = grads
        t = Tensors._make(saved[:_FIELDS])
        (
            normed, qkv, attended, statistics, sum1, statistics1, between, hidden, activated, sum2, statistics2, *kept,
        ) = saved[_FIELDS:]  # fmt: skip
        if half is None:
            w, _, out_weight, first, _, second, _ = operands(t, o)
        else:
            w, (out_weight, first, second) = kept[:3] if kept[1] is not None else kept[:1], kept[3:]
        shape = (dout_half if dout is None else dout).shape
        x = None if t.src is None else t.src.reshape(-1, width)
        if normed is None:
            normed = x if half is None else t.src_half.reshape(-1, width)  # type: ignore[union-attr]
        jobs: list[Any] = []
        do, do_half = (None if d is None else d.reshape(-1, width) for d in (dout, dout_half))
        bias1 = stacked((t.bias1, t.up_bias)) if t.up_bias is not None else t.bias1
        of_ffn = FfnSaved(
            between, first, bias1, second, t.bias2, hidden, activated, t.hidden_seed,
            t.output_seed if o.norm_first else None,
        )  # fmt: skip
        if o.norm_first:
            dbetween, dweight1, dbias1, dweight2, dbias2 = ffn_gradients(do, of_ffn, jobs, None)
            of_norm = NormSaved(
                sum2, None, t.norm2_weight, t.norm2_bias, t.out_proj_bias, statistics2, t.projection_seed
            )
            dprojected, dsum1, dnorm2_weight, dnorm2_bias, dout_bias = norm2_backward((dbetween, do), of_norm, jobs)
            dnorm1_weight = dnorm1_bias = None
        else:
            of_norm = NormSaved(sum2, None, t.norm2_weight, t.norm2_bias, t.bias2, statistics2, t.output_seed)
            dout2, dsum2, dnorm2_weight, dnorm2_bias, dbias2 = norm2_backward((do, None, do_half), of_norm, jobs)
            dbetween, dweight1, dbias1, dweight2, _ = ffn_gradients(
                dout2, of_ffn, jobs, dsum2 if half is None else None
            )
            of_norm = NormSaved(
                sum1, None, t.norm1_weight, t.norm1_bias, t.out_proj_bias, statistics1, t.projection_seed
            )
            given = (dbetween, None) if half is None else (dsum2, None, dbetween)
            dprojected, dsum1, dnorm1_weight, dnorm1_bias, dout_bias = norm1_backward(given, of_norm, jobs)
        dsrc = dsrc_half = dout_weight = dmask = drelative = None
        dbias: Any = None
        dqkv_weights = dqkv_biases = [None] * 3
        if need.out_proj_weight:
            dout_weight = torch.mm(dprojected.t(), attended).to(parameter)
        if needs_attention:
            query, key, value = views(qkv, shape, o)
            inputs = AttentionTensors(
                query, key, value, t.attn_mask, t.relative_bias, seqlens_q=t.cu_seqlens, seqlens_k=t.cu_seqlens,
                seed=t.attention_seed,
            )  # fmt: skip
            length = max_seqlen if packed else query.shape[2]
            dattended, attended = (as_heads(of, query.shape, o) for of in (torch.mm(dprojected, out_weight), attended))
            dqkv = torch.empty_like(qkv)
            if bias_sums:
                dbias = qkv.new_empty(qkv.shape[1], dtype=parameter)
            into = views(dqkv, shape, o)
            *_, dmask, drelative = attend(
                (dattended, None), AttentionSaved(*inputs, attended, statistics), length, length, into=into, jobs=jobs,
                dbias=dbias,
            )  # fmt: skip
            if t.cos is not None:
                turn_back(*into[:2], t.cos, t.sin, None)
            if needs_bias:
                summed: Any = dbias if bias_sums else torch.sum(dqkv, 0, dtype=parameter)
                dqkv_biases = project.of_biases(summed, need_qkv_biases)
            dqkv_weights = project.of_weights(dqkv, normed, need_qkv, parameter)
            if o.norm_first and needs_normed and not o.no_norm1:
                dnormed = project.of_input(dqkv, w, None)
                of_norm = NormSaved(x, None, t.norm1_weight, t.norm1_bias, None, statistics1, None)
                dsrc, _, dnorm1_weight, dnorm1_bias, _ = norm1_backward((dnormed, dsum1), of_norm, jobs)
            elif half is None and need.src:
                dsrc = project.of_input(dqkv, w, dsum1)
            elif needs_src:
                dsrc, dsrc_half = dsum1, project.of_input(dqkv, w, None)
                if t.src_half is None:
                    dsrc, dsrc_half = torch.add(dsrc, dsrc_half), None
        sums(jobs)
        if half is not None:
            dweight1, dweight2 = (d if d is None else d.to(parameter) for d in (dweight1, dweight2))
        dgate, dup = (dweight1, None) if t.up_weight is None or dweight1 is None else torch.unsafe_chunk(dweight1, 2)
        dgate_bias, dup_bias = (dbias1, None) if t.up_bias is None or dbias1 is None else torch.unsafe_chunk(dbias1, 2)
        (din_weight, dk_weight, dv_weight), (din_bias, dk_bias, dv_bias) = dqkv_weights, dqkv_biases
        dsrc, dsrc_half = (None if d is None else d.view(shape) for d in (dsrc, dsrc_half))
        return (
            dsrc, din_weight, din_bias, dout_weight, dout_bias, dnorm1_weight, dnorm1_bias, dgate, dgate_bias,
            dweight2, dbias2, dnorm2_weight, dnorm2_bias, dk_weight, dk_bias, dv_weight, dv_bias, dup, dup_bias,
            *[None] * 4, dmask, drelative, dsrc_half,
        )  # fmt: skip

    return run
