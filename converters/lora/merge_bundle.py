"""Merges LoRAs into the weights of an exported bundle, and takes them out again to the last byte.

The changed bundle is made beside the old one, out of links to its files. The two folders change places at the end, so
that either the old or the new bundle is there after a crash. Replaced files stay in the bundle under another name.
Files that are shared with the model are therefore never written to, and undoing is renaming.
"""

from __future__ import annotations  # help() shows the types as they are written here

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...schemas.callbacks import StartFile
from ...schemas.errors import CheckpointError, ConversionError, UsageError
from ...schemas.folded_biases import BIASES_NAME
from ...schemas.manifest import MANIFEST_NAME, FileEntry, LoraState, Placement, StageEntry, to_text
from ...schemas.messages import known_keywords, listed_below
from ...schemas.quantization import Quantization
from ...schemas.stages import Stage
from ...storage.atomic_output import staged_output
from ...storage.bundle import Bundle, open_bundle
from ...storage.bundle_lock import locked_bundle
from ...storage.file_hashes import describe_file, find_change, sha256_of
from ..checkpoints.component import Component
from ..export.fold_biases import depends_on, fold_biases
from .bundle_components import bundle_component
from .bundle_files import copy, link, link_others, share_others
from .changed_tensors import Changes, Effect, overwrite
from .merge_plan import MERGED_STAGES, LoraPlan, Merge, as_loras, plan_loras
from .stability_format import DEFAULT_FILTERS

KEPT = ".before-lora"  # the suffix of files that were replaced
NOTHING_APPLIES = "Export the stage it is for, or give another LoRA"


@known_keywords
def apply_loras(
    bundle: str | Path,
    loras: str | Path | Sequence[str | Path],
    *,
    strengths: Sequence[float] = (),
    text_encoder_strengths: Sequence[float] = (),
    module_filters: Sequence[str] = DEFAULT_FILTERS,
    alpha: float | None = None,
    start_file: StartFile | None = None,
) -> Merge:
    """Merge `loras` into the weights of `bundle`, as `merge_loras` does. The graphs stay as they are.

    The disk needs room for a copy of each weights file that changes. The old file is kept for `undo_loras`.

    Raises UsageError for a bundle that has LoRAs merged in already, CheckpointError when its files are damaged, and
    the errors of `merge_loras`.

    Examples:
        >>> done = apply_loras("bundle", ["style.safetensors"], strengths=[0.8])
        >>> undo_loras("bundle")
        ('style.safetensors',)
    """
    with locked_bundle(Path(bundle)):
        opened = _open_plain(bundle)
        plan = plan_loras(
            opened.root,
            _components(opened),
            as_loras(loras),
            strengths=strengths,
            text_encoder_strengths=text_encoder_strengths,
            module_filters=module_filters,
            alpha=alpha,
            advice=NOTHING_APPLIES,
        )
        merge = _BundleMerge.of(opened, plan)
        _require_real_files(opened.root)
        for stage in merge.changes:
            opened.check(stage)
        with staged_output(opened.root.resolve(), force=True, complete=True) as staged:
            link_others(opened.root, staged, merge.replaced)
            names = sorted(path.relative_to(opened.root).as_posix() for path in merge.replaced)
            kept = [_keep(opened, staged, name) for name in names]
            return merge.write(staged, opened.root, kept=kept, start=start_file)


def derive_bundle(
    root: str | Path,
    output: Path,
    loras: Sequence[str | Path],
    *,
    strengths: Sequence[float] = (),
    start_file: StartFile | None = None,
) -> Merge:
    """Write the bundle at `root` with `loras` merged in to `output`, in place of a bundle there.

    All other files are shared with the bundle at `root`: as clones, else as hard links, else as copies.

    Raises CheckpointError when any file of the bundle at `root` is damaged, and the errors of `apply_loras`."""
    bundle = _open_plain(root)
    plan = plan_loras(bundle.root, _components(bundle), loras, strengths=strengths, advice=NOTHING_APPLIES)
    merge = _BundleMerge.of(bundle, plan)
    for stage in bundle.manifest.stages:
        bundle.check(stage)
    with staged_output(output, force=True) as staged:
        placements = share_others(bundle.root, staged, merge.replaced)
        return merge.write(staged, output, placements=placements, start=start_file)


