"""Measures a GPU with stages of real size and random weights, phase by phase, and packs what a bare machine needs."""

from .report import GpuBenchReport
from .run import GpuBench, bench_gpu

__all__ = ["GpuBench", "GpuBenchReport", "bench_gpu"]
