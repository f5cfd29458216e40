"""The name of the program and its version, as manifests, passports and reports tell it."""

from importlib.metadata import version


def created_by() -> str:
    """Return the program and its version, as in "cascadekit 0.1.0"."""
    return f"cascadekit {version('cascadekit')}"
