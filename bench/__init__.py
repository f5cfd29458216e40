"""Measures this package on the machine at hand.

Every measurement is a process of its own, on a file of real size. What belongs together runs alternately, so that
whatever else the machine is doing meets all alike. Nothing here judges: a report says what was measured, and where.
"""

from .builds import LITE_CASCADE, BuildsReport, bench_builds
from .convert import bench_convert
from .engines import EnginesReport, bench_engines
from .export import bench_export
from .generate import GenerateReport, bench_generate
from .report import Report
from .standins import NETWORKS

__all__ = [
    "LITE_CASCADE",
    "NETWORKS",
    "BuildsReport",
    "EnginesReport",
    "GenerateReport",
    "Report",
    "bench_builds",
    "bench_convert",
    "bench_engines",
    "bench_export",
    "bench_generate",
]
