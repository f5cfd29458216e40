"""The description of one package that is sent to the worker process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..tensorrt.worker_request import WorkerRequest


@dataclass(frozen=True)
class PackageRequest(WorkerRequest):
    """A package to build. `steps` has the unit of each dim that is not 1, as ports of a stage have ranges."""

    stage: str = ""
    name: str = ""  # of the graph
    config: Mapping[str, Any] = field(default_factory=dict)
    precision: str = ""
    runs_on: str = "cpu"  # cpu or cuda; the name of the device is in the key besides
    dims: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)  # of each input
    steps: Mapping[str, int] = field(default_factory=dict)  # by dim

    worker: ClassVar[str] = "cascadekit.converters.aotinductor.package_worker"
