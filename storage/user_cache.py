"""The user's folder for files that cascadekit can make again: merged LoRAs, compiled kernels, engines."""

import os
import sys
from pathlib import Path

CACHE = "CASCADEKIT_CACHE"  # an environment variable that names another folder


def user_cache(name: str) -> Path:
    """The folder `name` in $CASCADEKIT_CACHE, else in the folder cascadekit of the user's caches."""
    chosen = os.environ.get(CACHE)
    return (Path(chosen) if chosen else _caches() / "cascadekit") / name


def _caches() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"  # the XDG rule for relative paths
