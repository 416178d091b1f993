"""Launch configurations of the feed-forward kernels, and which products take their epilogue in."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..common import device as gpu
from ..common import tuned
from ..common.configs import ConfigTable


class Config(NamedTuple):
    """Block sizes and launch options of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    halvings: int = 0
    """The epilogue works on the block's columns in 2**halvings parts, which take fewer registers at once."""


Configs = dict[tuple[int, bool], Config]


class Table(ConfigTable[tuple[int, bool], Config]):
    """Configurations by element size and heavy epilogue; what `fusenc tune` measured serves those that are not."""

    def __init__(self, operation: str, general: Configs, **of_family: Configs) -> None:
        super().__init__(operation, general, of_family)

    def choose(self, x: Tensor, heavy: bool, columns: int) -> Config:
        """The configuration for the product of ``x [rows, inner]`` with `columns` columns."""
        sizes = None if heavy else (gpu.power_of_2(x.shape[0]), columns, x.shape[1])
        return self.look_up((x.element_size(), heavy), x, True, sizes)


# Evidence: `fusenc inspect linear_act_kernel hidden_gradient_kernel` (docs/ffn.md). 128x256x64 with 8 warps and 3
# stages reaches the bound of a plain product, 59 % on sm_80 and 70 % on sm_90; the epilogue is halved until nothing
# spills. The general configurations fit 64 KiB of shared memory.
FORWARD = Table(
    "linear_act",
    {
        (2, False): Config(128, 128, 32, 8, 2, 2),
        (2, True): Config(128, 64, 32, 8, 2, 1),
        (4, False): Config(64, 64, 32, 4, 2),
        (4, True): Config(64, 32, 16, 4, 2),
    },
    ampere={(2, False): Config(128, 256, 64, 8, 3, 3), (2, True): Config(128, 64, 64, 8, 3, 1)},
    ada={(2, False): Config(128, 128, 64, 8, 3, 2), (2, True): Config(128, 64, 64, 8, 3, 1)},
    hopper={(2, False): Config(128, 256, 64, 8, 3, 3), (2, True): Config(128, 128, 64, 8, 3, 2)},
)
"""Heavy: gated, which has two products in registers."""
BACKWARD = Table(
    "hidden_gradient",
    {
        (2, False): Config(128, 128, 32, 8, 2, 2),
        (2, True): Config(128, 128, 32, 8, 2, 2),
        (4, False): Config(64, 64, 32, 4, 2),
        (4, True): Config(64, 64, 32, 4, 2, 1),
    },
    ampere={(2, False): Config(128, 256, 64, 8, 3, 3), (2, True): Config(128, 128, 64, 8, 3, 2)},
    ada={(2, False): Config(128, 128, 64, 8, 3, 2), (2, True): Config(128, 128, 64, 8, 3, 2)},
    hopper={(2, False): Config(128, 256, 64, 8, 3, 3), (2, True): Config(128, 256, 64, 8, 3, 3)},
)
"""Heavy: gated, with dropout, or with the activation computed again."""
GROUP_M = 8


def constants(config: Config, x: Tensor, columns: int) -> dict[str, Any]:
    """The compile-time arguments of a product of ``x [rows, inner]`` with `columns` columns."""
    block_m, block_n, block_k, num_warps, num_stages, halvings = config
    return {
        "EVEN_N": columns % block_n == 0, "EVEN_K": x.shape[1] % block_k == 0,
        "INPUT_PRECISION": gpu.input_precision(x), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "GROUP_M": GROUP_M, "HALVINGS": halvings, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def pointwise_block(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a pointwise kernel's block, and its warps: 16 elements of each array a thread."""
    block_n = min(256, max(16, gpu.power_of_2(columns)))
    return 2048 // block_n, block_n, 4


# The largest inner dimension up to which a 16-bit product takes its epilogue in, where nothing was measured. A fused
# product may lose 10 % (A100) to 15 % (H100) on the vendor's; what it saves is memory passes over its output, one of
# 2 bytes an element in the forward pass (which writes the pre-activation either way), two in the others. It pays while
#   loss * 2 * inner / (share * peak) < passes * 2 bytes / bandwidth
# A100: 0.10 * 2 * inner / (0.8 * 312 TFLOP/s) < passes * 2 / (2.04 TB/s), so inner < 1,223 passes;
# H100: 0.15 * 2 * inner / (0.7 * 989 TFLOP/s) < passes * 2 / (3.35 TB/s), so inner < 1,378 passes;
# MI300X: 0.15 * 2 * inner / (0.5 * 1307 TFLOP/s) < passes * 2 / (5.3 TB/s), so inner < 822 passes;
# L40S: 0.10 * 2 * inner / (0.8 * 362 TFLOP/s) < passes * 2 / (0.86 TB/s), so inner < 3,367 passes.
# That is arithmetic on data sheets, not a measurement: `fusenc tune` replaces it. float32 goes to the vendor's product:
# IEEE products run outside the tensor cores and are slower than memory by far.
_LARGEST_INNER = {"ampere": 1223, "hopper": 1378, "cdna": 822, "ada": 3367}
_PASSES = {"ffn_forward": 1, "ffn_output": 2, "ffn_backward": 2}


def use_fused(fused: bool | None, operation: str, x: Tensor, columns: int, inner: int) -> bool:
    """Whether a product takes its epilogue in: as the caller says, as was measured, or by the table above.

    `operation` is ``"ffn_forward"``, ``"ffn_output"`` or ``"ffn_backward"``.
    """
    if fused is not None:
        return fused
    measured = tuned.choice(operation, x.device.index, x.dtype, (gpu.power_of_2(x.shape[0]), columns, inner))
    if measured is not None:
        return measured == "fused"
    limit = _LARGEST_INNER.get(gpu.family(x.device.index))
    if limit is None:  # a chip that is not known, or none at all: the fewest kernels
        return True
    return x.element_size() == 2 and inner <= limit * _PASSES[operation]
