"""GPUs that engines are built for: names of cards, the kernels that a GPU lacks, and what to use instead."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from .errors import UsageError
from .precision import Backend, Precision
from .quantization import Quantization

RTX, PLAIN, AOTINDUCTOR = get_args(Backend)

# The compute capabilities TensorRT-RTX compiles for; tensorrt.ComputeCapability has the same names in capitals.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
OLDEST = 75  # NVIDIA's release notes: TensorRT 10.5 left out sm70, which was the last one before
# NVIDIA's guide to TensorRT-RTX: no plan serves both Turing and later GPUs.
ALONE = "sm75"

_KIND = r"(ti|super|d|laptop|gpu|maxq)*"  # of a GeForce

# Names of GPUs in lower case, without "nvidia", "geforce", "tesla", spaces and dashes.
CARDS: Mapping[str, str] = {
    rf"((gtx)?16[356]0|(rtx)?20[5678]0){_KIND}|titanrtx|quadrortx[34568]000|t4g?|t(400|600|1000|1200)": "sm75",
    r"a100(sxm.*|pcie.*|x|\d+gb.*)?|a30x?|a800": "sm80",
    rf"(rtx)?30[5-9]0{_KIND}|(rtx)?a[1-6]\d00|a(2|10g?|10m|16|40)": "sm86",
    rf"(rtx)?40[5-9]0{_KIND}|rtx\d000(ada|adageneration)|l(2|4|20|40|40s|40g)": "sm89",
    rf"(rtx)?50[5-9]0{_KIND}|rtxpro\d000.*": "sm120",
    r"gb10|dgxspark": "sm121",
    rf"(gtx)?10[1-8]0{_KIND}|p4|p40": "sm61",
    r"v100.*|titanv": "sm70",
    r".*orin.*": "sm87",
    r"h(20|100|200|800)(sxm.*|pcie.*|nvl|\d+gb.*)?|gh200": "sm90",
    r"g?b[12]00": "sm100",
    r"g?b300": "sm103",
}
_CAPABILITY = re.compile(r"(?:sm_?|compute_?)?(\d{1,2})\.?(\d)")


def parse_targets(values: Iterable[str]) -> tuple[str, ...]:
    """Return the compute capabilities named in `values`, ascending, each once.

    A value is "sm89", "8.9", "rtx 4090", or several such names with commas between. Raises UsageError for a name that
    is not known."""
    found = {parse_target(name) for value in values for name in value.split(",") if name.strip()}
    return tuple(sorted(found, key=number_of))


def parse_target(name: str) -> str:
    """Return one compute capability, such as "sm89". Raises UsageError for a name that is not known."""
    plain = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())
    for pattern, capability in CARDS.items():
        if re.fullmatch(pattern, plain):
            return capability
    given = _CAPABILITY.fullmatch(plain)
    if given:
        return f"sm{given[1]}{given[2]}"
    raise UsageError(
        f"{name!r}: not a known GPU; expected one of {', '.join(RTX_TARGETS)}, or a card such as 'rtx 4090'"
    )


def number_of(capability: str) -> int:
    """Return 120 for "sm120", which is compute capability 12.0."""
    return int(capability.removeprefix("sm"))


def require_rtx_targets(targets: Iterable[str]) -> None:
    """Raise UsageError for targets that TensorRT-RTX does not build for, and when there are none."""
    targets = tuple(targets)
    if not targets:
        raise UsageError('say which GPUs to build for, such as targets=["sm89"] or targets=["rtx 4090"]')
    wrong = [target for target in targets if target not in RTX_TARGETS]
    if wrong:
        too_old = any(number_of(target) < OLDEST for target in wrong)
        advice = f"TensorRT needs sm{OLDEST} or later, too" if too_old else 'on the GPU itself use backend="tensorrt"'
        raise UsageError(f"{', '.join(wrong)}: TensorRT-RTX builds for {', '.join(RTX_TARGETS)} alone; {advice}")


def group_targets(targets: Iterable[str]) -> list[tuple[str, ...]]:
    """Group `targets` into those that one plan can serve: Turing (sm75) needs a plan of its own."""
    targets = tuple(targets)
    groups = [tuple(t for t in targets if t == ALONE), tuple(t for t in targets if t != ALONE)]
    return [group for group in groups if group]


ANY = 1 << 20  # above every compute capability


@dataclass(frozen=True)
class _Lack:
    """A precision or quantization without kernels on GPUs below a compute capability; in both backends for None."""

    what: Precision | Quantization
    below: int
    reason: str
    instead: Precision | Quantization
    backend: str | None = None


# Each was found in a build with the backend named (TensorRT-RTX 1.7). Such a build fails only after minutes, or the
# finished engine fails when it runs.
_LACKS = (
    _Lack(Precision.BF16, 80, "has no bf16", Precision.FP16),
    _Lack(Precision.FP32, 80, "has no matrix products in fp32", Precision.FP16, RTX),
    _Lack(Quantization.INT4, 80, "has no int4", Quantization.INT8),
    _Lack(Quantization.FP8, 89, "has no fp8", Quantization.INT8),
    _Lack(Quantization.INT8_DYNAMIC, ANY, "has none of its integer products", Quantization.INT8),
)


@dataclass(frozen=True)
class Refusal:
    """Why graphs cannot become an engine for a GPU, and the precision or quantization of graphs that can."""

    reason: str
    instead: Precision | Quantization

    @property
    def argument(self) -> str:
        """The argument of `export` that makes such graphs."""
        return f'{self._name}="{self.instead}"'

    @property
    def option(self) -> str:
        """The same as an option of the command `cascadekit export`."""
        return f"--{self._name} {self.instead}"

    @property
    def _name(self) -> str:
        return "precision" if isinstance(self.instead, Precision) else "quantize"


def refusal(backend: str, target: str, precision: Precision, quantization: Quantization) -> Refusal | None:
    """Return why graphs of `precision` and `quantization` cannot be built for `target`; None when they can."""
    for lack in _LACKS:
        if lack.what not in (precision, quantization) or lack.backend not in (None, backend):
            continue
        if number_of(target) < lack.below:
            where = backend if lack.below == ANY else f"{target} in {backend}"
            return Refusal(f"{where} {lack.reason}", lack.instead)
    return None
