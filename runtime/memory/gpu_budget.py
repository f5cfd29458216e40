"""Which stages are in the GPU's memory: those used last, as far as they fit."""

from collections.abc import Callable
from typing import Protocol

GIB = 1 << 30


class Resident(Protocol):
    """Something in device memory that can leave it and come back when it is needed."""

    @property
    def device_bytes(self) -> int: ...

    def evict(self) -> None: ...


class DeviceBudget:
    """Keeps residents within `budget` bytes of device memory, or within what is free where that is less."""

    def __init__(self, free: Callable[[], int], budget: int | None = None) -> None:
        self._free = free
        self.budget = budget
        self.residents: list[Resident] = []  # the one used last at the end
        self.evictions = 0

    def use(self, resident: Resident) -> None:
        """It is in memory and used now."""
        self.forget(resident)
        self.residents.append(resident)

    def forget(self, resident: Resident) -> None:
        """It has left."""
        self.residents = [one for one in self.residents if one is not resident]

    def available(self) -> int:
        """Bytes that may be taken now."""
        free = self._free()
        if self.budget is None:
            return free
        return max(0, min(free, self.budget - sum(resident.device_bytes for resident in self.residents)))

    def make_room(self, wanted: int, keep: Resident) -> int:
        """Evict what was used longest ago, never `keep`, until `wanted` bytes are available or nothing is left to
        evict; the bytes available then."""
        while (available := self.available()) < wanted and self.evict_oldest(keep):
            pass
        return available

    def evict_oldest(self, keep: Resident) -> bool:
        """Evict what was used longest ago, never `keep`; whether there was something to evict."""
        oldest = next((resident for resident in self.residents if resident is not keep), None)
        if oldest is None:
            return False
        self.forget(oldest)
        self.evictions += 1
        oldest.evict()
        return True


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
