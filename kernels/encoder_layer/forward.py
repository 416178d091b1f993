"""The layer's forward pass: seven launches after the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from ..add_norm.arguments import Tensors as NormTensors
from ..add_norm.forward import add_norm_forward
from ..attention.arguments import Tensors as AttentionTensors
from ..attention.forward import attention_forward
from ..common import plan
from ..ffn.forward import linear_act_forward, output_forward, with_rows_of
from ..rotary.eager import Options as RotaryOptions
from ..rotary.eager import Tensors as RotaryTensors
from ..rotary.forward import rotate
from .arguments import Options, Tensors, as_rows, attention_options, views
from .products import Projections, norm_options, operands


def layer_forward(like: Tensors, o: Options, sizes: tuple[int, ...], needs: tuple[bool, ...]) -> Callable[..., Any]:

    dtype, width, save, half = like.src.dtype, like.src.shape[-1], len(needs) > 0, o.half
    keep, norms1 = (True,) * 5 if save else (), o.norm_first and not o.no_norm1
    numbers = attention_options(like.cu_seqlens is not None, o)
    project = Projections(like)
    norm1, norm2 = (
        plan.once(lambda *t, of=of: add_norm_forward(NormTensors(*t), of, keep)) for of in norm_options(o, dtype)
    )
    attend = plan.once(lambda *t: attention_forward(AttentionTensors(*t[:-2]), numbers, t[-2:], keep))
    turn = plan.once(lambda *t: rotate(RotaryTensors(*t), RotaryOptions(False, False), in_place=True))
    act = plan.once(
        lambda x, w, b, seed: linear_act_forward(x, w, b, seed, o.hidden_p, o.activation, o.gated, None, save)
    )
    output = plan.once(lambda x, w, b, residual, seed: output_forward(x, w, b, residual, seed, o.output_p, None))

    def run(*arguments: Any) -> Any:
        *arguments, max_seqlen, _ = arguments  # type: ignore[assignment]
        t = Tensors._make(arguments)
        src, cu_seqlens = t.src, t.cu_seqlens
        shape = src.shape
        x = src.reshape(-1, width)
        w = operands(t, o)
        given, statistics1, out_half = x if half is None else t.src_half, None, None
        if norms1:
            normed, _, statistics1, _ = norm1(x, None, t.norm1_weight, t.norm1_bias, None, None)
        else:
            normed = x.to(half) if given is None else given.reshape(-1, width)
        qkv = project.forward(normed, w.qkv, w.qkv_biases)
        query, key, value = views(qkv, shape, o)
        if t.cos is not None:
            turn(query, key, t.cos, t.sin, None)
        length = max_seqlen if cu_seqlens is not None else query.shape[2]
        attended, _, statistics = attend(
            query, key, value, t.attn_mask, t.relative_bias, None, cu_seqlens, cu_seqlens, None, None, None, None,
            t.attention_seed, length, length,
        )  # fmt: skip
        # The projection's bias is added in the norm's kernel, whose backward pass sums its gradient.
        rows = as_rows(attended, o)
        projected = F.linear(rows, w.out)
        if o.norm_first:
            between, sum2, statistics2, _ = norm2(
                projected, x, t.norm2_weight, t.norm2_bias, t.out_proj_bias, t.projection_seed
            )
            activated, hidden = act(between, w.first, w.first_bias, t.hidden_seed)
            out, sum1 = output(activated, w.second, w.second_bias, sum2, t.output_seed), None
        else:
            after1, sum1, statistics1, copy = norm1(
                projected, x, t.norm1_weight, t.norm1_bias, t.out_proj_bias, t.projection_seed
            )
            between = after1 if half is None else copy
            activated, hidden = act(between, w.first, w.first_bias, t.hidden_seed)
            out2 = F.linear(activated, w.second)
            out, sum2, statistics2, out_half = norm2(out2, after1, t.norm2_weight, t.norm2_bias, t.bias2, t.output_seed)
        outputs = with_rows_of(src, out), None if out_half is None else with_rows_of(src, out_half)
        if not save:
            return outputs
        kept = (None,) * 6 if half is None else (*w.qkv, *[None] * (3 - len(w.qkv)), w.out, w.first, w.second)
        return (
            *outputs, normed if norms1 or given is None else None, qkv, rows, statistics, sum1, statistics1, between,
            hidden, None if o.recompute else activated, sum2, statistics2, *kept,
        )  # fmt: skip

    return run
