"""Where a family's layers keep what `kernels.encoder_layer` is given."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .. import kernels
from ..modules import has_hooks, why_not_plain

ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in (
        ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
        ("quick_gelu", "quick_gelu"), ("silu", "silu"), ("swish", "silu"), ("relu2", "relu2"),
    )
    if theirs in ACT2FN
}  # fmt: skip
"""The kernels' name of an activation module of transformers."""

_LINEARS = ("in_proj", "k_proj", "v_proj", "out_proj", "weight1", "up", "weight2")
_NORMS = ("norm1", "norm2")
_RATES = ("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p")
_OPTIONS = ("scale", "activation", "eps1", "eps2", *_RATES)
_NEIGHBOURS = (("in_proj", "k_proj", "v_proj"), ("weight1", "up"))


class Layout:
    """Where a family's layers keep what `kernels.encoder_layer` is given, as paths within a layer.

    A rate counts while the module that has it trains: ``"dropout.p"`` while that dropout does, ``"dropout"``, a number
    or a dropout module, while the module around it does.

    Args:
        attention: path of the module that attends.
        projections: names in it of the linear layers of query, key, value and output. Two names: of all three in one,
            and of output. Three: output lies elsewhere.
        scale: name in it of the factor of the scores; "": the usual one.
        attention_dropout: the same of the rate of softmax weights.
        norm: as in `kernels.encoder_layer`.
        norm_first: likewise.
        gated: likewise; follows from ``up``.
        paths: linear layers ``out_proj``, ``weight1`` (beside ``up`` the gate) and ``weight2``; norms ``norm1`` and
            ``norm2``; ``activation``, without which it is GELU; ``dropout1_p``, ``dropout_p`` and ``dropout2_p``.
    """

    def __init__(
        self, attention: str, projections: str, *, scale: str = "scaling", attention_dropout: str = "dropout",
        norm: str = "layer", norm_first: bool = False, gated: bool = False, **paths: str,
    ) -> None:  # fmt: skip
        names = projections.split()
        linears = ("in_proj", "out_proj") if len(names) == 2 else _LINEARS
        own = {**dict(zip(linears, names, strict=False)), "attn_dropout_p": attention_dropout, "scale": scale}
        paths |= {name: f"{attention}.{path}" for name, path in own.items() if path}
        eps = "eps" if norm == "layer" else "variance_epsilon"
        paths |= {f"eps{name[-1]}": f"{paths[name]}.{eps}" for name in _NORMS if name in paths}
        self.attention, self.paths = attention, paths
        self._fixed = {"norm_first": norm_first, "norm": norm, "gated": gated or "up" in paths}
        if "norm1" not in paths:
            self._fixed["no_norm1"] = True
        options = ((name, _names(paths[name])) for name in _OPTIONS if name in paths)
        self._options = [(name, names[:-1], names[-1], name in _RATES) for name, names in options]
        weights = (name for name in (*_LINEARS, *_NORMS) if name in paths)
        self._weights = [(name, _names(paths[name]), name in _NORMS, *_fields(name)) for name in weights]

    def options(self, layer: Any) -> dict[str, Any]:
        """The options of `kernels.encoder_layer` that follow from a layer."""
        found: dict[str, Any] = self._fixed.copy()
        for option, holders, name, is_rate in self._options:
            module = layer
            for holder in holders:  # as `_submodule`, of which the calls would cost as much as the rest
                module = module.__dict__["_modules"][holder]
            value = module.__dict__["_modules"].get(name)
            if value is None:
                value = getattr(module, name)
            if is_rate:
                value = (value.p if isinstance(value, nn.Module) else value) if module.training else 0.0
            elif option == "activation" and type(value) in ACTIVATIONS and not has_hooks(value):
                value = ACTIVATIONS[type(value)]  # else it is called itself, and its hooks
            found[option] = value
        return found

    def parameters(self, layer: Any) -> tuple[kernels.LayerWeights, dict[str, Any]]:
        """The parameters of a layer, and the modules that are called instead of multiplying by one."""
        found: list[Any] = [None] * len(kernels.LayerWeights._fields)
        modules = {}
        for name, names, is_norm, weight, bias in self._weights:
            module = _submodule(layer, names)
            kind, own = type(module), module.__dict__["_parameters"]
            if "weight" not in own or not (kind is nn.Linear or is_norm or kind is Conv1D):
                own = {"weight": module.weight, "bias": getattr(module, "bias", None)}  # which are no parameters
                if not is_norm:
                    modules[name] = module
            found[weight], found[bias] = own["weight"], own.get("bias")
            if not (kind is nn.Linear or is_norm) and _is_transposed(module):
                found[weight] = found[weight].t()
        return kernels.LayerWeights._make(found), modules

    def neighbours(self, layer: Any) -> Iterator[list[Any]]:
        """The parameters that one product does for, if they lie one behind the other in memory."""
        for group in _NEIGHBOURS:
            modules = [at(layer, self.paths[name]) for name in group if name in self.paths]
            if len(modules) == len(group) and all(type(module) is nn.Linear for module in modules):
                for name in ("weight", "bias"):
                    yield [module._parameters.get(name) for module in modules]

    def why_not(self, layer: Any, norm: type) -> str:
        """Why a linear layer, a norm or a dropout is not one that can be stood in for, or ""."""
        paths = {name: path.removesuffix(".p") for name, path in self.paths.items()}
        plain = [(paths[name], at(layer, paths[name]), norm) for name in _NORMS if name in paths]
        for path in (paths[name] for name in _RATES if name in paths):
            *holders, last = _names(path)
            modules = _submodule(layer, holders)._modules
            plain += [(path, modules[last], nn.Dropout)] if last in modules else []
        return why_not_linear((paths[name], at(layer, paths[name])) for name in _LINEARS if name in paths) or (
            why_not_plain(plain)
        )


def _fields(name: str) -> tuple[int, int]:
    """Where in `kernels.LayerWeights` the weight and the bias lie."""
    fields = kernels.LayerWeights._fields
    weight = name if name in fields else f"{name}_weight"
    return fields.index(weight), fields.index(weight.replace("weight", "bias"))


@functools.cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _submodule(module: Any, names: Iterable[str]) -> Any:
    for name in names:
        module = module.__dict__["_modules"][name]
    return module


def at(module: Any, path: str) -> Any:
    """The submodule of a path."""
    return _submodule(module, _names(path))


def why_not_linear(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Why these modules, which a fused forward stands in for or calls, are no linear layers of single tokens, or "".

    That is `nn.Linear`, transformers' `Conv1D`, or peft's plain LoRA around one: what they give for a token depends on
    that token alone.
    """
    for name, module in modules:
        kind = type(module)
        if kind is nn.Linear or kind is Conv1D:
            hooked = has_hooks(module)
        elif _is_lora(module):
            hooked = any(has_hooks(part) for part in module.modules())
        else:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}, not an nn.Linear"
        if hooked:
            return f"{name} has hooks or a forward of its own"
    return ""


def _is_transposed(module: Any) -> bool:
    """True for a linear layer that keeps its weight the other way round, and for an adapter around one."""
    return type(module) is Conv1D or (_is_lora(module) and type(module.base_layer) is Conv1D)


def _is_lora(module: Any) -> bool:
    """True for peft's LoRA around a linear layer, without one of the variants that replace its formula."""
    kind = type(module)
    return kind.__module__ == "peft.tuners.lora.layer" and kind.__qualname__ == "Linear" and not module.lora_variant
