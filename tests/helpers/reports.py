"""Parity reports made up of random arrays, for tests of what is written about them."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cascadekit.parity.compare import Kind, Subject, compare
from cascadekit.parity.report.circumstances import Circumstances
from cascadekit.parity.report.write_report import build_report
from cascadekit.parity.results import Report
from cascadekit.schemas.manifest import Manifest
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.report import ComparedFile, Comparison, DepthEntry, ParityReport, RangeEntry
from cascadekit.schemas.stages import Stage

Images = tuple[NDArray[np.float32], NDArray[np.float32]]
IMAGE = Subject("trajectory: image", Kind.TRAJECTORY)


def made_report(
    comparisons: tuple[Comparison, ...],
    engine: str = "onnxruntime",
    image_psnr: float | None = 60.0,
    left_out: tuple[str, ...] = (),
) -> Report:
    """A verification that found these comparisons."""
    return Report(engine, "torch", comparisons, image_psnr, image_psnr_needed=50.0, left_out=left_out)


def alone(stage: str, rest: str = "x") -> Subject:
    """An output of a stage's pass by itself."""
    return Subject(f"{stage}: {rest}", Kind.STAGE, Stage(stage))


def along(stage: str, step: int, rest: str = "") -> Subject:
    """The latents after a step of a trajectory."""
    return Subject(f"trajectory: {stage} step {step}{rest}", Kind.TRAJECTORY, Stage(stage), step)


def forced(stage: str, step: int) -> Subject:
    """An output of a teacher-forced pass."""
    return Subject(f"teacher-forced: {stage} pass {step}, noise_pred", Kind.TEACHER_FORCED, Stage(stage), step)


def comparison(
    subject: Subject | str, error: float = 1e-6, tolerance: float = 1e-4, ulp: Precision | None = None
) -> Comparison:
    """A comparison of 300 values whose relative L2 is about `error`; infinite values for an infinite one."""
    name = subject if isinstance(subject, str) else subject.name
    rng = np.random.default_rng(sum(map(ord, name)))
    reference = rng.standard_normal((3, 100))
    noise = rng.standard_normal((3, 100)) * error if np.isfinite(error) else np.where(reference > 2, np.inf, 0)
    return compare(subject, reference + noise, reference, tolerance, ulp)


def healthy() -> tuple[Comparison, ...]:
    return (
        comparison(alone("text_encoder", "pooled (batch 3)")),
        comparison(alone("prior", "noise_pred (batch 1, height 6, width 6)"), 2e-6, ulp=Precision.FP16),
        *(comparison(forced("prior", n), 1e-6 * n) for n in (1, 2, 3, 4)),
        *(comparison(along("prior", n), 3e-6 * n, 1e-3) for n in (1, 2, 3, 4)),
        *(comparison(along("decoder", n), 3e-6 * n, 1e-3) for n in (1, 2, 3)),
        comparison(alone("vqgan", "images (batch 1)"), 0.0),
        comparison(IMAGE, 1e-5, 1e-3),
    )


def empty_manifest() -> Manifest:
    return Manifest(created_by="x", default_size=(64, 64), vqgan_scale=None, tokenizer=None, stages={})


def depth(faulty: int = 25) -> list[DepthEntry]:
    own = [1e-6 * (1 + n % 5) if n != faulty else 2e-3 for n in range(40)]
    return [
        DepthEntry(
            stage=Stage.PRIOR,
            name=f"down_blocks.0.{n} channelwise.4",
            own=error,
            floor=5e-7,
            accumulated=1e-5 if n < faulty else 2e-3,
            faulty=n == faulty,
        )
        for n, error in enumerate(own)
    ]


def ranges() -> list[RangeEntry]:
    return [
        RangeEntry(stage=Stage.PRIOR, name=f"up_blocks.1.{n}", max_abs=10 * 1.4**n, precision=Precision.FP16)
        for n in range(28)
    ]


def report(run: Report, images: Images | None = None, bundle: str = "bundle", **more: str) -> ParityReport:
    """With every section there is."""
    file = ComparedFile(role="bundle", path=f"{bundle}/model.onnx", bytes=12345, fingerprint="0" * 64, sha256=None)
    about = Circumstances(
        bundle=bundle,
        command=more.get("command", "cascadekit verify bundle --against model --report report.html"),
        environment={"python": "CPython 3.11", "numpy": np.__version__, **more},
        files=(file,),
        date="2026-01-31T12:00:00+00:00",
    )
    whole = build_report(replace(run, images=images), empty_manifest(), about)
    return whole.model_copy(update={"depth": tuple(depth()), "ranges": tuple(ranges())})


def noise_images() -> Images:
    rng = np.random.default_rng(0)
    found = rng.random((1, 3, 64, 96), dtype=np.float32)
    return found, np.clip(found + rng.standard_normal(found.shape, dtype=np.float32) * 1e-3, 0, 1)
