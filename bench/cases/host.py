"""What a call costs before the work begins: tiny inputs on a CPU, and each public function up to a stubbed driver."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fusenc
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checking import LARGEST_DIFFERENCE_OF_A_MODEL
from ..timing import Device
from . import add_norm, decoder, embed_norm, ffn, layer, rotary
from .case import RECORDED, Case, Given, Inputs, Maker, Point, Provider, directed, function

STUBBED = "the driver is stubbed, so nothing is computed"
TINY = 0.5
"""Target: a tiny call on a CPU may cost twice the eager composition's."""
LAUNCHING = {
    "attention": (1.9, 1.3), "attention_varlen": (1.1, 1.0), "add_norm": (1.8, 1.3), "linear_act": (0.8, 0.8),
    "ffn": (0.9, 0.8), "embed_norm": (0.8, 1.0), "encoder_layer": (0.6, 0.75), "nn.TransformerEncoderLayer": (0.6, 0.6),
}  # fmt: skip
"""Targets: the cost of a call up to the stubbed driver over the yardstick's, without and with gradients."""
BERT = {"no gradients": 0.4, "with gradients": None, "with gradients, autocast": 0.5}
"""Those of Hugging Face's BERT, by what is run; None: none is set."""
BERT_LAYERS = 4
"""So that what an encoder asks once a call is spread over layers, as in use."""


def cases(given: Given, device: Device) -> list[Case]:
    """Tiny inputs, then stubbed launches; the sizes are fixed. All on a CPU: a GPU's clock hides what the host does."""
    if device.kind != "cpu":
        return []
    directions = given.get("direction", ("forward", "both"))
    found = _tiny(directions, device)
    if importlib.util.find_spec("triton") is not None:
        found += [
            launching(name, d, device)
            for name, of in FUNCTIONS.items()
            for d in directions
            if d == "forward" or (d == "both" and of.gradients)
        ]
        found += [launching_layer(d, device) for d in directions if d in ("forward", "both")]
    if importlib.util.find_spec("triton") is not None and importlib.util.find_spec("transformers") is not None:
        found += [
            launching_bert(how, device)
            for how in BERT
            if ("forward" if how == "no gradients" else "both") in directions
        ]
    return found


def _tiny(directions: tuple[str, ...], device: Device) -> list[Case]:
    def point(batch: int, length: int, heads: int, direction: str) -> Point:
        return Point("float32", batch, length, 64, heads, 1.0, direction, device.kind, device.where)

    def tiny(op: str, case: Case) -> Case:
        return dataclasses.replace(case, op="host", name=f"{op} {case.name}", targets={"fusenc": TINY})

    found = []
    for direction in directions:
        rows = [direction, RECORDED] if direction == "both" else [direction]
        found += [tiny("add_norm", add_norm.case(point(1, 8, 1, d), "layer")) for d in rows]
        found.append(tiny("embed_norm", embed_norm.case(point(1, 8, 1, direction), vocabulary=100)))
        found.append(tiny("rotary", rotary.case(point(1, 8, 1, direction))))
        found += [tiny("ffn", ffn.case(point(1, 8, 1, direction), v, hidden=128)) for v in ffn.VARIANTS]
        for dropout in (0.0, 0.1) if direction == "both" else (0.0,):
            for d in rows:
                made = layer.case(point(1, 8, 4, d), hidden=128, dropout=dropout)
                found.append(tiny("layer", made))
        found += [tiny("decoder", decoder.case(m, point(1, 8, 4, direction))) for m in decoder.MODULES]
    return found


