"""GPU engines from a bundle's graphs, by TensorRT-RTX (no GPU needed, for any GPU) or TensorRT (for the one present).

``build`` makes plans, ``BuildWishes`` says which. What a plan is for and made of is in the bundle's manifest.
"""

from .builder import Built, build, prune, stale_plans
from .process import Progress
from .tasks import BuildWishes

__all__ = ["BuildWishes", "Built", "Progress", "build", "prune", "stale_plans"]
