"""Functions that `generate`, `ui` and `serve` share: opening the cascade, and notes."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.errors import UsageError
from ..schemas.stages import EVERY_IMAGE, Stage
from .console import note
from .progress import byte_progress

if TYPE_CHECKING:
    from ..runtime.cascade import Cascade
    from ..runtime.memory.prediction import Extras
    from ..runtime.text.tokenizer import ClipTokenizer
    from ..schemas.manifest import Manifest
    from ..schemas.request import Request


WEIGHT = re.compile(r"\([^()]*:\s*(?:\d+(?:\.\d+)?|\.\d+)\s*\)")  # emphasis as in (word:1.2)
OPENING = ("device", "engine", "threads", "memory", "vram", "allow_cpu", "cuda_graph", "tf32", "stages", "loras")


def open_cascade(bundle: Path, *, loras: Sequence[tuple[str, float]], **options: Any) -> "Cascade":
    """Open the cascade with the options of MACHINERY, whose names are in `OPENING`.

    Raises UsageError when it lacks a stage that every image needs."""
    from ..runtime.cascade import Cascade
    from ..runtime.engines.int8_saturation import int8_warning
    from ..storage.bundle import open_bundle

    if loras:
        from ..converters.lora.bundle_cache import with_loras

        with Cascade.open(bundle, **options) as opened:  # what cannot run here is refused before LoRAs are merged
            _require_every_image(opened, bundle)
        with byte_progress() as start_file:
            bundle = with_loras(bundle, loras, start_file=start_file, say=note)
    cascade = Cascade.open(bundle, refit=_refit, say=note, **options)
    manifest, name = cascade.manifest, cascade.engine.name
    _require_every_image(cascade, bundle)
    for line in (_verdict_note(manifest, name), open_bundle(bundle).tokenizer_change(), int8_warning(manifest, name)):
        if line:
            note(line)
    return cascade


def _require_every_image(cascade: "Cascade", bundle: Path) -> None:
    """Close the cascade and raise UsageError if it lacks a stage that every image needs."""
    if missing := [stage for stage in EVERY_IMAGE if stage not in cascade.manifest.stages]:
        cascade.close()
        raise UsageError(f"{bundle}: has no {', '.join(missing)}; export the model with it")


def _verdict_note(manifest: "Manifest", engine: str) -> str | None:
    """The warning about the bundle's verdict. That it was never verified is said once for each bundle."""
    from ..parity.verdict import warning
    from ..schemas.verdicts import Verdict, verdict_of

    if verdict_of(manifest, engine) is Verdict.NEVER and not _first_time(manifest):
        return None
    return warning(manifest, engine)


def _first_time(manifest: "Manifest") -> bool:
    """True when a bundle of these files is used for the first time; an empty file in the user's cache remembers it."""
    from ..storage.user_cache import user_cache

    prints = [file.fingerprint for entry in manifest.stages.values() for file in entry.files]
    mark = user_cache("unverified") / hashlib.sha256("\n".join(prints).encode()).hexdigest()[:20]
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # said again next time
        pass
    return True


def _refit(engine: Any, graph: Path) -> None:
    """Put the current weights of `graph` into an engine of plain TensorRT."""
    from ..converters.tensorrt.backend import find_backend
    from ..converters.tensorrt.refit import refit

    refit(find_backend("tensorrt"), engine, graph)


