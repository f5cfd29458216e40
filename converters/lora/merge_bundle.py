"""Merges LoRAs into the weights of an exported bundle, and takes them out again to the last byte.

A changed bundle is made beside the old one out of links to its files, and the two folders change places at the end:
whatever happens in between, the old one or the new one is there, whole. The files that were replaced stay in the
bundle under another name, so a file that is linked to the model's is never written to, and undoing is renaming.
"""

import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...schemas.bundle import MANIFEST_NAME, FileEntry, LoraState, Placement, StageEntry, to_text
from ...schemas.callbacks import Progress, StartFile
from ...schemas.config_json import from_json
from ...schemas.dtypes import DTYPE_SIZES
from ...schemas.errors import CheckpointError, ConversionError, UsageError
from ...schemas.layouts import Layout
from ...schemas.messages import indented
from ...schemas.quantization import Quantization
from ...schemas.stages import Stage
from ...schemas.tensors import Shape, expected_tensors
from ...storage.atomic_output import staged_output
from ...storage.bundle import Bundle, locked_bundle, open_bundle
from ...storage.file_hashes import describe_file, find_change, sha256_of
from ...storage.file_ranges import CopiedRange, copy_range
from ...storage.safetensors_reader import TensorRange
from ...storage.safetensors_writer import reserve, what_failed
from ..checkpoints.component import Component, Problems
from ..export.bundle_weights import clone
from ..export.graph_files import ExternalTensor, external_data, load_graph
from .changed_tensors import Changes, Effect, overwrite
from .encoding import FLOATS
from .merge_plan import MERGED_STAGES, LoraPlan, plan_loras
from .stability_format import DEFAULT_FILTERS

KEPT = ".before-lora"  # behind the names of the files that were replaced


@dataclass(frozen=True)
class Applied:
    """The result of a merge: the effect on each changed tensor, the parts that the bundle lacks, and notes."""

    effects: tuple[Effect, ...]
    unapplied: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest_change(self) -> float:
        return max((effect.largest_change for effect in self.effects), default=0.0)


def apply_loras(
    root: str | Path,
    loras: Sequence[str | Path],
    *,
    strengths: Sequence[float] = (),
    text_encoder_strengths: Sequence[float] = (),
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    start_file: StartFile | None = None,
) -> Applied:
    """Merge `loras` into the weights of the bundle at `root`; its graphs stay as they are. As `merge_loras` does it:
    W + strength · ΔW in float32, rounded once to the dtype that is stored.

    The disk must have room for a copy of each weights file that changes; the old one stays, for `undo_loras`.
    Raises UsageError for a bundle that has LoRAs merged in already, CheckpointError when its files are damaged,
    and what `merge_loras` raises.

    Example:
        >>> done = apply_loras("bundle", ["style.safetensors"], strengths=[0.8])
        >>> undo_loras("bundle")
        ('style.safetensors',)
    """
    with locked_bundle(Path(root)):
        merge = _planned(
            Path(root),
            loras,
            strengths=strengths,
            text_encoder_strengths=text_encoder_strengths,
            module_filters=module_filters,
            alpha=alpha,
        )
        bundle = merge.bundle
        _require_real_files(bundle.root)
        for stage in merge.changes:
            bundle.check(stage)
        with staged_output(bundle.root.resolve(), force=True, complete=True) as staged:
            _link_others(bundle.root, staged, {*merge.replaced, bundle.root / MANIFEST_NAME})
            names = (MANIFEST_NAME, *sorted(map(merge.relative, merge.replaced)))
            kept = [_keep(bundle, staged, name) for name in names]
            return _write_merged(merge, staged, {}, kept, start_file)


def derive_bundle(
    root: str | Path,
    output: Path,
    loras: Sequence[str | Path],
    *,
    strengths: Sequence[float] = (),
    start_file: StartFile | None = None,
) -> Applied:
    """Make a bundle at `output`, in place of what is there, that is the one at `root` with `loras` merged in as
    `apply_loras` does it. It shares all other files with that bundle: clones of them where the file system clones,
    else hard links, else copies.

    Raises CheckpointError when any file of the bundle at `root` is damaged, else what `apply_loras` raises."""
    merge = _planned(Path(root), loras, strengths=strengths)
    bundle = merge.bundle
    for stage in bundle.manifest.stages:
        bundle.check(stage)
    with staged_output(output, force=True) as staged:
        ways = _share_others(bundle.root, staged, {*merge.replaced, bundle.root / MANIFEST_NAME})
        return _write_merged(merge, staged, ways, [], start_file)


@dataclass(frozen=True)
class _Merge:
    """A bundle and what LoRAs change about the tensors its graphs read."""

    bundle: Bundle
    plan: LoraPlan
    changes: dict[Stage, Changes]

    @property
    def replaced(self) -> set[Path]:
        """The files those tensors lie in."""
        tensors = (self.plan.components[stage].tensors[name] for stage, names in self.changes.items() for name in names)
        return {tensor.path for tensor in tensors}

    def relative(self, path: Path) -> str:
        return path.relative_to(self.bundle.root).as_posix()


