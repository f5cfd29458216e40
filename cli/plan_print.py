"""Prints the GPU engines of a bundle, for `inspect`."""

from typing import TYPE_CHECKING

from .console import say, show_table

if TYPE_CHECKING:
    from ..converters.contents import BundleContents
    from ..schemas.plan_entries import PlanEntry

PLAN_COLUMNS = ("stage", "graph", "for", "precision", "images: min, opt, max", "by", "MB", "s", "plan", "")


def show_plans(found: "BundleContents") -> None:
    """Print a table of the bundle's engines, with the state of each; a hint when there are none."""
    plans = [(stage, plan) for stage, entry in found.manifest.stages.items() for plan in entry.plans]
    if plans:
        rows = (_plan_row(stage, plan, found.plan_states[plan.path].text) for stage, plan in plans)
        show_table("", PLAN_COLUMNS, rows)
    else:
        say("no GPU engines; make them with `cascadekit build`")


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