def request_fields(options: Mapping[str, Any], loras: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The fields of a request, from those options of LOOKS that were given, and from the LoRAs."""
    found = {name: value for name, value in options.items() if value not in (None, ()) and name != "size"}
    if options.get("size"):
        found["width"], found["height"] = options["size"]
    if loras:
        found["loras"] = [{"name": name, "strength": strength} for name, strength in loras]
    return found


def manifest_of(bundle: Path, engine: Mapping[str, Any]) -> "Manifest":
    """The manifest of the cascade that `open_cascade` opens, in milliseconds; `engine` has the options of MACHINERY.

    Raises UsageError for a bundle, a stage of another one, a LoRA or a memory policy that is none."""
    from ..runtime.engines.mixed_bundles import manifest_with_stages_of
    from ..runtime.memory.residency import MemoryPolicy
    from ..storage.bundle import open_bundle

    MemoryPolicy.parse(engine["memory"])
    if engine["loras"]:
        from ..converters.lora.bundle_cache import find_lora

        for name, _ in engine["loras"]:
            find_lora(name)
    opened = open_bundle(bundle)
    others = {stage: open_bundle(path) for stage, path in engine["stages"].items()}
    return manifest_with_stages_of(opened, others) if others else opened.manifest


def require_previewer(manifest: "Manifest", every: int | None) -> None:
    """Raise UsageError when previews are asked for and the bundle has no previewer."""
    if every and Stage.PREVIEWER not in manifest.stages:
        raise UsageError("--preview-every: the bundle has no previewer; export the model with it, or leave this out")


def note_memory(requests: "Sequence[Request]", cascade: "Cascade", most: int, *, previews: bool) -> None:
    """Note how much memory the largest image will need, before anything is loaded."""
    from ..runtime.engines.nvidia_driver import first_gpu
    from ..runtime.memory.prediction import predict_peak, process_bytes

    largest = max(requests, key=lambda each: each.settings.width * each.settings.height)
    policy, together, on_gpu = cascade.residency.policy, min(most, len(requests)), cascade.device == "cuda"
    extras = _extras(largest, previews=previews)
    how: dict[str, Any] = {"device": "cuda"} if on_gpu else {"process": process_bytes()}
    peak = predict_peak(cascade.manifest, policy, largest.settings, together, extras, **how)
    note(f"{'GPU ' * on_gpu}memory: about {peak.nbytes / 1e9:.1f} GB at the peak, in the {peak.stage}")
    if on_gpu and not isinstance(gpu := first_gpu(), str) and peak.nbytes > gpu.memory:
        todo = "take --memory staged, an fp16 bundle, a lite stage, or a smaller size or --batch"
        note(f"{gpu.name} has {gpu.memory / 1e9:.1f} GB: {todo}")


def _extras(request: "Request", *, previews: bool) -> "Extras":
    """The parts of a request, besides its text, that take memory."""
    from ..runtime.memory.prediction import Extras
    from ..runtime.sampling.controlnets import CONTROLS

    return Extras(
        image_prompts=len(request.image_prompts),
        varies=request.init_image is not None,
        masks=request.mask is not None and request.init_image is not None,
        controls=tuple(dict.fromkeys(CONTROLS[each.name].stage for each in request.controls)),
        previews=previews,
    )


def note_cut_prompts(requests: "Sequence[Request]", tokenizer: "ClipTokenizer") -> None:
    """Note the end of each prompt that CLIP does not read; with --long-prompts nothing is cut off."""
    texts = {text for each in requests if not each.settings.long_prompts for text in (each.prompt, each.negative)}
    for text, cut in zip(sorted(texts), tokenizer(sorted(texts)).truncated, strict=True):
        if cut:
            note(f"{text[:30]!r}...: CLIP reads 77 tokens; cut off: {cut.strip()!r}; --long-prompts reads all")


def note_brackets(requests: "Sequence[Request]") -> None:
    """Note brackets of weighted prompts without a partner, and weights in prompts that are read without them."""
    from ..runtime.text.prompt_weights import unbalanced_brackets

    weighted = {text for each in requests if each.settings.weighted for text in (each.prompt, each.negative)}
    for text in sorted(weighted):
        if alone := unbalanced_brackets(text):
            note(f"{text[:30]!r}: {alone} has no partner; one that opens reaches to the end, one that closes is text")
    plain = {text for each in requests if not each.settings.weighted for text in (each.prompt, each.negative)}
    for text in sorted(plain):
        if WEIGHT.search(text):
            note(f"{text[:30]!r}: weights such as (word:1.2) are read as text; --weighted reads them as emphasis")
