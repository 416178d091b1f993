"""A layer of a family on `kernels.encoder_layer`: an adapter says where its weights and its options are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .. import kernels
from ..kernels.attention.eager import MAX_HEAD_DIM
from ..kernels.encoder_layer import neighbours
from ..modules import has_hooks, why_not_plain
from .calls import Call, asks_for_more, by_name, require_known, serves
from .stock import CAPTURE

ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in (
        ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
        ("quick_gelu", "quick_gelu"), ("silu", "silu"), ("swish", "silu"), ("relu2", "relu2"),
    )
    if theirs in ACT2FN
}  # fmt: skip
"""The kernels' name of an activation module of transformers."""

IMPLEMENTATIONS = frozenset({"eager", "sdpa", "fusenc", "fusenc_flash"})
"""Implementations of attention that the fused forwards stand in for; others may compute something else."""

_NORMS = frozenset({"norm1", "norm2"})
_FIELDS = {
    name: (f"{name}_weight", f"{name}_bias") for name in ("in_proj", "k_proj", "v_proj", "out_proj", "up", *_NORMS)
} | {"weight1": ("weight1", "bias1"), "weight2": ("weight2", "bias2")}
_PLACES = {name: tuple(map(kernels.LayerWeights._fields.index, pair)) for name, pair in _FIELDS.items()}
"""Where in `kernels.LayerWeights` the weight and the bias lie, by the names that adapters use."""


