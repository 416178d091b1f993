"""Every kernel that the library launches, in every configuration it ships."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fusenc.kernels import (
    BlockMask,
    LayerWeights,
    add_norm,
    attention,
    attention_varlen,
    embed_norm,
    encoder_layer,
    ffn,
    linear_act,
    rotary,
    rotary_tables,
)
from torch import Tensor

from .compiling import Launch, record_launches

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Unit:
    """A kernel as one case launches it."""

    case: str
    launch: Launch

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.launch.name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inference(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: call(*(t.detach() for t in inputs))


def _calls(arch: str) -> Iterator[tuple[str, Callable[..., Tensor], list[tuple[int, ...]], torch.dtype]]:
    """Case, call, shapes of the inputs and dtype; forward and backward of each call are recorded."""
    half_heads = [(HALF, d) for d in (16, 32, 64, 128, 256)]
    for dtype, head in [*half_heads, (BRAIN, 64), *((FLOAT, d) for d in (16, 32, 64, 128, 256))]:
        yield f"{_name(dtype)} head {head}", attention, [(2, 4, 512, head)] * 3, dtype

    def mask(*shape: int, dtype: torch.dtype = HALF, gradient: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)

    blocks = BlockMask.sliding_window(512, 128)
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "padding mask": {"attn_mask": mask(2, 1, 1, 512, dtype=torch.bool)},
        "bias": {"attn_mask": mask(1, 4, 512, 512, gradient=True)},
        "dropout": {"dropout_p": 0.1},
        "relative bias, softcap": {"relative_bias": mask(4, 257, gradient=True), "softcap": 30.0},
        "block mask": {"block_mask": blocks.to("meta")},
    }
    for option, arguments in options.items():
        call = functools.partial(attention, **arguments)
        yield f"float16 head 64 {option}", call, [(2, 4, 512, 64)] * 3, HALF
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    packed: Any = functools.partial(
        attention_varlen,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=512,
        max_seqlen_k=512,
        window=(128, 128),
    )
    yield "float16 head 64 packed, window, 4 heads share a key head", packed, [(800, 8, 64), *[(800, 2, 64)] * 2], HALF
    yield "float16 head 80", attention, [(2, 4, 512, 80)] * 3, HALF
    for head in (16, 64, 128, 256):  # a query without a gradient: delta has a kernel of its own then
        yield f"float16 head {head}, frozen query", _frozen_query, [(2, 4, 512, head)] * 3, HALF

    def rows(width: int) -> list[tuple[int, ...]]:
        return [(4096, width), (4096, width), (width,), (width,)]

    for width in (64, 384, 768, 1024, 4096, 8192, 16384, 32768, 65536):
        yield f"float16 width {width}", add_norm, rows(width), HALF
    for width in (64, 768, 8192, 16384, 65536):
        yield f"float32 width {width}", add_norm, rows(width), FLOAT
    for width in (768, 8192):
        yield f"bfloat16 width {width}", add_norm, rows(width), BRAIN
    yield "float16 width 1000", add_norm, rows(1000), HALF
    yield "float16 width 1024 rms", functools.partial(add_norm, norm="rms"), rows(1024), HALF
    yield "float16 width 1024 dropout", functools.partial(add_norm, dropout_p=0.1), rows(1024), HALF
    for width in (1024, 8192):
        everything = functools.partial(_biased_add_norm, dropout_p=0.1, recompute=True)
        yield f"float16 width {width} x_bias, dropout, recompute", everything, [*rows(width), (width,)], HALF
    stream = functools.partial(_streamed_add_norm, norm="rms", zero_centered_weight=True)
    yield "float16 width 1024 rms, float32 residual", stream, rows(1024)[:3], HALF

    block: list[tuple[int, ...]] = [(4096, 768), (3072, 768), (3072,), (768, 3072), (768,)]
    for dtype in (HALF, BRAIN, FLOAT):
        yield f"{_name(dtype)} gelu", functools.partial(ffn, fused=True), block, dtype
        with_inference = functools.partial(linear_act, fused=True)
        yield f"{_name(dtype)} gelu, inference", _inference(with_inference), block[:3], dtype
    variants: dict[str, dict[str, Any]] = {
        "gelu_tanh": {"activation": "gelu_tanh"}, "relu": {"activation": "relu"}, "silu": {"activation": "silu"},
        "quick_gelu": {"activation": "quick_gelu"}, "relu2": {"activation": "relu2"},
        "gelu recompute": {"recompute": True}, "gelu dropout": {"dropout_p": 0.1},
        "gelu dropout recompute": {"dropout_p": 0.1, "recompute": "activation"},
    }  # fmt: skip
    pairs: list[tuple[int, ...]] = [(4096, 768), (6144, 768), (6144,), *block[3:]]
    residual: list[tuple[int, ...]] = [*block, (4096, 768)]
    for fused in (True, False):
        way = "" if fused else " unfused"
        for option, arguments in variants.items():
            if not fused and "recompute" not in option:  # the pointwise kernels differ by the activation alone
                continue
            yield f"float16 {option}{way}", functools.partial(ffn, fused=fused, **arguments), block, HALF
        for dtype in (HALF, FLOAT):
            gated = functools.partial(ffn, fused=fused, gated=True, activation="silu")
            yield f"{_name(dtype)} gated{way}", gated, pairs, dtype
            dropped = functools.partial(gated, dropout_p=0.1, recompute="activation")
            yield f"{_name(dtype)} gated dropout recompute{way}", dropped, pairs, dtype

            def added(*t: Tensor, fused: bool = fused) -> Tensor:
                return ffn(*t[:5], dropout_p=0.1, out_dropout_p=0.1, residual=t[5], fused=fused)

            yield f"{_name(dtype)} residual, both dropouts{way}", added, residual, dtype
    yield "float16 linear_act", linear_act, block[:3], HALF

    ids = torch.empty(32, 128, dtype=torch.int64, device="meta")
    for dtype, width in [*((HALF, w) for w in (64, 384, 768, 1024, 4096, 16384)), (FLOAT, 768), (FLOAT, 4096)]:
        embedded: list[tuple[int, ...]] = [(30522, width), (512, width), (2, width), (width,), (width,)]
        embed: Any = functools.partial(embed_norm, ids, token_type_ids=ids)
        yield f"{_name(dtype)} embed width {width}", embed, embedded, dtype
    embedded = [(30522, 768), (512, 768), (2, 768), (768,), (768,)]
    choices: dict[str, dict[str, Any]] = {
        "dropout": {"dropout_p": 0.1}, "position ids, no type ids": {"position_ids": ids},
        "RMSNorm": {"norm": "rms"},
    }  # fmt: skip
    for option, arguments in choices.items():
        yield f"float16 embed width 768 {option}", functools.partial(embed_norm, ids, **arguments), embedded, HALF

    def rotated(interleaved: bool, rotary_dim: int) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor) -> Tensor:
            cos, sin = rotary_tables(512, rotary_dim, device="meta")
            out = rotary(query, key, cos, sin, interleaved=interleaved)
            return torch.stack([t for t in out if t is not None])

        return call

    for dtype, head, rotary_dim, interleaved in (
        (HALF, 64, 64, False), (HALF, 64, 64, True), (HALF, 128, 128, False), (HALF, 64, 32, False),
        (FLOAT, 64, 64, False),
    ):  # fmt: skip
        name = f"{_name(dtype)} rotary head {head}, {rotary_dim} rotated{', neighbours' if interleaved else ''}"
        yield name, rotated(interleaved, rotary_dim), [(2, 12, 512, head)] * 2, dtype

    layer: list[tuple[int, ...]] = [
        (32, 128, 768), (2304, 768), (2304,), (768, 768), *[(768,)] * 3, (3072, 768), (3072,), (768, 3072),
        *[(768,)] * 3,
    ]  # fmt: skip
    rates: dict[str, Any] = dict.fromkeys(("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p"), 0.1)
    kinds: dict[str, dict[str, Any]] = {"post-norm": {}, "pre-norm": {"norm_first": True}, "post-norm dropout": rates}
    for option, arguments in kinds.items():  # with sums on the side that the functions alone do not have
        yield f"float16 layer {option}", functools.partial(_layer, **arguments), layer, HALF

    from fusenc.kernels.ffn import whole

    for (chip, width), config in whole.CONFIGS.items():
        if chip == arch:  # no other launches it
            narrow: list[tuple[int, ...]] = [(16384, width), (4 * width, width), (4 * width,), (width, 4 * width),
                                             (width,), (16384, width)]  # fmt: skip

            def at_once(*t: Any, config: Any = config) -> Tensor:
                made: Any = whole.whole_ffn
                return made(*t, "gelu", config)(*t)

            yield f"float16 width {width} whole block", at_once, narrow, HALF


def _layer(src: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    return encoder_layer(src, LayerWeights(*weights), 12, **options)


def _frozen_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query.detach(), key, value)


def _biased_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, **options: Any) -> Any:
    return add_norm(x, residual, weight, bias, x_bias=x_bias, **options)


def _streamed_add_norm(x: Tensor, residual: Tensor, weight: Tensor, **options: Any) -> Any:
    """Beside a float32 residual stream, which here leaves as it came, so that its gradient is one more input."""
    out, total = add_norm(x, residual.float(), weight, return_sum=True, **options)
    return torch.cat([out, total.to(out.dtype)])


@functools.cache
def units(arch: str) -> tuple[Unit, ...]:
    """All units of a chip, each distinct launch once, under the first case that makes it."""
    found: dict[str, Unit] = {}
    for case, call, shapes, dtype in _calls(arch):
        # Half the inputs of a real call are views of one projection; here each has memory of its own, aligned.
        inputs = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
        with record_launches(arch) as launches:
            out = call(*inputs)
            if out.requires_grad:
                out.backward(torch.empty_like(out))
        seen: dict[str, int] = {}
        for launch in launches:
            seen[launch.name] = seen.get(launch.name, 0) + 1
            again = f" #{seen[launch.name]}" if seen[launch.name] > 1 else ""
            found.setdefault(launch.identity, Unit(case + again, launch))
    return tuple(found.values())


def kernels() -> list[str]:
    """The names of all shipped kernels, in order of appearance."""
    return list(dict.fromkeys(unit.kernel for arch in ("", "sm_90") for unit in units(arch)))


def chosen(names: list[str], arch: str) -> list[Unit]:
    """The units of the named kernels, all if `names` is empty, as a chip launches them.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for name in names:
        if name not in kernels():
            raise ValueError(f"unknown kernel {name!r}, expected one of {', '.join(kernels())}")
    return [unit for unit in units(arch) if not names or unit.kernel in names]
