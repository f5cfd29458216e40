"""Checks a bundle without running it.

onnx checks each graph by its own rules. The byte range of every weight must lie inside its file. Every file must be
the one that the manifest describes.
"""

from __future__ import annotations  # help() shows the types as they are written here

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from ...runtime.engines.tensorrt.plan_header import find_contradiction
from ...schemas.callbacks import Say, ignored
from ...schemas.manifest import DOMAINS, MANIFEST_NAME, FileEntry, GraphEntry, PortEntry, StageEntry
from ...schemas.messages import known_keywords, listed
from ...schemas.stages import Stage
from ...storage.bundle import PUT_BACK, Bundle, open_bundle
from ...storage.file_hashes import WHOLE_BELOW, find_change, sha256_of
from ...storage.open_file import require_regular
from .graph_files import (
    beside_holes,
    check_graph,
    external_data,
    first_line,
    infer_strictly,
    load_graph,
    opset_of,
    port_entries,
)

# polygraphy has a script, but no __main__.
POLYGRAPHY = "import sys; from polygraphy.tools import main; sys.exit(main())"
POLYGRAPHY_TIMEOUT = 300  # seconds
NOT_INSTALLED = "not installed"
SHOWN = 3  # initialisers with the same problem that are named


@dataclass
class BundleCheck:
    """Problems and facts of one graph, of the files of one stage, or of the files that belong to no stage."""

    stage: Stage | None  # None: files that belong to no stage
    subject: str  # the graph's name; "" for the stage's files
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """All checks of a bundle; true when none found a problem."""

    checks: tuple[BundleCheck, ...]

    def __bool__(self) -> bool:
        return not any(check.problems for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        return {
            "valid": bool(self),
            "checks": [
                {"stage": c.stage, "graph": c.subject or None, "problems": c.problems, **c.facts} for c in self.checks
            ],
        }


@known_keywords
def validate(bundle: Bundle | str | Path, *, hash: bool = False, say: Say = ignored) -> Validation:
    """Check every stage and every other file of `bundle` (opened, or its path) without running it.

        result = validate("bundle", hash=True)
        if not result:
            print([problem for check in result.checks for problem in check.problems])

    With `hash` every byte of each file that has a SHA-256 in the manifest is read and compared. Without `hash` a file
    with the size and time of the manifest counts as unchanged. A file without a recorded SHA-256 is compared by the
    samples of its fingerprint, and named in `facts`. Nothing is written into the bundle. At most one graph without
    its weights is in memory. `say` is called with the name of each stage.

    Raises CheckpointError when the manifest cannot be read."""
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    checks = []
    for stage, entry in bundle.manifest.stages.items():
        say(f"checking the {stage}")
        checks.append(_check_files(bundle, stage, entry, hash))
        with TemporaryDirectory(prefix="cascadekit-validate-") as scratch:
            for name, graph in entry.graphs.items():
                check = BundleCheck(stage, name)
                _check_graph(bundle.root, entry, graph, check, Path(scratch))
                checks.append(check)
    return Validation((*checks, _check_rest(bundle, hash)))


def _check_rest(bundle: Bundle, hash: bool) -> BundleCheck:
    """Check the files of no stage: the tokenizer, weights that LoRAs replaced, and files that the manifest lacks."""
    manifest = bundle.manifest
    check = BundleCheck(None, "")
    kept = manifest.lora.kept if manifest.lora else ()
    for file in manifest.files:
        _compare(bundle, file, check, PUT_BACK, hash=True)
    for file in kept:
        _compare(bundle, file, check, "the LoRAs cannot be undone; export the model again", hash=hash)
    unlisted = sorted(_on_disk(bundle.root) - _known(bundle))
    check.facts = {"files": len(manifest.files) + len(kept), "unlisted": unlisted}
    return check


def _on_disk(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}


def _known(bundle: Bundle) -> set[str]:
    """Paths of the files in the manifest, of the manifest itself, and of the notes beside plans."""
    manifest = bundle.manifest
    files = [*manifest.files, *(manifest.lora.kept if manifest.lora else ())]
    files += [file for entry in manifest.stages.values() for file in entry.files]
    plans = [plan.path for entry in manifest.stages.values() for plan in entry.plans]
    notes = (PurePosixPath(path).with_suffix(".json").as_posix() for path in plans)
    return {MANIFEST_NAME, *plans, *notes, *(file.path for file in files)}


def _check_files(bundle: Bundle, stage: Stage, entry: StageEntry, hash: bool) -> BundleCheck:
    """Compare the stage's files with the manifest: by all their bytes with `hash`, else as loading does."""
    check = BundleCheck(stage, "")
    for file in entry.files:
        whole = hash or file.path in entry.graph_paths
        _compare(bundle, file, check, bundle.advice(entry, file), hash=whole)
    unhashed = [
        {"path": file.path, "sha256_now": sha256_of(path) if hash and path.is_file() else None}
        for file in entry.files
        if file.sha256 is None and (path := bundle.root / file.path)
    ]
    check.facts = {"weights": entry.weights, "files": len(entry.files), "without_sha256": unhashed}
    _check_plans(bundle, entry, check, hash)
    return check


def _compare(bundle: Bundle, file: FileEntry, check: BundleCheck, advice: str, *, hash: bool) -> None:
    path = bundle.root / file.path
    problem = find_change(path, file, always_hash=hash)
    if problem:
        check.problems.append(f"{file.path}: {problem}; {advice}")


def _check_plans(bundle: Bundle, entry: StageEntry, check: BundleCheck, hash: bool) -> None:
    """Check the headers of GPU engines, and all bytes of small ones; with `hash` all bytes of every engine.

    An engine of other weights than the stage has now is no problem, because it is not run."""
    for plan in entry.plans:
        path = bundle.root / plan.path
        problem = find_contradiction(path, plan)
        if not problem and (hash or plan.bytes < WHOLE_BELOW) and sha256_of(path) != plan.sha256:
            problem = "its SHA-256 is not that of the manifest"
        if problem:
            check.problems.append(f"{plan.path}: {problem}; build it again with `cascadekit build`")
    if entry.plans:
        current = sum(entry.is_current(plan) for plan in entry.plans)
        check.facts["plans"] = {"current": current, "of_other_weights": len(entry.plans) - current}


def _check_graph(root: Path, entry: StageEntry, graph: GraphEntry, check: BundleCheck, scratch: Path) -> None:
    path = root / graph.path
    try:
        require_regular(path)
        model = load_graph(path)
    except Exception as error:  # protobuf raises a class of its own for bytes that are no graph
        check.problems.append(f"{graph.path}: cannot be read as ONNX: {first_line(error)}")
        return
    operators = Counter(_operators(model.graph))
    check.facts = {
        "opset": opset_of(model),
        "ir_version": model.ir_version,
        "operators": {f"{domain}::{name}" if domain else name: n for (domain, name), n in sorted(operators.items())},
        "initializers": len(model.graph.initializer),
    }
    check.problems += [
        *_against_manifest(model, graph),
        *_foreign_operators(operators, entry),
        *_misplaced_weights(model, path),
    ]
    sizes = {file.name: file.stat().st_size for file in path.parent.iterdir() if file != path and file.is_file()}
    with beside_holes(scratch / check.subject, sizes) as alone:
        shutil.copyfile(path, alone / path.name)
        check.problems += _onnx_problems(alone / path.name)
        check.facts["polygraphy"], failed = _polygraphy(alone / path.name)
        check.problems += failed


def _operators(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """Domain and name of every node, nested graphs included; the domain of ai.onnx is ""."""
    for node in graph.node:
        yield ("" if node.domain == "ai.onnx" else node.domain), node.op_type
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                yield from _operators(nested)


def _against_manifest(model: onnx.ModelProto, graph: GraphEntry) -> Iterator[str]:
    if opset_of(model) != graph.opset:
        yield f"{graph.path}: expected opset {graph.opset} as the manifest says, found {opset_of(model)}"
    pairs = {
        "inputs": (graph.inputs, port_entries(model.graph.input)),
        "outputs": (graph.outputs, port_entries(model.graph.output)),
    }
    for what, (expected, found) in pairs.items():
        if expected != found:
            yield f"{graph.path}: expected {what} {_ports(expected)} as the manifest says, found {_ports(found)}"


def _ports(ports: Iterable[PortEntry]) -> str:
    return ", ".join(f"{port.name} {port.dtype} [{', '.join(map(str, port.dims))}]" for port in ports)


def _foreign_operators(operators: Iterable[tuple[str, str]], entry: StageEntry) -> Iterator[str]:
    allowed = DOMAINS[entry.target]
    foreign = sorted(f"{domain}::{name}" for domain, name in operators if domain not in allowed)
    if foreign:
        names = ", ".join(domain or "ai.onnx" for domain in allowed)
        yield f"operators {', '.join(foreign)}: a graph with target {entry.target} may use those of {names} only"


def _misplaced_weights(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    """Find initialisers whose bytes are not in the graph's folder, not inside their file, or not as many as needed."""
    sizes: dict[str, int | None] = {}
    homeless: dict[str, list[str]] = {}
    wrong: list[str] = []
    try:
        for data in external_data(model):
            if data.location not in sizes:
                sizes[data.location] = _size_beside(path, data.location)
            size = sizes[data.location]
            if size is None:
                homeless.setdefault(data.location, []).append(data.name)
            elif data.offset < 0 or data.length < 0 or data.offset + data.length > size:
                wrong.append(f"{data.name}: bytes {data.offset} to {data.offset + data.length} of a file of {size}")
            elif data.length != data.needed:
                expected = f"expected {data.needed} for {data.dtype} {list(data.dims)}"
                wrong.append(f"{data.name}: {data.length} bytes, {expected}")
    except ValueError as error:
        yield f"the offset or length of an initialiser is no number: {error}"
    for location, names in homeless.items():
        yield f"{listed(names, SHOWN)}: have their bytes in {location!r}, which is not a file beside the graph"
    yield from wrong[:SHOWN]
    if len(wrong) > SHOWN:
        yield f"and {len(wrong) - SHOWN} more initialisers like these"


def _size_beside(path: Path, location: str) -> int | None:
    """The size of a file in the graph's folder; None for any other place. The Hub's cache has links to files."""
    pure = PurePosixPath(location)
    found = path.parent / location
    inside = len(pure.parts) == 1 and not pure.is_absolute() and location not in (".", "..")
    return found.stat().st_size if inside and found.is_file() else None


def _onnx_problems(path: Path) -> Iterator[str]:
    """Problems reported by onnx's checker and by its strict shape inference."""
    for name, check in (("onnx.checker", check_graph), ("strict shape inference", infer_strictly)):
        try:
            check(path)
        except Exception as error:  # onnx raises classes of its own and, from C++, plain RuntimeError and others
            yield f"{name}: {first_line(error)}".replace(f"{path.parent}/", "")


def _polygraphy(path: Path) -> tuple[str, list[str]]:
    """The result of `polygraphy inspect model` in one word, and problems."""
    if find_spec("polygraphy") is None:
        return NOT_INSTALLED, []
    command = (sys.executable, "-c", POLYGRAPHY, "inspect", "model", str(path), "--model-type", "onnx")
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=POLYGRAPHY_TIMEOUT)
    except subprocess.TimeoutExpired:
        return "failed", [f"polygraphy inspect model: no answer in {POLYGRAPHY_TIMEOUT} seconds"]
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or [f"exit code {ended.returncode}, no message"]
        return "failed", [f"polygraphy inspect model: {lines[-1]}"]
    return "passed", []
