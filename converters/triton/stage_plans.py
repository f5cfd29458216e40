"""Chooses the plans of a bundle that Triton's TensorRT backend runs: one for each stage and kind of GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.engines.plan_choice import build_command, check_plan
from ...schemas.callbacks import Say
from ...schemas.errors import EngineError
from ...schemas.manifest import MAIN_GRAPH, StageEntry
from ...schemas.plan_entries import PlanEntry
from ...schemas.stages import Stage
from ...storage.bundle import Bundle
from .config_text import Word, string_map


@dataclass(frozen=True)
class StagePlans:
    """The plans of a stage by compute capability ("sm89"), and their files by name."""

    plans: dict[str, PlanEntry]
    files: dict[str, Path]

    @property
    def least(self) -> int:
        """The least batch that all plans take."""
        return max(min(sizes[0] for sizes in _batches(plan)) for plan in self.plans.values())

    @property
    def most(self) -> int:
        """The largest batch that all plans take."""
        return min(max(sizes[1] for sizes in _batches(plan)) for plan in self.plans.values())

    def config(self) -> dict[str, Any]:
        """The fields of the model's config that name files and optimisation profiles."""
        profiles = max(len(plan.profiles) for plan in self.plans.values())
        names = {_compute_capability(sm): name for sm, name in zip(self.plans, self.files, strict=True)}
        group: dict[str, Any] = {"count": 1, "kind": Word("KIND_GPU")}
        if profiles > 1:
            group["profile"] = [str(number) for number in range(profiles)]
        return {"cc_model_filenames": string_map(names), "instance_group": group}


def find_plans(bundle: Bundle, stages: Sequence[Stage], say: Say) -> dict[Stage, StagePlans]:
    """The newest plan of each stage's whole graph for every GPU that all stages have one for.

    Raises EngineError with the command that builds what is missing, or when a plan's file is damaged."""
    found = {stage: _newest(bundle.entry(stage)) for stage in stages}
    missing = [stage for stage, plans in found.items() if not plans]
    if missing:
        commands = "; ".join(build_command(bundle, stage, "tensorrt", (), MAIN_GRAPH) for stage in missing)
        raise EngineError(
            f"{bundle.root}: no current tensorrt plan of the whole graph of {', '.join(missing)}; build one: {commands}"
        )
    common = [sm for sm in found[stages[0]] if all(sm in plans for plans in found.values())]
    if not common:
        have = "; ".join(f"{stage} {', '.join(plans)}" for stage, plans in found.items())
        raise EngineError(f"{bundle.root}: its plans are for different GPUs: {have}; build all stages on one GPU")
    versions = sorted({plans[sm].backend_version for plans in found.values() for sm in common})
    say(f"plans are of TensorRT {', '.join(versions)}; the server's TensorRT must have the same version")
    return {stage: _files(bundle, stage, {sm: plans[sm] for sm in common}) for stage, plans in found.items()}


def _newest(entry: StageEntry) -> dict[str, PlanEntry]:
    return {
        plan.device.capability: plan
        for plan in entry.plans
        if (plan.backend, plan.graph) == ("tensorrt", MAIN_GRAPH) and plan.device and entry.is_current(plan)
    }


def _files(bundle: Bundle, stage: Stage, plans: dict[str, PlanEntry]) -> StagePlans:
    files = {f"model_{sm}.plan": check_plan(bundle, stage, plan) for sm, plan in plans.items()}
    return StagePlans(plans, files)


def _batches(plan: PlanEntry) -> list[tuple[int, int]]:
    """The least and the largest batch of each profile; the first dim of every port is the batch."""
    ports = [next(iter(profile.ports.values())) for profile in plan.profiles]
    return [(shapes.min[0], shapes.max[0]) for shapes in ports]


def _compute_capability(sm: str) -> str:
    """Triton's name of a GPU's kind.

    Examples:
        >>> _compute_capability("sm89"), _compute_capability("sm120")
        ('8.9', '12.0')
    """
    digits = sm.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"
