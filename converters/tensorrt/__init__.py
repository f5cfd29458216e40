"""GPU engines from a bundle's graphs, by TensorRT-RTX (no GPU needed, for any GPU) or TensorRT (for the one present).

``build`` makes plans as ``BuildOptions`` describe them; ``refit`` gives a loaded plan other weights. The bundle's
manifest records the GPUs, shapes and source files of each plan.
"""

from .builder import Built, build, prune, stale_plans
from .plans_to_build import BuildOptions
from .refit import refit
from .worker_process import BuildProgress

__all__ = ["BuildOptions", "BuildProgress", "Built", "build", "prune", "refit", "stale_plans"]
