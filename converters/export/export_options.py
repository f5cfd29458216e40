"""The options of an export, in one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ...schemas.choices import one_of, require_one_of, stages_of
from ...schemas.dtypes import DTYPE_OPTIONS
from ...schemas.errors import UsageError
from ...schemas.fp16 import MAX_EXPONENT
from ...schemas.limits import VQGAN_SCALES
from ...schemas.messages import changed_fields, known_fields
from ...schemas.precision import Precision, Target
from ...schemas.quantization import BUNDLE_SCHEMES, RULES, Quantization, Scheme, bundle_scheme
from ...schemas.stages import Stage

WeightsMode = Literal["auto", "link", "copy"]
Fp16Safe = Literal["auto", "off"] | int | None


@known_fields
@dataclass(frozen=True, repr=False)
class ExportOptions:
    """The options of `export`; names and defaults are those of the command line.

    Strings are accepted in place of enums:

        export("model", "bundle", ExportOptions(precision="fp16", stages=["prior"]))

    Attributes:
        stages: Stages to export; empty: every stage that the model has.
        weights: "auto": clones of the model's files if the file system clones, else copies; "copy"; "link".
        precision: The type that graphs compute in.
        precisions: The precision of single stages, in place of `precision`.
        target: The runtime whose operators the graphs may use.
        storage: The precision that weights are stored in; None: unchanged for fp32 graphs, else as the graph computes.
        fp16_safe: Exponents of prior, decoder and vqgan in fp16: "auto" measures them, a number is used for all
            streams, "off" is without any. None is "auto" where ONNX Runtime is installed, else "off".
        calibration: A file of what "auto" measured; it is used if it exists, else written.
        quantize: How Linears are stored in 8 or 4 bits, if their error stays small.
        quantize_threshold: Largest relative error of a quantised Linear; None: twice the error of normal numbers.
        controlnet: Whether the prior has inputs for the residuals of a ControlNet.
        hash: Whether the SHA-256 of weights is recorded.
        loras: LoRA files and their strengths, to be merged into the weights.
        text_encoder: A file or folder of the CLIP bigG text encoder, if the model holds none.
        vqgan_scale: Latent scale of the vqgan; None: the scale that the model's layout implies.
        force: Whether an existing bundle is replaced.

    ``weights="link"`` makes hard links if the file system does not clone. No other program opens the graphs then, and
    the model's files must never change in place.

    Raises UsageError for values that are unknown or exclude each other."""

    stages: Sequence[Stage] = ()
    weights: WeightsMode = "auto"
    precision: Precision = Precision.FP32
    precisions: Mapping[Stage, Precision] = field(default_factory=dict)
    target: Target = Target.PORTABLE
    storage: Precision | None = None
    fp16_safe: Fp16Safe = None
    calibration: str | Path | None = None
    quantize: Quantization = Quantization.NONE
    quantize_threshold: float | None = None
    controlnet: bool = False
    hash: bool = True
    loras: Sequence[tuple[str | Path, float]] = ()
    text_encoder: str | Path | None = None
    vqgan_scale: float | None = None
    force: bool = False

    def __repr__(self) -> str:
        return changed_fields(self)

    def __post_init__(self) -> None:
        by_stage = {one_of(Stage, key, "precisions"): value for key, value in self.precisions.items()}
        parsed = {
            "stages": stages_of(self.stages),
            "precision": one_of(Precision, self.precision, "precision"),
            "precisions": {stage: one_of(Precision, value, "precisions") for stage, value in by_stage.items()},
            "target": one_of(Target, self.target, "target"),
            "storage": self.storage if self.storage is None else one_of(Precision, self.storage, "storage"),
            "quantize": one_of(Quantization, self.quantize, "quantize"),
        }
        for name, value in parsed.items():
            object.__setattr__(self, name, value)
        require_one_of(get_args(WeightsMode), self.weights, "weights")
        if self.fp16_safe not in (None, "auto", "off", *range(MAX_EXPONENT + 1)):
            raise UsageError(f'fp16_safe={self.fp16_safe!r}: expected "auto", "off", or 0 to {MAX_EXPONENT}')
        for lora in [self.loras] if isinstance(self.loras, str | Path) else self.loras:
            if isinstance(lora, str | Path) or not isinstance(lora, Sequence) or len(lora) != 2:
                raise UsageError(f'loras={lora!r}: expected a file and a strength, as in ("style.safetensors", 1.0)')
        self._require_quantization()
        least, most = VQGAN_SCALES
        if self.vqgan_scale is not None and not least <= self.vqgan_scale <= most:
            raise UsageError(
                f"vqgan_scale={self.vqgan_scale:g}: expected a number from {least:g} to {most:g}, such as 0.3764"
            )

    def _require_quantization(self) -> None:
        if self.quantize is Quantization.NONE:
            if self.quantize_threshold is not None:
                raise UsageError(
                    f"quantize_threshold={self.quantize_threshold:g} is for quantised weights, and quantize is none; "
                    f"set quantize too, to one of {', '.join(BUNDLE_SCHEMES)}"
                )
            return
        if self.quantize_threshold is not None and not self.quantize_threshold > 0:
            raise UsageError(f"quantize_threshold={self.quantize_threshold:g}: expected a number above 0, such as 0.05")
        if self.weights == "link":
            raise UsageError(
                'weights="link" keeps the weights of the model, and quantising changes them; use weights="auto"'
            )
        bundle_scheme(self.quantize, self.target)  # raises for a target that has no operators for it

    @property
    def scheme(self) -> Scheme:
        """How quantised weights are stored for `target`."""
        return bundle_scheme(self.quantize, self.target)

    def precision_of(self, stage: Stage) -> Precision:
        """The type that the graphs of `stage` compute in."""
        return self.precisions.get(stage, self.precision)

    def quantizes(self, stage: Stage) -> bool:
        """True when Linears of `stage` may be stored in 8 or 4 bits."""
        return self.quantize is not Quantization.NONE and stage in RULES

    def storage_of(self, stage: Stage) -> str | None:
        """The safetensors dtype (F32, BF16, F16) to store the weights of `stage` in; None: as the model has them."""
        precision = self.precision_of(stage)
        return DTYPE_OPTIONS[self.storage or ("keep" if precision is Precision.FP32 else precision)]

    def require_stages(self, stages: Sequence[Stage]) -> None:
        """Raises UsageError for an option that applies to none of `stages`, the stages that are exported."""
        measured = {Stage.PRIOR, Stage.DECODER, Stage.VQGAN} & set(stages)
        in_fp16 = any(self.precision_of(stage) is Precision.FP16 for stage in measured)
        if self.fp16_safe is not None and not in_fp16:
            safe = f'"{self.fp16_safe}"' if isinstance(self.fp16_safe, str) else self.fp16_safe
            raise UsageError(
                f'fp16_safe={safe} is for a prior, decoder or vqgan in fp16; add precision="fp16", or leave it out'
            )
        if self.calibration is not None and (not in_fp16 or self.fp16_safe == "off"):
            raise UsageError(
                f'calibration="{self.calibration}" is for a prior, decoder or vqgan in fp16 within its range; '
                'add precision="fp16" without fp16_safe="off", or leave it out'
            )
        if self.controlnet and Stage.PRIOR not in stages:
            raise UsageError("controlnet=True is for the prior, which is not exported here; export it too")
        if self.vqgan_scale is not None and Stage.VQGAN not in stages:
            raise UsageError(f"vqgan_scale={self.vqgan_scale:g} is for the vqgan, which is not exported; export it too")
        if self.quantize is not Quantization.NONE and not any(map(self.quantizes, stages)):
            raise UsageError(
                f'quantize="{self.quantize}" is for {", ".join(RULES)}, and none of them is exported here; leave it out'
            )
        absent = [stage for stage in self.precisions if stage not in stages]
        if absent:
            raise UsageError(
                f"a precision is given for the {absent[0]}, which is not exported; exported are {', '.join(stages)}"
            )
