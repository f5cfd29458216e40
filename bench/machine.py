"""The machine that a measurement is taken on."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe_machine(folder: Path, *, peer: bool = False) -> dict[str, Any]:
    """The facts that measured numbers depend on: processor, memory, the disk below `folder`, versions."""
    from ..parity.report.circumstances import cpu_model  # the floor of parity: processes that measure do without

    kind, device = _file_system(folder)
    libraries = ("cascadekit", "numpy", *(("diffusers", "torch", "safetensors", "accelerate") if peer else ()))
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file_system": kind,
        "device": device,
        "free_bytes": shutil.disk_usage(folder).free,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": {name: found for name in libraries if (found := _version(name))},
        "cp": subprocess.run(("cp", "--version"), capture_output=True, text=True, check=False).stdout.split("\n")[0],
        "load_average": {"before": os.getloadavg()[0]},
    }


def _file_system(folder: Path) -> tuple[str, str]:
    """Type and device of the file system `folder` lies on."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        mounts = []
    for mount in mounts:
        fields, _, rest = mount.partition(" - ")
        if fields.split()[2] == number:
            kind, name = rest.split()[:2]
            return kind, name
    return "unknown", number


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
