"""The work of each stage of a batch on a cluster: images a second, actors, and the share of time that they worked."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BusyTime:
    """The seconds that one actor or task worked for one piece."""

    stage: str
    worker: str
    seconds: float
    images: int


@dataclass
class StageReport:
    """Sums of what the workers of each stage did."""

    wall: float = 0.0  # seconds until the last image, from before the actors were started
    _seconds: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    _images: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, busy: Iterable[BusyTime], wall: float) -> None:
        """Count the work for a finished group, `wall` seconds after the start."""
        self.wall = wall
        for each in busy:
            self._seconds[each.stage][each.worker] += each.seconds
            self._images[each.stage] += each.images

    def to_json(self) -> dict[str, dict[str, float]]:
        """By stage: images, workers, the sum of their busy seconds, images a busy second, and utilisation.

        Utilisation is the busy share of the time of all workers, their start included."""
        return {
            stage: {
                "images": self._images[stage],
                "workers": len(by_worker),
                "busy_seconds": round(sum(by_worker.values()), 3),
                "images_per_second": round(self._images[stage] / max(sum(by_worker.values()), 1e-9), 3),
                "utilisation": round(sum(by_worker.values()) / max(self.wall * len(by_worker), 1e-9), 3),
            }
            for stage, by_worker in self._seconds.items()
        }

    def lines(self) -> list[str]:
        return [
            f"{stage}: {_counted(found['images'], 'image')} by {_counted(found['workers'], 'worker')}, "
            f"{found['images_per_second']:.2f} images/s each, busy {found['utilisation']:.0%} of {self.wall:.0f} s"
            for stage, found in self.to_json().items()
        ]


def _counted(number: float, noun: str) -> str:
    return f"{number:.0f} {noun}{'s' * (number != 1)}"