def undo_loras(bundle: str | Path) -> tuple[str, ...]:
    """Put back every file that `apply_loras` replaced. Returns the names of the LoRAs that were merged in.

    Raises UsageError when no LoRA can be taken out, and CheckpointError when a kept file is missing or changed.

    Examples:
        >>> undo_loras("bundle")
        ('style.safetensors',)
    """
    with locked_bundle(Path(bundle)):
        opened = open_bundle(Path(bundle))
        state = opened.manifest.lora
        if state is None:
            raise UsageError(f"{bundle}: no LoRA is merged into it; there is nothing to undo")
        if not state.kept:
            raise UsageError(f"{bundle}: was exported with its LoRAs; export the model again without LoRAs")
        for file in state.kept:
            problem = find_change(opened.root / file.path, file)
            if problem:
                raise CheckpointError(f"{opened.root / file.path}: {problem}; export the model again")
        originals = {opened.root / file.path: file.path.removesuffix(KEPT) for file in state.kept}
        with staged_output(opened.root.resolve(), force=True, complete=True) as staged:
            link_others(opened.root, staged, {*originals, *(opened.root / name for name in originals.values())})
            for path, name in originals.items():
                link(path, staged / name)
        return tuple(lora.name for lora in state.loras)


@dataclass(frozen=True)
class _BundleMerge:
    """A bundle, and the changes of the tensors that its graphs read."""

    bundle: Bundle
    plan: LoraPlan
    changes: dict[Stage, Changes]

    @classmethod
    def of(cls, bundle: Bundle, plan: LoraPlan) -> _BundleMerge:
        """Raises ConversionError when the plan changes nothing that the graphs read."""
        changes = {stage: _changes_in_graphs(plan, stage, bundle) for stage in plan.stages}
        if not any(changes.values()):
            raise ConversionError(f"{bundle.root}: nothing in its graphs changes:{listed_below(plan.unapplied)}")
        return cls(bundle, plan, changes)

    @property
    def replaced(self) -> set[Path]:
        """The files that change: the manifest, and the weights that hold changed tensors."""
        tensors = (self.plan.components[stage].tensors[name] for stage, names in self.changes.items() for name in names)
        biases = (path for stage in self.changes for path in self._stale_biases(stage))
        return {self.bundle.root / MANIFEST_NAME, *(tensor.path for tensor in tensors), *biases}

    def _stale_biases(self, stage: Stage) -> Iterator[Path]:
        """Yield the file of biases that were computed from weights that change, if the stage has one."""
        path = self.bundle.root / stage / BIASES_NAME
        has_one = any(self.bundle.root / file.path == path for file in self.bundle.entry(stage).files)
        if has_one and depends_on(self.plan.components[stage].config, self.changes[stage].keys()):
            yield path

    def write(
        self,
        staged: Path,
        output: Path,
        *,
        kept: Sequence[FileEntry] = (),
        placements: Mapping[Path, Placement] | None = None,
        start: StartFile | None,
    ) -> Merge:
        """Write the changed weights and the manifest into `staged`, which has all other files.

        `kept` are the old files that stay for an undo. `placements` say how files came from another bundle."""
        effects: list[Effect] = []
        stages = {
            stage: _with_placement(entry, staged, placements or {})
            for stage, entry in self.bundle.manifest.stages.items()
        }
        for stage, changes in self.changes.items():
            effects += self._rewrite(stage, changes, staged, start)
            stages[stage] = self._with_new_files(stages[stage], staged)
        state = LoraState(loras=tuple(self.plan.entries), kept=tuple(kept))
        manifest = self.bundle.manifest.model_copy(update={"stages": stages, "lora": state})
        (staged / MANIFEST_NAME).write_text(to_text(manifest), encoding="utf-8")
        return Merge(output, tuple(effects), tuple(self.plan.unapplied), tuple(self.plan.notes))

    def _rewrite(self, stage: Stage, changes: Changes, staged: Path, start: StartFile | None) -> list[Effect]:
        """Change the tensors in copies of their files, then compute the biases again that depend on them."""
        root, component = self.bundle.root, self.plan.components[stage]
        tensors = {
            name: replace(tensor, path=staged / tensor.path.relative_to(root))
            for name, tensor in component.tensors.items()
        }
        for name in changes:
            source, path = component.tensors[name].path, tensors[name].path
            if not path.exists():
                copy(source, path, start(f"{stage}/{path.name}", source.stat().st_size) if start else None)
        effects = overwrite(tensors, changes)
        for biases in self._stale_biases(stage):
            fold_biases(component.config, tensors, staged / biases.relative_to(root))
        return effects

    def _with_new_files(self, entry: StageEntry, staged: Path) -> StageEntry:
        """Return the stage's entry with the sizes and hashes of the files that changed."""
        root, replaced = self.bundle.root, self.replaced
        files = tuple(
            describe_file(staged, staged / file.path, sha256_of(staged / file.path))
            if root / file.path in replaced
            else file
            for file in entry.files
        )
        weights = {root / file.path for file in entry.files if _is_weights(file, entry)}
        return entry.model_copy(update={"files": files, "weights": "copy" if weights <= replaced else entry.weights})


