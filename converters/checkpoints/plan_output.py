"""Plans the files that a conversion writes: which tensors go into each, and which source ranges make each tensor.

| value | contents |
|---|---|
| OutputPlan | one FilePlan for each weights file |
| FilePlan | one TensorPlan for each tensor |
| TensorPlan | the ranges of source files (TensorRange) that hold the tensor's values |
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas.block_types import BLOCK_TYPES, QUANTISED, WRITTEN
from ...schemas.casts import target_dtype
from ...schemas.errors import ConversionError, UsageError
from ...schemas.folders import MODEL_INDEX, MODULAR_FILES, ORIGINAL_NAMES, shard_name, weights_names
from ...schemas.key_prefixes import COMFYUI_FILES, COMFYUI_PREFIXES
from ...schemas.layouts import FOLDERS, Layout, to_diffusers
from ...schemas.passport_keys import without_passport
from ...schemas.sdnq_formats import SDNQ_CHOICES
from ...schemas.stages import Stage, Variant
from ...schemas.tensors import Shape
from ...storage.safetensors_plan import TensorPlan, canonical_order
from ...storage.safetensors_reader import TensorRange
from .comfyui_copy import can_copy, copied, described, keeps_codes
from .component import Component
from .dtype_before import dtype_before, notes_on_dtypes
from .gguf_types import STAGES, GGUFTypes, file_metadata, file_numbers, main_type
from .model_folder import component_folders
from .open_model import ENCODERS

if TYPE_CHECKING:  # numpy is not needed to plan copies
    from .comfyui_types import ScaledTypes
    from .sdnq_types import SdnqTypes

COMFYUI_NAMES: Mapping[Stage, str] = {
    Stage.PRIOR: "stable_cascade_stage_c",
    Stage.DECODER: "stable_cascade_stage_b",
}
PIPELINE_FILES: Mapping[Layout, tuple[str, ...]] = {Layout.DIFFUSERS: (MODEL_INDEX,), Layout.MODULAR: MODULAR_FILES}


@dataclass(frozen=True)
class OutputOptions:
    """How a conversion writes its output. `convert` has an option for each field.

    Attributes:
        layout: The layout to write.
        dtype: The dtype of the weights in safetensors' spelling; None keeps that of the source.
        variant: The variant in the names of diffusers files; "" for none.
        shard_size: Bytes above which a diffusers component is cut into shards; None for no limit.
        combined: True for the folder names of the combined pipeline.
        canonical: True to order tensors as the safetensors library does, False to keep the source's order.
        quantize: The type of most Linears of prior and decoder, such as "Q8_0" or "FP8"; None keeps each tensor's type.
    """

    layout: Layout
    dtype: str | None = None
    variant: str = ""
    shard_size: int | None = None
    combined: bool = False
    canonical: bool = False
    quantize: str | None = None


@dataclass(frozen=True)
class FilePlan:
    """A weights file to write: its path below the output, its tensors in their order, and its metadata.

    `numbers` is the part of a GGUF file's metadata that is not text. `restored` files get back the header of a file
    that their sources were made of."""

    path: Path
    tensors: dict[str, TensorPlan]
    metadata: dict[str, str]
    numbers: dict[str, int] = field(default_factory=dict)
    restored: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(plan.nbytes for plan in self.tensors.values())

    @property
    def described(self) -> str:
        """A line on how the file's tensors are made, as in "158 tensors: 150 copied (F16), 8 F16 to BF16"."""
        kinds = Counter(map(_became, self.tensors.values()))
        header = "; the header of the file that the sources were made of" if self.restored else ""
        return f"{len(self.tensors)} tensors: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}{header}"

    @property
    def sources(self) -> list[Path]:
        """The files that hold its values, sorted."""
        return sorted({path for tensor in self.tensors.values() for path in tensor.files})

    @property
    def is_copied(self) -> bool:
        """True when every value is copied, neither cast nor multiplied by a scale."""
        return all(
            isinstance(each, TensorRange) and each.dtype == plan.dtype and not each.scale
            for plan in self.tensors.values()
            for each in plan.ranges
        )


def _became(plan: TensorPlan) -> str:
    """Return how the values of a tensor are made, as in "F16 to BF16"."""
    if plan.calculated:
        return f"calculated ({plan.dtype})"
    stored = {f"{each.dtype} with scales" if each.scale else each.dtype for each in plan.source_ranges}
    others = sorted(stored - {plan.dtype})
    return f"{' and '.join(others)} to {plan.dtype}" if others else f"copied ({plan.dtype})"


