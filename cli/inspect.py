"""The command `inspect`: checkpoints, LoRAs, and bundles with their GPU engines."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .console import FAILED, note, say, show_table
from .help import HelpfulCommand
from .options import PATH

if TYPE_CHECKING:
    from ..converters.checkpoints.component import Component
    from ..converters.contents import BundleContents, CheckpointContents
    from ..schemas.manifest import StageEntry
    from ..schemas.plan_entries import PlanEntry

COMPONENT_COLUMNS = ("component", "layout", "variant", "dtype", "parameters", "problems", "file")
STAGE_COLUMNS = ("stage", "variant", "precision", "target", "quantization", "graphs", "weights", "MB")
PLAN_COLUMNS = ("stage", "graph", "for", "precision", "images: min, opt, max", "by", "MB", "s", "plan", "")


@click.command(cls=HelpfulCommand)
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what a file or folder holds.

    Only headers are read, also on the Hub: cascadekit inspect hf://stabilityai/stable-cascade
    A bundle is shown with its GPU engines, a LoRA as `cascadekit lora inspect` shows it.
    Exit code 1 when tensors are missing or unexpected, or a GPU engine is damaged.

    Example: cascadekit inspect stage_c_lite_bf16.safetensors
    """
    from ..converters.contents import BundleContents, LoraContents, contents_of

    found = contents_of(path, note)
    if as_json:
        say(json.dumps(found.to_json(), indent=2))
    elif isinstance(found, BundleContents):
        _show_bundle(found)
    elif isinstance(found, LoraContents):
        from .lora.inspect import show_facts

        show_facts(found.facts)
    else:
        _show_components(found)
    if not found:
        raise SystemExit(FAILED)


def _show_components(found: "CheckpointContents") -> None:
    from ..converters.checkpoints.provenance import licence_fields
    from ..schemas.layouts import can_become

    show_table("", COMPONENT_COLUMNS, map(_component_row, found.components))
    for component in found.components:
        say(f"{component.stage}: can become {', '.join(can_become(component.stage))}")
        for line in component.problems.lines():
            say(f"{component.path}: {line}")
        for key, text in licence_fields(component.metadata).items():
            say(f"{component.stage}: {key}: {text}")


def _component_row(c: "Component") -> tuple[str, ...]:
    problems = str(sum(map(len, vars(c.problems).values()))) if c.problems else "none"
    return c.stage, c.layout, c.variant, ", ".join(c.dtypes), f"{c.parameters:,}", problems, str(c.path)


def _show_bundle(found: "BundleContents") -> None:
    manifest = found.manifest
    width, height = manifest.default_size
    loras = ", ".join(f"{lora.name} ({lora.strength:g})" for lora in manifest.lora.loras) if manifest.lora else "none"
    say(f"bundle by {manifest.created_by}; {width}x{height} by default; vqgan scale {manifest.vqgan_scale}")
    say(f"LoRAs merged in: {loras}")
    show_table("", STAGE_COLUMNS, (_stage_row(name, entry) for name, entry in manifest.stages.items()))
    plans = [(stage, plan) for stage, entry in manifest.stages.items() for plan in entry.plans]
    if plans:
        show_table(
            "", PLAN_COLUMNS, (_plan_row(stage, plan, found.plan_states[plan.path].text) for stage, plan in plans)
        )
    else:
        say("no GPU engines; make them with `cascadekit build`")


def _stage_row(stage: str, entry: "StageEntry") -> tuple[str, ...]:
    size = sum(file.bytes for file in entry.files) / 1e6
    graphs = ", ".join(entry.graphs)
    kinds = (entry.variant, entry.precision, entry.target, entry.quantization)
    return (stage, *map(str, kinds), graphs, entry.weights, f"{size:.1f}")


def _plan_row(stage: str, plan: "PlanEntry", state: str) -> tuple[str, ...]:
    from ..schemas.profiles import shown

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
