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
from .calls import FLATTENED, Call, asks_for_more, by_name, flattened_starts, require_known
from .stock import CAPTURE, collected


def may_pack(t: Tensor) -> bool:
    """Whether padding can be left out of a call on a tensor like this one.

    On a GPU the number of tokens would have to be waited for; a compiled graph would keep this batch's.
    """
    # A tensor that stands for a GPU's where there is none (CONTRIBUTING.md) says yes to both.
    return t.is_cpu and not t.is_cuda and not torch.compiler.is_compiling()


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
    """An encoder that leaves padding out on the CPU; mixed into a subclass of the family's own. It is given ids or
    embeddings and a mask ``[B, L]``. Its fused layers take a `call`, which the stock forward hands on to them: the
    first one packs.
    """

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
        given = by_name(self, args, kwargs)
        found = (given.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds"))
        inputs = next((t for t in found if t is not None), None)
        flattened = self._flattened(given)
        plan = None
        if inputs is not None and not self._asks_for_more(given) and not torch._C._get_tracing_state():
            plan = self._plan(inputs, given, flattened)
        if plan is None or not self._all_fused():
            require_known(flattened, getattr(self, "config", None))
            return super().forward(**given, **flattened)
        given["attention_mask"], call = plan
        if flattened and self.own_positions:
            self._unflatten(given, call)
        out = super().forward(**given, call=call)
        if call.packing is None:
            return out
        if isinstance(out, tuple):
            return (_unpacked(out[0], call.packing), *out[1:])
        out.last_hidden_state = _unpacked(out.last_hidden_state, call.packing)
        return out

    def _flattened(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take out the arguments of a flattened batch."""
        return {name: given.pop(name) for name in FLATTENED if given.get(name) is not None}

    def _unflatten(self, given: dict[str, Any], call: Call) -> None:
        """Give each text of a flattened batch a row."""
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
        keep = self._padding(inputs, attention_mask, given)
        if keep is not None:
            return None, self._call(PaddedPacking(keep), inputs, given)
        return attention_mask, self._call(None, inputs, given)

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        """What the layers are told."""
        return Call(packing, bool(given.get("is_causal")))

    def _padding(self, inputs: Tensor, attention_mask: Any, given: dict[str, Any]) -> Tensor | None:
        """Which tokens are real, bool ``[B, L]``, if this call can and should leave the others out, else None."""
        if not isinstance(attention_mask, Tensor) or not may_pack(inputs):
            return None
        keep = self._real_tokens(inputs, attention_mask)
        if keep is None or keep.all():
            return None
        if self.by_distance:
            begins = keep[:, 0] + (keep[:, 1:] & ~keep[:, :-1]).sum(1)
            if (begins > 1).any():
                return None
        return keep

    def _all_real(self, inputs: Tensor, attention_mask: Any) -> bool:
        """True of a mask that is known, without a wait, to hide nothing."""
        if not isinstance(attention_mask, Tensor) or attention_mask.is_cuda or not attention_mask.is_cpu:
            return False
        keep = self._real_tokens(inputs, attention_mask)
        return keep is not None and bool(keep.all())

    def _real_tokens(self, inputs: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Which tokens a mask calls real, bool ``[B, L]``; None if it says anything else."""
        return attention_mask.bool() if attention_mask.shape == inputs.shape[:2] else None

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

    def _real_tokens(self, inputs: Tensor, attention_mask: Tensor) -> Tensor | None:
        batch, length = inputs.shape[:2]
        if attention_mask.shape not in ((batch, 1, length, length), (batch, 1, 1, length)):
            return None
        mask = attention_mask[:, 0]
        of_first_query = mask[:, 0]
        if mask.dtype == torch.bool:
            keep = of_first_query
        else:  # as eager attention adds it to the scores
            keep = of_first_query == 0
            if not (of_first_query == torch.where(keep, 0.0, torch.finfo(mask.dtype).min)).all():
                return None
        if mask.stride(1) != 0 and not (mask == of_first_query[:, None]).all():
            return None  # more than a padding mask
        return keep

    def _asks_for_more(self, given: dict[str, Any]) -> bool:
        return super()._asks_for_more(given) or bool(collected())


def _unpacked(x: Tensor, packing: PaddedPacking) -> Tensor:
    return packing.unpack(x) if x.dim() == 2 else x  # a model whose layers were all dropped never packed
