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


def _by_head(*numbers: tuple[int, int, int, int]) -> Configs:
    """Configurations of 16 and of 32 bit, for heads of 16, 32, 64, 128 and 256 each."""
    keys = [(size, head) for size in (2, 4) for head in (16, 32, 64, 128, 256)]
    return {key: Config(*each) for key, each in zip(keys, numbers, strict=True)}


class Table(ConfigTable[tuple[int, int], Config]):
    """Configurations by element size and padded head size.

    Those of an architecture use its registers to the last; with one of the switches in `general_with`, which need some
    themselves, the general ones serve. What `fusenc tune` measured serves calls without any such option.
    """

    def __init__(
        self, operation: str, general: Configs, general_with: tuple[str, ...] = (), **of_family: Configs
    ) -> None:
        super().__init__(operation, general, of_family)
        self._general_with = general_with

    def choose(self, query: Tensor, switches: Switches, length: int) -> Config:
        """The configuration for a call; `length` is that of the longest sequence of queries."""
        of_chip = all(getattr(switches, name) in (False, 0, "none") for name in self._general_with)
        # Masks and added terms are loaded to shared memory, which the configuration measured without may fill.
        plain = of_chip and switches.MASK == "none" and not (switches.ADDED or switches.DROPOUT or switches.SPARSE)
        head = max(switches.BLOCK_D, switches.BLOCK_DV)
        sizes = (gpu.power_of_2(length), head) if plain else None
        config = self.look_up((query.element_size(), head), query, of_chip, sizes)
        if switches.SPARSE:  # no block may reach over the edge of a block mask's
            most = switches.SPARSE
            config = config._replace(block_m=min(config.block_m, most), block_n=min(config.block_n, most))
        return config


# fmt: off
# Evidence: `fusenc inspect` (the bounds without overlap are in docs/results.md; bench/machine_code/budget.csv holds the
# tables to them). The general configurations fit the shared memory of the smallest chips (64 KiB on gfx942) and keep
# everything in registers there. Of two configurations with equal bounds the one whose
# loads are pipelined (two stages or more), which the bounds do not see, and of those that with smaller blocks.
FORWARD = Table(
    "attention_forward",
    _by_head(
        (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1),
        (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1),
    ),
    # SPARSE: Triton 3.8 spills 451 of the loop's 3961 instructions in Hopper's configuration, and 3.6 14 in Ampere's.
    general_with=("DROPOUT", "RELATIVE", "SPARSE"),
    ampere={(2, 64): Config(128, 64, 4, 3), (2, 128): Config(128, 32, 4, 2)},
    hopper={(2, 64): Config(128, 128, 8, 2), (2, 128): Config(128, 128, 8, 2)},
)
DKDV = Table(
    "attention_dkdv",
    _by_head(
        (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (16, 32, 8, 1),
        (32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1),
    ),
    general_with=("MASK", "ADDED", "DROPOUT", "SPARSE", "GROUPED"),
    ampere={(2, 64): Config(32, 128, 4, 2), (2, 128): Config(32, 128, 8, 1)},
    hopper={(2, 64): Config(64, 128, 8, 2), (2, 128): Config(32, 128, 8, 1)},
)
DQ = Table(
    "attention_dq",
    _by_head(
        (128, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 16, 4, 1),
        (64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1),
    ),
    general_with=("DROPOUT",),
    ampere={(2, 64): Config(128, 32, 4, 2), (2, 128): Config(128, 64, 8, 1)},
    ada={(2, 64): Config(128, 32, 4, 2)},
    cdna={(2, 64): Config(128, 32, 4, 2)},
    hopper={(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 64, 8, 2)},
)
PLANES = Table(
    "attention_plane",
    _by_head(
        (64, 64, 4, 1), (64, 64, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1), (32, 32, 4, 1),
        (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1),
    ),
    ampere={(2, 64): Config(64, 64, 8, 1)},
    hopper={(2, 64): Config(64, 64, 4, 1)},
)
# fmt: on