def _is_weights(file: FileEntry, entry: StageEntry) -> bool:
    """True for the files that came from a model: no graph, and no biases that were computed."""
    return file.path not in entry.graph_paths and not file.path.endswith(f"/{BIASES_NAME}")


def _open_plain(root: str | Path) -> Bundle:
    """Open a bundle. Raises UsageError when it has LoRAs merged in already."""
    bundle = open_bundle(Path(root))
    if bundle.manifest.lora is not None:
        names = ", ".join(f"{lora.name} ({lora.strength:g})" for lora in bundle.manifest.lora.loras)
        undo = f"cascadekit lora apply {shlex.quote(str(bundle.root))} --undo"
        raise UsageError(f"{bundle.root}: has {names} merged in already; take them out with `{undo}`, then apply all")
    return bundle


def _components(bundle: Bundle) -> dict[Stage, Component]:
    return {stage: bundle_component(bundle, stage) for stage in MERGED_STAGES if stage in bundle.manifest.stages}


def _require_real_files(root: Path) -> None:
    """Raise UsageError for a bundle of links, such as one in the Hub's cache, whose files other programs use too."""
    path = next((path for path in sorted(root.rglob("*")) if path.is_symlink()), None)
    if path is not None:
        raise UsageError(
            f"{path}: a link to a file elsewhere, which is not to be changed; copy the bundle (cp -rL {root} COPY) and "
            f"apply to the copy, or leave the bundle as it is: `cascadekit generate {root} PROMPT --lora LORA`"
        )


def _changes_in_graphs(plan: LoraPlan, stage: Stage, bundle: Bundle) -> Changes:
    """Return the changes of a stage without those of tensors that no graph reads, which have no effect.

    Raises UsageError when tensors are missing from the graphs because they are quantised."""
    tensors, changes = plan.components[stage].tensors, plan.of(stage)
    quantization = bundle.entry(stage).quantization
    if quantization is not Quantization.NONE and not changes.keys() <= tensors.keys():
        raise UsageError(
            f"{bundle.root}: the {stage} is quantised ({quantization}), and a LoRA changes weights before that; "
            f'export the model again with the LoRAs and quantize="{quantization}"'
        )
    plan.unapplied += [f"{stage}: {name}: its graphs do not use it" for name in changes if name not in tensors]
    return {name: of_tensor for name, of_tensor in changes.items() if name in tensors}


def _keep(bundle: Bundle, staged: Path, name: str) -> FileEntry:
    """Link a file that is to be replaced under the name that it is kept by."""
    known = {file.path: file for entry in bundle.manifest.stages.values() for file in entry.files}
    kept = staged / (name + KEPT)
    link(bundle.root / name, kept)
    if name in known:
        return known[name].model_copy(update={"path": name + KEPT})
    return describe_file(staged, kept, sha256_of(kept))


def _with_placement(entry: StageEntry, staged: Path, placements: Mapping[Path, Placement]) -> StageEntry:
    """Return the stage's entry with the placement of its weights; of several, the one that shares most."""
    paths = (staged / file.path for file in entry.files if _is_weights(file, entry))
    found = {placements[path] for path in paths if path in placements}
    placement = next((one for one in ("link", "reflink", "copy") if one in found), entry.weights)
    return entry.model_copy(update={"weights": placement})
