"""transformers' own classes: which a fused class stands in for, and whether they are as fusenc knows them.

A fused forward repeats what several stock forwards compute. So it declares, for each of them, the arguments that it
takes and the names that its code uses, its modules and numbers above all. `why_changed` compares the installed
transformers with this: `fuse` finds a new or renamed argument, a new module, a new scale or a new clamp before anything
runs. The order of arguments does not count, since all are handed on by name. Arguments of caches, of decoders and of
what a call returns may be there or not: a call that gives one of them runs the stock forward.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import transformers
from transformers import PreTrainedModel

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, _active_collector
except ImportError as error:
    raise ImportError(f"transformers {transformers.__version__}: {error}") from error
if not isinstance(_CAN_RECORD_REGISTRY, dict) or not isinstance(_active_collector.get(), dict | None):
    raise ImportError(f"transformers {transformers.__version__}: output_capturing is not as fusenc knows it")

CAPTURE = "transformers.utils.output_capturing"
"""transformers leaves hooks of this module, which do nothing unless a call asks for hidden states or attentions."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPTIONAL_ARGUMENTS = _words(
    """
    past_key_values cache cache_position past_key_values_length cache_length use_cache key_value_states
    encoder_hidden_states encoder_attention_mask encoder_decoder_position_bias inputs_embeds input_embeds
    output_attentions output_hidden_states return_dict
    """
)
"""Arguments that a stock forward may take or not, unless it is declared with them."""

_COMMON_NAMES = _words(
    """
    torch nn functional Tensor shape size view reshape transpose permute contiguous expand expand_as unsqueeze unbind
    chunk gather clone num_attention_heads device dtype to long arange zeros training p config isinstance hasattr
    enumerate range int tuple set dict ValueError
    ALL_ATTENTION_FUNCTIONS get_interface eager_attention_forward _attn_implementation deterministic_flash_attn
    apply_chunking_to_forward chunk_size_feed_forward seq_len_dim feed_forward_chunk ff_chunk
    EncoderDecoderCache DynamicCache self_attention_cache cross_attention_cache layer_idx update is_updated get
    get_seq_length keys values layers is_decoder is_encoder_decoder is_cross_attention crossattention
    BaseModelOutput BaseModelOutputWithPastAndCrossAttentions
    """
)
"""Names that any stock forward may use: they shape and copy, or choose what the fused forwards do not stand in for."""


class Replaced(NamedTuple):
    """A stock class that `fuse` replaces."""

    name: str
    kind: Any
    """Of a layer its adapter, else the class with the fused forward."""
    relies_on: Mapping[str, str]
    """As for `Stock.fused`."""
    layer: str = ""
    """Of an encoder, the name of its layers' class, which stands before it in the `Family`."""
    attributes: Mapping[str, Any] = types.MappingProxyType({})
    """Of the class that takes its place."""


class Family(NamedTuple):
    """What `fuse` knows of a model type."""

    prefix: str
    """Of the names of its classes, which `replaced` leaves out."""
    replaced: Sequence[Replaced]
    plain: Sequence[str] = ()
    """Names of classes that stay as they are by nature, although transformers checkpoints them as it does layers."""


class Stock:
    """The classes and functions of one model type, by name; `prefix` is left out of the names.

    Raises:
        AttributeError: this transformers has none of that name; the message says so.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self._module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        self.prefix = prefix

    def __getitem__(self, name: str) -> Any:
        found: Any = self._module
        for part in (self.prefix + name).split("."):
            if not hasattr(found, part):
                raise AttributeError(f"transformers {transformers.__version__} has no {self.prefix}{name}")
            found = getattr(found, part)
        return found

    def fused(self, mixin: Any, name: str, relies_on: Mapping[str, str], **attributes: Any) -> Any:
        """A subclass of the class `name` whose forward is that of `mixin`, found by pickle in the mixin's module.

        It keeps the plain name, which goes into configurations that are saved and by which others know layers, and the
        arguments that `inspect` sees.

        Args:
            relies_on: for the name of each stock class (its forward is meant), method or function that the fused
                forward stands in for or calls: its arguments, a colon, and the names that its code uses. Without a
                colon the arguments are ``hidden_states attention_mask **kwargs``. After the name of a class come the
                paths in a layer where its modules are.
        """
        plain = self[name]
        signature = inspect.signature(plain.forward)
        positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        code = mixin.forward
        forward: Any = types.FunctionType(
            code.__code__, code.__globals__, code.__name__, code.__defaults__, code.__closure__
        )
        forward.__kwdefaults__, forward.__doc__, forward.__signature__ = code.__kwdefaults__, code.__doc__, signature
        members = {
            "__module__": mixin.__module__, "__qualname__": f"Fused{plain.__name__}", "__doc__": mixin.__doc__,
            "forward": forward, "stock": self, "stock_class": plain, "stock_arguments": tuple(positional[1:]),
            "relies_on": relies_on,
        }  # fmt: skip
        fused = type(plain.__name__, (mixin, plain), {**members, **attributes})
        setattr(sys.modules[mixin.__module__], fused.__qualname__, fused)
        if issubclass(plain, PreTrainedModel):  # what calls may ask for is registered when a model is built
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(fused), plain._can_record_outputs)
        return fused


def collected() -> Any:
    """The outputs (hidden states, attentions) that the running call of a model records, by name; empty if none."""
    return _active_collector.get() or {}


def why_changed(fused: Any) -> str:
    """The reason why the installed transformers differs from what a fused class, or its layers', needs, or ""."""
    for part, declared in getattr(fused, "relies_on", {}).items():
        name = part.split()[0]
        try:
            found = fused.stock[name]
        except AttributeError as error:
            return str(error)
        ending = ".forward" if isinstance(found, type) else ""
        if reason := _why_other(getattr(found, "forward", found), declared):
            return f"transformers {transformers.__version__}: {fused.stock.prefix}{name}{ending} {reason}"
    return why_changed(fused.fused_layer) if hasattr(fused, "fused_layer") else ""


_USUAL_ARGUMENTS = "hidden_states attention_mask **kwargs"


@functools.cache
def _why_other(function: Callable[..., Any], declared: str) -> str:
    """Why a function is not the one declared, or ""."""
    function = inspect.unwrap(function)
    arguments, names = map(_words, declared.split(":") if ":" in declared else (_USUAL_ARGUMENTS, declared))
    by_keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    takes = {
        p.name if p.kind in by_keyword else str(p).partition(":")[0]  # **kwargs, or what is not known
        for p in inspect.signature(function).parameters.values()
    }
    changes = _changes("takes", takes - (_OPTIONAL_ARGUMENTS - arguments) - {"self"}, arguments)
    changes = changes or _changes("uses", _names(function.__code__) - _COMMON_NAMES, names)
    return f"{' and '.join(changes)}, unlike the one that fusenc was written for" if changes else ""


def _changes(verb: str, found: frozenset[str] | set[str], known: frozenset[str]) -> list[str]:
    changes = ((verb, found - known), (f"{verb} no", known - found))
    return [f"{text} {', '.join(sorted(names))}" for text, names in changes if names]


def _names(code: types.CodeType) -> frozenset[str]:
    """The attributes and globals that code uses."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)
