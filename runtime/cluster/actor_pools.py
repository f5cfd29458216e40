"""How many actors each stage has, and what each actor takes of the cluster."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from ...schemas.errors import UsageError
from ...schemas.stages import Stage

FIELDS = ("cpus", "gpus")
NUMBER = re.compile(r"\d{1,6}(\.\d{1,4})?")


@dataclass(frozen=True)
class ActorPool:
    """The actors of one stage: a fixed number, or (None) as many as Ray finds room and work for.

    `cpus` and `gpus` are what Ray reserves for each; None for `gpus` is the stage's share of a GPU where the cluster
    has GPUs and the device is not the CPU."""

    size: int | None = None
    cpus: float = 0.75
    gpus: float | None = None

    @classmethod
    def parse(cls, text: str, pool: "ActorPool") -> Self:
        """Parse "4,cpus=2,gpus=0.5"; what is left out is that of `pool`. Raises UsageError."""
        size, *rest = text.split(",")
        found = dict(part.partition("=")[::2] for part in rest)
        wrong = found.keys() - set(FIELDS) or [value for value in found.values() if not NUMBER.fullmatch(value)]
        if wrong or not (size.isdecimal() and len(size) < 7 and int(size) > 0):
            raise UsageError(f"actors {text!r}: expected a number of actors, as in prior=4 or prior=4,cpus=2,gpus=0.5")
        return cls(**{**vars(pool), "size": int(size), **{name: float(value) for name, value in found.items()}})


# The prior's actors also run the encoders of pictures, the decoder's also the vqgan.
DEFAULT_POOLS: Mapping[Stage, ActorPool] = {
    Stage.TEXT_ENCODER: ActorPool(cpus=0.25),
    Stage.PRIOR: ActorPool(),
    Stage.DECODER: ActorPool(),
}
GPU_SHARES = {Stage.TEXT_ENCODER: 0.1, Stage.PRIOR: 0.45, Stage.DECODER: 0.45}


def parse_pools(given: Iterable[str]) -> dict[Stage, ActorPool]:
    """The pools of all stages; each text is STAGE=NUMBER[,cpus=N][,gpus=N]. Raises UsageError."""
    pools = dict(DEFAULT_POOLS)
    for text in given:
        name, _, rest = text.partition("=")
        if name not in pools:
            raise UsageError(f"actors {text!r}: expected one of the stages {', '.join(pools)}, as in prior=4")
        pools[Stage(name)] = ActorPool.parse(rest, pools[Stage(name)])
    return pools


def fitted_pools(
    pools: Mapping[Stage, ActorPool], cluster: Mapping[str, float], *, use_gpus: bool
) -> dict[Stage, ActorPool]:
    """The pools with their share of a GPU. `cluster` has the numbers of CPUs and GPUs by Ray's names.

    Raises UsageError when the least number of actors does not fit the cluster, which would wait for room for ever."""
    shares = GPU_SHARES if use_gpus and cluster.get("GPU") else dict.fromkeys(GPU_SHARES, 0.0)
    fitted = {
        stage: replace(pool, gpus=shares[stage] if pool.gpus is None else pool.gpus) for stage, pool in pools.items()
    }
    needed = {
        "CPU": sum((pool.size or 1) * pool.cpus for pool in fitted.values()),
        "GPU": sum((pool.size or 1) * (pool.gpus or 0.0) for pool in fitted.values()),
    }
    for name, number in needed.items():
        if number > cluster.get(name, 0.0) + 1e-6:
            raise UsageError(
                f"actors: they need {number:g} {name}s, the cluster has "
                f"{cluster.get(name, 0.0):g}; give fewer actors, or smaller shares, as in actors=prior=1,cpus=0.5"
            )
    return fitted
