"""`fusenc verify`: kernels executed by the meaning of their Triton IR, on a machine without a GPU.

Each launch is checked for accesses outside its tensors, races between programs and undefined values; memory that was
never written reads as NaN. The execution is ttsem's; values are compared with eager PyTorch in float64.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusenc
import torch
from fusenc.kernels import (
    BlockMask,
    LayerWeights,
    add_norm,
    alibi_slopes,
    attention,
    attention_varlen,
    embed_norm,
    encoder_layer,
    ffn,
    linear_act,
    rotary,
    rotary_tables,
)
from fusenc.kernels.common import plan
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

CAPABILITY = 90
INSTALL = "python -m pip install --ignore-requires-python --no-deps ttsem==0.1.0"


class VerifyError(Exception):
    """What was asked for cannot be verified; the message says why."""


@dataclass
class Row:
    """One function with one option, forward and backward."""

    function: str
    option: str
    launches: int
    races_unchecked: int
    """Launches with too many accesses for the race check, whose address ranges alone could not rule a race out."""
    error: float
    """Largest error against float64, as a share of what is allowed: twice eager PyTorch's own error in that dtype (or
    one rounding, if that is more) for the output, three times for gradients."""
    fault: str = ""


def _options() -> Iterator[tuple[str, str, Callable[..., Tensor], list[tuple[int, ...]], torch.dtype]]:
    def keep(lengths: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda q: (torch.arange(70) < torch.tensor(lengths)[:, None])[:, None, None, :].to(q.device)

    heads: list[tuple[int, ...]] = [(2, 2, 50, 40), (2, 2, 70, 40), (2, 2, 70, 24)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield "attention", str(dtype).removeprefix("torch."), attention, heads, dtype
    masks: dict[str, Callable[[Tensor], dict[str, Any]]] = {
        "causal": lambda q: {"is_causal": True},
        "padding mask, one sequence empty": lambda q: {"attn_mask": keep([70, 0])(q)},
        "full bool mask": lambda q: {"attn_mask": torch.arange(50, device=q.device)[:, None] * 2 > torch.arange(70)},
        "float mask": lambda q: {"attn_mask": torch.linspace(-2, 2, 50 * 70, dtype=q.dtype).view(50, 70)},
        "dropout": lambda q: {"dropout_p": 0.2},
        "causal, padding mask and dropout": lambda q: {
            "is_causal": True, "attn_mask": keep([70, 33])(q), "dropout_p": 0.2,
        },
    }  # fmt: skip
    for name, arguments in masks.items():
        call = lambda q, k, v, a=arguments: attention(q, k, v, **a(q))  # noqa: E731
        yield "attention", name, call, heads, torch.float16
    swapped: list[tuple[int, ...]] = [(b, length, h, d) for b, h, length, d in heads]
    strided = lambda q, k, v: attention(*(t.transpose(1, 2) for t in (q, k, v)))  # noqa: E731
    yield "attention", "[B, L, H, D] views", strided, swapped, torch.float16

    few = [heads[0], *[(2, 1, 70, 40)] * 2]
    starts_q, starts_k = torch.tensor([0, 40, 40, 77]), torch.tensor([0, 30, 35, 90])
    tokens: list[tuple[int, ...]] = [(77, 2, 40), (90, 2, 40), (90, 2, 24)]
    blocks = BlockMask.sliding_window(70, 20, global_tokens=1, block_size=16)
    attend: Any = attention
    attend_packed: Any = attention_varlen
    calls: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
        "window, bottom right": (lambda *t: attend(*t, window=(9, 3), alignment="bottom_right"), heads),
        "heads share keys": (lambda *t: attend(*t, enable_gqa=True), few),
        "softcap and ALiBi": (lambda *t: attend(*t, softcap=3.0, alibi_slopes=alibi_slopes(2, t[0].device)), heads),
        "bias with gradient": (lambda *t: attend(*t[:3], t[3]), [*heads, (1, 2, 50, 70)]),
        "relative bias with gradient": (lambda *t: attend(*t[:3], relative_bias=t[3]), [*heads, (2, 33)]),
        "lengths": (lambda q, k, v: attend(q, k, v, seqlens_k=torch.tensor([70, 9], device=q.device)), heads),
        "block mask": (
            lambda q, k, v: attend(q, k, v, block_mask=blocks.to(q.device)), [(2, 2, 70, 40)] * 3
        ),
        "packed": (
            lambda q, *kv: attend_packed(q, *kv, starts_q.to(q.device), starts_k.to(q.device), 40, 55), tokens
        ),
    }  # fmt: skip
    for name, (call, shapes) in calls.items():
        yield "attention", name, call, shapes, torch.float16

    rows: list[tuple[int, ...]] = [(75, 100), (75, 100), (100,), (100,)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield "add_norm", str(dtype).removeprefix("torch."), add_norm, rows, dtype
    yield "add_norm", "dropout", lambda *t: add_norm(*t, dropout_p=0.2), rows, torch.float16
    yield "add_norm", "no residual", lambda x, w, b: add_norm(x, None, w, b), [rows[0], *rows[2:]], torch.float16
    yield "add_norm", "no weight or bias", lambda x, r: add_norm(x, r, None, None), rows[:2], torch.float16
    both = lambda *t: torch.cat(add_norm(*t, return_sum=True))  # noqa: E731
    yield "add_norm", "return_sum", both, rows, torch.float16
    norms: dict[str, dict[str, Any]] = {
        "rms": {"norm": "rms"}, "no eps": {"eps": 0.0}, "float32 sum": {"residual_in_fp32": True},
        "zero-centred weight": {"zero_centered_weight": True}, "recompute": {"recompute": True, "dropout_p": 0.2},
    }  # fmt: skip
    for name, given in norms.items():
        yield "add_norm", name, functools.partial(add_norm, **given), rows, torch.float16
    biased = lambda x, r, w, b, x_bias: add_norm(x, r, w, b, x_bias=x_bias, dropout_p=0.2)  # noqa: E731
    yield "add_norm", "x_bias, dropout", biased, [*rows, (100,)], torch.float16
    yield "add_norm", "width 20000", add_norm, [(3, 20000), (3, 20000), (20000,), (20000,)], torch.float16
    yield "add_norm", "width 2050", add_norm, [(9, 2050), (9, 2050), (2050,), (2050,)], torch.float16

    block: list[tuple[int, ...]] = [(75, 48), (100, 48), (100,), (40, 100), (40,)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield "ffn", str(dtype).removeprefix("torch."), ffn, block, dtype
    variants: dict[str, dict[str, Any]] = {
        "gelu_tanh": {"activation": "gelu_tanh"}, "relu": {"activation": "relu"}, "dropout": {"dropout_p": 0.2},
        "quick_gelu": {"activation": "quick_gelu"}, "relu2": {"activation": "relu2"},
        "silu, recompute": {"activation": "silu", "recompute": True},
    }  # fmt: skip
    for name, given in variants.items():
        yield "ffn", name, functools.partial(ffn, **given), block, torch.float16
    pairs: list[tuple[int, ...]] = [(75, 48), (200, 48), (200,), (40, 100), (40,), (75, 40)]
    for fused in (True, False):

        def added(*t: Tensor, fused: bool = fused) -> Tensor:
            rates = {"dropout_p": 0.2, "out_dropout_p": 0.2}
            return ffn(*t[:5], residual=t[5], gated=True, recompute="activation", fused=fused, **rates)  # type: ignore[arg-type]

        yield "ffn", f"gated, residual, dropouts, {'fused' if fused else 'unfused'}", added, pairs, torch.float16
    yield "linear_act", "dropout", lambda *t: linear_act(*t, dropout_p=0.2), block[:3], torch.float16
    yield "ffn", "no bias", lambda x, w1, w2: ffn(x, w1, None, w2, None), [block[0], block[1], block[3]], torch.float16

    ids, kinds = (torch.arange(3 * 25).view(3, 25) * step % n for step, n in ((7, 20), (3, 2)))
    ids[:, 15:] = 0  # as padding: a segment of several stretches
    tables: list[tuple[int, ...]] = [(20, 100), (30, 100), (2, 100), (100,), (100,)]
    embedding: dict[str, Callable[[Tensor], dict[str, Any]]] = {
        "two types": lambda w: {"token_type_ids": kinds.to(w.device)},
        "RMSNorm": lambda w: {"norm": "rms"},
        "dropout": lambda w: {"dropout_p": 0.2},
        "position ids": lambda w: {"position_ids": kinds.to(w.device), "padding_idx": 0},
    }
    for name, more in embedding.items():
        embed = lambda w, *t, a=more: embed_norm(ids.to(w.device), w, *t, eps=1e-5, **a(w))  # noqa: E731
        yield "embed_norm", name, embed, tables, torch.float16
    for interleaved in (False, True):
        turn = lambda q, k, i=interleaved: torch.cat(  # noqa: E731
            [t.flatten() for t in rotary(q, k, *rotary_tables(50, 24, device=q.device), interleaved=i) if t is not None]
        )
        name = "neighbours" if interleaved else "halves, shared keys"
        yield "rotary", name, turn, [(2, 4, 50, 40), (2, 1, 50, 40)], torch.float16

    layer: list[tuple[int, ...]] = [
        (2, 37, 48), (144, 48), (144,), (48, 48), *[(48,)] * 3, (100, 48), (100,), (48, 100), *[(48,)] * 3,
    ]  # fmt: skip
    rates: dict[str, Any] = dict.fromkeys(("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p"), 0.2)
    for name, given in {"post-norm": {}, "pre-norm, dropouts": {"norm_first": True, **rates}}.items():
        whole = lambda x, *w, g=given: encoder_layer(x, LayerWeights(*w), 3, **g)  # noqa: E731
        yield "encoder_layer", name, whole, layer, torch.float16


def functions() -> list[str]:
    """The names that can be verified."""
    return list(dict.fromkeys(function for function, *_ in _options()))


def _run(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)  # the same dropout on every side
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def _largest_error(got: list[Tensor], truth: list[Tensor], eager: list[Tensor], dtype: torch.dtype) -> float:
    worst = 0.0
    for i, (g, t, e) in enumerate(zip(got, truth, eager, strict=True)):
        if g.isnan().any():
            return float("nan")
        one_rounding = torch.finfo(dtype).eps * float(t.abs().max())
        allowed = (3 if i else 2) * max(float((e.double() - t).abs().max()), one_rounding)
        worst = max(worst, float((g.double() - t).abs().max()) / allowed)
    return worst


@contextlib.contextmanager
def _session() -> Iterator[Any]:
    """ttsem's session, after which the process no longer pretends to have a GPU: ttsem itself leaves the answers of
    ``torch.cuda`` and Triton's driver as they were inside it, and torch.compile then looks for a GPU."""
    from triton.runtime.driver import driver
    from ttsem.sanitize import session

    before = [(owner, vars(owner).copy()) for owner in (torch.cuda, driver)]
    plan.forget()
    try:
        with session(CAPABILITY, "fusenc verify") as state:
            yield state
    finally:
        plan.forget()
        for owner, attributes in before:
            vars(owner).update(attributes)


