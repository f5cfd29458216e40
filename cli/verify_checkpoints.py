"""The verify command on two checkpoints: tensor by tensor, in any layouts."""

from pathlib import Path
from typing import TYPE_CHECKING

from .console import detail, say, say_json, show_table
from .options import local
from .progress import byte_progress

if TYPE_CHECKING:
    from ..parity.checkpoints.compare_tensors import CheckpointComparison, TensorMatch

COUNTED = ("equal", "cast", "differing", "other shape", "other dtype", "missing", "unexpected")
SHOWN = 40  # tensors that are not equal; --json lists all


def verify_checkpoints(found: Path, expected: Path, stages: tuple[str, ...], *, as_json: bool, mapping: bool) -> bool:
    """Compare two checkpoints and print the result; returns whether all tensors are equal."""
    from ..parity.checkpoints.compare_tensors import compare_checkpoints

    with byte_progress() as start_file:
        result = compare_checkpoints(local(found), local(expected), stages, start_file=start_file)
    if as_json:
        say_json(result.to_json())
    else:
        _print(result, mapping=mapping)
    return bool(result)


def _print(result: "CheckpointComparison", *, mapping: bool) -> None:
    rows = []
    for stage, layouts in result.layouts.items():
        statuses = [str(tensor.status) for tensor in result.tensors if tensor.stage is stage]
        rows.append((str(stage), " / ".join(layouts), *(str(statuses.count(status)) for status in COUNTED)))
    none = [name for n, name in enumerate(COUNTED, start=2) if all(row[n] == "0" for row in rows)]
    show_table("", ("stage", "layouts", *COUNTED), rows, optional=none)
    if mapping:
        mapped = ([str(each or "-") for each in (t.stage, t.found, t.expected, t.status)] for t in result.tensors)
        show_table("", ("stage", "compared", "against", "verdict"), mapped)
    for tensor in () if mapping else result.tensors:
        detail(f"{tensor.stage}: {tensor.name}: {tensor.status} ({tensor.found or '-'}, {tensor.expected or '-'})")
    wrong = [tensor for tensor in result.tensors if not tensor]
    for tensor in wrong[:SHOWN]:
        say(f"{tensor.stage}: {tensor.name}: {_problem(tensor)}")
    if len(wrong) > SHOWN:
        say(f"and {len(wrong) - SHOWN} more; --json lists all")
    for stage in result.unmatched:
        say(f"{stage}: missing in the checkpoint it is compared with")
    if result.left_out:
        say(f"left out, as only the other checkpoint has it: {', '.join(result.left_out)}")
    say(_verdict(result))


def _verdict(result: "CheckpointComparison") -> str:
    if not result:
        return "NOT equal"
    cast = sum(tensor.status == "cast" for tensor in result.tensors)
    return f"equal, {cast} tensors after a cast" if cast else "equal"


def _problem(tensor: "TensorMatch") -> str:
    if tensor.status != "differing":
        return f"{tensor.status} {tensor.detail}".strip()
    worst = "" if tensor.max_abs is None else f", by at most {tensor.max_abs:.3g}"
    return f"{tensor.differing} values differ{worst}, first at {list(tensor.first or ())} ({tensor.found})"
