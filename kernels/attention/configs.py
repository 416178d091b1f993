"""Launch configurations of the attention kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common import device as gpu
from ..common.configs import ConfigTable
from .blocks import Switches


class Config(NamedTuple):
    """Block sizes and launch options of one attention kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Configs = dict[tuple[int, int], Config]


class Table(ConfigTable[tuple[int, int], Config]):
    """Configurations by element size and padded head size.

    Those of an architecture use its registers to the last; with one of the options in `crowded`, which need some
    themselves, the general ones serve. What `fusenc tune` measured serves calls without any such option.
    """

    def __init__(self, operation: str, general: Configs, crowded: tuple[str, ...] = (), **of_family: Configs) -> None:
        super().__init__(operation, general, of_family)
        self._crowded = crowded

    def choose(self, query: Tensor, switches: Switches, length: int) -> Config:
        """The configuration for a call; `length` is that of the longest sequence of queries."""
        own = not any(getattr(switches, name) not in (False, 0, "none") for name in self._crowded)
        # Masks and added terms are loaded to shared memory, which the configuration measured without may fill.
        plain = own and switches.MASK == "none" and not (switches.ADDED or switches.DROPOUT or switches.SPARSE)
        sizes = (gpu.power_of_2(length), head_size(switches)) if plain else None
        config = self.look_up((max(2, query.element_size()), head_size(switches)), query, own, sizes)
        if switches.SPARSE:  # no block may reach over the edge of a block mask's
            config = config._replace(
                block_m=min(config.block_m, switches.SPARSE), block_n=min(config.block_n, switches.SPARSE)
            )
        return config


def head_size(switches: Switches) -> int:
    """The padded head size that counts: the larger of the query's and the value's."""
    return max(switches.BLOCK_D, switches.BLOCK_DV)


# Evidence: `fusenc inspect` (the bounds without overlap are in docs/results.md; bench/machine_code/budget.csv holds the
# tables to them). The general configurations fit the shared memory of the smallest chips (64 KiB on gfx942) and keep
# everything in registers there. Of two configurations with equal bounds the one whose
# loads are pipelined (two stages or more), which the bounds do not see, and of those that with smaller blocks.
FORWARD = Table(
    "attention_forward",
    {
        (2, 16): Config(128, 64, 4, 3),
        (2, 32): Config(128, 64, 4, 3),
        (2, 64): Config(128, 64, 8, 2),
        (2, 128): Config(128, 32, 8, 2),
        (2, 256): Config(64, 32, 8, 1),
        (4, 16): Config(64, 64, 4, 2),
        (4, 32): Config(64, 32, 4, 2),
        (4, 64): Config(64, 32, 8, 2),
        (4, 128): Config(32, 32, 8, 1),
        (4, 256): Config(16, 16, 4, 1),
    },
    # SPARSE: Triton 3.8 spills 451 of the loop's 3961 instructions in Hopper's configuration, and 3.6 14 in Ampere's.
    crowded=("DROPOUT", "RELATIVE", "SPARSE"),
    ampere={(2, 64): Config(128, 64, 4, 3), (2, 128): Config(128, 32, 4, 2)},
    hopper={(2, 64): Config(128, 128, 8, 2), (2, 128): Config(128, 128, 8, 2)},
)
DKDV = Table(
    "attention_dkdv",
    {
        (2, 16): Config(32, 128, 4, 2),
        (2, 32): Config(32, 128, 4, 2),
        (2, 64): Config(32, 64, 4, 2),
        (2, 128): Config(32, 64, 4, 1),
        (2, 256): Config(16, 32, 8, 1),
        (4, 16): Config(32, 64, 4, 1),
        (4, 32): Config(32, 64, 8, 1),
        (4, 64): Config(32, 32, 8, 1),
        (4, 128): Config(16, 32, 8, 1),
        (4, 256): Config(16, 16, 8, 1),
    },
    crowded=("MASK", "ADDED", "DROPOUT", "SPARSE", "GROUPED"),
    ampere={(2, 64): Config(32, 128, 4, 2), (2, 128): Config(32, 128, 8, 1)},
    hopper={(2, 64): Config(64, 128, 8, 2), (2, 128): Config(32, 128, 8, 1)},
)
DQ = Table(
    "attention_dq",
    {
        (2, 16): Config(128, 64, 4, 2),
        (2, 32): Config(128, 32, 4, 2),
        (2, 64): Config(64, 32, 4, 2),
        (2, 128): Config(64, 32, 4, 1),
        (2, 256): Config(32, 16, 4, 1),
        (4, 16): Config(64, 32, 4, 1),
        (4, 32): Config(64, 32, 4, 1),
        (4, 64): Config(32, 32, 8, 1),
        (4, 128): Config(32, 16, 8, 1),
        (4, 256): Config(16, 16, 8, 1),
    },
    crowded=("DROPOUT",),
    ampere={(2, 64): Config(128, 32, 4, 2), (2, 128): Config(128, 64, 8, 1)},
    ada={(2, 64): Config(128, 32, 4, 2)},
    cdna={(2, 64): Config(128, 32, 4, 2)},
    hopper={(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 64, 8, 2)},
)
PLANES = Table(
    "attention_plane",
    {
        (2, 16): Config(64, 64, 4, 1),
        (2, 32): Config(64, 64, 4, 1),
        (2, 64): Config(32, 64, 4, 1),
        (2, 128): Config(64, 64, 8, 1),
        (2, 256): Config(32, 32, 4, 1),
        (4, 16): Config(32, 32, 4, 1),
        (4, 32): Config(32, 32, 4, 1),
        (4, 64): Config(32, 32, 4, 1),
        (4, 128): Config(32, 32, 8, 1),
        (4, 256): Config(16, 16, 8, 1),
    },
    ampere={(2, 64): Config(64, 64, 8, 1)},
    hopper={(2, 64): Config(64, 64, 4, 1)},
)
