"""A layer of a family on `kernels.encoder_layer`: an adapter says where its weights and its options are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.attention.eager import MAX_HEAD_DIM
from ..kernels.encoder_layer import neighbours
from ..modules import why_not_plain
from .calls import Call, asks_for_more, by_name, require_known, serves
from .layout import Layout, at
from .stock import CAPTURE, Stock

IMPLEMENTATIONS = frozenset({"eager", "sdpa", "fusenc", "fusenc_flash"})
"""Implementations of attention that the fused forwards stand in for; others may compute something else."""


class Adapter:
    """What `FusedLayer` needs to know of a family's layers; a family has a subclass, each of its layer classes one
    instance, most with no more than a `layout`."""

    layout: ClassVar[Layout]
    across: ClassVar[Layout | None] = None
    """Of an attention to a memory, and of the norm that goes with it."""
    norm: ClassVar[str] = ""
    """Name of the stock class of norms; "": nn.LayerNorm."""
    head_dim: ClassVar[str] = "head_dim"
    """Name in the module that attends of the size of a head."""
    served: ClassVar[frozenset[str]] = frozenset({"hidden_states", "attention_mask"})
    """Arguments of the stock forward that the fused one serves."""

    def __init__(self, stock: Stock, relies_on: Mapping[str, str]) -> None:
        self.kinds: dict[str, tuple[type, ...]] = {}
        """The stock classes of the parts that are stood in for, one of several, by path."""
        for name, *paths in map(str.split, relies_on):
            for path in paths:
                self.kinds[path] = (*self.kinds.get(path, ()), stock[name])
        self.norm_kind = stock[self.norm] if self.norm else nn.LayerNorm

    def layout_of(self, layer: Any) -> Layout:
        """`layout` of this layer, where not all are alike."""
        return self.layout

    def options_of(self, layer: Any) -> dict[str, Any]:
        """The options of `kernels.encoder_layer` that follow from a layer, ``nhead`` aside."""
        return self.layout_of(layer).options(layer)

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        """Those that follow from a call."""
        if call is not None and call.packing is not None:
            return {"is_causal": call.is_causal}
        mask = given.get("attention_mask")
        return {"attn_mask": mask, "is_causal": causal_without_mask(at(layer, self.layout.attention), mask, given)}

    def head_dim_of(self, layer: Any) -> int:
        """Size of a head."""
        return getattr(at(layer, self.layout.attention), self.head_dim)

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        """Whether a call that no encoder has looked at can be served, beyond what holds for all families."""
        return True

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        """What the stock layer returns."""
        return out

    def parameters(self, layer: Any) -> tuple[kernels.LayerWeights, dict[str, Any]]:
        """The weights of `kernels.encoder_layer`, and its `modules`."""
        return self.layout_of(layer).parameters(layer)

    def run(self, layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        """A layer on the kernels, adapters in the place of products."""
        weights, modules = self.parameters(layer)
        nhead = weights.out_proj_weight.shape[1] // self.head_dim_of(layer)
        return kernels.encoder_layer(x, weights, nhead, modules=modules, **options)

    def why_not_fused(self, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        return self.why_not_parts(layer) or self.why_not_more(layer) or self._why_not_weights(layer)

    def why_not_parts(self, layer: Any) -> str:
        """Why the parts that the family declares are not those."""
        found = ((path, at(layer, path), kinds) for path, kinds in self.kinds.items())
        return why_not_plain(
            ((path, part, type(part) if type(part) in kinds else kinds[0]) for path, part, kinds in found), CAPTURE
        )

    def why_not_more(self, layer: Any) -> str:
        """Reasons of the family's own."""
        return ""

    def _why_not_weights(self, layer: Any) -> str:
        """Why its attention or a module with weights is not one that can be stood in for."""
        config = getattr(at(layer, self.layout.attention), "config", None)  # MPNet's has none: it has one way
        if config is not None and config._attn_implementation not in IMPLEMENTATIONS:
            return f"attention implementation {config._attn_implementation} is not fused"
        if self.head_dim_of(layer) > MAX_HEAD_DIM:
            return f"the head size is above {MAX_HEAD_DIM}"
        return self.layout_of(layer).why_not(layer, self.norm_kind)


class FusedLayer(nn.Module):
    """An encoder layer on the fused kernels; mixed into a subclass of the family's own."""

    adapter: ClassVar[Adapter]
    recompute: bool = False
    """Whether the backward pass computes the activation again instead of keeping it; `fuse` sets it."""

    @classmethod
    def why_not_fused(cls, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        return cls.adapter.why_not_fused(layer)

    def forward(self, *args: Any, call: Call | None = None, **kwargs: Any) -> Any:
        """As the family's own layer; with a `call` of an encoder that leaves padding out the result is packed, ``[T,
        width]``."""
        given, adapter = by_name(self, args, kwargs), self.adapter
        x: Any = given.get("hidden_states")
        if call is None and (
            asks_for_more(given, adapter.served)
            or not serves(x, given.get("attention_mask"), at(self, adapter.layout.paths["norm2"]).weight)
            or not adapter.serves(self, given)
            or adapter.why_not_fused(self)
        ):
            require_known(given, getattr(at(self, adapter.layout.attention), "config", None))
            return super().forward(**given)
        options, packing = adapter.options_of(self), None if call is None else call.packing
        if packing is not None:
            x = packing.pack(x) if x.dim() == 3 else x
            options["cu_seqlens"], options["max_seqlen"] = packing.cu_seqlens, packing.max_length
        options |= adapter.options_of_call(self, x, given, call)
        options["recompute"] = self.recompute
        out = adapter.run(self, x, options)
        if packing is not None and call is not None and call.last is self:
            out = packing.unpack(out)
        return adapter.results(out, given)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._apply(*args, **kwargs)
        lay_together(self)
        return out


def causal_without_mask(attention: Any, attention_mask: Tensor | None, given: dict[str, Any]) -> bool:
    """Whether the stock attention would be causal: without a mask that is, and by its own word or that of the call."""
    asked = given.get("is_causal")
    if attention_mask is not None or not (getattr(attention, "is_causal", True) if asked is None else asked):
        return False
    config = getattr(attention, "config", None)  # last, as to look into a configuration takes microseconds
    return config is not None and config._attn_implementation != "eager"


def bias_and_mask(bias: Tensor | None, mask: Tensor | None) -> dict[str, Tensor | None]:
    """A bias of positions, by distance if it has two dimensions, and a mask as options of `kernels.encoder_layer`."""
    if bias is None or bias.dim() == 2:
        return {"relative_bias": bias, "attn_mask": mask}
    if mask is None:
        return {"attn_mask": bias}
    masked = torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
    return {"attn_mask": masked}


def lay_together(layer: Any) -> None:
    """Let the weights of query, key and value lie one behind the other, so that one product does for them, and those of
    a gate and what it gates; likewise their biases. The parameters stay the same objects: only their data move."""
    for group in _neighbours(layer):
        neighbours.lay_together(group)


def let_go(layer: Any) -> None:
    """Forget that they do: for a layer that is fused no longer."""
    for group in _neighbours(layer):
        neighbours.let_go(group)


def _neighbours(layer: Any) -> Iterator[list[Any]]:
    if isinstance(layer, FusedLayer):
        for layout in (layer.adapter.layout_of(layer), layer.adapter.across):
            yield from () if layout is None else layout.neighbours(layer)
