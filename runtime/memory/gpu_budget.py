"""Keeps as many stages in GPU memory as fit; the one used longest ago is evicted first."""

from collections.abc import Callable
from typing import Protocol

GIB = 1 << 30


class Resident(Protocol):
    """A stage in GPU memory that can be evicted and comes back when it is used."""

    @property
    def device_bytes(self) -> int: ...

    def evict(self) -> None: ...


class DeviceBudget:
    """Keeps residents within `budget` bytes of GPU memory, or within the free memory if that is less."""

    def __init__(self, free: Callable[[], int], budget: int | None = None) -> None:
        self._free = free
        self.budget = budget
        self.residents: list[Resident] = []  # in the order of their last use
        self.evictions = 0

    def use(self, resident: Resident) -> None:
        """Note that the resident is in memory and is used now."""
        self.forget(resident)
        self.residents.append(resident)

    def forget(self, resident: Resident) -> None:
        """Note that the resident has left the memory."""
        self.residents = [one for one in self.residents if one is not resident]

    def available(self) -> int:
        """The number of bytes that may be allocated now."""
        free = self._free()
        if self.budget is None:
            return free
        return max(0, min(free, self.budget - sum(resident.device_bytes for resident in self.residents)))

    def make_room(self, wanted: int, keep: Resident) -> int:
        """Evict residents, never `keep`, until `wanted` bytes are available or nothing is left to evict.

        The resident used longest ago goes first. Returns the bytes that are available then."""
        while (available := self.available()) < wanted and self.evict_oldest(keep):
            pass
        return available

    def evict_oldest(self, keep: Resident) -> bool:
        """Evict the resident used longest ago, never `keep`; returns False when there is none."""
        oldest = next((resident for resident in self.residents if resident is not keep), None)
        if oldest is None:
            return False
        self.forget(oldest)
        self.evictions += 1
        oldest.evict()
        return True


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
