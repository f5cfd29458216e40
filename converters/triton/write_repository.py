"""Writes a bundle as a model repository for Triton Inference Server.

The repository has a model for each stage, with the bundle's graph or plan, and two models in Python over them:
`cascade` answers a call once, `cascade_stream` sends previews first.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.triton.request_tensors import INPUTS, OUTPUTS, STREAM_INPUTS, STREAM_OUTPUTS
from ...schemas.callbacks import Say, StartFile, ignored
from ...schemas.errors import ExportError
from ...schemas.folders import TRITON_FORMAT, TRITON_INDEX
from ...schemas.forecast import FileSize, Forecast, OnPlan
from ...schemas.manifest import MANIFEST_NAME, Manifest, to_text
from ...schemas.precision import Precision
from ...schemas.stages import EVERY_IMAGE, Stage
from ...storage.atomic_output import check_output, staged_output
from ...storage.bundle import Bundle, open_bundle, require_utf8
from ...storage.file_sizes import sizes_of
from ..export.bundle_weights import clone
from .config_text import Word, config_text, port_tensors, row_tensors, string_map
from .stage_plans import StagePlans, find_plans
from .triton_options import KINDS, TritonOptions

GATHERING = 50_000  # microseconds that a call waits for others to be generated with
MOST_WAITING = 64  # calls; the server refuses others at once
DEFAULT = TritonOptions()

MODEL_PY = '''"""{about}"""

from cascadekit.runtime.triton.{module} import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class ModelFolder:
    """A model of the repository: its config, and the content of its version 1: text, or files of the bundle."""

    config: dict[str, Any]
    content: dict[str, str | Path]

    def files(self) -> Iterator[tuple[str, str | Path]]:
        name = self.config["name"]
        yield f"{name}/config.pbtxt", config_text(self.config)
        yield from ((f"{name}/1/{path}", found) for path, found in self.content.items())


@dataclass(frozen=True)
class Repository:
    """A repository on disk: the names of the models, and the files with their bytes."""

    output: Path
    backend: str
    models: tuple[str, ...]
    files: tuple[FileSize, ...]

    def to_json(self) -> dict[str, Any]:
        files = [{"path": file.path, "bytes": file.bytes} for file in self.files]
        return {"output": str(self.output), "backend": self.backend, "models": list(self.models), "files": files}


def export_triton(
    bundle: str | Path,
    output: str | Path,
    options: TritonOptions = DEFAULT,
    *,
    start_file: StartFile | None = None,
    say: Say = ignored,
    on_plan: OnPlan | None = None,
) -> Repository:
    """Write the repository of `bundle` at `output`. `on_plan` is called with a Forecast once everything was checked.

    Raises a CascadeError, and leaves nothing behind, when a stage or a plan is missing or damaged. It also does when a
    stage cannot run where the options say, or when the output cannot be written."""
    output = Path(output)
    require_utf8(output)
    check_output(output, force=options.force, files=[TRITON_INDEX])
    opened = open_bundle(Path(bundle))
    models = _models(opened, options, say)
    content = dict(file for model in models for file in model.files())
    names = tuple(model.config["name"] for model in models)
    content[TRITON_INDEX] = _index(options, names, [*content, TRITON_INDEX])
    sources = [found for found in content.values() if isinstance(found, Path)]
    sizes = tuple(FileSize(path, _bytes(found)) for path, found in content.items())
    if on_plan:
        check_output(output, force=options.force, sources=[opened.root], files=list(content))
        on_plan(Forecast(output, sizes_of(sources), sizes))
    with staged_output(output, force=options.force, sources=[opened.root], files=list(content), say=say) as staged:
        for path, found in content.items():
            _write(found, staged / path, path, options, start_file)
    return Repository(output, options.backend, names, sizes)


def _index(options: TritonOptions, models: tuple[str, ...], files: list[str]) -> str:
    """The file that says what the folder is. The server reads folders alone."""
    found = {"format": TRITON_FORMAT, "version": 1, "backend": options.backend, "models": models, "files": files}
    return json.dumps(found, indent=2) + "\n"


def _bytes(found: str | Path) -> int:
    return found.stat().st_size if isinstance(found, Path) else len(found.encode())


def _write(found: str | Path, target: Path, name: str, options: TritonOptions, start_file: StartFile | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(found, str):
        target.write_text(found, encoding="utf-8")
        return
    progress = start_file(name, _bytes(found)) if start_file else None
    if options.weights == "copy" or not clone(found, target):
        if options.weights == "link":
            _link(found, target)
        else:
            shutil.copyfile(found, target)
    if progress:
        progress(_bytes(found))


def _link(found: Path, target: Path) -> None:
    try:
        os.link(found.resolve(), target)
    except OSError as error:
        raise ExportError(f'{found}: cannot be hard-linked: {error.strerror}; use weights="copy"') from error


def _models(bundle: Bundle, options: TritonOptions, say: Say) -> list[ModelFolder]:
    stages = [*EVERY_IMAGE, *([Stage.PREVIEWER] if Stage.PREVIEWER in bundle.manifest.stages else [])]
    plans = find_plans(bundle, stages, say) if options.backend == "tensorrt" else {}
    for stage in stages:
        bundle.graph(stage)  # checks the stage's files
        if options.backend != "tensorrt" and options.device == "cpu":
            _require_cpu_kernels(bundle, stage)
    batch, rows = options.batch, 1 if options.exact else options.batch
    if plans:
        rows = _rows(plans, options)
        batch = min([batch, *(found.most for stage, found in plans.items() if stage is Stage.PREVIEWER)])
    return [
        *(_stage_model(bundle, stage, options, plans.get(stage)) for stage in stages),
        *_cascade_models(bundle, stages, rows, batch, options.instances),
    ]


def _require_cpu_kernels(bundle: Bundle, stage: Stage) -> None:
    if bundle.entry(stage).precision is Precision.BF16:
        raise ExportError(
            f"{bundle.root}: its {stage} computes in bf16, for which onnxruntime has no CPU kernels; "
            f'set device="cuda", or export it again: cascadekit export MODEL -o BUNDLE --precision {stage}=fp32'
        )


def _rows(plans: dict[Stage, StagePlans], options: TritonOptions) -> int:
    """The rows that all sampled stages and the text encoder take at once.

    Raises ExportError when an exact image needs one row, and a plan needs more."""
    needs_more = [stage for stage, found in plans.items() if found.least > 1]
    if options.exact and needs_more:
        raise ExportError(
            f"the plans of the {', '.join(needs_more)} take no single row, which exact=True needs; set exact=False, or "
            "build them for one image: cascadekit build BUNDLE --backend tensorrt --graph model --min WxH"
        )
    limits = [plans[stage].most for stage in (Stage.TEXT_ENCODER, Stage.PRIOR, Stage.DECODER)]
    return 1 if options.exact else min(options.batch, *limits)


def _stage_model(bundle: Bundle, stage: Stage, options: TritonOptions, plans: StagePlans | None) -> ModelFolder:
    entry = bundle.entry(stage).with_main_graph_alone()
    config: dict[str, Any] = {
        "name": str(stage),
        "backend": options.backend,
        "max_batch_size": plans.most if plans else options.batch,
        "input": port_tensors(entry.inputs),
        "output": port_tensors(entry.outputs),
        "instance_group": {"count": 1, "kind": Word(KINDS[options.device])},
    }
    if not options.exact:  # a batch of several calls rounds differently
        config["dynamic_batching"] = {}
    files = [bundle.root / file.path for file in entry.files]
    if plans:
        config |= plans.config()
        return ModelFolder(config, dict(plans.files))
    if options.backend == "onnxruntime":  # several files of one graph lie in a folder of the graph's name
        return ModelFolder(config, {f"model.onnx/{path.name}": path for path in files})
    manifest = bundle.manifest.model_copy(update={"stages": {stage: entry}, "tokenizer": None, "files": ()})
    about = f"The {stage} as a model that runs ONNX Runtime in Python."
    return ModelFolder(
        config,
        {
            "model.py": MODEL_PY.format(about=about, module="stage_model", name="StageModel"),
            MANIFEST_NAME: to_text(_without_history(manifest)),
            **{path.relative_to(bundle.root).as_posix(): path for path in files},
        },
    )


def _cascade_models(
    bundle: Bundle, stages: list[Stage], rows: int, batch: int, instances: int
) -> Iterator[ModelFolder]:
    """`cascade` and `cascade_stream`: at most `batch` images together, `rows` of them through a stage at once."""
    entries = {stage: entry for stage, entry in bundle.manifest.stages.items() if stage in stages}
    manifest = bundle.manifest.model_copy(update={"stages": entries})
    files: dict[str, str | Path] = {MANIFEST_NAME: to_text(_without_history(manifest))}
    if manifest.tokenizer and bundle.tokenizer:
        files[manifest.tokenizer] = bundle.tokenizer
    for name, inputs, outputs, about in (
        ("cascade", INPUTS, OUTPUTS, "Images of prompts."),
        ("cascade_stream", STREAM_INPUTS, STREAM_OUTPUTS, "Images of prompts, with previews."),
    ):
        config: dict[str, Any] = {
            "name": name,
            "backend": "python",
            "max_batch_size": batch,
            "input": row_tensors(inputs, inputs=True),
            "output": row_tensors(outputs, inputs=False),
            "instance_group": {"count": instances, "kind": Word("KIND_CPU")},
            "dynamic_batching": {
                "max_queue_delay_microseconds": GATHERING,
                "default_queue_policy": {"max_queue_size": MOST_WAITING},
            },
            "parameters": string_map({"rows": str(rows)}, "string_value"),
        }
        if outputs is STREAM_OUTPUTS:
            config["model_transaction_policy"] = {"decoupled": True}
        code = MODEL_PY.format(about=about, module="cascade_model", name="CascadeModel")
        yield ModelFolder(config, {"model.py": code, **files})


def _without_history(manifest: Manifest) -> Manifest:
    """Without verdicts and LoRAs, which are of the whole bundle."""
    return manifest.model_copy(update={"parity": (), "lora": None})
