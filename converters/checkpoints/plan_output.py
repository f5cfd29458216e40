"""Decides which files a conversion writes, and which bytes make each tensor in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas.errors import ConversionError, UsageError
from ...schemas.folders import shard_name, weights_names
from ...schemas.key_prefixes import COMFYUI_FILES, COMFYUI_PREFIXES
from ...schemas.layouts import Layout, to_diffusers
from ...schemas.stages import Stage, Variant
from ...schemas.tensors import Shape
from ...storage.cast import target_dtype
from ...storage.tensor_plans import TensorPlan, canonical_order
from .identify import Component
from .model_folder import component_folders
from .open_model import ENCODERS

ORIGINAL_NAMES: Mapping[Stage, str] = {
    Stage.PRIOR: "stage_c",
    Stage.DECODER: "stage_b",
    Stage.VQGAN: "stage_a",
    Stage.EFFNET_ENCODER: "effnet_encoder",
    Stage.PREVIEWER: "previewer",
    Stage.CONTROLNET_CANNY: "controlnet/canny",
    Stage.CONTROLNET_INPAINTING: "controlnet/inpainting",
    Stage.CONTROLNET_SUPER_RESOLUTION: "controlnet/super_resolution",
    Stage.CONTROLNET_IDENTITY: "controlnet/identity",
}
COMFYUI_NAMES: Mapping[Stage, str] = {
    Stage.PRIOR: "stable_cascade_stage_c",
    Stage.DECODER: "stable_cascade_stage_b",
}


@dataclass(frozen=True)
class Target:
    """How a conversion's output should be: layout, dtype in safetensors' spelling (None keeps), the variant that file
    names say (None: none), the size above which a component is cut into shards, the combined pipeline's folder
    names, the safetensors library's order of tensors instead of the source's."""

    layout: Layout
    dtype: str | None = None
    variant: str = ""
    shard_size: int | None = None
    combined: bool = False
    canonical: bool = False


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file to write, its path below the output."""

    path: Path
    tensors: dict[str, TensorPlan]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.tensors.values())


@dataclass(frozen=True)
class Arrangement:
    """All files of an output but its configs; `indexes` are the JSON indexes of sharded components."""

    files: tuple[FilePlan, ...]
    indexes: dict[Path, dict[str, Any]]
    notes: tuple[str, ...] = ()


def arrange(components: Mapping[Stage, Component], target: Target) -> Arrangement:
    """The files that hold `components` in the target's layout.

    Raises UsageError when the layout has no place for any of them, ConversionError for parts that cannot be joined."""
    if target.layout is Layout.COMFYUI:
        return _comfyui(components, target)
    files: list[FilePlan] = []
    indexes: dict[Path, dict[str, Any]] = {}
    for component in components.values():
        tensors = plan_tensors(component, target)
        for path in _paths(component, target):
            shards = list(_shards(_file(path, tensors, component.metadata, target), target))
            files += shards
            if len(shards) > 1:
                name = weights_names(_stem(component.stage), target.variant)[1]
                indexes[path.with_name(name)] = _index(shards)
    return Arrangement(tuple(files), indexes)


def plan_tensors(component: Component, target: Target, prefix: str = "") -> dict[str, TensorPlan]:
    """Which bytes make each tensor of `component`, in the order they have in the source."""
    shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in component.tensors.items()}
    plans = {}
    for name, made in to_diffusers(component.stage, target.layout).inverse.apply(shapes).items():
        ranges = tuple(component.tensors[part.name] for part in made.parts)  # away from diffusers nothing is cut
        dtypes = {target_dtype(tensor.dtype, target.dtype) for tensor in ranges}
        if len(dtypes) > 1:
            raise ConversionError(
                f"{component.path}: {', '.join(p.name for p in made.parts)} become one tensor {name} "
                f"but differ in dtype ({', '.join(sorted(dtypes))}); choose one with --dtype"
            )
        plans[prefix + name] = TensorPlan(dtypes.pop(), made.shape, ranges)
    return plans | {prefix + name: TensorPlan("I64", (), ()) for name in component.zeros}


def _paths(component: Component, target: Target) -> list[Path]:
    if target.layout is not Layout.DIFFUSERS and component.stage in ORIGINAL_NAMES:
        return [Path(f"{ORIGINAL_NAMES[component.stage]}{_lite(component)}.safetensors")]
    name = weights_names(_stem(component.stage), target.variant)[0]
    return [Path(folder, name) for folder in component_folders(component.stage, combined=target.combined)]


def _stem(stage: Stage) -> str:
    return "model" if stage in ENCODERS else "diffusion_pytorch_model"


def _lite(component: Component) -> str:
    return "_lite" if component.variant is Variant.LITE else ""


def _file(path: Path, tensors: dict[str, TensorPlan], metadata: Mapping[str, str], target: Target) -> FilePlan:
    ordered = canonical_order(tensors) if target.canonical else tensors
    return FilePlan(path, ordered, {"format": "pt", **metadata})


def _shards(file: FilePlan, target: Target) -> Iterator[FilePlan]:
    """The file cut into shards of at most the target's size; a single larger tensor is a shard of its own."""
    if target.layout is not Layout.DIFFUSERS or target.shard_size is None or file.nbytes <= target.shard_size:
        yield file
        return
    shards: list[dict[str, TensorPlan]] = [{}]
    filled = 0
    for name, plan in file.tensors.items():
        if shards[-1] and filled + plan.nbytes > target.shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = plan
        filled += plan.nbytes
    stem = file.path.name.split(".")[0]
    for number, tensors in enumerate(shards, start=1):
        name = shard_name(stem, target.variant, number, len(shards))
        yield FilePlan(file.path.with_name(name), tensors, file.metadata)


def _index(shards: list[FilePlan]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.path.name for shard in shards for name in shard.tensors},
    }


def _comfyui(components: Mapping[Stage, Component], target: Target) -> Arrangement:
    """The all-in-one files of the stages there are; ControlNets stay files of their own."""
    files: list[FilePlan] = []
    notes = []
    placed: set[Stage] = set()
    for head, parts in COMFYUI_FILES.items():
        if head not in components:
            continue
        present = [stage for stage in parts if stage in components]
        absent = [str(stage) for stage in parts if stage not in components]
        tensors: dict[str, TensorPlan] = {}
        for stage in present:
            tensors |= plan_tensors(components[stage], target, COMFYUI_PREFIXES[stage])
        path = Path(f"{COMFYUI_NAMES[head]}{_lite(components[head])}.safetensors")
        files.append(_file(path, tensors, components[head].metadata, target))
        placed.update(present)
        if absent:
            notes.append(f"{path}: without {', '.join(absent)}, which ComfyUI's own file has")
    for stage, component in components.items():
        if stage.startswith("controlnet/"):
            (path,) = _paths(component, target)
            files.append(_file(path, plan_tensors(component, target), component.metadata, target))
            placed.add(stage)
    homeless = [str(stage) for stage in components if stage not in placed]
    if not files:
        raise UsageError(f"ComfyUI's files are named after stage_c and stage_b; there is neither with {homeless[0]}")
    if homeless:
        notes.append(f"no place in these ComfyUI files for {', '.join(homeless)}; left out")
    return Arrangement(tuple(files), {}, tuple(notes))
