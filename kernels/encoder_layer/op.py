"""The layer on the kernels, in one autograd function: no gradient of a bias, a norm or a residual costs a launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_norm.arguments import Options as NormOptions
from ..add_norm.arguments import Wanted
from ..common import operator
from .arguments import LayerWeights, Masks, Options, as_heads, as_rows, attention_call, views

_WEIGHTS = len(LayerWeights._fields)
_Saved = list[Any]


def forward(
    src: Tensor, w: LayerWeights, masks: Masks, seeds: Sequence[Tensor | None], options: Options, save: bool
) -> tuple[Tensor, _Saved]:
    """The output, and with `save` what the backward pass needs."""
    from ..add_norm.forward import add_norm_forward
    from ..attention.forward import attention_forward
    from ..ffn.forward import linear_act_forward, output_forward

    p = options.dropouts
    norm1, norm2 = _norms(options)
    x = src.reshape(-1, src.shape[-1])
    normed, mean1, rstd1 = x, None, None
    if options.norm_first:
        normed, _, mean1, rstd1 = add_norm_forward(
            x, None, w.norm1_weight, w.norm1_bias, None, None, norm1, False, save
        )
    qkv = F.linear(normed, w.in_proj_weight, w.in_proj_bias)
    inputs, attention_options = attention_call(qkv, src.shape, masks, seeds[0], options)
    attended, _, statistics = attention_forward(inputs, attention_options, False)
    # The projection's bias is added where its sum is read: in the norm's kernel, whose backward pass sums its gradient.
    projected = torch.mm(as_rows(attended, options, x), w.out_proj_weight.t())
    if not options.norm_first:
        between, sum1, mean1, rstd1 = add_norm_forward(
            projected, x, w.norm1_weight, w.norm1_bias, w.out_proj_bias, seeds[1], norm1, save, save
        )
        activated, hidden = linear_act_forward(
            between, w.weight1, w.bias1, seeds[2], p.hidden, options.kernel_activation, False, None, save
        )
        out2 = torch.mm(activated, w.weight2.t())
        out, sum2, mean2, rstd2 = add_norm_forward(
            out2, between, w.norm2_weight, w.norm2_bias, w.bias2, seeds[3], norm2, save, save
        )
        saved = [x, qkv, attended, statistics, sum1, mean1, rstd1, between, hidden, activated, sum2, mean2, rstd2]
    else:
        between, sum2, mean2, rstd2 = add_norm_forward(
            projected, x, w.norm2_weight, w.norm2_bias, w.out_proj_bias, seeds[1], norm2, True, save
        )
        activated, hidden = linear_act_forward(
            between, w.weight1, w.bias1, seeds[2], p.hidden, options.kernel_activation, False, None, save
        )
        out = output_forward(activated, w.weight2, w.bias2, sum2, seeds[3], p.output, None)
        saved = [normed, qkv, attended, statistics, x, mean1, rstd1, between, hidden, activated, sum2, mean2, rstd2]
    return out.view(src.shape), saved if save else []


def backward(
    dout: Tensor, w: LayerWeights, masks: Masks, seeds: Sequence[Tensor | None], options: Options, saved: _Saved,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the source, of each weight and of the attention mask, as far as `needs` says.

    Sums over rows (norms' parameters, biases) are collected and added up by the programs of the last attention kernel;
    a key's bias has the gradient 0.
    """
    from ..add_norm.backward import add_norm_backward
    from ..attention.backward import attention_backward, bias_sums
    from ..common.column_sums import ColumnSums
    from ..ffn.backward import ffn_backward

    first, qkv, attended, statistics, sum1, mean1, rstd1, between, hidden, activated, sum2, mean2, rstd2 = saved
    needs_src, needs_mask = needs[0], needs[1 + _WEIGHTS]
    needs_weights: Any = LayerWeights(*needs[1 : 1 + _WEIGHTS])  # type: ignore[arg-type]
    grads: dict[str, Any] = dict.fromkeys(LayerWeights._fields)
    p, dtype, sums = options.dropouts, dout.dtype, ColumnSums()
    norm1, norm2 = _norms(options)
    do = dout.reshape(-1, dout.shape[-1])

    def norm_backward(
        dy: Tensor, dsum: Tensor | None, total: Any, mean: Any, rstd: Any, seed: Tensor | None, number: int, bias: str
    ) -> tuple[Tensor | None, Tensor | None]:
        names = (f"norm{number}_weight", f"norm{number}_bias")
        parameters = [dtype if name and getattr(needs_weights, name) else None for name in (*names, bias)]
        wanted = Wanted(dtype, dtype if bias else None, *parameters)
        dx, dz, *found = add_norm_backward(
            dy, dsum, total, None, None, getattr(w, names[0]), mean, rstd, seed, (norm1, norm2)[number - 1], False,
            wanted, sums,
        )  # fmt: skip
        grads.update({name: grad for name, grad in zip((*names, bias), found, strict=True) if name})
        return dx, dz

    def ffn_gradients(dy: Any, out_seed: Tensor | None, needs_bias2: bool, accumulate: Tensor | None) -> Any:
        needed = (True, needs_weights.weight1, needs_weights.bias1, needs_weights.weight2, needs_bias2)
        dx, grads["weight1"], grads["bias1"], grads["weight2"], dbias2 = ffn_backward(
            dy, between, w.weight1, w.bias1, w.weight2, hidden, activated, seeds[2], out_seed, p.hidden, p.output,
            options.kernel_activation, False, None, needed, sums, accumulate,
        )  # fmt: skip
        if needs_bias2:
            grads["bias2"] = dbias2
        return dx

    if not options.norm_first:
        dout2, dsum2 = norm_backward(do, None, sum2, mean2, rstd2, seeds[3], 2, "bias2")
        dbetween = ffn_gradients(dout2, None, False, dsum2)
        dprojected, dsum1 = norm_backward(dbetween, None, sum1, mean1, rstd1, seeds[1], 1, "out_proj_bias")
    else:
        dbetween = ffn_gradients(do, seeds[3], needs_weights.bias2, None)
        dprojected, dsum1 = norm_backward(dbetween, do, sum2, mean2, rstd2, seeds[1], 2, "out_proj_bias")
    assert dprojected is not None and dsum1 is not None

    dsrc = dmask = None
    flat = as_rows(attended, options, first)
    if needs_weights.out_proj_weight:
        grads["out_proj_weight"] = torch.mm(dprojected.t(), flat)
    below_norm1 = options.norm_first and (needs_weights.norm1_weight or needs_weights.norm1_bias)
    needs_normed = needs_src or below_norm1
    if needs_normed or needs_mask or needs_weights.in_proj_weight or needs_weights.in_proj_bias:
        inputs, attention_options = attention_call(qkv, dout.shape, masks, seeds[0], options)
        dattended = as_heads(torch.mm(dprojected, w.out_proj_weight), attended, options)
        dqkv = torch.empty_like(qkv)
        partial = None
        if needs_weights.in_proj_bias:
            grads["in_proj_bias"], partial = dqkv.new_empty(dqkv.shape[1]), bias_sums(inputs, attention_options)
            width = dqkv.shape[1] // 3
            parts = (partial[:, :width], partial[:0, :width], partial[:, width:])  # no row: a sum of 0
            for part, out in zip(parts, grads["in_proj_bias"].split(width), strict=True):
                sums.add(part, dtype, out)
        dmask = attention_backward(
            dattended, None, attended, statistics, inputs, attention_options, (True, True, needs_mask, False), sums,
            partial, views(dqkv, dout.shape, options),
        )[3]  # fmt: skip
        if needs_weights.in_proj_weight:
            grads["in_proj_weight"] = torch.mm(dqkv.t(), first)
        if options.norm_first and needs_normed:
            dnormed = torch.mm(dqkv, w.in_proj_weight)
            dsrc, _ = norm_backward(dnormed, dsum1, sum1, mean1, rstd1, None, 1, "")
        elif needs_src:
            dsrc = torch.addmm(dsum1, dqkv, w.in_proj_weight)
    sums.launch()
    return None if dsrc is None else dsrc.view(dout.shape), *grads.values(), dmask


