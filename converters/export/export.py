"""Exports a model as a bundle: ONNX graphs for each stage, weights in safetensors files, and the manifest."""

from __future__ import annotations  # help() shows the types as they are written here

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas.callbacks import Say, StartFile, ignored
from ...schemas.created_by import created_by
from ...schemas.errors import ExportError, LayoutError, UsageError
from ...schemas.forecast import OnPlan
from ...schemas.infer_config import infer_config
from ...schemas.limits import VQGAN_SCALES
from ...schemas.manifest import MANIFEST_NAME, LoraState, Manifest, to_text
from ...schemas.messages import require_known
from ...schemas.stages import (
    PROJ_BLOCKS_ENDS,
    ControlNetConfig,
    Stage,
    TextEncoderConfig,
    Variant,
    VQGANConfig,
    variant_of,
)
from ...storage.atomic_output import check_output, staged_output
from ...storage.bundle import require_utf8
from ...storage.file_hashes import Hashing, describe_file
from ...storage.output_rules import require_writable
from ..checkpoints.component import Component, find_problems
from ..checkpoints.model_folder import check_tokenizer, write_tokenizer
from ..checkpoints.open_model import Model, open_model
from ..hub import local_path
from .bundle_weights import source_files, stored_dtype, why_not_as_is
from .export_options import ExportOptions
from .export_stage import OnQuantized, StageExporter
from .forecast_export import forecast_export

if TYPE_CHECKING:
    from ..lora.merge_plan import LoraPlan

DEFAULT = ExportOptions()
DEFAULT_SIDE = {Variant.TINY: 256, Variant.ICONS: 128}  # pixels; every other cascade was trained at 1024


def export(
    model: Model | str | Path,
    output: str | Path,
    options: ExportOptions = DEFAULT,
    *,
    start_file: StartFile | None = None,
    say: Say = ignored,
    on_quantized: OnQuantized = ignored,
    on_plan: OnPlan | None = None,
    **changes: Any,
) -> Manifest:
    """Write the bundle of `model` (opened, or its path) at `output`: cascade.json and a folder for each stage.

    Options are given as one value or by name; a name overrides the value's field:

        export("model", "bundle", precision="fp16", fp16_safe="auto")
        export("model", "bundle", ExportOptions(target="tensorrt", precision="bf16"), stages=["prior"])

    `start_file` is called before a weights file is written. `say` is called with each line that a user should know.
    `on_quantized` is called with the choice of Linears for each quantised stage. `on_plan` is called with a Forecast
    once everything was checked; an exception there ends the export with nothing written. Returns the bundle's manifest.

    Raises a CascadeError, and leaves nothing behind, when an option is wrong, a stage is missing or damaged, or the
    output cannot be written."""
    require_known("export", changes, ExportOptions.__dataclass_fields__.keys() | signature(export).parameters.keys())
    options = replace(options, **changes)
    output = Path(output)
    require_utf8(output)
    check_output(output, force=options.force, files=[MANIFEST_NAME])
    if options.calibration is not None:
        require_writable(Path(options.calibration))
    if options.stages:
        options.require_stages(options.stages)
    model = _opened(model, options, say)
    components = _components(model, options)
    configs = [component.config for component in components.values()]
    vocabulary = next((config.vocab_size for config in configs if isinstance(config, TextEncoderConfig)), None)
    tokenizer = check_tokenizer(model.tokenizer, vocabulary)
    for text in tokenizer.notes if tokenizer else ():
        say(text)
    options = replace(options, loras=[(local_path(path, say), strength) for path, strength in options.loras])
    loras = _read_loras(components, options, say)
    side = min(DEFAULT_SIDE.get(component.variant, 1024) for component in components.values())
    sources = [*model.sources, *(path for component in components.values() for path in source_files(component))]
    sources += [Path(path) for path, _ in options.loras]
    if on_plan:
        check_output(output, force=options.force, sources=sources, files=[MANIFEST_NAME])
        on_plan(forecast_export(components.values(), output, options, set(loras.stages) if loras else set()))
    with (
        staged_output(output, force=options.force, sources=sources, files=[MANIFEST_NAME], say=say) as staged,
        Hashing() as hashes,
    ):
        staged.mkdir()
        words = write_tokenizer(tokenizer, staged)  # before the stages: calibration reads prompts with it
        if words:
            hashes.start(words)
        exporter = StageExporter(
            root=staged,
            options=options,
            hashes=hashes,
            loras=loras,
            control=_controlled_blocks(model),
            start_file=start_file,
            say=say,
            on_quantized=on_quantized,
        )
        exported = {stage: exporter.export(component) for stage, component in components.items()}
        manifest = Manifest(
            created_by=created_by(),
            default_size=(side, side),
            vqgan_scale=next((config.scale_factor for config in configs if isinstance(config, VQGANConfig)), None),
            tokenizer=words.relative_to(staged).as_posix() if words else None,
            stages={stage: done.entry(staged, hashes) for stage, done in exported.items()},
            files=(describe_file(staged, words, hashes.of(words)),) if words else (),
            lora=LoraState(loras=tuple(loras.entries), kept=()) if loras else None,
        )
        (staged / MANIFEST_NAME).write_text(to_text(manifest), encoding="utf-8")
    return manifest


