"""The arguments of a phase's process, the folders it works in, and the inputs of the stages."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.manifest import PortEntry
from ...schemas.sizes import latent_sizes
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from .phases import Phase

Arrays = dict[str, NDArray[Any]]

TOKENS, WORDS = 77, 20  # of a prompt
OF_BUNDLES = ("build", "engine", "image")  # works that read a bundle
RATIO = 0.5  # the timestep ratio at which outputs are compared


@dataclass(frozen=True)
class GpuJob:
    """The settings that all phases share. `side` is of the image in pixels, `runs` are measured passes."""

    folder: str
    device: str
    side: int
    runs: int
    prior_steps: int
    decoder_steps: int

    def root(self, phase: Phase) -> Path:
        return Path(self.folder) / phase.variant

    def model(self, phase: Phase) -> Path:
        return self.root(phase) / "model"

    def bundle(self, phase: Phase) -> Path:
        return self.root(phase) / f"bundle-{phase.precision}"

    def packages(self, phase: Phase) -> Path:
        """The folder of the first packages that `build` makes."""
        return self.bundle(phase) / Stage.PRIOR / "plans"

    def reference(self, phase: Phase, *, own: bool = False) -> Path:
        """The outputs to compare with: of diffusers in fp32, or our `own` in fp32 where diffusers is not installed."""
        return self.root(phase) / f"{'own' if own else 'diffusers'}-{phase.stage}.npz"

    def lacks_files(self, phase: Phase) -> bool:
        """True if the phase writes files and they are not there."""
        written = {
            "make": self.model(phase),
            "diffusers": self.reference(phase),
            "export": self.bundle(phase),
            "build": self.packages(phase),
        }.get(phase.work)
        return written is not None and not written.exists()

    def reads(self, phase: Phase) -> Path | None:
        """The folder that a phase cannot do without."""
        if phase.work in OF_BUNDLES:
            return self.bundle(phase)
        return self.model(phase) if phase.work in ("diffusers", "compile", "export") else None

    def to_json(self, phase: Phase) -> str:
        return json.dumps({"job": asdict(self), "phase": asdict(phase)})


def stage_inputs(ports: tuple[PortEntry, ...], stage: Stage, side: int, vocabulary: int = 0) -> Arrays:
    """Seeded inputs for an image of side x side pixels; the prior has two rows, as with guidance.

    The last two of `vocabulary` tokens begin and end a text."""
    sizes = latent_sizes(side, side)
    height, width = sizes.prior if stage is Stage.PRIOR else sizes.decoder
    batch = 2 if stage in (Stage.PRIOR, Stage.TEXT_ENCODER) else 1
    dims = {"batch": batch, "height": height, "width": width, "tokens": TOKENS, "images": 1}
    dims |= {"effnet_height": sizes.prior[0], "effnet_width": sizes.prior[1]}
    rng = np.random.default_rng(1)
    shapes = {port.name: tuple(dims[dim] if isinstance(dim, str) else dim for dim in port.dims) for port in ports}
    if stage is Stage.TEXT_ENCODER:
        ids = np.full(shapes["input_ids"], vocabulary - 1, np.int64)
        ids[:, 0], ids[:, 1:WORDS] = vocabulary - 2, rng.integers(3, vocabulary - 2, (batch, WORDS - 1))
        return {"input_ids": ids, "attention_mask": np.ones(shapes["attention_mask"], np.int64)}
    arrays: Arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if "timestep_ratio" in arrays:
        arrays["timestep_ratio"][:] = RATIO
    if "clip_img" in arrays:
        arrays["clip_img"][:] = 0
    if stage is Stage.VQGAN:
        arrays["latents"] *= np.float32(0.5)
    return arrays


def inputs_of(bundle: Bundle, stage: Stage, side: int) -> Arrays:
    entry = bundle.entry(stage)
    return stage_inputs(entry.inputs, stage, side, entry.config.get("vocab_size", 0))


def relative_l2(found: Arrays, expected: Arrays) -> float:
    """The largest relative L2 of the outputs."""
    wide = {name: array.astype(np.float64) for name, array in expected.items()}
    return max(float(np.linalg.norm(found[name] - each) / np.linalg.norm(each)) for name, each in wide.items())
