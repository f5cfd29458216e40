"""The engine names that the options of several commands offer."""

from ..runtime.engines.engine_table import ENGINES as ENGINE_TABLE

ENGINES = tuple(ENGINE_TABLE)
