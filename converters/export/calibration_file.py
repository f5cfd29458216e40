"""The file of `export --calibration`: how large the values of stages grow, measured once for many exports.

{"format": "cascadekit-calibration", "version": 1, "stages": {"prior": {"up_blocks.1.0": 812.5, ...}}}
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...schemas.errors import ExportError
from ...schemas.json_text import dump_json, load_object
from ...schemas.messages import reason
from ...schemas.stages import Stage, UNetConfig, VQGANConfig
from ...schemas.unet_blocks import blocks_of
from ...storage.atomic_file import whole_file

FORMAT, VERSION = "cascadekit-calibration", 1


def ranges_of(
    path: Path | None, config: UNetConfig | VQGANConfig, measure: Callable[[], dict[str, float]]
) -> Mapping[str, float]:
    """The magnitudes of the stage's values by name, from the file at `path`.

    They are measured, and added to the file, if it does not exist or has none of the stage. None stands for no file.
    Raises ExportError for a file that is no calibration, or one of another network."""
    if path is None:
        return measure()
    stages = _read(path) if path.exists() else {}
    if config.stage not in stages:
        stages[config.stage] = measure()
        text = dump_json({"format": FORMAT, "version": VERSION, "stages": stages}, indent=1)
        try:
            with whole_file(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise ExportError(f"{path}: the calibration cannot be written: {error.strerror}") from error
    return _checked(path, config, stages[config.stage])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = load_object(path.read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as a calibration: {reason(error)}; name another file") from error
    stages = found.get("stages")
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION) or not isinstance(stages, dict):
        raise ExportError(
            f"{path}: expected a calibration of format {FORMAT!r}, version {VERSION}, found "
            f"{found.get('format')!r}, version {found.get('version')!r}; name another file"
        )
    return stages


def _checked(path: Path, config: UNetConfig | VQGANConfig, ranges: Any) -> Mapping[str, float]:
    names = set(_always_measured(config))
    if not isinstance(ranges, dict) or not all(type(value) in (int, float) and value >= 0 for value in ranges.values()):
        raise ExportError(f"{path}: stages.{config.stage} does not map names to magnitudes; name another file")
    missing = sorted(names - ranges.keys())
    if missing:
        raise ExportError(
            f"{path}: stages.{config.stage} has nothing on {missing[0]}: it was measured on another network; "
            "name a new file to measure this one"
        )
    return ranges


def _always_measured(config: UNetConfig | VQGANConfig) -> Iterator[str]:
    """Yield values that every calibration of the network has."""
    if isinstance(config, UNetConfig):
        yield from (block.name for block in blocks_of(config))
        return
    assert config.stage is Stage.VQGAN
    yield from (f"up_blocks.{index}" for index in range(1, config.bottleneck_blocks + 1))
    yield from (f"down_blocks.{2 * level}" for level in range(config.levels))
