"""Chooses the packages of a bundle that can be loaded here: by torch, device, weights' names and origin."""

import hashlib
import platform
from functools import partial

import torch

from ....schemas.manifest import StageEntry
from ....schemas.plan_entries import DeviceEntry, PlanEntry
from ....schemas.precision import Backend
from ....storage.bundle import Bundle
from ..cpu_flags import cpu_flags
from ..plan_choice import CPU_CAPABILITY, RunnablePlans, targets_of
from .built_here import NOT_BUILT_HERE, is_built_here
from .device import HOST, require_device

BACKEND: Backend = "aotinductor"
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


def packages_on(bundle: Bundle, device: str) -> RunnablePlans:
    """The packages of `bundle` that can be loaded on `device` here, "cpu" or "cuda"; see `refusal`.

    Raises EngineError when torch finds no GPU."""
    here = present_device(device)
    return RunnablePlans(bundle, BACKEND, here.capability, partial(refusal, device=here))


def refusal(entry: StageEntry, plan: PlanEntry, *, device: DeviceEntry) -> str | None:
    """Why the package `plan` of a stage cannot be loaded on `device`; None when it can."""
    if not entry.is_current(plan):
        return "was built from another graph than the bundle has now"
    if plan.backend_version != torch.__version__:
        return f"was built with torch {plan.backend_version}, installed is {torch.__version__}"
    if device.capability not in targets_of(plan):
        return f"was built for {', '.join(targets_of(plan))}, this is {device.capability}"
    if device.capability == CPU_CAPABILITY and plan.device and plan.device != device:
        return f"was built for a CPU with other features: {plan.device.name}, this is {device.name}"
    if not is_built_here(plan.sha256):
        return NOT_BUILT_HERE
    return None
