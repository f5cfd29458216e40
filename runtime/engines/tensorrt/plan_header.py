"""The first 64 bytes of a TensorRT-RTX plan, the only part that can be read without a GPU.

NVIDIA does not document them; these fields were the same in every plan that TensorRT-RTX 1.7.1 wrote here. A header can
show that a plan is cut short, foreign or for other GPUs. It never proves that a plan is good.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from ....schemas.plan_entries import PlanEntry
from ....schemas.targets import RTX

MAGIC = b"vtrt"
HEADER = struct.Struct("<4s4xQQ4B4sI20xQ")  # magic, layout, size of the file, version, magic again, targets, weights
LAYOUT = 2
BITS = {1: "sm75", 2: "sm80", 4: "sm86", 8: "sm89", 16: "sm120", 32: "sm121"}


@dataclass(frozen=True)
class PlanHeader:
    """The header of a plan: size in bytes, version of TensorRT-RTX, GPUs, and bytes of weights on the GPU."""

    bytes: int
    version: str
    targets: tuple[str, ...]
    weight_bytes: int


def read_header(path: Path) -> PlanHeader | None:
    """The header of the plan at `path`; None if it is no plan of TensorRT-RTX. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size:
        return None
    magic, layout, size, *version, again, mask, weights = HEADER.unpack(start)
    if (magic, again, layout) != (MAGIC, MAGIC, LAYOUT):
        return None
    targets = tuple(target for bit, target in BITS.items() if mask & bit)
    return PlanHeader(size, ".".join(map(str, version)), targets, weights)


def find_contradiction(path: Path, plan: PlanEntry) -> str | None:
    """The difference between the file at `path` and `plan` in size or header; None when there is none.

    Only the size of a plain TensorRT plan is compared. `sha256_of` compares the whole content."""
    if not path.is_file():
        return "it is missing"
    found = path.stat().st_size
    if found != plan.bytes:
        return f"expected {plan.bytes} bytes, it has {found}"
    if plan.backend != RTX:
        return None
    header = read_header(path)
    if header is None:
        return f"it does not begin like a plan of {RTX}"
    for what, expected, is_there in (
        ("size", plan.bytes, header.bytes),
        ("version", plan.backend_version, header.version),
        ("targets", " ".join(plan.targets), " ".join(header.targets)),
    ):
        if expected != is_there:
            return f"its header says {what} {is_there}, expected {expected}"
    if plan.weight_streaming and header.weight_bytes:
        return f"its header says {header.weight_bytes} bytes of weights stay on the GPU, expected 0: they are streamed"
    return None
