"""Converts checkpoints between layouts: every output tensor is a range, or several, of an input file."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..schemas.errors import ConversionError, UsageError
from ..schemas.layouts import Layout, to_diffusers
from ..schemas.stages import NetworkConfig, Stage, Variant, VQGANConfig
from ..schemas.tensors import Shape
from .identify import Component
from .model import Model, open_model
from .model_folder import component_files, write_folder_files
from .outputs import staged_output
from .safetensors_file import Progress, TensorPlan, write_file

ORIGINAL_NAMES: Mapping[Stage, str] = {Stage.PRIOR: "stage_c", Stage.DECODER: "stage_b", Stage.VQGAN: "stage_a"}

DIFFUSERS_VQGAN_SCALE = 0.3764

StartFile = Callable[[str, int], Progress]  # given a file's name and its bytes, who to tell of the bytes done


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote: for each stage the weights file below the output, and what the user should know."""

    output: Path
    files: dict[Stage, Path]
    notes: tuple[str, ...]


def convert(
    sources: Sequence[str | Path],
    output: str | Path,
    to: str | Layout,
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    force: bool = False,
    start_file: StartFile | None = None,
) -> Conversion:
    """Write every stage found in `sources` to `output` in the layout `to`; no weight changes a bit.

    `output` becomes a folder, or one file when it ends in .safetensors and a single stage goes to the original
    layout. Raises a CascadeError, and leaves nothing behind, when a source is damaged or the output unwritable."""
    output, to = Path(output), Layout(to)
    model = open_model(sources, text_encoder=text_encoder, image_encoder=image_encoder)
    if not model.components:
        raise UsageError("nothing to convert: no stage found in " + ", ".join(map(str, sources)))
    for component in model.components.values():
        component.require_sound()
    single = output.suffix == ".safetensors"
    if single and (to is not Layout.ORIGINAL or len(model.components) > 1):
        raise UsageError(f"{output}: one file holds one stage in the original layout; give a folder instead")
    files = {stage: _place(component, to) for stage, component in model.components.items()}
    with staged_output(output, force=force) as staged:
        for stage, component in model.components.items():
            path = staged if single else staged / files[stage]
            path.parent.mkdir(parents=True, exist_ok=True)
            plan = plan_tensors(component, to)
            progress = start_file(path.name if single else str(files[stage]), _bytes(plan)) if start_file else None
            write_file(path, plan, {"format": "pt", **component.metadata}, progress)
        if not single:
            _write_rest(model, staged, to)
    return Conversion(output, files if not single else {}, (*model.notes, *_scale_notes(model, to)))


def plan_tensors(component: Component, to: Layout) -> dict[str, TensorPlan]:
    """Which bytes make each tensor of `component` in the layout `to`, in the order they have in the source."""
    rules = to_diffusers(component.stage, to).inverse
    shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in component.tensors.items()}
    plans = {}
    for name, made in rules.apply(shapes).items():
        ranges = tuple(component.tensors[part.name] for part in made.parts)  # away from diffusers nothing is cut
        dtypes = {tensor.dtype for tensor in ranges}
        if len(dtypes) > 1:
            raise ConversionError(
                f"{component.path}: {', '.join(p.name for p in made.parts)} become one tensor {name} "
                f"but differ in dtype ({', '.join(sorted(dtypes))}); save them in one dtype first"
            )
        plans[name] = TensorPlan(ranges[0].dtype, made.shape, ranges)
    return plans


def _place(component: Component, to: Layout) -> Path:
    """Where a component's weights go below the output folder."""
    if to is Layout.ORIGINAL and component.stage in ORIGINAL_NAMES:
        suffix = "_lite" if component.variant is Variant.LITE else ""
        return Path(f"{ORIGINAL_NAMES[component.stage]}{suffix}.safetensors")
    return component_files(component.stage).weights


def _write_rest(model: Model, folder: Path, to: Layout) -> None:
    """Everything of the output folder that is not weights."""
    configs = {stage: _config_for(component, to) for stage, component in model.components.items()}
    if to is Layout.ORIGINAL:
        configs = {stage: config for stage, config in configs.items() if stage not in ORIGINAL_NAMES}
        write_folder_files(folder, configs, index=False)
    else:
        write_folder_files(folder, configs, index=True)
    if model.tokenizer is not None:
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        shutil.copytree(model.tokenizer, folder / "tokenizer")


def _config_for(component: Component, to: Layout) -> NetworkConfig:
    """The config to write; a diffusers folder says diffusers' VQGAN scale."""
    if isinstance(component.config, VQGANConfig) and component.layout is Layout.ORIGINAL and to is Layout.DIFFUSERS:
        return replace(component.config, scale_factor=DIFFUSERS_VQGAN_SCALE)
    return component.config


def _scale_notes(model: Model, to: Layout) -> list[str]:
    vqgan = model.components.get(Stage.VQGAN)
    if vqgan is None or vqgan.layout is to:
        return []
    return [
        "the vqgan's scale belongs to the layout: original code multiplies latents by 0.43, diffusers by 0.3764; "
        "weights are the same, images a little less or more contrasted (see export --vqgan-scale)"
    ]


def _bytes(plan: Mapping[str, TensorPlan]) -> int:
    return sum(tensor.nbytes for tensor in plan.values())
