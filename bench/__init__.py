"""Measures this package on this machine.

Every measurement is a process of its own, on a file of real size. Programs that are compared run alternately, so that
other load on the machine slows all of them alike. A report has figures and the machine, and no verdict.

Each name is imported when it is first used: the processes that measure start in a part of the time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench_report import BenchReport as BenchReport
    from .builds import LITE_CASCADE as LITE_CASCADE
    from .builds import BuildsReport as BuildsReport
    from .builds import bench_builds as bench_builds
    from .convert_speed import bench_convert as bench_convert
    from .engines import EnginesReport as EnginesReport
    from .engines import bench_engines as bench_engines
    from .export_speed import bench_export as bench_export
    from .generate_speed import GenerateReport as GenerateReport
    from .generate_speed import bench_generate as bench_generate
    from .standins import NETWORKS as NETWORKS

_PUBLIC = {
    "LITE_CASCADE": ".builds",
    "NETWORKS": ".standins",
    "BuildsReport": ".builds",
    "EnginesReport": ".engines",
    "GenerateReport": ".generate_speed",
    "BenchReport": ".bench_report",
    "bench_builds": ".builds",
    "bench_convert": ".convert_speed",
    "bench_engines": ".engines",
    "bench_export": ".export_speed",
    "bench_generate": ".generate_speed",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)
