"""Chooses the packages of a bundle that can be loaded here: by torch, device, weights' names and origin."""

import hashlib
import platform

import torch

from ....schemas.errors import EngineError
from ....schemas.manifest import MAIN_GRAPH, StageEntry
from ....schemas.plan_entries import DeviceEntry, PlanEntry
from ....schemas.stages import EVERY_IMAGE, Stage
from ....storage.bundle import Bundle
from ..cpu_flags import cpu_flags
from .built_here import NOT_BUILT_HERE, is_built_here
from .device import HOST, require_device

BACKEND = "aotinductor"
CPU_CAPABILITY = "cpu"
FLAG_DIGITS = 8


def present_device(device: str) -> DeviceEntry:
    """The CPU or the GPU of this machine as packages name it; a package runs on an equal one only.

    A package for the CPU uses all its features. The name therefore ends with a digest of their list. Raises EngineError
    when torch finds no GPU."""
    if device == HOST:
        flags = " ".join(sorted(cpu_flags())) or platform.processor()
        digest = hashlib.sha256(flags.encode()).hexdigest()[:FLAG_DIGITS]
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest}"
        return DeviceEntry(name=name, capability=CPU_CAPABILITY)
    require_device(device, BACKEND)
    major, minor = torch.cuda.get_device_capability()
    return DeviceEntry(name=torch.cuda.get_device_name(), capability=f"sm{major}{minor}")


def build_command(bundle: Bundle, stage: Stage, device: str) -> str:
    """The command that builds packages of `stage` for `device`."""
    on_gpu = "" if device == HOST else f" --device {device}"
    return f"cascadekit build {bundle.root} --backend {BACKEND} --stage {stage}{on_gpu}"


def refusal(entry: StageEntry, plan: PlanEntry, device: DeviceEntry) -> str | None:
    """Why the package `plan` of a stage cannot be loaded on `device`; None when it can."""
    if not entry.is_current(plan):
        return "was built from another graph than the bundle has now"
    if plan.backend_version != torch.__version__:
        return f"was built with torch {plan.backend_version}, installed is {torch.__version__}"
    if plan.device is None or plan.device.capability != device.capability:
        return f"was built for {plan.device.capability if plan.device else 'no device'}, this is {device.capability}"
    if device.capability == CPU_CAPABILITY and plan.device != device:
        return f"was built for a CPU with other features: {plan.device.name}, this is {device.name}"
    if not is_built_here(plan.sha256):
        return NOT_BUILT_HERE
    return None


def loadable_packages(bundle: Bundle, stage: Stage, graph: str, device: str) -> tuple[PlanEntry, ...]:
    """The packages of a graph that can be loaded here, the newest first.

    Raises EngineError, with the reason and the command that builds one, when there is none."""
    entry, here = bundle.entry(stage), present_device(device)
    command = build_command(bundle, stage, device)
    plans = [plan for plan in reversed(entry.plans) if (plan.backend, plan.graph) == (BACKEND, graph)]
    if not plans:
        raise EngineError(f"{stage}: the bundle has no {BACKEND} package of its graph {graph!r}; make one: {command}")
    loadable = tuple(plan for plan in plans if refusal(entry, plan, here) is None)
    if not loadable:
        raise EngineError(f"{stage}: its package {plans[0].path} {refusal(entry, plans[0], here)}; make one: {command}")
    return loadable


def graphs_with_packages(entry: StageEntry, device: DeviceEntry) -> tuple[str, ...]:
    """The graphs of a stage that have a package for `device`, in the manifest's order."""
    plans = [plan for plan in entry.plans if plan.backend == BACKEND]
    loadable = {plan.graph for plan in plans if refusal(entry, plan, device) is None}
    return tuple(graph for graph in entry.graphs if graph in loadable)


def has_packages(bundle: Bundle, device: str) -> bool:
    """True if every stage that `generate` needs has packages that can be loaded on `device` here."""
    try:
        here = present_device(device)
    except EngineError:
        return False
    entries = [bundle.manifest.stages.get(stage) for stage in EVERY_IMAGE]
    return all(entry is not None and MAIN_GRAPH in graphs_with_packages(entry, here) for entry in entries)
