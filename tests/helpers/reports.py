"""Parity reports made up of random arrays, for tests of what is written about them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadekit.parity.compare import Comparison, compare
from cascadekit.parity.report.build import Circumstances, build_report
from cascadekit.schemas.bundle import Manifest
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.report import DepthEntry, FileEntry, ParityReport, RangeEntry
from cascadekit.schemas.stages import Stage

Images = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Run:
    """What a verification found."""

    comparisons: tuple[Comparison, ...]
    engine: str = "onnxruntime"
    reference: str = "torch"
    image_psnr: float | None = 60.0
    image_psnr_needed: float = 50.0
    left_out: tuple[str, ...] = ()

    @property
    def image_failed(self) -> bool:
        return self.image_psnr is not None and self.image_psnr < self.image_psnr_needed

    def __bool__(self) -> bool:
        return all(self.comparisons) and not self.image_failed


def comparison(name: str, error: float = 1e-6, tolerance: float = 1e-4, ulp: Precision | None = None) -> Comparison:
    """Of 300 values whose relative L2 is about `error`; infinite values for an infinite one."""
    rng = np.random.default_rng(sum(map(ord, name)))
    reference = rng.standard_normal((3, 100))
    noise = rng.standard_normal((3, 100)) * error if np.isfinite(error) else np.where(reference > 2, np.inf, 0)
    return compare(name, reference + noise, reference, tolerance, ulp)


def healthy() -> tuple[Comparison, ...]:
    return (
        comparison("text_encoder: pooled (batch 3)"),
        comparison("prior: noise_pred (batch 1, height 6, width 6)", 2e-6, ulp=Precision.FP16),
        *(comparison(f"teacher-forced: prior pass {n}, noise_pred", 1e-6 * n) for n in (1, 2, 3, 4)),
        *(comparison(f"trajectory: prior step {n}", 3e-6 * n, 1e-3) for n in (1, 2, 3, 4)),
        *(comparison(f"trajectory: decoder step {n}", 3e-6 * n, 1e-3) for n in (1, 2, 3)),
        comparison("vqgan: images (batch 1)", 0.0),
        comparison("trajectory: image", 1e-5, 1e-3),
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


def report(run: Run, images: Images | None = None, bundle: str = "bundle", **more: str) -> ParityReport:
    """With every section there is."""
    file = FileEntry(role="bundle", path=f"{bundle}/model.onnx", bytes=12345, fingerprint="0" * 64, sha256=None)
    about = Circumstances(
        bundle=bundle,
        command=more.get("command", "cascadekit verify bundle --against model --report report.html"),
        environment={"python": "CPython 3.11", "numpy": np.__version__, **more},
        files=(file,),
        date="2026-01-31T12:00:00+00:00",
    )
    return build_report(run, empty_manifest(), about, images=images, depth=depth(), ranges=ranges())


def noise_images() -> Images:
    rng = np.random.default_rng(0)
    found = rng.random((1, 3, 64, 96), dtype=np.float32)
    return found, np.clip(found + rng.standard_normal(found.shape, dtype=np.float32) * 1e-3, 0, 1)