def verify(names: list[str], advance: Callable[[int, int], None] | None = None) -> list[Row]:
    """Run every option of the named functions (all if empty) through ttsem.

    Raises:
        VerifyError: ttsem is not installed, or an unknown function.
    """
    _need_ttsem()
    from ttsem.sanitize import KernelFault

    for name in names:
        if name not in functions():
            raise VerifyError(f"unknown function {name!r}, expected one of {', '.join(functions())}, or a script")
    chosen = [option for option in _options() if not names or option[0] in names]
    result = []
    for done, (function, option, call, shapes, dtype) in enumerate(chosen, 1):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        with fusenc.kernels.use_backend("eager"):
            eager, truth = _run(call, inputs), _run(call, [t.double() for t in inputs])
        row = Row(function, option, 0, 0, float("nan"))
        with _session() as state:
            try:
                row.error = _largest_error(_run(call, [t.cuda() for t in inputs]), truth, eager, dtype)
            except KernelFault as fault:
                row.fault = str(fault)
            row.launches, row.races_unchecked = state.launches, state.races_unchecked
        if not row.fault and not row.error <= 1.0:
            row.fault = f"values: the error is {row.error:.2f} times what is allowed"
        result.append(row)
        if advance:
            advance(done, len(chosen))
    return result


def _need_ttsem() -> None:
    if importlib.util.find_spec("ttsem") is None:
        raise VerifyError(f"needs ttsem; install it with: {INSTALL}")


