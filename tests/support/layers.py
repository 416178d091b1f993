"""Tensors of calls of encoder_layer."""

from __future__ import annotations

import torch
from fusenc.kernels import LayerWeights

HEADS = 3


def tensors(shape, hidden=70, device="cpu", biases=True):
    """The source and the parameters of a layer."""
    generator = torch.Generator().manual_seed(1)
    e = shape[-1]

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device)

    src = draw(*shape)
    root = e**-0.5
    weights = LayerWeights(
        draw(3 * e, e, scale=root), draw(3 * e), draw(e, e, scale=root), draw(e), 1 + draw(e, scale=0.3), draw(e),
        draw(hidden, e, scale=root), draw(hidden), draw(e, hidden, scale=hidden**-0.5), draw(e),
        1 + draw(e, scale=0.3), draw(e),
    )  # fmt: skip
    if not biases:
        weights = LayerWeights(*(None if "bias" in n else t for n, t in zip(weights._fields, weights, strict=True)))
    return src, weights


def separate(weights, kv_heads=HEADS):
    """The same with weights of their own for query, key and value."""
    head_dim = weights.out_proj_weight.shape[1] // HEADS
    sizes = [HEADS * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    found = {}
    for kind, whole in (("weight", weights.in_proj_weight), ("bias", weights.in_proj_bias)):
        for name, part in zip(("in_proj", "k_proj", "v_proj"), whole[: sum(sizes)].split(sizes), strict=True):
            found[f"{name}_{kind}"] = part.clone()
    return weights._replace(**found)


def gated(weights, separately=False):
    """The same with a gated feed-forward of the same hidden size."""
    generator = torch.Generator().manual_seed(2)
    up = torch.randn(weights.weight1.shape, generator=generator).to(weights.weight1) * weights.weight1.std()
    up_bias = torch.randn(weights.bias1.shape, generator=generator).to(weights.bias1)
    if separately:
        return weights._replace(up_weight=up, up_bias=up_bias)
    return weights._replace(weight1=torch.cat((weights.weight1, up)), bias1=torch.cat((weights.bias1, up_bias)))
