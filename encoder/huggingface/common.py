"""What the families share: the arguments of a call, activations, and encoders that leave padding out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .. import kernels
from ..kernels.attention.eager import MAX_HEAD_DIM
from ..modules import has_hooks
from ..packing import PaddedPacking, attend
from ..padding import RealTokens, may_remove, real_tokens, require_setting
from .stock import CAPTURE, collected

ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in (
        ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
        ("quick_gelu", "quick_gelu"), ("silu", "silu"), ("swish", "silu"), ("relu2", "relu2"),
    )
    if theirs in ACT2FN
}  # fmt: skip
"""The kernels' name of an activation module of transformers."""

IMPLEMENTATIONS = frozenset({"eager", "sdpa", "fusenc"})
"""Implementations of attention that the fused forwards stand in for; others may compute something else."""

HARMLESS = frozenset(
    {"use_cache", "cache_position", "position_ids", "output_hidden_states", "return_dict", "num_items_in_batch"}
)
"""Arguments that models hand on to encoders and layers and that change nothing of what these compute. A call that gives
any other argument which its fused forward does not serve runs the stock forward."""


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by the names that the stock forward of a fused module has for them.

    Raises:
        TypeError: more arguments than the stock forward takes, or one given twice.
    """
    given = {**dict(zip(module.stock_arguments, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs):
        raise TypeError(f"{type(module).__name__}: an argument is given twice, or there are too many")
    return given


def asks_for_more(given: dict[str, Any], served: frozenset[str]) -> bool:
    """True if a call gives an argument that its fused forward does not serve, and that may change the results."""
    for name, value in given.items():
        if value is None or value is False or name in served or name in HARMLESS:
            continue
        if type(value) is not int or value:  # no cache has 0 tokens
            return True
    return False


def why_not_attention(attention: Any, projections: Iterable[str], name: str, head_dim: int) -> str:
    """Why an attention module's part of a fused forward cannot run, or ""; `name` is how the report calls it."""
    config = getattr(attention, "config", None)  # MPNet's has none: its attention has one implementation
    if config is not None and config._attn_implementation not in IMPLEMENTATIONS:
        return f"attention implementation {config._attn_implementation} is not fused"
    if head_dim > MAX_HEAD_DIM:
        return f"the head size is above {MAX_HEAD_DIM}"
    return why_not_linear((f"{name}.{part}", attention._modules[part]) for part in projections)


def why_not_linear(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Why these modules, which a fused forward calls, are no linear layers of single tokens, or "".

    That is `nn.Linear`, or peft's plain LoRA around one: what they give for a token depends on that token alone.
    """
    for name, module in modules:
        kind = type(module)
        if kind is nn.Linear:
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


def why_not_activation(activation: Any) -> str:
    """Why a feed-forward's activation cannot run fused, or ""."""
    return "" if type(activation) in ACTIVATIONS else f"activation {activation} is not fused"


def serves(x: Any, attention_mask: Any, norm_weight: Tensor) -> bool:
    """True if the fused forwards do what a call on these hidden states and this mask asks for."""
    if not isinstance(x, Tensor):
        return False
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        return False  # flash and flex attention have masks of their own
    if torch._C._get_tracing_state():
        return False  # a traced graph is made of torch's own operators
    recorded = collected()
    if "attentions" in recorded or "cross_attentions" in recorded:
        return False
    return norm_weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)  # under it norms are float32