def _controlled_blocks(model: Model) -> tuple[int, ...]:
    """The blocks of the prior that the model's ControlNets feed; without any, those of most released ones."""
    configs = [component.config for component in model.components.values()]
    fed = {block for config in configs if isinstance(config, ControlNetConfig) for block in config.proj_blocks}
    return tuple(sorted(fed)) or PROJ_BLOCKS_ENDS


def _opened(model: Model | str | Path, options: ExportOptions, say: Say) -> Model:
    if not isinstance(model, Model):
        encoder = options.text_encoder
        return open_model([local_path(model, say)], text_encoder=None if encoder is None else local_path(encoder, say))
    if options.text_encoder is not None:
        raise UsageError("text_encoder is for a model given by its path; give it to open_model() instead")
    return model


def _components(model: Model, options: ExportOptions) -> dict[Stage, Component]:
    """The sound components to export, by stage.

    Raises UsageError when there are none or options do not fit them, ExportError when they cannot be linked."""
    stages = list(options.stages) or [stage for stage in Stage if stage in model.components]
    if not stages:
        raise UsageError(f"nothing to export: the model has none of {', '.join(Stage)}")
    options.require_stages(stages)
    components = {stage: _with_scale(_sound_component(model, stage), options.vqgan_scale) for stage in stages}
    for component in components.values():
        for path in source_files(component):
            require_utf8(path.relative_to(path.parent))  # graphs refer to the weights by the model's file names
        reason = why_not_as_is(component, stored_dtype(component, options)) if options.weights == "link" else None
        if reason:
            raise ExportError(f'{reason}; use weights="copy"')
    return components


def _read_loras(components: Mapping[Stage, Component], options: ExportOptions, say: Say) -> LoraPlan | None:
    """The changes that the LoRAs make to the weights; None without LoRAs."""
    if not options.loras:
        return None
    from ..lora.merge_plan import plan_loras

    paths, strengths = [path for path, _ in options.loras], [strength for _, strength in options.loras]
    plan = plan_loras("the model", components, paths, strengths=strengths)
    if options.weights == "link":
        raise UsageError(
            f'weights="link" shares the model\'s weights, and a LoRA changes those of the {", ".join(plan.stages)}; '
            'use weights="auto", which copies what changes'
        )
    for text in (*plan.notes, *(f"not applied: {part}" for part in plan.unapplied)):
        say(text)
    return plan


def _sound_component(model: Model, stage: Stage) -> Component:
    """The component of `stage`, with every tensor that its config asks for.

    Raises LayoutError for missing and misshapen tensors. The message names the variant of the file when the
    config.json beside it describes another one."""
    component = model.components.get(stage)
    if component and component.problems:
        try:
            found = infer_config(stage, {name: tensor.shape for name, tensor in component.tensors.items()})
        except LayoutError:
            found = component.config
        if variant_of(found) != component.variant and not find_problems(found, component.tensors):
            raise LayoutError(
                f"{component.path}: its config.json describes the {component.variant} {stage}, the file holds the "
                f"{variant_of(found)} one; put the config.json there that belongs to the file"
            )
    return model.component(stage)


def _with_scale(component: Component, scale: float | None) -> Component:
    """The component; a vqgan gets the latent scale `scale` when one is given.

    Raises ExportError for a config.json whose scale is outside VQGAN_SCALES."""
    if not isinstance(component.config, VQGANConfig):
        return component
    least, most = VQGAN_SCALES
    config = component.config if scale is None else replace(component.config, scale_factor=scale)
    if not least <= config.scale_factor <= most:
        raise ExportError(
            f"{component.path}: its config.json says scale_factor {config.scale_factor:g}; expected a number from "
            f"{least:g} to {most:g}; give the right one, vqgan_scale=0.3764 for diffusers or vqgan_scale=0.43 for "
            "the original"
        )
    return replace(component, config=config)
