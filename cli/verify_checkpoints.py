"""The verify command on checkpoints: tensor by tensor, in any layouts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas.bundle import MANIFEST_NAME
from ..schemas.stages import Stage
from .console import byte_progress, say, show_table
from .options import local

if TYPE_CHECKING:
    from ..parity.checkpoints.compare_tensors import CheckpointComparison, TensorMatch

COUNTED = ("equal", "cast", "differing", "other shape", "other dtype", "missing", "unexpected")
SHOWN = 40  # tensors that are not equal; --json lists all


def is_bundle(path: Path) -> bool:
    """Whether verify's first argument is an exported bundle, rather than a checkpoint."""
    return (path / MANIFEST_NAME).is_file()


def verify_checkpoints(found: Path, expected: Path, stages: tuple[str, ...], *, as_json: bool, mapping: bool) -> bool:
    """Compare, print, and say whether all tensors are equal."""
    from ..converters.checkpoints.open_model import open_model
    from ..parity.checkpoints.compare_tensors import compare_checkpoints, total_bytes

    models = open_model([local(found)]), open_model([local(expected)])
    with byte_progress() as start:
        progress = start("comparing", total_bytes(*models))
        result = compare_checkpoints(*models, [Stage(stage) for stage in stages], progress)
    if as_json:
        say(json.dumps(result.to_json(), indent=2))
    else:
        _print(result, mapping=mapping)
    return bool(result)


def _print(result: "CheckpointComparison", *, mapping: bool) -> None:
    rows = []
    for stage, layouts in result.layouts.items():
        statuses = [str(tensor.status) for tensor in result.tensors if tensor.stage is stage]
        rows.append((str(stage), " / ".join(layouts), *(str(statuses.count(status)) for status in COUNTED)))
    show_table("", ("stage", "layouts", *COUNTED), rows)
    if mapping:
        columns = ("stage", "compared", "against", "verdict")
        show_table("", columns, [_mapped(tensor) for tensor in result.tensors])
    wrong = [tensor for tensor in result.tensors if not tensor]
    for tensor in wrong[:SHOWN]:
        say(f"{tensor.stage}: {tensor.name}: {_what(tensor)}")
    if len(wrong) > SHOWN:
        say(f"and {len(wrong) - SHOWN} more; see --json")
    for stage in result.unmatched:
        say(f"{stage}: not in what it is compared against")
    if result.left_out:
        say(f"left out, as only the other has it: {', '.join(result.left_out)}")
    say(_verdict(result))


def _verdict(result: "CheckpointComparison") -> str:
    if not result:
        return "NOT equal"
    cast = sum(tensor.status == "cast" for tensor in result.tensors)
    return f"equal, {cast} tensors but for a cast" if cast else "equal"


def _mapped(tensor: "TensorMatch") -> tuple[str, str, str, str]:
    return str(tensor.stage), str(tensor.found or "-"), str(tensor.expected or "-"), str(tensor.status)


def _what(tensor: "TensorMatch") -> str:
    if tensor.status != "differing":
        return f"{tensor.status} {tensor.detail}".strip()
    worst = "" if tensor.max_abs is None else f", by at most {tensor.max_abs:.3g}"
    return f"{tensor.differing} values differ{worst}, first at {list(tensor.first or ())} ({tensor.found})"
