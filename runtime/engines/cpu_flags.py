"""What the CPU can multiply, from the features that Linux lists; asking torch would take seconds."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last one is that of Arm

BF16_CONVERTED = frozenset({"avx_ne_convert"})  # of x86 CPUs without AVX-512 that OpenVINO computes bf16 on


def cpu_flags(cpu_info: Path | None = None) -> frozenset[str]:
    """The CPU's features as Linux names them; empty on other systems."""
    try:
        lines = (cpu_info or CPUINFO).read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, ()))


def multiplies_bf16() -> bool:
    """True if the CPU multiplies bf16. On others torch computes it, slower than float32."""
    return bool(BF16 & cpu_flags())


def may_compute_bf16() -> bool:
    """False if no engine can gain from bf16 here. True where Linux does not list the CPU's features."""
    flags = cpu_flags()
    return not flags or bool((BF16 | BF16_CONVERTED) & flags)