_LENGTH, _WIDTH, _HIDDEN, _HEADS, _IDS = 8, 64, 128, 4, 100
_ROW, _HEAD = (1, _LENGTH, _WIDTH), (1, _LENGTH, _HEADS, _WIDTH // _HEADS)
_NORM, _SQUARE = ((_WIDTH,), (_WIDTH,)), ((_WIDTH, _WIDTH), (_WIDTH,))
_BLOCK = ((_HIDDEN, _WIDTH), (_HIDDEN,), (_WIDTH, _HIDDEN), (_WIDTH,))


@dataclass(frozen=True)
class Function:
    """A public function, and what in PyTorch's own does the same."""

    ours: Callable[..., Any]
    eager: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    """Of the floating arguments."""
    others: Callable[[], list[Tensor]] = list
    out: tuple[tuple[int, ...], ...] = (_ROW,)
    heads: bool = False
    """Whether the arguments are `[B, L, H, D]`, to be seen as `[B, H, L, D]`."""
    gradients: bool = True


def _starts() -> list[Tensor]:
    return [torch.tensor([0, _LENGTH], dtype=torch.int32)]


def _ids() -> list[Tensor]:
    ids = torch.arange(_LENGTH)[None]
    return [ids, ids % 2, ids]


def _tables() -> list[Tensor]:
    half = fusenc.kernels.rotary_tables(_LENGTH, _WIDTH // _HEADS)
    return [*half, *(torch.cat((t, t), -1) for t in half)]


def _ours(name: str) -> Any:
    return getattr(fusenc.kernels, name)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def _packed(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    return _sdpa(*(t.transpose(0, 1)[None] for t in (query, key, value)))[0].transpose(0, 1)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _weights(query, key) @ value


def _ours_embed(*arguments: Tensor) -> Tensor:
    *tables, ids, types, _ = arguments
    return _ours("embed_norm")(ids, *tables, token_type_ids=types)


def _ours_layer(src: Tensor, *weights: Tensor) -> Tensor:
    return _ours("encoder_layer")(src, fusenc.kernels.LayerWeights(*weights), _HEADS)


def _layer(src: Tensor, *weights: Tensor) -> Tensor:
    (in_weight, in_bias, out_weight, out_bias, norm1, norm1_bias, *block, norm2, norm2_bias) = weights
    projected = F.linear(src, in_weight, in_bias).chunk(3, -1)
    x = F.layer_norm(src + F.linear(_heads(*projected), out_weight, out_bias), (_WIDTH,), norm1, norm1_bias)
    return F.layer_norm(x + _ffn(x, *block), (_WIDTH,), norm2, norm2_bias)


def _heads(*projected: Tensor) -> Tensor:
    heads = (t.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for t in projected)
    return _sdpa(*heads).transpose(1, 2).flatten(-2)


def _ours_decoder(src: Tensor, memory: Tensor, *weights: Tensor) -> Tensor:
    of: Any = fusenc.kernels.LayerWeights
    first, second, rest = weights[:6], weights[6:12], weights[12:]
    return _ours("decoder_layer")(src, of(*first, *rest), _HEADS, memory, of(*second, *rest))


def _decoder(src: Tensor, memory: Tensor, *weights: Tensor) -> Tensor:
    x = src
    for in_weight, in_bias, out_weight, out_bias, norm, norm_bias in (weights[:6], weights[6:12]):
        projected: Any
        if x is src:
            projected = F.linear(x, in_weight, in_bias).chunk(3, -1)
        else:
            (q, kv), (q_bias, kv_bias) = (t.split((_WIDTH, 2 * _WIDTH)) for t in (in_weight, in_bias))
            projected = F.linear(x, q, q_bias), *F.linear(memory, kv, kv_bias).chunk(2, -1)
        x = F.layer_norm(x + F.linear(_heads(*projected), out_weight, out_bias), (_WIDTH,), norm, norm_bias)
    (*block, norm3, norm3_bias) = weights[12:]
    return F.layer_norm(x + _ffn(x, *block), (_WIDTH,), norm3, norm3_bias)


def _ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


FUNCTIONS = {
    "attention": Function(
        lambda *qkv: _ours("attention")(*qkv), _sdpa, (_HEAD,) * 3, out=(_HEAD,), heads=True
    ),
    "attention_varlen": Function(
        lambda q, k, v, starts: _ours("attention_varlen")(q, k, v, starts, starts, _LENGTH, _LENGTH), _packed,
        (_HEAD[1:],) * 3, _starts, (_HEAD[1:],),
    ),
    "attention_weights": Function(
        lambda q, k: _ours("attention_weights")(q, k), _weights, (_HEAD,) * 2, heads=True, gradients=False
    ),
    "attention_with_weights": Function(
        lambda *qkv: _ours("attention_with_weights")(*qkv)[0], _attention, (_HEAD,) * 3, out=(_HEAD,), heads=True
    ),
    "add_norm": Function(
        lambda *tensors: _ours("add_norm")(*tensors), add_norm.layer_norm, (_ROW, _ROW, *_NORM)
    ),
    "embed_norm": Function(
        _ours_embed, embed_norm.plain, ((_IDS, _WIDTH), (_LENGTH, _WIDTH), (2, _WIDTH), *_NORM), _ids
    ),
    "rotary": Function(
        lambda q, k, *tables: _ours("rotary")(q, k, *tables[:2]), rotary.plain, (_HEAD,) * 2, _tables, (_HEAD,) * 2,
        heads=True,
    ),
    "linear_act": Function(
        lambda *tensors: _ours("linear_act")(*tensors, "gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)),
        (_ROW, *_BLOCK[:2]), out=((1, _LENGTH, _HIDDEN),),
    ),
    "ffn": Function(lambda *tensors: _ours("ffn")(*tensors), _ffn, (_ROW, *_BLOCK)),
    "encoder_layer": Function(
        _ours_layer, _layer,
        (_ROW, (3 * _WIDTH, _WIDTH), (3 * _WIDTH,), *_SQUARE, *_NORM, *_BLOCK, *_NORM),
    ),
    "decoder_layer": Function(
        _ours_decoder, _decoder,
        (_ROW, _ROW, *((3 * _WIDTH, _WIDTH), (3 * _WIDTH,), *_SQUARE, *_NORM) * 2, *_BLOCK, *_NORM),
    ),
}  # fmt: skip


def launching(name: str, direction: str, device: Device) -> Case:
    """One public function beside what PyTorch's own takes: on a GPU, or on a CPU with the driver stubbed.

    On a CPU the two leave out different things: the first what a driver and a GPU do, the second nothing, since
    PyTorch's functions compute 8 rows. The ratio is what CI holds, as it depends little on the machine.
    """
    from ..stub_driver import stubbed_driver

    of, real = FUNCTIONS[name], device.where != "cpu"

    def inputs() -> Inputs:
        torch.manual_seed(0)
        leaves, upstream = (
            [torch.randn(shape, device=device.where) for shape in shapes] for shapes in (of.shapes, of.out)
        )
        if of.heads:
            leaves, upstream = ([t.transpose(1, 2) for t in part] for part in (leaves, upstream))
        return Inputs(leaves, [t.to(device.where) for t in of.others()], upstream)

    providers: dict[str, Provider] = {"eager": function(of.eager, direction), "fusenc": function(of.ours, direction)}
    gradients = "with gradients" if direction == "both" else "no gradients"
    return Case(
        "host", f"launching {name}, {gradients}", "float32", direction, inputs, providers, ("eager",),
        {} if real else _target(name, direction), providers["eager"] if real else None, "" if real else STUBBED,
        tolerance=LARGEST_DIFFERENCE_OF_A_MODEL, tokens=_LENGTH,
        within=contextlib.nullcontext if real else stubbed_driver,
    )  # fmt: skip


def launching_layer(direction: str, device: Device) -> Case:
    """The encoder layer up to the stubbed driver beside torch's own, on its fast path where it has one."""
    from ..stub_driver import stubbed_driver

    of = layer.case(Point("float32", 1, _LENGTH, _WIDTH, _HEADS, 1.0, direction, device.kind, device.where), _HIDDEN)
    stock = "fast-path" if direction == "forward" else "torch.nn"
    name = "nn.TransformerEncoderLayer"
    return dataclasses.replace(
        of, op="host", name=f"launching {name}, {'with gradients' if direction == 'both' else 'no gradients'}",
        providers={which: of.providers[which] for which in (stock, "fusenc")}, against=(stock,),
        targets=_target(name, direction), reference=None, unchecked=STUBBED, within=stubbed_driver,
    )  # fmt: skip


def launching_bert(how: str, device: Device) -> Case:
    """The layers of a fused BERT inside their encoder, up to the stubbed driver, beside the unfused ones on SDPA.

    Args:
        how: a key of `BERT`.
        device: a CPU.
    """
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    from ..stub_driver import stubbed_driver

    direction, dtype = ("forward" if how == "no gradients" else "both"), "float32"

    def encoder(fused: bool) -> Maker:
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=_WIDTH, num_attention_heads=_HEADS, intermediate_size=_HIDDEN, num_hidden_layers=BERT_LAYERS,
            attn_implementation="sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        of = BertEncoder(config).train(direction == "both")
        if fused:
            fusenc.fuse(of, strict=True)

        def call(x: Tensor) -> Tensor:
            return of(x).last_hidden_state  # type: ignore[no-any-return]

        run = torch.autocast("cpu", torch.bfloat16)(call) if how.endswith("autocast") else call
        return lambda inputs: directed(run, inputs, direction, list(of.parameters()))

    def inputs() -> Inputs:
        torch.manual_seed(0)
        return Inputs([torch.randn(_ROW)], [], [torch.randn(_ROW)])

    target = BERT[how]
    return Case(
        "host", f"launching {BERT_LAYERS} layers of BERT, {how}", dtype, direction, inputs,
        {"hf-sdpa": lambda: encoder(False), "fusenc": lambda: encoder(True)}, ("hf-sdpa",),
        {} if target is None else {"fusenc": 1.0 / target}, None, STUBBED, tokens=_LENGTH, within=stubbed_driver,
    )  # fmt: skip


def _target(name: str, direction: str) -> dict[str, float]:
    return {"fusenc": 1.0 / LAUNCHING[name][direction == "both"]} if name in LAUNCHING else {}
