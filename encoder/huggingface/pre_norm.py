"""What ViT and the families with its layers share."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from ..packing import PaddedPacking
from .common import (
    asks_for_more,
    attention,
    by_name,
    causal_without_mask,
    feed_forward,
    serves,
    why_not_activation,
    why_not_attention,
    why_not_linear,
)
from .stock import CAPTURE


class PreNormLayer(nn.Module):
    """A pre-norm layer of one attention and one ``fc1``, ``fc2`` block; mixed into a subclass of the family's own."""

    names: ClassVar[dict[str, str]]
    """The family's names: of the layer's modules ``attention``, ``norm1`` and ``norm2``, of the attention's
    projection ``out``, and of its numbers ``scale`` and ``dropout``."""
    parts: ClassVar[dict[str, type]]
    """The family's own classes of the parts that the fused forward stands in for, ``attention`` and ``mlp``."""
    served: ClassVar[frozenset[str]] = frozenset({"hidden_states", "attention_mask", "is_causal"})
    """Arguments of the stock forward that the fused one serves."""

    @classmethod
    def why_not_fused(cls, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        names, parts = cls.names, layer._modules
        attention, mlp = parts[names["attention"]], parts["mlp"]
        return (
            why_not_plain([(names["attention"], attention, cls.parts["attention"]), ("mlp", mlp, cls.parts["mlp"])],
                          except_of=CAPTURE)
            or why_not_attention(attention, ("q_proj", "k_proj", "v_proj", names["out"]), names["attention"],
                                 attention.head_dim)
            or why_not_activation(mlp.activation_fn)
            or why_not_linear((f"mlp.{name}", mlp._modules[name]) for name in ("fc1", "fc2"))
            or why_not_plain([
                *((names[name], parts[names[name]], nn.LayerNorm) for name in ("norm1", "norm2")),
                *((name, parts[name], nn.Dropout) for name in ("dropout",) if name in parts),
            ])
        )  # fmt: skip

    def forward(self, *args: Any, packing: PaddedPacking | None = None, **kwargs: Any) -> Tensor:
        """As the family's own layer; with `packing` the result is packed, ``[T, width]``, and there is no mask."""
        given = by_name(self, args, kwargs)
        x: Any = given.get("hidden_states")
        attention_mask = given.get("attention_mask")
        names = self.names
        parts: Any = self._modules
        norm1, norm2 = (parts[names[name]] for name in ("norm1", "norm2"))
        if packing is None and (
            asks_for_more(given, self.served)
            or not serves(x, attention_mask, norm1.weight)
            or self.why_not_fused(self)
        ):  # fmt: skip
            return super().forward(**given)
        x = x if packing is None or x.dim() == 2 else packing.pack(x)
        module: Any = parts[names["attention"]]
        mlp: Any = parts["mlp"]
        dropout: Any = parts.get("dropout")
        dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
        if packing is None:
            is_causal = causal_without_mask(module, attention_mask, given)
        else:
            is_causal = bool(given.get("is_causal"))
        attended = attention(
            norm(x, norm1), (module.q_proj, module.k_proj, module.v_proj),
            module.head_dim, packing=packing, attn_mask=attention_mask, is_causal=is_causal,
            dropout_p=getattr(module, names["dropout"]) if module.training else 0.0,
            scale=getattr(module, names["scale"]),
        )  # fmt: skip
        out = module._modules[names["out"]](attended)
        normed, x = kernels.add_norm(
            out, x, norm2.weight, norm2.bias, eps=norm2.eps, dropout_p=dropout_p, return_sum=True
        )
        return feed_forward(normed, mlp.fc1, mlp.activation_fn, mlp.fc2, out_dropout_p=dropout_p, residual=x)


def norm(x: Tensor, module: Any) -> Tensor:
    """A LayerNorm."""
    return kernels.add_norm(x, None, module.weight, module.bias, eps=module.eps)
