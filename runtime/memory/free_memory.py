"""The memory that is free on this machine, as Linux reports it."""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that the machine and the process's control group leave free; None when the system does not report them."""
    machine = byte_fields(Path("/proc/meminfo")).get("MemAvailable")
    return min((found for found in (machine, _group_free()) if found is not None), default=None)


def byte_fields(path: Path) -> dict[str, int]:
    """The sizes in a file such as /proc/meminfo or /proc/PID/status, in bytes by name; empty without that file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def _group_free() -> int | None:
    """Bytes that a container's memory limit leaves free; pages of files count as free."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