def _norms(options: Options) -> tuple[NormOptions, NormOptions]:
    p = options.dropouts
    first, second = (0.0, p.projection) if options.norm_first else (p.projection, p.output)
    return NormOptions(first, options.eps1), NormOptions(second, options.eps2)


class EncoderLayer(torch.autograd.Function):
    """The kernels in eager mode, with gradients."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, src: Tensor, *arguments: Any
    ) -> Tensor:
        weights, masks = LayerWeights(*arguments[:_WEIGHTS]), Masks(*arguments[_WEIGHTS:-2])
        seeds, options = arguments[-2:]
        out, saved = forward(src, weights, masks, seeds, options, True)
        ctx.save_for_backward(*weights, masks.attn_mask, masks.cu_seqlens, *seeds, *saved)
        ctx.is_causal, ctx.max_seqlen, ctx.options = masks.is_causal, masks.max_seqlen, options
        return out

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors = list(ctx.saved_tensors)
        weights, tensors = LayerWeights(*tensors[:_WEIGHTS]), tensors[_WEIGHTS:]
        masks = Masks(tensors[0], ctx.is_causal, tensors[1], ctx.max_seqlen)
        seeds, saved = tensors[2:6], tensors[6:]
        grads = backward(dout, weights, masks, seeds, ctx.options, saved, ctx.needs_input_grad)
        return *grads, None, None, None, None, None
