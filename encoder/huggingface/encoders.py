"""Encoders whose layers run fused: they ask the layers once a call, and leave padding out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.common import checks
from ..modules import Watched, has_hooks
from ..packing import FlattenedPacking, PaddedPacking, UnflattenedPacking
from ..padding import RealTokens, may_remove, real_tokens, require_setting
from .calls import FLATTENED, Call, asks_for_more, by_name, flattened_starts, readable, require_known
from .masks import count_for, counted
from .stock import CAPTURE, collected


def why_a_layer_is_not_fused(layers: Iterable[Any], kind: Any) -> str:
    """Why one of an encoder's layers, fused or not yet, cannot run fused, or ""."""
    for layer in layers:
        if not issubclass(kind, type(layer)) and not isinstance(layer, kind):
            return f"{type(layer).__name__} is not a layer that is fused"
        if reason := kind.why_not_fused(layer):
            return str(reason)
    return ""


_watched: weakref.WeakKeyDictionary[Any, Watched] = weakref.WeakKeyDictionary()
"""The encoders whose layers were all found to run fused, as they were then."""


class PaddingFree(nn.Module):
    """An encoder that leaves padding out; mixed into a subclass of the family's own. It is given ids or embeddings and
    a mask ``[B, L]``. Its fused layers take a `call`, which the stock forward hands on to them: the first one packs.
    """

    padding: str = "auto"
    """"auto", "remove" or "keep"; `fuse` sets it."""
    layer_list: ClassVar[str]
    """Name of the list of layers."""
    fused_layer: ClassVar[type]
    by_distance: ClassVar[bool] = False
    """Whether layers go by the distance of two tokens: then no padding may lie between real tokens."""
    own_positions: ClassVar[bool] = False
    """Whether the stock forward counts positions from the first column on: then texts of a flattened batch each get a
    row, until the first layer."""
    served: ClassVar[frozenset[str]] = frozenset({"input_ids", "attention_mask", "inputs_embeds"})
    """Arguments of the stock forward with which padding can be left out."""

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why an encoder cannot run fused, or "": it needs each of its layers fused."""
        return why_a_layer_is_not_fused(cls.layers_of(encoder), cls.fused_layer)

    @classmethod
    def layers_of(cls, encoder: Any) -> Iterable[Any]:
        """The layers of an encoder."""
        return encoder._modules[cls.layer_list]  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's own encoder; hidden states at padded positions may come back as 0."""
        require_setting(self.padding)
        given = by_name(self, args, kwargs)
        found = (given.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds"))
        inputs = next((t for t in found if t is not None), None)
        flattened = self._flattened(given)
        plan = None
        if inputs is not None and not self._asks_for_more(given) and not torch._C._get_tracing_state():
            plan = self._plan(inputs, given, flattened)
        if plan is None or not self._all_fused():
            return super().forward(**given, **self._for_stock(given, flattened))
        given["attention_mask"], call = plan
        self._prepare(given, call, bool(flattened))
        out = super().forward(**given, call=call)
        if call.packing is None:
            return out
        if isinstance(out, tuple):
            return (_unpacked(out[0], call.packing), *out[1:])
        out.last_hidden_state = _unpacked(out.last_hidden_state, call.packing)
        return out

    def _for_stock(self, given: dict[str, Any], flattened: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a flattened batch that the stock forward is given beside the others.

        Raises:
            ValueError: its attention would mix the texts.
        """
        require_known(flattened, getattr(self, "config", None))
        return flattened

    def _flattened(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take out the arguments of a flattened batch."""
        return {name: given.pop(name) for name in FLATTENED if given.get(name) is not None}

    def _prepare(self, given: dict[str, Any], call: Call, is_flattened: bool) -> None:
        """Change the arguments of a call whose layers all run fused: with `own_positions` each text of a flattened
        batch gets a row."""
        if not (is_flattened and self.own_positions):
            return
        flat: Any = call.packing
        call.packing = packing = UnflattenedPacking.behind(flat.cu_seqlens, flat.max_length, flat.shape[1])
        for name in ("input_ids", "inputs_embeds"):
            if given.get(name) is not None:
                given[name] = packing.padded(given[name][0])

    def _all_fused(self) -> bool:
        """True if all layers run fused, and nobody looks at what goes from one to the next."""
        if torch.compiler.is_compiling():
            return self._ask_all()
        watched = _watched.get(self)
        if watched is None or not watched.unchanged():
            if not self._ask_all():
                return False
            _watched[self] = Watched(self)
            count_for(getattr(self, "config", None))
        return True

    def _ask_all(self) -> bool:
        kind: Any = self.fused_layer
        layers = list(self.layers_of(self))
        if not all(
            isinstance(layer, kind) and not has_hooks(layer, CAPTURE) and not layer.why_not_fused(layer)
            for layer in layers
        ):
            return False
        return len({t.dtype for layer in layers for t in layer.parameters()}) == 1

    def _plan(self, inputs: Tensor, given: dict[str, Any], flattened: dict[str, Any]) -> tuple[Any, Call] | None:
        """The mask for the layers and what they are told if all run fused; None to call the stock forward as it is."""
        attention_mask = given.get("attention_mask")
        if flattened:
            if attention_mask is not None and not self._all_real(inputs, attention_mask):
                checks.fail_value("attention_mask", f"None beside {next(iter(flattened))}", attention_mask)
            starts, _, longest, _ = flattened_starts(flattened, inputs, inputs)
            return None, self._call(FlattenedPacking(starts.int(), longest, inputs.shape[1]), inputs, given)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            return None
        tokens = self._padding(inputs, attention_mask, given)
        if tokens is not None and tokens.hidden:
            return None, self._call(PaddedPacking(tokens), inputs, given)
        if tokens is not None and attention_mask is not None and attention_mask.dim() == 2:  # more may be causal
            attention_mask = None
        return attention_mask, self._call(None, inputs, given)

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        """What the layers are told."""
        return Call(packing, bool(given.get("is_causal")))

    def _padding(self, inputs: Tensor, attention_mask: Any, given: dict[str, Any]) -> RealTokens | None:
        """The real tokens, if there are no others or this call can and should leave them out, else None. A GPU is
        waited for once, or if `masks` has counted them, not again."""
        if not isinstance(attention_mask, Tensor) or not may_remove(self.padding, inputs, attention_mask):
            return None
        found = self._real_tokens(inputs, attention_mask)
        if found is None:
            return None
        keep, *conditions = found
        known = None if self.by_distance else counted(attention_mask, bool(given.get("is_causal")))
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
            conditions=conditions, known=known, waits_anyway=True,  # transformers looks at each mask
        )  # fmt: skip

    def _all_real(self, inputs: Tensor, attention_mask: Any) -> bool:
        """True of a mask that is known, without a wait, to hide nothing."""
        if not isinstance(attention_mask, Tensor) or not readable(attention_mask):
            return False
        found = self._real_tokens(inputs, attention_mask)
        return found is not None and all(bool(each.all()) for each in found)

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
