"""Tables of launch configurations: what a family of kernels is launched with, chip by chip."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from . import device as gpu
from . import plan, tuned

Key = TypeVar("Key", bound=Hashable)
Config = TypeVar("Config", bound=NamedTuple)

_STAGES = (1, 2, 3, 4)


class ConfigTable(Generic[Key, Config]):
    """Configurations of one kernel by a key, by family of chips where one has its own, and as measured on this GPU.

    Args:
        operation: the kernel's name in the tables that `fusenc tune` writes.
        general: what serves every chip.
        of_family: what a family of chips (`gpu.family`) has of its own.
    """

    def __init__(
        self, operation: str, general: Mapping[Key, Config], of_family: Mapping[str, Mapping[Key, Config]]
    ) -> None:
        self.operation = operation
        self._general = general
        self._of_family = of_family
        self._candidates: dict[Key, dict[str, Config]] = {}
        self._forced: Config | None = None

    def look_up(self, key: Key, x: Tensor, own: bool, sizes: tuple[int, ...] | None) -> Config:
        """The configuration for a call on the device of `x`: the measured one, the chip's own or the general one.

        Args:
            key: the table's key.
            x: gives device and dtype.
            own: whether the chip's own configuration serves this call.
            sizes: as `fusenc tune` knows the call; None where the call is not what it measures, so that its choice may
                not even launch.
        """
        if self._forced is not None:
            return self._forced
        if sizes is not None:
            measured = tuned.choice(self.operation, x.device.index, x.dtype, sizes)
            # A name that is no candidate is of a table that another version wrote.
            if measured is not None and measured in (candidates := self.candidates(key)):
                return candidates[measured]
        config = self._of_family.get(gpu.family(x.device.index), {}).get(key) if own else None
        return config or self._general[key]

    def candidates(self, key: Key) -> dict[str, Config]:
        """What `fusenc tune` tries, by name (the numbers with an "x" between): any chip's, with 1 to 4 stages."""
        if key not in self._candidates:
            known = [self._general[key], *(table[key] for table in self._of_family.values() if key in table)]
            varied = [config._replace(num_stages=stages) for config in known for stages in _STAGES]
            self._candidates[key] = {"x".join(map(str, config)): config for config in [*known, *varied]}
        return self._candidates[key]

    @contextlib.contextmanager
    def forced(self, config: Config) -> Iterator[None]:
        """Inside, every launch has this configuration."""
        before, self._forced = self._forced, config
        plan.change_switches()
        try:
            yield
        finally:
            self._forced = before
            plan.change_switches()
