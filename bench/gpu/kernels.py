"""Part 3: the kernels, forward and backward, against the best of PyTorch."""

from __future__ import annotations

import itertools

from ..cases import add_norm, attention, ffn
from ..cases.case import Case, Point
from ..timing import Device
from .listing import in_turns, only, through_compiler

DIRECTIONS = ("forward", "backward")
DTYPE = "bfloat16"
SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
OURS = ("fusenc", "fusenc-packed")

TOKENS, WIDTH = 16384, 2048
"""Of attention's batches, as in the charts of the FlashAttention-3 paper."""
HEADS = (64, 128)
"""Width of a head."""
LENGTHS = (512, 2048, 128, 8192)
KINDS = {"dense": (False, 1.0, 0.0), "ragged": (False, 0.5, 0.0), "causal": (True, 1.0, 0.0),
         "dropout": (False, 1.0, 0.1)}  # fmt: skip
"""Whether causal, how much of the batch is real (padded and packed), and the dropout; lengths and kinds are in order of
value."""
FLEX_LENGTH = 2048
NORMS = ((4096, 768), (16384, 1024))
ROWS = (4096, 512, 16384, 128)


def cases(device: Device, tiny: bool) -> list[Case]:
    """Attention, norms and products in turns."""
    attentions = [only(case, SDPA, OURS) for case, _ in _attentions(device, tiny)]
    return in_turns([attentions, *([only(case, ("eager",), OURS) for case in of] for of in _others(device, tiny))])


def compiled(device: Device, tiny: bool) -> list[Case]:
    """Some of the same beside torch.compile and FlexAttention."""
    flexible = [through_compiler(case, ("sdpa-cudnn",), "flex") for case, of in _attentions(device, tiny) if of]
    others = [[through_compiler(case, ("eager",), "compile") for case in of] for of in _others(device, tiny)]
    return in_turns([of[:1] if tiny else of for of in (*others, flexible)])  # tiny, a second one shows nothing more


def _others(device: Device, tiny: bool) -> tuple[list[Case], list[Case]]:
    """Norms, and products."""
    norms = [add_norm.case(_rows(*size, d, device, tiny), "layer") for size in NORMS for d in DIRECTIONS]
    return norms, [ffn.product(_rows(rows, 768, d, device, tiny)) for rows in ROWS for d in DIRECTIONS]


def _attentions(device: Device, tiny: bool) -> list[tuple[Case, bool]]:
    """All of attention in order of value, and whether FlexAttention is measured beside it."""
    tokens, width, shrink = (128, 64, 64) if tiny else (TOKENS, WIDTH, 1)
    ranked = sorted(
        itertools.product(LENGTHS[:2] if tiny else LENGTHS, KINDS, HEADS, DIRECTIONS),
        key=lambda of: LENGTHS.index(of[0]) + list(KINDS).index(of[1]),
    )
    found = []
    for length, kind, head, direction in ranked:
        causal, fill, dropout = KINDS[kind]
        long, heads = max(2, length // shrink), width // (head // min(shrink, 4))
        point = Point(DTYPE, tokens // long, long, width, heads, fill, direction, device.kind, device.where)
        found.append((attention.case(point, causal, dropout), length == FLEX_LENGTH and not dropout))
    return found


def _rows(rows: int, width: int, direction: str, device: Device, tiny: bool) -> Point:
    rows, width = (max(1, rows // 128), width // 32) if tiny else (rows, width)
    return Point(DTYPE, 1, rows, width, 1, 1.0, direction, device.kind, device.where)