def _planned(
    root: Path,
    loras: Sequence[str | Path],
    *,
    strengths: Sequence[float] = (),
    text_encoder_strengths: Sequence[float] = (),
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
) -> _Merge:
    bundle = open_bundle(root)
    _require_none_applied(bundle)
    components = {stage: _component(bundle, stage) for stage in MERGED_STAGES if stage in bundle.manifest.stages}
    plan = plan_loras(
        bundle.root,
        components,
        loras,
        strengths=strengths,
        text_encoder_strengths=text_encoder_strengths,
        module_filters=module_filters,
        alpha=alpha,
        advice="Export the stage it is for, or give another LoRA",
    )
    changes = {stage: _in_graphs(plan, stage, bundle) for stage in plan.stages}
    if not any(changes.values()):
        raise ConversionError(f"{root}: nothing in its graphs changes:{indented(plan.unapplied)}")
    return _Merge(bundle, plan, changes)


def _write_merged(
    merge: _Merge,
    staged: Path,
    ways: Mapping[Path, Placement],
    kept: Sequence[FileEntry],
    start_file: StartFile | None,
) -> Applied:
    """Give `staged`, which has all other files (in these `ways`, where they are not the bundle's own), the files that
    change and the manifest."""
    bundle, plan, replaced = merge.bundle, merge.plan, merge.replaced
    effects: list[Effect] = []
    stages = {stage: _shared(entry, staged, ways) for stage, entry in bundle.manifest.stages.items()}
    for stage, names in merge.changes.items():
        effects += _rewrite(bundle, plan.components[stage], names, staged, start_file)
        stages[stage] = _entry(stages[stage], bundle.root, replaced, staged)
    state = LoraState(loras=tuple(plan.entries), kept=tuple(kept))
    manifest = bundle.manifest.model_copy(update={"stages": stages, "lora": state})
    (staged / MANIFEST_NAME).write_text(to_text(manifest), encoding="utf-8")
    return Applied(tuple(effects), tuple(plan.unapplied), tuple(plan.notes))


def undo_loras(root: str | Path) -> tuple[str, ...]:
    """Put back every file that `apply_loras` replaced; returns the names of the LoRAs that were merged in.

    Raises UsageError when there are none or they cannot be taken out, CheckpointError when a file that was kept is
    missing or changed."""
    with locked_bundle(Path(root)):
        bundle = open_bundle(Path(root))
        state = bundle.manifest.lora
        if state is None:
            raise UsageError(f"{root}: no LoRA is merged into it; there is nothing to undo")
        if not state.kept:
            raise UsageError(f"{root}: was exported with its LoRAs; export the model again without LoRAs")
        for file in state.kept:
            problem = find_change(bundle.root / file.path, file)
            if problem:
                raise CheckpointError(f"{bundle.root / file.path}: {problem}; export the model again")
        originals = {bundle.root / file.path: file.path.removesuffix(KEPT) for file in state.kept}
        with staged_output(bundle.root.resolve(), force=True, complete=True) as staged:
            _link_others(bundle.root, staged, {*originals, *(bundle.root / name for name in originals.values())})
            for path, name in originals.items():
                _link(path, staged / name)
        return tuple(lora.name for lora in state.loras)


def _require_none_applied(bundle: Bundle) -> None:
    if bundle.manifest.lora is not None:
        names = ", ".join(f"{lora.name} ({lora.strength:g})" for lora in bundle.manifest.lora.loras)
        raise UsageError(f"{bundle.root}: has {names} merged in already; take them out with undo=True, then apply all")


def _require_real_files(root: Path) -> None:
    """Refuse a bundle of links, as the Hub's cache keeps them: its files are not this bundle's alone."""
    link = next((path for path in sorted(root.rglob("*")) if path.is_symlink()), None)
    if link is not None:
        raise UsageError(
            f"{link}: a link to a file elsewhere, which is not to be changed; copy the bundle (cp -rL {root} COPY) and "
            "apply to the copy, or use `generate --lora`, which leaves the bundle as it is"
        )


def _component(bundle: Bundle, stage: Stage) -> Component:
    """The stage as its graphs describe it: where each tensor lies, whatever layout the files have."""
    entry = bundle.entry(stage)
    config = from_json(stage, entry.config)
    expected = expected_tensors(config)
    files = {bundle.root / file.path for file in entry.files}
    tensors = {}
    for graph in entry.graphs.values():
        path = bundle.root / graph.path
        for data in external_data(load_graph(path)):
            if path.parent / data.location not in files:
                raise CheckpointError(f"{path}: {data.name} lies in {data.location!r}, which is no file of the bundle")
            if data.name in expected:
                tensors[data.name] = _range(path, data, expected[data.name])
    return Component(bundle.root / stage, stage, Layout.DIFFUSERS, config, tensors, {}, Problems())


def _range(graph: Path, data: ExternalTensor, shape: Shape) -> TensorRange:
    if data.length != math.prod(shape) * DTYPE_SIZES.get(data.dtype, 0):
        raise CheckpointError(
            f"{graph}: {data.name}: expected {list(shape)} of {', '.join(FLOATS)}, found {data.length} bytes of "
            f"{data.dtype or 'another dtype'}; export the model again"
        )
    return TensorRange(graph.parent / data.location, data.dtype, shape, data.offset, data.length)


