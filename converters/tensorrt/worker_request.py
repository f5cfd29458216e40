"""One build as the process that does it is told, and the lines it answers with."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # by port, then min, opt and max


@dataclass(frozen=True)
class Job:
    """Builds a plan of one graph. Paths are absolute. `profiles` have shapes for every input but `weight_inputs`,
    names of initialisers that become inputs; `timing_cache` is for TensorRT, which measures kernels on the GPU and
    remembers how they did."""

    backend: str
    graph: str
    output: str
    targets: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    refittable: bool = False
    weight_streaming: bool = False
    weight_inputs: tuple[str, ...] = ()
    timing_cache: str | None = None

    def command(self) -> tuple[str, ...]:
        """What to start; the job itself goes to standard input, as profiles may be longer than a command may be."""
        return (sys.executable, "-c", "from cascadekit.converters.tensorrt.worker import main; main()")

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Job":
        content: dict[str, Any] = json.loads(line)
        return cls(**content | {name: tuple(content[name]) for name in ("targets", "profiles", "weight_inputs")})