def causal_without_mask(attention: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the stock attention would be causal: without a mask that is, and by its own word or that of the call."""
    if attention_mask is not None or attention.config._attn_implementation == "eager":
        return False
    given = kwargs.get("is_causal")
    return bool(getattr(attention, "is_causal", True) if given is None else given)


def attention(
    x: Tensor, projections: Sequence[Any], head_dim: int, *, source: Tensor | None = None,
    packing: PaddedPacking | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Attention of the tokens `x` to those of `source` (None: to themselves), heads side by side, not yet projected.

    Args:
        x: ``[B, L, width]``, or packed ``[T, width]``.
        projections: the linear layers of query, key and value.
        head_dim: size of a head.
        options: of `attend`, or with `packing` of `Packing.attend`.
    """
    source = x if source is None else source
    query, key, value = (
        projection(t).unflatten(-1, (-1, head_dim))
        for projection, t in zip(projections, (x, source, source), strict=True)
    )
    return (attend if packing is None else packing.attend)(query, key, value, **options).flatten(-2)


def feed_forward(
    x: Tensor, up: Any, activation: Any, down: Any, *, gated: bool = False, dropout_p: float = 0.0,
    out_dropout_p: float = 0.0, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.ffn` with modules: linear layers, of which adapters are called, and an activation.

    Args:
        up: a linear layer, or two, of a gate and of what it gates.
        gated: whether one linear layer `up` gives both.
    """
    ups = up if isinstance(up, tuple) else (up,)
    biases = [linear.bias for linear in ups if linear.bias is not None]
    if all(type(linear) is nn.Linear for linear in (*ups, down)) and len(biases) in (0, len(ups)):
        weight, bias = (ups[0].weight, ups[0].bias)
        if len(ups) == 2:
            weight, bias = torch.cat([linear.weight for linear in ups]), torch.cat(biases) if biases else None
        return kernels.ffn(
            x, weight, bias, down.weight, down.bias, activation=ACTIVATIONS[type(activation)],
            gated=gated or len(ups) == 2, dropout_p=dropout_p, out_dropout_p=out_dropout_p, residual=residual,
        )  # fmt: skip
    hidden = [linear(x) for linear in ups]
    gate, *rest = hidden[0].chunk(2, -1) if gated else hidden
    hidden = activation(gate) * rest[0] if rest else activation(gate)
    out = F.dropout(down(F.dropout(hidden, dropout_p)), out_dropout_p)
    return out if residual is None else residual + out


def all_fused(layers: Iterable[Any], kind: Any) -> bool:
    """True if each of the layers runs fused: a hook would find packed tokens, an unfused layer could not read them."""
    return all(
        isinstance(layer, kind) and not has_hooks(layer, CAPTURE) and not layer.why_not_fused(layer) for layer in layers
    )


def why_a_layer_is_not_fused(layers: Iterable[Any], kind: Any) -> str:
    """Why one of an encoder's layers, fused or not yet, cannot run fused, or ""."""
    for layer in layers:
        if not issubclass(kind, type(layer)) and not isinstance(layer, kind):
            return f"{type(layer).__name__} is not a layer that is fused"
        if reason := kind.why_not_fused(layer):
            return str(reason)
    return ""


class PaddingFree(nn.Module):
    """An encoder that leaves padding out; mixed into a subclass of the family's own. It is given ids or embeddings and
    a mask ``[B, L]``. Its fused layers take a `packing`, which the stock forward hands on to them: the first one packs.
    """

    padding: str = "auto"
    """"auto", "remove" or "keep"; `fuse` sets it."""
    layer_list: ClassVar[str]
    """Name of the list of layers."""
    fused_layer: ClassVar[type]
    by_distance: ClassVar[bool] = False
    """Whether layers go by the distance of two tokens: then no padding may lie between real tokens."""
    served: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask", "inputs_embeds"})
    """Arguments of the stock forward with which padding can be left out."""

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why an encoder cannot run fused, or "": it needs each of its layers fused."""
        return why_a_layer_is_not_fused(cls.layers_of(encoder), cls.fused_layer)

    @classmethod
    def layers_of(cls, encoder: Any) -> Iterable[Any]:
        """The layers of an encoder."""
        return encoder._modules[cls.layer_list]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's own encoder; hidden states at padded positions may come back as 0."""
        require_setting(self.padding)
        given = by_name(self, args, kwargs)
        found = (given.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds"))
        inputs = next((t for t in found if t is not None), None)
        plan = None
        if inputs is not None and not self._asks_for_more(given) and not torch._C._get_tracing_state():
            plan = self._plan(inputs, given.get("attention_mask"))
        if plan is None or not self._all_fused():
            return super().forward(**given)
        given["attention_mask"], options = plan
        out = super().forward(**given, **options)
        packing = options.get("packing")
        if packing is None:
            return out
        if isinstance(out, tuple):
            return (_unpacked(out[0], packing), *out[1:])
        out.last_hidden_state = _unpacked(out.last_hidden_state, packing)
        return out

    def _all_fused(self) -> bool:
        """True if all layers run fused, and nobody looks at what goes from one to the next."""
        return all_fused(self.layers_of(self), self.fused_layer)

    def _plan(self, inputs: Tensor, attention_mask: Any) -> tuple[Any, dict[str, Any]] | None:
        """The mask and further arguments of the stock forward if all layers run fused; None to call it as it is."""
        tokens = self._padding(inputs, attention_mask)
        return None if tokens is None else (None, {"packing": PaddedPacking(tokens)})

    def _padding(self, inputs: Tensor, attention_mask: Any) -> RealTokens | None:
        """The real tokens, if this call can and should leave the others out, else None. A GPU is waited for once."""
        if not isinstance(attention_mask, Tensor) or not may_remove(self.padding, inputs, attention_mask):
            return None
        found = self._real_tokens(inputs, attention_mask)
        if found is None:
            return None
        keep, *conditions = found
        if self.by_distance:
            conditions.append((keep[:, 0] + (keep[:, 1:] & ~keep[:, :-1]).sum(1) <= 1).all())
        layers = list(self.layers_of(self))
        weights = [p for p in layers[0].parameters() if p.dim() == 2] if layers else []
        if not weights:
            return None
        # ALBERT's layers run several times.
        num_layers = max(len(layers), getattr(getattr(self, "config", None), "num_hidden_layers", 0))
        return real_tokens(
            self.padding, keep, weights[0], products=sum(weight.numel() for weight in weights), num_layers=num_layers,
            conditions=conditions,
        )  # fmt: skip

    def _real_tokens(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...] | None:
        """Which tokens a mask calls real, bool ``[B, L]``, and conditions: bool tensors of one element that are True if
        it says nothing else. None if it certainly does."""
        return (attention_mask.bool(),) if attention_mask.shape == inputs.shape[:2] else None

    def _asks_for_more(self, given: dict[str, Any]) -> bool:
        """True if the call asks for hidden states or attentions, or for something unknown."""
        if asks_for_more(given, self.served):
            return True
        config: Any = getattr(self, "config", None)
        for name in ("output_hidden_states", "output_attentions"):
            asked = given.get(name)
            if getattr(config, name, False) if asked is None else asked:
                return True
        return False


class PaddingFreeStates(PaddingFree):
    """A `PaddingFree` encoder that is given hidden states ``[B, L, width]`` and the mask of its attention,
    ``[B, 1, L or 1, L]``."""

    layer_list = "layer"
    served = frozenset({"hidden_states", "attention_mask"})

    def _real_tokens(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...] | None:
        batch, length = inputs.shape[:2]
        if attention_mask.shape not in ((batch, 1, length, length), (batch, 1, 1, length)):
            return None
        mask, conditions = attention_mask[:, 0], []
        of_first_query = mask[:, 0]
        if mask.dtype == torch.bool:
            keep = of_first_query
        else:  # as eager attention adds it to the scores
            keep = of_first_query == 0
            conditions.append((keep | (of_first_query == torch.finfo(mask.dtype).min)).all())
        if mask.stride(1) != 0:
            conditions.append((mask == of_first_query[:, None]).all())
        return keep, *conditions

    def _asks_for_more(self, given: dict[str, Any]) -> bool:
        return super()._asks_for_more(given) or bool(collected())


def _unpacked(x: Tensor, packing: PaddedPacking) -> Tensor:
    return packing.unpack(x) if x.dim() == 2 else x  # a model whose layers were all dropped never packed
