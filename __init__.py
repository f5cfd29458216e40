"""cascadekit: convert, export, run and verify Stable Cascade.

What needs onnx or torch is imported when first used, so that `import cascadekit` is light and works without them.
Importing it also tells ONNX Runtime and huggingface_hub not to report that they are used, see `runtime.telemetry`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.engines.telemetry import switch_off_telemetry

if TYPE_CHECKING:
    from .converters.checkpoints.convert import convert as convert
    from .converters.checkpoints.open_model import inspect as inspect
    from .converters.export.export import export as export
    from .converters.lora.at_load import with_loras as with_loras
    from .parity.checkpoints.compare_tensors import compare_checkpoints as compare_checkpoints
    from .parity.results import Report as Report
    from .parity.verify import record_reference as record_reference
    from .parity.verify import verify as verify
    from .runtime.cascade import Cascade as Cascade
    from .runtime.sampling.seeds import PlacedSeed as PlacedSeed
    from .runtime.text.embeds import PromptEmbeds as PromptEmbeds
    from .schemas.settings import Settings as Settings

switch_off_telemetry()  # before anything imports one of those libraries, the command line and workers included

_PUBLIC = {
    "Cascade": (".runtime.cascade", "Cascade"),
    "PlacedSeed": (".runtime.sampling.seeds", "PlacedSeed"),
    "PromptEmbeds": (".runtime.text.embeds", "PromptEmbeds"),
    "Report": (".parity.results", "Report"),
    "Settings": (".schemas.settings", "Settings"),
    "compare_checkpoints": (".parity.checkpoints.compare_tensors", "compare_checkpoints"),
    "convert": (".converters.checkpoints.convert", "convert"),
    "export": (".converters.export.export", "export"),
    "with_loras": (".converters.lora.at_load", "with_loras"),
    "inspect": (".converters.checkpoints.open_model", "inspect"),
    "record_reference": (".parity.verify", "record_reference"),
    "verify": (".parity.verify", "verify"),
}

__all__ = [
    "Cascade", "PlacedSeed", "PromptEmbeds", "Report", "Settings", "compare_checkpoints", "convert", "export",
    "inspect", "record_reference", "verify", "with_loras",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module, __name__), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
