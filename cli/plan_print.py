"""Prints the GPU engines of a bundle, its sources and verdicts, for `inspect`."""

from typing import TYPE_CHECKING

from ..schemas.messages import listed
from ..schemas.passport_keys import shown_source
from .console import say, say_wrapped, show_table

if TYPE_CHECKING:
    from ..converters.contents import BundleContents
    from ..schemas.manifest import Manifest
    from ..schemas.plan_entries import PlanEntry

PLAN_COLUMNS = ("stage", "graph", "for", "precision", "images: min, opt, max", "by", "MB", "s", "plan", "")
UNPROVED = {"never": "not verified", "stale": "changed since they were verified"}  # by verdicts of `schemas.verdicts`


def show_plans(found: "BundleContents") -> None:
    """Print a table of the bundle's engines, with the state of each; a hint when there are none."""
    plans = [(stage, plan) for stage, entry in found.manifest.stages.items() for plan in entry.plans]
    if plans:
        rows = (_plan_row(stage, plan, found.plan_states[plan.path].text) for stage, plan in plans)
        show_table("", PLAN_COLUMNS, rows)
    else:
        say("no GPU engines; make them with `cascadekit build`")


def show_verdicts(manifest: "Manifest") -> None:
    """Print what a bundle was made of, and what its verifications found."""
    from ..schemas.verdicts import stage_verdicts

    found = {source.fingerprint: source for stage in manifest.stages.values() for source in stage.sources}
    sources = [shown_source(source.name, source.fingerprint) for source in found.values()]
    if sources:
        say_wrapped(f"made from {listed(sources, 8)}")
    for entry in manifest.parity:
        image = "" if entry.image_psnr_db is None else f", image {entry.image_psnr_db:.1f} dB"
        result = "agrees" if entry.passed else "does not agree"
        about = f"{entry.engine} {result} with {entry.reference} in {', '.join(entry.stages)}{image}"
        say_wrapped(f"verified {entry.date}: {about}")
    now = stage_verdicts(manifest)
    for verdict, said in UNPROVED.items():
        if stages := [stage for stage, found in now.items() if found == verdict]:
            say_wrapped(f"{said}: {', '.join(stages)}; cascadekit verify BUNDLE --against MODEL")


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