class Adapter:
    """What `FusedLayer` needs to know of a family's layers; a family has a subclass, each of its layer classes one
    instance."""

    weights: ClassVar[Mapping[str, str]]
    """Where the modules are whose parameters `kernels.LayerWeights` lists, as paths within a layer: by ``"in_proj"``
    (query, key and value, or with ``"k_proj"`` and ``"v_proj"`` the query), ``"out_proj"``, ``"weight1"`` (beside
    ``"up"`` the gate), ``"weight2"``, ``"norm1"``, ``"norm2"``."""
    across: ClassVar[Mapping[str, str]] = {}
    """Likewise those of an attention to a memory, and as ``"norm1"`` the norm that goes with it."""
    attention: str
    """Path of the module that attends."""
    dropouts: tuple[str, ...] = ()
    """Paths of dropout modules."""
    served: frozenset[str] = frozenset({"hidden_states", "attention_mask"})
    """Arguments of the stock forward that the fused one serves."""

    def __init__(self, parts: Mapping[str, type | tuple[type, ...]], norm: type = nn.LayerNorm) -> None:
        self.parts, self.norm = parts, norm
        """The family's own classes of the parts that are stood in for, by path, and of its norms. A tuple: one of
        these."""

    def weights_of(self, layer: Any) -> Mapping[str, str]:
        """`weights` of this layer, where not all are alike."""
        return self.weights

    def options_of(self, layer: Any) -> dict[str, Any]:
        """The options of `kernels.encoder_layer` that follow from a layer, ``nhead`` aside."""
        raise NotImplementedError

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        """Those that follow from a call."""
        if call is not None and call.packing is not None:
            return {"is_causal": call.is_causal}
        mask = given.get("attention_mask")
        return {"attn_mask": mask, "is_causal": causal_without_mask(at(layer, self.attention), mask, given)}

    def head_dim_of(self, layer: Any) -> int:
        """Size of a head."""
        return at(layer, self.attention).head_dim  # type: ignore[no-any-return]

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        """Whether a call that no encoder has looked at can be served, beyond what holds for all families."""
        return True

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        """What the stock layer returns."""
        return out

    def run(self, layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        """A layer on the kernels, adapters in the place of products."""
        weights, modules = parameters(layer, self.weights_of(layer))
        nhead = weights.out_proj_weight.shape[1] // self.head_dim_of(layer)
        return kernels.encoder_layer(x, weights, nhead, modules=modules, **options)

    def why_not_fused(self, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        return self.why_not_parts(layer) or self.why_not_more(layer) or self._why_not_weights(layer)

    def why_not_parts(self, layer: Any) -> str:
        """Why the parts that the family declares are not those."""
        found = ((path, at(layer, path), kinds) for path, kinds in self.parts.items())
        return why_not_plain(
            ((path, part, _one_of(kinds, part) if isinstance(kinds, tuple) else kinds) for path, part, kinds in found),
            except_of=CAPTURE,
        )

    def why_not_more(self, layer: Any) -> str:
        """Reasons of the family's own."""
        return ""

    def _why_not_weights(self, layer: Any) -> str:
        """Why its attention or a module with weights is not one that can be stood in for."""
        places = self.weights_of(layer)
        config = getattr(at(layer, self.attention), "config", None)  # MPNet's has none: its attention has one way
        if config is not None and config._attn_implementation not in IMPLEMENTATIONS:
            return f"attention implementation {config._attn_implementation} is not fused"
        if self.head_dim_of(layer) > MAX_HEAD_DIM:
            return f"the head size is above {MAX_HEAD_DIM}"
        return why_not_linear((path, at(layer, path)) for name, path in places.items() if name not in _NORMS) or (
            why_not_plain([
                *((places[name], at(layer, places[name]), self.norm) for name in _NORMS if name in places),
                *((path, at(layer, path), nn.Dropout) for path in self.dropouts),
            ])
        )  # fmt: skip


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
            or not serves(x, given.get("attention_mask"), at(self, adapter.weights["norm2"]).weight)
            or not adapter.serves(self, given)
            or adapter.why_not_fused(self)
        ):
            require_known(given, getattr(at(self, adapter.attention), "config", None))
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


def parameters(layer: Any, places: Mapping[str, str]) -> tuple[kernels.LayerWeights, dict[str, Any]]:
    """The parameters at these places, and the modules that are called instead of multiplying by one."""
    found: list[Any] = [None] * len(kernels.LayerWeights._fields)
    modules = {}
    for name, path in places.items():
        module = at(layer, path)
        weight, bias = _PLACES[name]
        own = module.__dict__["_parameters"]
        if name in _NORMS:
            if "weight" not in own:  # a tensor that is no parameter
                own = {"weight": module.weight, "bias": getattr(module, "bias", None)}
            found[weight] = own["weight"]
        elif "weight" in own and type(module) is nn.Linear:
            found[weight] = own["weight"]
        else:
            if "weight" not in own or type(module) is not Conv1D:
                modules[name] = module
                own = {"weight": module.weight, "bias": module.bias}
            found[weight] = own["weight"].t() if is_transposed(module) else own["weight"]
        found[bias] = own.get("bias")
    return kernels.LayerWeights._make(found), modules


def _one_of(kinds: tuple[type, ...], module: nn.Module) -> type:
    """That of these which a module is, else the first."""
    return next((kind for kind in kinds if type(module) is kind), kinds[0])


def is_transposed(module: Any) -> bool:
    """True for a linear layer that keeps its weight the other way round, and for an adapter around one."""
    return type(module) is Conv1D or (is_lora(module) and type(module.base_layer) is Conv1D)


@functools.cache
def _names(path: str) -> list[str]:
    return path.split(".")


def at(module: Any, path: str) -> Any:
    """The submodule of a path."""
    for name in _names(path):
        module = module.__dict__["_modules"][name]
    return module


def why_not_linear(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Why these modules, which a fused forward stands in for or calls, are no linear layers of single tokens, or "".

    That is `nn.Linear`, transformers' `Conv1D`, or peft's plain LoRA around one: what they give for a token depends on
    that token alone.
    """
    for name, module in modules:
        kind = type(module)
        if kind is nn.Linear or kind is Conv1D:
            hooked = has_hooks(module)
        elif is_lora(module):
            hooked = any(has_hooks(part) for part in module.modules())
        else:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}, not an nn.Linear"
        if hooked:
            return f"{name} has hooks or a forward of its own"
    return ""


def is_lora(module: Any) -> bool:
    """True for peft's LoRA around a linear layer, without one of the variants that replace its formula."""
    kind = type(module)
    return kind.__module__ == "peft.tuners.lora.layer" and kind.__qualname__ == "Linear" and not module.lora_variant


def activation(module: Any) -> Any:
    """The kernels' name of an activation, or the activation itself, which also has its hooks called."""
    name = ACTIVATIONS.get(type(module))
    return module if name is None or has_hooks(module) else name


def rate(layer: Any, path: str, holder: Any = None) -> float:
    """The rate of a dropout module, 0 in evaluation, of itself or of the `holder` that reads its rate."""
    dropout = at(layer, path)
    return dropout.p if (dropout if holder is None else holder).training else 0.0  # type: ignore[no-any-return]


def causal_without_mask(attention: Any, attention_mask: Tensor | None, given: dict[str, Any]) -> bool:
    """Whether the stock attention would be causal: without a mask that is, and by its own word or that of the call."""
    asked = given.get("is_causal")
    if attention_mask is not None or not (getattr(attention, "is_causal", True) if asked is None else asked):
        return False
    config = getattr(attention, "config", None)  # last, as to look into a configuration takes microseconds
    return config is not None and config._attn_implementation != "eager"


_GROUPS = (("in_proj", "k_proj", "v_proj"), ("weight1", "up"))


def lay_together(layer: Any) -> None:
    """Let the weights of query, key and value lie one behind the other, so that one product does for them, and those of
    a gate and what it gates; likewise their biases. The parameters stay the same objects: only their data move."""
    for group in _groups(layer):
        neighbours.lay_together(group)


def let_go(layer: Any) -> None:
    """Forget that they do: for a layer that is fused no longer."""
    for group in _groups(layer):
        neighbours.let_go(group)


def _groups(layer: Any) -> Iterator[list[Any]]:
    if not isinstance(layer, FusedLayer):
        return
    for places, group in itertools.product((layer.adapter.weights_of(layer), layer.adapter.across), _GROUPS):
        modules = [at(layer, places[name]) for name in group if name in places]
        if len(modules) == len(group) and all(type(module) is nn.Linear for module in modules):
            for name in ("weight", "bias"):
                yield [module._parameters.get(name) for module in modules]