def run(targets: list[str], markdown: Path | None) -> int:
    """Verify shipped functions and print a table, or run a script; the exit status is 1 if something is wrong.

    Raises:
        VerifyError: ttsem is not installed, an unknown function, or a missing script.
    """
    if targets and targets[0].endswith(".py"):
        return run_script(Path(targets[0]), targets[1:])
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("executing", total=None)
        rows = verify(targets, lambda done, total: progress.update(task, completed=done, total=total))
    table = Table("function", "option", "launches", "not race-checked", "error, of the allowed", "verdict")
    for row in rows:
        verdict = f"[red]{row.fault}[/red]" if row.fault else "ok"
        counts = str(row.launches), str(row.races_unchecked)
        table.add_row(row.function, row.option, *counts, f"{row.error:.2f}", verdict)
    console.print(table)
    found = (
        "faults were found" if any(r.fault for r in rows) else "no overrun, no race, no undefined or unwritten value"
    )
    console.print(f"{sum(r.launches for r in rows)} launches: {found}.")
    if markdown is not None:
        lines = ["| function | option | launches | not race-checked | error, of the allowed |", "|---|---|---|---|---|"]
        lines += [f"| {r.function} | {r.option} | {r.launches} | {r.races_unchecked} | {r.error:.2f} |" for r in rows]
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
        console.print(f"Written to {markdown}")
    return 1 if any(row.fault for row in rows) else 0


def run_script(script: Path, arguments: list[str]) -> int:
    """Run a user's own Triton program, written for ``device="cuda"``, with every launch checked.

    Raises:
        VerifyError: ttsem is not installed, or there is no such file.
    """
    _need_ttsem()
    if not script.is_file():
        raise VerifyError(f"no file at {script}")
    return subprocess.run([sys.executable, "-m", "ttsem.sanitize", str(script), *arguments], check=False).returncode
