"""The options of a comparison, and which of them go together."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runtime.engines.engine_table import ENGINES
from ..schemas.choices import require_one_of
from ..schemas.errors import UsageError
from ..schemas.sizes import latent_sizes
from ..schemas.stages import Stage

# The dtype a reference computes in, by the name people choose it by; None is that of its weights, float32.
REFERENCE_DTYPES = {"fp64": "float64", "fp32": None, "bf16": "bfloat16", "fp16": "float16"}
REFERENCES = ("cascadekit", "diffusers")
KNOWN: Mapping[str, Collection[str]] = {  # the values of options
    "engine": ENGINES,
    "reference": REFERENCES,
    "reference_precision": REFERENCE_DTYPES,
    "reference_device": ("cpu", "cuda"),
    "sizes": ("small", "all"),
}


@dataclass(frozen=True)
class ComparisonOptions:
    """The model that a bundle is compared with, and the inputs; `verify` documents each field."""

    against: Path | None = None
    recorded: Path | None = None
    text_encoder: Path | None = None
    stages: tuple[Stage, ...] = ()
    device: str = "cpu"
    engine: str = "onnxruntime"
    reference: str = REFERENCES[0]
    reference_precision: str = "fp32"
    reference_device: str = "cpu"
    size: tuple[int, int] | None = None
    sizes: str = "small"


def check_options(
    options: ComparisonOptions, *, record: bool = False, bisect: bool = False, ranges: bool = False
) -> None:
    """Raise UsageError for options that do not go together. `record` is true when the reference is to be recorded."""
    for name, known in KNOWN.items():
        require_one_of(known, getattr(options, name), name)
    given = {"record=...": record, "bisect=True": bisect, "ranges=True": ranges}
    chosen = [name for name, wanted in given.items() if wanted]
    if chosen and options.against is None:
        raise UsageError(f"{chosen[0]} needs the model: give against=...")
    if (options.against is None) == (options.recorded is None):
        raise UsageError("give against=... as the model, or recorded=... as a file that was recorded from it")
    on_gpu = options.reference_device != "cpu"
    if on_gpu and options.against is None:
        raise UsageError(
            f'reference_device="{options.reference_device}": a recording has been computed already; give against=...'
        )
    if record and len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} cannot be given together; run one after the other")
    if options.reference != REFERENCES[0] and (bisect or ranges):
        raise UsageError(f"{chosen[0]} looks into cascadekit's own modules: leave reference=... away")
    able = ENGINES[options.engine].devices
    if not record and options.device != "cpu" and options.device not in able:  # TensorRT has the GPU without being told
        raise UsageError(f"device {options.device!r}: {options.engine} runs on {' and '.join(able)}")
    if options.size is not None:
        if len(options.size) != 2:
            raise UsageError(f"size={options.size!r}: expected (width, height) in pixels")
        width, height = options.size
        latent_sizes(height, width)
