"""The samplers by name, apart from `schemas.settings`, so that `generate --help` imports no pydantic."""

from enum import StrEnum


class Sampler(StrEnum):
    """The samplers: diffusers' DDPM-Würstchen, and Stability's own "gdf"."""

    DDPM_WUERSTCHEN = "ddpm-wuerstchen"
    GDF = "gdf"
