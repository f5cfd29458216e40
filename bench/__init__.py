"""Measures this package on this machine.

Every measurement is a process of its own, on a file of real size. Programs that are compared run alternately, so that
other load on the machine slows all of them alike. A report has figures and the machine, and no verdict.
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
