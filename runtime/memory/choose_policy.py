"""Chooses the policy of `memory="auto"` by the memory that this machine has."""

from ...schemas.manifest import Manifest
from ...schemas.settings import Settings
from ...schemas.stages import CONTROLNETS
from ..engines.nvidia_driver import first_gpu
from .free_memory import free_memory
from .prediction import SESSION, Extras, predict_peak
from .residency import AUTO, RESIDENT, STAGED, MemoryPolicy

# The share of memory that "auto" may fill. On a CPU it is a share of what is free: other programs need some, too. On a
# GPU it is a share of all: the screen and the driver take some.
SHARES = {"cpu": 0.5, "cuda": 0.8}
EVERYTHING = Extras(image_prompts=1, varies=True, masks=True, controls=CONTROLNETS, previews=True)


def chosen_policy(policy: MemoryPolicy, manifest: Manifest, device: str) -> MemoryPolicy:
    """`policy` itself, or what "auto" means here: all stages stay loaded if they fit, else one at a time.

    They fit if an image of the default size, made with every stage of the bundle, takes no more than the share of
    SHARES. On a system that reports no free memory, "auto" is "staged"."""
    if policy != AUTO:
        return policy
    free = _gpu_memory() if device == "cuda" else free_memory()
    if free is None or not manifest.stages:
        return STAGED
    settings = Settings(*manifest.default_size)
    peak = predict_peak(manifest, RESIDENT, settings, 1, EVERYTHING, device=device, process=SESSION)
    return RESIDENT if peak.nbytes <= SHARES[device] * free else STAGED


def _gpu_memory() -> int | None:
    gpu = first_gpu()
    return None if isinstance(gpu, str) else gpu.memory