def _in_graphs(plan: LoraPlan, stage: Stage, bundle: Bundle) -> Changes:
    """The changes of a stage, less those of tensors that no graph reads: they have no effect. Raises UsageError where
    they are quantised instead."""
    tensors = plan.components[stage].tensors
    changes = plan.of(stage)
    quantization = bundle.entry(stage).quantization
    if quantization is not Quantization.NONE and not changes.keys() <= tensors.keys():
        raise UsageError(
            f"{bundle.root}: the {stage} is quantised ({quantization}), and a LoRA changes weights before that; "
            f'export the model again with the LoRAs and quantize="{quantization}"'
        )
    plan.unapplied += [f"{stage}: {name}: its graphs do not use it" for name in changes if name not in tensors]
    return {name: parts for name, parts in changes.items() if name in tensors}


def _keep(bundle: Bundle, staged: Path, name: str) -> FileEntry:
    """Link a file that is to be replaced under the name it is kept by."""
    known = {file.path: file for entry in bundle.manifest.stages.values() for file in entry.files}
    _link(bundle.root / name, staged / (name + KEPT))
    if name in known:
        return known[name].model_copy(update={"path": name + KEPT})
    return describe_file(staged, staged / (name + KEPT), sha256_of(staged / (name + KEPT)))


def _rewrite(
    bundle: Bundle, component: Component, changes: Changes, staged: Path, start_file: StartFile | None
) -> list[Effect]:
    """Copy the files of the tensors to change, then change them in the copies."""
    tensors = {}
    for name in changes:
        tensor = component.tensors[name]
        copy = staged / tensor.path.relative_to(bundle.root)
        tensors[name] = TensorRange(copy, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
        if not copy.exists():
            label = f"{component.stage}/{copy.name}"
            _copy(tensor.path, copy, start_file(label, tensor.path.stat().st_size) if start_file else None)
    return overwrite(tensors, changes)


def _copy(source: Path, target: Path, progress: Progress | None) -> None:
    """A copy of the file's bytes; on file systems that clone it takes no time and no space."""
    size = source.stat().st_size
    try:
        if clone(source, target):
            return
        with target.open("xb") as out:
            reserve(out.fileno(), size)
            copy_range(CopiedRange(source, 0, size, 0), out.fileno(), progress)
    except OSError as error:
        raise ConversionError(what_failed(target, size, error)) from error


def _entry(entry: StageEntry, root: Path, replaced: Collection[Path], staged: Path) -> StageEntry:
    """The stage's entry with new facts on the files that were replaced."""
    files = []
    for file in entry.files:
        path = staged / file.path
        files.append(describe_file(staged, path, sha256_of(path)) if root / file.path in replaced else file)
    weights = {root / file.path for file in entry.files if file.path not in entry.graph_paths}
    how = "copy" if weights <= set(replaced) else entry.weights
    return entry.model_copy(update={"files": tuple(files), "weights": how})


def _shared(entry: StageEntry, staged: Path, ways: Mapping[Path, Placement]) -> StageEntry:
    """The stage's entry with the way its weights came from another bundle, the most dangerous of several."""
    paths = (staged / file.path for file in entry.files if file.path not in entry.graph_paths)
    found = {ways[path] for path in paths if path in ways}
    way = next((way for way in ("link", "reflink", "copy") if way in found), entry.weights)
    return entry.model_copy(update={"weights": way})


def _link_others(root: Path, staged: Path, without: Collection[Path]) -> None:
    """Give `staged` everything in the bundle at `root` but the files `without`."""
    for path, target in _others(root, staged, without):
        _link(path, target)


def _share_others(root: Path, staged: Path, without: Collection[Path]) -> dict[Path, Placement]:
    """The same for a bundle that stays apart from the one at `root`; how each file came there."""
    return {target: _share(path, target) for path, target in _others(root, staged, without)}


def _others(root: Path, staged: Path, without: Collection[Path]) -> Iterator[tuple[Path, Path]]:
    """Make the folders of the bundle at `root` in `staged`; its files but those `without`, and where they go."""
    staged.mkdir()
    for path in sorted(root.rglob("*")):
        target = staged / path.relative_to(root)
        if path.is_dir() and path.is_symlink():
            target.symlink_to(path.resolve())
        elif path.is_dir():
            target.mkdir()
        elif path.is_file() and path not in without:
            yield path, target


def _share(source: Path, target: Path) -> Placement:
    """A clone that keeps the time of change, else a hard link, else a copy; of what a link leads to."""
    source = source.resolve()
    if clone(source, target):
        shutil.copystat(source, target)
        return "reflink"
    return _link(source, target)


def _link(source: Path, target: Path) -> Placement:
    """A hard link, or a copy that keeps the time of change where there are none."""
    try:
        os.link(source, target, follow_symlinks=False)
        return "link"
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        return "copy"