@dataclass(frozen=True)
class OutputPlan:
    """All weights files of an output, the JSON indexes of sharded components by path, and notes for the user.

    `quantization` has the settings of quantised stages for their config.json."""

    options: OutputOptions
    files: tuple[FilePlan, ...]
    indexes: dict[Path, dict[str, Any]]
    notes: tuple[str, ...] = ()
    quantization: dict[Stage, dict[str, Any]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.nbytes for file in self.files)

    @property
    def sources(self) -> list[Path]:
        """The files that hold the values of the output, sorted."""
        return sorted({path for file in self.files for path in file.sources})

    @property
    def file_names(self) -> list[str]:
        """The paths, below the output folder, of files that every run with this plan writes."""
        pipeline = PIPELINE_FILES.get(self.options.layout, ())
        return [*(file.path.as_posix() for file in self.files), *(path.as_posix() for path in self.indexes), *pipeline]

    def fingerprint(self) -> str:
        """Return a digest of everything that decides the output's bytes. Sources count by path, size and time."""
        digest = hashlib.sha256()
        for path in self.sources:
            status = path.stat()
            digest.update(repr((str(path.absolute()), status.st_size, status.st_mtime_ns)).encode())
        for file in self.files:
            digest.update(repr((file.path, file.metadata, file.numbers, list(file.tensors.items()))).encode())
        return digest.hexdigest()


def plan_output(components: Mapping[Stage, Component], options: OutputOptions) -> OutputPlan:
    """Plan the files that hold `components` in the layout of `options`.

    Raises UsageError when the layout has no place for any of them, ConversionError for tensors that cannot be
    joined."""
    planners = {Layout.COMFYUI: _plan_comfyui, Layout.GGUF: _plan_gguf}
    plan = planners.get(options.layout, _plan_each)(components, options)
    if options.dtype is not None:
        return plan
    tensors = [each for file in plan.files for each in file.tensors.values()]
    notes = [line for component in components.values() for line in notes_on_dtypes(component, tensors)]
    return replace(plan, notes=(*plan.notes, *notes))


def _plan_each(components: Mapping[Stage, Component], options: OutputOptions) -> OutputPlan:
    """Plan files of one component each, for all layouts that have these."""
    files: list[FilePlan] = []
    indexes: dict[Path, dict[str, Any]] = {}
    quantization: dict[Stage, dict[str, Any]] = {}
    notes: list[str] = []
    for component in components.values():
        types = _types(component, options)
        tensors = plan_tensors(component, options, types=types)
        if types:
            notes.append(types.note(component))
            quantization[component.stage] = types.settings
        for path in _paths(component, options):
            shards = list(_cut_into_shards(_file(path, tensors, component.metadata, options), options))
            files += shards
            if len(shards) > 1:
                name = weights_names(_stem(component.stage), options.variant)[1]
                indexes[path.with_name(name)] = _index(shards)
    return OutputPlan(options, tuple(files), indexes, tuple(notes), quantization)


def _types(component: Component, options: OutputOptions) -> "ScaledTypes | SdnqTypes | None":
    """Choose the weights to quantise for ComfyUI or as SDNQ does; None when all stay as they are."""
    if not options.quantize or component.stage not in STAGES:
        return None
    if options.quantize in SDNQ_CHOICES:
        from .sdnq_types import SdnqTypes

        return SdnqTypes.of(component, options.quantize)
    from .comfyui_types import ScaledTypes

    return ScaledTypes.of(component, options.quantize)


def plan_tensors(
    component: Component, options: OutputOptions, prefix: str = "", types: "ScaledTypes | SdnqTypes | None" = None
) -> dict[str, TensorPlan]:
    """Plan each tensor of `component` under its name in the output, in the order of the source.

    The weights that `types` quantises become codes and factors. Files for ComfyUI have them under the names of the
    split layout, in which each of q, k and v is a matrix.

    Raises ConversionError when tensors of different dtypes become one and the dtypes are to be kept."""
    shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in component.tensors.items()}
    plans: dict[str, TensorPlan] = {}
    blocks = GGUFTypes.of(component, options.quantize) if options.layout is Layout.GGUF else None
    keeps = keeps_codes(component, options.layout, options.dtype)
    is_split = options.layout is Layout.COMFYUI and (types or keeps)
    rules = to_diffusers(component.stage, Layout.SPLIT if is_split else options.layout).inverse
    for name, mapped in rules.apply(shapes).items():
        # No rule from the diffusers names cuts a tensor, so that all rows of each source are taken.
        ranges = tuple(component.tensors[rows.name] for rows in mapped.rows)
        if types and (quantised := types.plan(prefix + name, mapped.rows[0].name, ranges[0])):
            plans |= quantised
            continue
        if keeps and can_copy(ranges[0]):
            plans |= copied(prefix + name, ranges[0])
            continue
        if blocks:
            dtypes = blocks.stored_as(mapped.rows[0].name, mapped.shape, ranges, options.dtype)
        else:
            dtypes = {target_dtype(each.dtype, options.dtype or dtype_before(each, component)) for each in ranges}
            _require_floats(component, name, dtypes)
        if len(dtypes) > 1:
            raise ConversionError(
                f"{component.path}: {', '.join(rows.name for rows in mapped.rows)} become one tensor {name} "
                f'but differ in dtype ({", ".join(sorted(dtypes))}); choose one, such as dtype="bf16"'
            )
        plans[prefix + name] = TensorPlan(dtypes.pop(), mapped.shape, ranges)
    return plans | {prefix + name: TensorPlan("I64", (), ()) for name in component.zeros}


