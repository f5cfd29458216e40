"""cascadekit: convert, export, run and verify Stable Cascade.

What needs onnx or torch is imported when first used, so that `import cascadekit` is light and works without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converters.checkpoint import convert as convert
    from .converters.export import export as export
    from .converters.model import inspect as inspect
    from .runtime.pipeline import Cascade as Cascade
    from .schemas.settings import Settings as Settings

_PUBLIC = {
    "Cascade": (".runtime.pipeline", "Cascade"),
    "Settings": (".schemas.settings", "Settings"),
    "convert": (".converters.checkpoint", "convert"),
    "export": (".converters.export", "export"),
    "inspect": (".converters.model", "inspect"),
}

__all__ = ["Cascade", "Settings", "convert", "export", "inspect"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module, __name__), attribute)
