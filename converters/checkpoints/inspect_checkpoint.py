"""Describes a checkpoint from its headers alone, on disk or on the Hub."""

from __future__ import annotations  # help() shows the types as they are written here

from pathlib import Path

from ...schemas.errors import LayoutError
from ...schemas.stages import Stage
from .component import Component
from .identify import identify_all
from .open_model import Model, open_model


def inspect(path: str | Path) -> Model:
    """Return the stages, layouts, configs, dtypes and problems of a checkpoint, from its headers alone.

    `path` is a weights file, a model folder, a folder of single files, or a source on the Hub (hf://owner/repo[/path]).
    Only headers are transferred from the Hub. Problems are listed in each component and raise no error. `contents_of`
    also opens bundles, LoRAs, graphs and images, as the command ``inspect`` does.

    Raises UsageError when there is nothing at `path`, ForeignError (a LayoutError) for a file without a component, and
    CheckpointError for a damaged file.

    Examples:
        >>> model = inspect("stage_c_lite_bf16.safetensors")
        >>> model.components[Stage.PRIOR].describe()
        'prior (lite, original layout)'
    """
    if str(path).startswith("hf:"):  # as `hub.is_hub`, which is not imported for files on disk
        return _inspect_remote(path)
    return open_model([Path(path)])


def _inspect_remote(source: str | Path) -> Model:
    """List the components of a Hub source by its headers. Files that are not components get a note."""
    from ..hub import remote_headers

    found: list[Component] = []
    refused: list[LayoutError] = []
    for header in remote_headers(source):
        try:
            found += identify_all(header).components
        except LayoutError as error:
            refused.append(error)
    if not found and refused:
        raise refused[0]
    components: dict[Stage, Component] = {}
    alternatives = [one for one in found if components.setdefault(one.stage, one) is not one]
    return Model(components, notes=tuple(map(str, refused)), alternatives=tuple(alternatives))
