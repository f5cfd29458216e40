"""The report of the GPU benchmark: tables from the results of the phases, with "not measured" where one is missing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .phases import SAMPLED, STAGES

NOTHING = "not measured"
FIRST_STEPS = tuple(f"first step, {stage}" for stage in SAMPLED)
OF_A_START = ("open", "load", *FIRST_STEPS, "other steps", "rest", "first image", "later images")
IMAGE_COLUMNS = ("", *OF_A_START, "MiB of GPU memory", "predicted MiB")
MEMORY = {"memory_mb": "measured", "predicted_mb": "predicted"}
EAGER = ("float32 eager", "bfloat16 eager", "float16 eager")
MODES = (*EAGER, "bfloat16 CUDA graph", "float16 CUDA graph")

Table = tuple[str, Sequence[str], list[list[str]]]  # title, columns, rows


@dataclass(frozen=True)
class GpuBenchReport:
    """The state of the benchmark, and tables of it."""

    content: Mapping[str, Any]

    def to_json(self) -> Mapping[str, Any]:
        return self.content

    @property
    def failed(self) -> dict[str, str]:
        """The reasons of the phases that failed or could not run, by name."""
        found = {}
        for name, kept in self.content["phases"].items():
            missing = kept.get("result", {}).get("missing")
            if reason := kept.get("error") or (missing and f"not installed: {missing}"):
                found[name] = reason
        return found

    def tables(self) -> Iterator[Table]:
        """Milliseconds of a pass, distances to fp32, memory, and cold starts, of each variant."""
        for variant in dict.fromkeys(name.split()[1] for name in self.content["phases"]):
            kinds = dict.fromkeys(_kind(name) for name in self._named("engine") if name.split()[1] == variant)
            title = f"{variant}, {self.content['job']['side']} pixels a side"
            stages = self._stages(variant)
            columns = ("", *stages)
            for figure, text in (("ms", "milliseconds of a pass"), ("relative_l2", self._against(variant))):
                rows = [
                    ["diffusers " + mode, *(self._eager(variant, stage, mode, figure) for stage in stages)]
                    for mode in MODES
                ]
                if figure == "ms":
                    rows.append(["diffusers bfloat16 compiled", *(self._compiled(variant, stage) for stage in stages)])
                for kind in kinds:
                    rows.append([" ".join(kind), *(self._engine(variant, kind, stage, figure) for stage in stages)])
                yield f"{title}: {text}", columns, rows
            rows = [
                ["diffusers " + mode, *(self._eager(variant, stage, mode, "memory_mb") for stage in stages)]
                for mode in EAGER
            ]
            for kind in kinds:
                for figure, text in MEMORY.items():
                    cells = (self._engine(variant, kind, stage, figure) for stage in stages)
                    rows.append([" ".join((*kind, text)), *cells])
            yield f"{title}: MiB of GPU memory", columns, rows
            yield f"{title}: seconds of a cold start", IMAGE_COLUMNS, [*self._images(variant)]

    def _stages(self, variant: str) -> list[str]:
        """The stages that are measured with a variant: those that all share, with the first alone."""
        words = {word for name in self.content["phases"] if name.split()[1] == variant for word in name.split()[2:]}
        return [str(stage) for stage in STAGES if stage in words]

    def _against(self, variant: str) -> str:
        """The reference of the engines' distances: diffusers, or our own graph, in fp32."""
        names = [name for name in self._named("engine") if name.split()[1] == variant]
        kinds = sorted({kind for name in names if (kind := self._result(name).get("against"))})
        return f"relative L2 to {' and '.join(kinds) or 'fp32'}"

    def _named(self, work: str) -> list[str]:
        return [name for name in self.content["phases"] if name.split()[0] == work]

    def _result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.content["phases"].get(name, {}).get("result", {})
        return result

    def _eager(self, variant: str, stage: str, mode: str, figure: str) -> str:
        return _shown(self._result(f"diffusers {variant} {stage}").get(mode, {}).get(figure))

    def _compiled(self, variant: str, stage: str) -> str:
        return _shown(self._result(f"compile {variant} {stage}").get("ms") if stage in SAMPLED else None)

    def _engine(self, variant: str, kind: tuple[str, ...], stage: str, figure: str) -> str:
        precision, engine, *rest = kind
        return _shown(self._result(" ".join(["engine", variant, precision, engine, stage, *rest])).get(figure))

    def _images(self, variant: str) -> Iterator[list[str]]:
        for name in self._named("image"):
            found = self._result(name)
            if name.split()[1] != variant or not found:
                continue
            load, steps, run = (sum(found[part].values()) for part in ("load", "steps", "run"))
            first = [found["first_step"].get(stage, 0.0) for stage in SAMPLED]
            seconds = [found["open"], load, *first, steps, run, found["first_image"]]
            later = ", ".join(f"{each:.2f}" for each in found["images"])
            memory = [_shown(found.get(figure)) for figure in MEMORY]
            yield [" ".join(name.split()[2:]), *(f"{each:.2f}" for each in seconds), later, *memory]


def _kind(name: str) -> tuple[str, ...]:
    """Precision, engine and what was changed, from the name of a phase of an engine."""
    _, _, precision, engine, _, *rest = name.split()
    return precision, engine, *rest


def _shown(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
