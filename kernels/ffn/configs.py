"""Launch configurations of the feed-forward kernels, and which products take their epilogue in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common import launch, tuned


class Config(NamedTuple):
    """Block sizes and launch options of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    halvings: int = 0
    """The epilogue works on the block's columns in 2**halvings parts, which take fewer registers at once."""


Key = tuple[int, bool, bool]
Configs = dict[Key, Config]


class Table:
    """Configurations by element size, gating and dropout, and by architecture where one has its own."""

    def __init__(self, general: Configs, **of_architecture: Configs) -> None:
        self._general = general
        self._of_architecture = of_architecture

    def choose(self, x: Tensor, gated: bool, dropout: bool) -> Config:
        """The configuration for a call."""
        own = self._of_architecture.get(FAMILIES.get(launch.architecture(x.device.index), ""), {})
        key = x.element_size(), gated, dropout
        return own.get(key) or self._general[key]


GROUP_M = 8
FAMILIES = {
    "sm_80": "ampere",
    "sm_86": "ada", "sm_89": "ada", "sm_120": "ada",
    "sm_90": "hopper", "sm_100": "hopper",
    "gfx90a": "cdna", "gfx942": "cdna",
}  # fmt: skip
_HALF, _FLOAT = Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 2)
FORWARD = Table({(s, g, d): _HALF if s == 2 else _FLOAT for s in (2, 4) for g in (False, True) for d in (False, True)})
BACKWARD = FORWARD


def pointwise_block(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a pointwise kernel's block, and its warps."""
    block_n = min(256, max(16, launch.power_of_2(columns)))
    return 2048 // block_n, block_n, 4


def use_fused(fused: bool | None, operation: str, x: Tensor, columns: int, inner: int) -> bool:
    """Whether a product takes its epilogue in."""
    if fused is not None:
        return fused
    sizes = launch.power_of_2(x.shape[0]), columns, inner
    choice = tuned.choice(operation, x.device.index, x.dtype, sizes)
    return choice != "unfused"
