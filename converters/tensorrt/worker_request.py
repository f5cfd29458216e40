"""The description of one build that is sent to the worker process."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

ProfileShapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # by port, then min, opt and max


@dataclass(frozen=True)
class WorkerRequest:
    """A plan to build from one graph. Its fields but the paths decide the key of the plan, see ``plan_cache``."""

    backend: str
    graph: str  # absolute path
    output: str  # absolute path
    targets: tuple[str, ...]
    profiles: tuple[ProfileShapes, ...]  # with shapes for every input
    refittable: bool = False
    weight_streaming: bool = False
    timing_cache: str | None = None  # absolute path; for TensorRT, which measures kernels on the GPU

    worker: ClassVar[str] = "cascadekit.converters.tensorrt.worker"

    def command(self) -> tuple[str, ...]:
        """The command line of the worker. The request itself goes to standard input, because profiles may exceed the
        longest command line."""
        return (sys.executable, "-c", f"from {self.worker} import main; main()")

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Self:
        content: dict[str, Any] = json.loads(line)
        return cls(**content | {name: tuple(content[name]) for name in ("targets", "profiles")})
