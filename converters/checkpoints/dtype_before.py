"""The dtypes that weights had before torchao, bitsandbytes or SDNQ quantised them, as their folders tell them."""

from collections import Counter
from collections.abc import Iterable

from ...schemas.dtypes import FLOATS
from ...storage.safetensors_plan import TensorPlan
from ...storage.safetensors_reader import TensorRange
from .component import Component

STATED = ("torchao ", "bitsandbytes nf4", "bitsandbytes fp4")  # kinds of which each weight states its dtype
UNSTATED = ("bitsandbytes int8", "SDNQ ")
EXACT = "F32"  # holds the values of every kind


def dtype_before(weight: TensorRange, component: Component) -> str | None:
    """Return the dtype of a weight before it was quantised; None for weights of other programs.

    A weight that does not state it had the dtype of all other floats of the component. If these differ, the dtype is
    float32, which loses nothing."""
    scale = weight.scale
    if scale is None or not scale.kind.startswith((*STATED, *UNSTATED)):
        return None
    if scale.kind.startswith(STATED):
        return scale.rounded or EXACT
    floats = {each.dtype for each in component.tensors.values() if each.scale is None and each.dtype in FLOATS}
    return floats.pop() if len(floats) == 1 else EXACT


def notes_on_dtypes(component: Component, plans: Iterable[TensorPlan]) -> list[str]:
    """Return a line on the quantised weights of `component` that become floats as `dtype_before` says."""
    before = {each: dtype_before(each, component) for each in component.tensors.values() if each.scale}
    counts = Counter(
        (each.scale.kind, plan.dtype)
        for plan in plans
        for each in plan.source_ranges
        if each.scale and before.get(each) == plan.dtype
    )
    shown = [f"{count} weights in {kind} become {dtype}" for (kind, dtype), count in counts.items()]
    if not shown:
        return []
    return [f'{component.stage}: {", ".join(shown)}, as before they were quantised; choose another with dtype="bf16"']
