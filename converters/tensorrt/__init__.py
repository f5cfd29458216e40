"""GPU engines from a bundle's graphs, by TensorRT-RTX (no GPU needed, for any GPU) or TensorRT (for the one present).

``build`` makes plans, ``BuildOptions`` says which, ``refit`` gives a loaded one other weights. What a plan is for and
made of is in the bundle's manifest.
"""

from .builder import Built, build, prune, stale_plans
from .plans_to_build import BuildOptions
from .refit import refit
from .worker_process import BuildProgress

__all__ = ["BuildOptions", "BuildProgress", "Built", "build", "prune", "refit", "stale_plans"]