def _require_floats(component: Component, name: str, dtypes: set[str]) -> None:
    if found := dtypes & {*QUANTISED}:
        raise ConversionError(
            f"{component.path}: {name} is quantised ({', '.join(found)}), which this layout does not keep; choose the "
            'dtype of the weights, such as dtype="bf16"'
        )


def _paths(component: Component, options: OutputOptions) -> list[Path]:
    if options.layout not in FOLDERS and component.stage in ORIGINAL_NAMES:
        return [Path(f"{ORIGINAL_NAMES[component.stage]}{_lite(component)}.safetensors")]
    name = weights_names(_stem(component.stage), options.variant)[0]
    return [Path(folder, name) for folder in component_folders(component.stage, combined=options.combined)]


def _stem(stage: Stage) -> str:
    return "model" if stage in ENCODERS else "diffusion_pytorch_model"


def _lite(component: Component) -> str:
    return "_lite" if component.variant is Variant.LITE else ""


def _file(path: Path, tensors: dict[str, TensorPlan], metadata: Mapping[str, str], options: OutputOptions) -> FilePlan:
    ordered = canonical_order(tensors) if options.canonical else tensors
    return FilePlan(path, ordered, {"format": "pt", **without_passport(metadata), **described(tensors)})


def _cut_into_shards(file: FilePlan, options: OutputOptions) -> Iterator[FilePlan]:
    """Yield shards of at most the shard size. A single tensor above that size becomes a shard of its own."""
    if options.layout not in FOLDERS or options.shard_size is None or file.nbytes <= options.shard_size:
        yield file
        return
    shards: list[dict[str, TensorPlan]] = [{}]
    filled = 0
    for name, plan in file.tensors.items():
        if shards[-1] and filled + plan.nbytes > options.shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = plan
        filled += plan.nbytes
    stem = file.path.name.split(".")[0]
    for number, tensors in enumerate(shards, start=1):
        name = shard_name(stem, options.variant, number, len(shards))
        yield FilePlan(file.path.with_name(name), tensors, file.metadata)


def _index(shards: list[FilePlan]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.path.name for shard in shards for name in shard.tensors},
    }


def _plan_comfyui(components: Mapping[Stage, Component], options: OutputOptions) -> OutputPlan:
    """Plan the all-in-one files of the stages there are. ControlNets stay files of their own."""
    files: list[FilePlan] = []
    notes: list[str] = []
    planned: set[Stage] = set()
    for head, stages in COMFYUI_FILES.items():
        if head not in components:
            continue
        present = [stage for stage in stages if stage in components]
        absent = [str(stage) for stage in stages if stage not in components]
        path = Path(f"{COMFYUI_NAMES[head]}{_lite(components[head])}.safetensors")
        tensors: dict[str, TensorPlan] = {}
        for stage in present:
            types = _types(components[stage], options)
            notes += [types.note(components[stage])] if types else []
            tensors |= plan_tensors(components[stage], options, COMFYUI_PREFIXES[stage], types)
        files.append(_file(path, tensors, components[head].metadata, options))
        planned.update(present)
        if absent:
            notes.append(f"{path}: without {', '.join(absent)}, which ComfyUI's own file has")
    for stage, component in components.items():
        if stage.startswith("controlnet/"):
            (path,) = _paths(component, options)
            files.append(_file(path, plan_tensors(component, options), component.metadata, options))
            planned.add(stage)
    others = [str(stage) for stage in components if stage not in planned]
    if not files:
        raise UsageError(
            f"the comfyui layout files everything with stage_c or stage_b, and {others[0]} comes with neither; add one "
            "of them to the sources"
        )
    if others:
        notes.append(f"no place in these ComfyUI files for {', '.join(others)}; left out")
    return OutputPlan(options, tuple(files), {}, tuple(notes))


def _plan_gguf(components: Mapping[Stage, Component], options: OutputOptions) -> OutputPlan:
    """Plan a GGUF file for each of the prior and the decoder."""
    present = [components[stage] for stage in STAGES if stage in components]
    others = [str(stage) for stage in components if stage not in STAGES]
    if not present:
        raise UsageError(f"the gguf layout has a place for {' and '.join(STAGES)}, found {', '.join(others)}; add one")
    files = []
    for component in present:
        tensors = plan_tensors(component, options)
        title = f"{ORIGINAL_NAMES[component.stage]}{_lite(component)}"
        kind = options.quantize or main_type(tensors)
        path = Path(f"{title}-{kind}.gguf")
        files.append(FilePlan(path, tensors, file_metadata(component, title), file_numbers(kind)))
    notes = [f"no place in GGUF files for {', '.join(others)}; left out"] if others else []
    if options.quantize:
        notes += [_note_on_types(file, options.quantize) for file in files]
    return OutputPlan(options, tuple(files), {}, tuple(notes))


def _note_on_types(file: FilePlan, quantize: str) -> str:
    """Return a line on how many weights have which type."""
    counts = Counter(plan.dtype for plan in file.tensors.values())
    shown = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    differ = counts.keys() & {*WRITTEN} - {quantize}
    reason = f"; rows that are no multiple of {BLOCK_TYPES[quantize].values} have {', '.join(sorted(differ))}"
    return f"{file.path}: tensors by type: {shown}{reason if differ else ''}"
