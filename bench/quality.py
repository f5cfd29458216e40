"""Measures how often the example model generates what it is asked for, by precision, steps, sampler and guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..converters.checkpoints.example_model import EXAMPLE_MODEL
from ..converters.export.export import export
from ..runtime.cascade import Cascade
from ..schemas.callbacks import Say
from ..schemas.errors import EngineError, UsageError
from .judge.judge import Judgement, has_style, judge
from .judge.prompts import HELD_OUT, SEEN, prompts_of, scenes_to_ask
from .judge.scenes import Icon, Scene
from .process import bench_folder

BATCH = 16  # images that are generated together

Picture = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class QualityChoice:
    """One row of the table: the options of `export`, the engine, and the settings of `Cascade.generate`."""

    exported: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "onnxruntime"
    settings: Mapping[str, Any] = field(default_factory=dict)


def _steps(prior: int, decoder: int) -> QualityChoice:
    return QualityChoice(settings={"prior_steps": prior, "decoder_steps": decoder})


def _gdf(**settings: float) -> QualityChoice:
    return QualityChoice(settings={"sampler": "gdf", **settings})


# ONNX Runtime has no bf16 kernels on CPUs, and OpenVINO computes bf16 graphs wrongly. PyTorch has bf16 anywhere.
VARIANTS: Mapping[str, Mapping[str, QualityChoice]] = {
    "precision": {
        "fp32": QualityChoice(),
        "fp16": QualityChoice({"precision": "fp16"}),
        "fp16, fp16-safe": QualityChoice({"precision": "fp16", "fp16_safe": "auto"}),
        "bf16": QualityChoice(engine="torch-bf16"),
        "int8": QualityChoice({"quantize": "int8"}),
        "int4": QualityChoice({"quantize": "int4"}),
        "int8-dynamic": QualityChoice({"quantize": "int8-dynamic"}),
        "fp8": QualityChoice({"quantize": "fp8"}),
    },
    "steps": {"20 + 10": _steps(20, 10), "10 + 5": _steps(10, 5), "6 + 4": _steps(6, 4), "4 + 2": _steps(4, 2)},
    "sampler": {"ddpm-wuerstchen": QualityChoice(), "gdf": _gdf()},
    "guidance": {f"{value}": QualityChoice(settings={"prior_guidance": float(value)}) for value in (1, 2, 3, 4, 6, 8)},
    "rescale": {
        f"gdf, guidance {guidance}, rescale {rescale}": _gdf(prior_guidance=float(guidance), rescale=rescale)
        for guidance in (4, 8)
        for rescale in (0.0, 0.7)
    },
}


@dataclass(frozen=True)
class Shares:
    """Right pictures of each kind, out of those that were asked for; `styles` counts icons in the style asked for."""

    right: Mapping[str, int]
    asked: Mapping[str, int]
    styles: int = 0
    wrong: Sequence[str] = ()

    def share(self, kinds: Sequence[str]) -> float:
        """The share of right pictures over `kinds`, from 0 to 1."""
        return sum(self.right[kind] for kind in kinds) / sum(self.asked[kind] for kind in kinds)

    def cells(self) -> list[str]:
        """The columns of a table: seen, held out, icons, shapes, pairs, icons in the right style, pictures."""
        groups = (SEEN, HELD_OUT, *([f"seen {kind}", f"held-out {kind}"] for kind in ("icons", "shapes", "pairs")))
        icons = sum(self.asked[kind] for kind in groups[2])
        return [
            *(f"{self.share(kinds):.0%}" for kinds in groups),
            f"{self.styles / icons:.0%}",
            f"{sum(self.asked.values())}",
        ]

    def to_json(self) -> dict[str, Any]:
        """All counts, and the shares of what was seen in training and of what was held out."""
        return {**asdict(self), "seen": self.share(SEEN), "held_out": self.share(HELD_OUT)}


@dataclass(frozen=True)
class QualityReport:
    """The shares of every variant, by group; `missing` names variants that cannot run here, and why."""

    machine: dict[str, Any]
    each: int
    shares: dict[str, dict[str, Shares]]
    missing: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        shares = {group: {name: found.to_json() for name, found in rows.items()} for group, rows in self.shares.items()}
        return {"machine": self.machine, "each": self.each, "shares": shares, "missing": self.missing}


def bench_quality(
    work: Path, *, model: Path | None = None, groups: Sequence[str] = tuple(VARIANTS), each: int = 32, say: Say
) -> QualityReport:
    """Judge `each` pictures of each kind in every variant of `groups`; bundles are made in a folder inside `work`.

    `model` are the files of another training; None takes those that cascadekit ships."""
    shares: dict[str, dict[str, Shares]] = {}
    missing: dict[str, str] = {}
    with bench_folder(work) as (folder, machine):
        bundles = _Bundles(model or EXAMPLE_MODEL, folder)
        for group in groups:
            shares[group] = {}
            for name, variant in VARIANTS[group].items():
                try:
                    found = bundles.judged(variant, each)
                except (UsageError, EngineError) as error:
                    missing[f"{group}: {name}"] = str(error)
                    continue
                shares[group][name] = found
                say(f"{group}: {name}: seen {found.share(SEEN):.0%}, held out {found.share(HELD_OUT):.0%}")
    return QualityReport(machine, each, shares, missing)


class _Bundles:
    """Exports a bundle for each set of export options once, and judges each variant once."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.bundles: dict[str, Path] = {}
        self.shares: dict[str, Shares] = {}

    def judged(self, variant: QualityChoice, each: int) -> Shares:
        key = repr(variant)
        if key not in self.shares:
            with Cascade.open(self._bundle(variant.exported), engine=variant.engine) as cascade:
                self.shares[key] = judge_cascade(cascade, scenes_to_ask(each), **variant.settings)
        return self.shares[key]

    def _bundle(self, options: Mapping[str, Any]) -> Path:
        key = repr(options)
        if key not in self.bundles:
            bundle = self.folder / f"bundle-{len(self.bundles)}"
            export(self.model, bundle, **options)
            self.bundles[key] = bundle
        return self.bundles[key]


def judge_cascade(cascade: Cascade, asked: Mapping[str, Sequence[Scene]], **settings: Any) -> Shares:
    """Generate a picture of every scene and judge it. `settings` are keywords of `Cascade.generate`."""
    right: dict[str, int] = {}
    styles, wrong = 0, []
    for kind, scenes in asked.items():
        pictures = generated(cascade, scenes, **settings)
        verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        right[kind] = sum(verdict.right for verdict in verdicts)
        wrong += [_wrong(scene, verdict) for scene, verdict in zip(scenes, verdicts, strict=True) if not verdict.right]
        styles += sum(has_style(p, scene) for p, scene in zip(pictures, scenes, strict=True) if isinstance(scene, Icon))
    return Shares(right, {kind: len(scenes) for kind, scenes in asked.items()}, styles, wrong)


def _wrong(scene: Scene, verdict: Judgement) -> str:
    return f"asked: {prompts_of([scene])[0]}; seen: {verdict.seen}"


def generated(cascade: Cascade, scenes: Sequence[Scene], **settings: Any) -> list[Picture]:
    """A picture of every scene, (h, w, 3) levels; a batch's seed is the place of its first scene."""
    made: list[Picture] = []
    prompts = prompts_of(scenes)
    for at in range(0, len(prompts), BATCH):
        made += [np.asarray(image) for image in cascade.generate(prompts[at : at + BATCH], seed=at, **settings).images]
    return made
