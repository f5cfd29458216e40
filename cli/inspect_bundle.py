"""What `inspect` says of an exported bundle: its stages and its GPU engines, from the manifest and plan headers."""

import json
from pathlib import Path
from typing import Any

from ..runtime.engines.tensorrt.plan_header import find_contradiction
from ..schemas.bundle import MANIFEST_NAME, PlanEntry, StageEntry
from ..schemas.profiles import shown
from ..storage.bundle import Bundle, open_bundle
from .console import say, show_table

STAGE_COLUMNS = ("stage", "variant", "precision", "target", "quantization", "graphs", "weights", "MB")
PLAN_COLUMNS = ("stage", "graph", "for", "precision", "images: least, likeliest, largest", "by", "MB", "s", "plan", "")
GOOD = "ok"


def is_bundle(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file()


def show_bundle(path: Path, *, as_json: bool) -> bool:
    """Print what is known of the bundle at `path`; whether its plans are what the manifest says. Raises CheckpointError
    for a manifest that is none."""
    bundle = open_bundle(path)
    states = {
        plan.path: _state(bundle, entry, plan) for entry in bundle.manifest.stages.values() for plan in entry.plans
    }
    if as_json:
        say(json.dumps(_content(bundle, states), indent=2))
    else:
        _print(bundle, states)
    return all(good for good, _ in states.values())


def _state(bundle: Bundle, entry: StageEntry, plan: PlanEntry) -> tuple[bool, str]:
    """Whether a plan is what the manifest says, and what to know of it."""
    problem = find_contradiction(bundle.root / plan.path, plan)
    if problem:
        return False, f"{problem}; build it again"
    return True, GOOD if entry.is_current(plan) else "of other weights than the stage has now"


def _content(bundle: Bundle, states: dict[str, tuple[bool, str]]) -> dict[str, Any]:
    content = bundle.manifest.model_dump(mode="json")
    for stage in content["stages"].values():
        for plan in stage["plans"]:
            plan["state"] = states[plan["path"]][1]
    return content


def _print(bundle: Bundle, states: dict[str, tuple[bool, str]]) -> None:
    manifest = bundle.manifest
    width, height = manifest.default_size
    loras = ", ".join(f"{lora.name} ({lora.strength:g})" for lora in manifest.lora.loras) if manifest.lora else "none"
    say(f"bundle by {manifest.created_by}; {width}x{height} by default; vqgan scale {manifest.vqgan_scale}")
    say(f"LoRAs merged in: {loras}")
    show_table("", STAGE_COLUMNS, (_stage_row(name, entry) for name, entry in manifest.stages.items()))
    plans = [(stage, plan) for stage, entry in manifest.stages.items() for plan in entry.plans]
    if plans:
        show_table("", PLAN_COLUMNS, (_plan_row(stage, plan, states[plan.path][1]) for stage, plan in plans))
    else:
        say("no GPU engines; make them with `cascadekit build`")


def _stage_row(stage: str, entry: StageEntry) -> tuple[str, ...]:
    size = sum(file.bytes for file in entry.files) / 1e6
    graphs = ", ".join(entry.graphs)
    kinds = (entry.variant, entry.precision, entry.target, entry.quantization)
    return (stage, *map(str, kinds), graphs, entry.weights, f"{size:.1f}")


def _plan_row(stage: str, plan: PlanEntry, state: str) -> tuple[str, ...]:
    sizes = "; ".join(
        shown(profile.opt)
        if profile.min == profile.opt == profile.max
        else ", ".join(map(shown, (profile.min, profile.opt, profile.max)))
        for profile in plan.profiles
    )
    return (
        stage,
        plan.graph,
        " ".join(plan.targets) or (f"{plan.device.name} ({plan.device.capability})" if plan.device else ""),
        plan.precision,
        sizes,
        f"{plan.backend} {plan.backend_version}",
        f"{plan.bytes / 1e6:.1f}",
        f"{plan.seconds:.1f}",
        plan.path,
        state,
    )
