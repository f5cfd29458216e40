"""The command that measures a GPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli.console import say, show_table
from ..cli.options import PATH
from ..runtime.engines.engine_table import ENGINES
from ..schemas.precision import Precision
from ..schemas.stages import Variant
from .cli import AS_JSON, names_option, show, show_progress

if TYPE_CHECKING:
    from .gpu.report import GpuBenchReport

SIZES = ("lite", "full")
DEFAULT_PRECISIONS = "fp16,fp32,bf16"
ON_GPUS = [name for name, engine in ENGINES.items() if "cuda" in engine.devices]


@click.command()
@click.option("--work", type=PATH, default=Path(), help="Folder for weights and bundles; 40 GB for the full cascade.")
@click.option("--state", type=PATH, help="File of results, read and written.  [default: gpu-bench.json in --work]")
@names_option("--sizes", SIZES, "lite,full")
@names_option("--precisions", [str(each) for each in Precision], DEFAULT_PRECISIONS)
@names_option("--engines", ON_GPUS, "onnxruntime")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Rehearse with the tiny cascade; its figures say nothing.")
@click.option("--minutes", type=click.FloatRange(0.1), default=8, show_default=True, help="Time for all phases.")
@click.option("--phase", "names", multiple=True, metavar="NAME", help="Only phases whose names begin so (repeatable).")
@click.option("--again", is_flag=True, help="Measure also what the state has.")
@click.option("--list", "listed", is_flag=True, help="List the phases, and measure nothing.")
@AS_JSON
def gpu(
    sizes: list[str], precisions: list[str], listed: bool, as_json: bool, names: tuple[str, ...], **how: Any
) -> None:
    """Measure a GPU: stages of real size with random weights, beside diffusers where it is installed.

    Every phase is a process of its own. Results are kept in the state after each, and a second run goes on.

    Example: cascadekit bench gpu --work /dev/shm --sizes lite
    """
    from .gpu.run import GpuBench, bench_gpu

    bench = GpuBench(
        variants=tuple(Variant(size) for size in sizes),
        precisions=tuple(Precision(name) for name in precisions),
        names=names,
        **how,
    )
    if listed:
        for phase in bench.phases():
            say(phase.name)
        return
    show(bench_gpu(bench, show_progress), as_json, _print)


def _print(report: "GpuBenchReport") -> None:
    machine = report.content["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    say(f"GPU: {machine['gpu']}; {machine['cores_usable']} cores; {versions}")
    for title, columns, rows in report.tables():
        say("")
        say(title)
        show_table("", columns, rows)
    for name, reason in report.failed.items():
        say(f"{name}: {reason}")


@click.command("gpu-kit")
@click.option("-o", "--output", type=PATH, default=Path("gpu-kit"), show_default=True, help="New folder.")
@click.option("--python", default="3.12", show_default=True, help="Python of the machine with the GPU.")
@click.option("--onnxruntime", default="onnxruntime-gpu", show_default=True, help="Such as onnxruntime-gpu==1.31.1.")
@click.option("--with", "more", multiple=True, metavar="PACKAGE", help="A further package (repeatable).")
@click.option("--without", multiple=True, metavar="PACKAGE", help="Leave out what is there already (repeatable).")
@click.option("--sm", type=click.IntRange(50), help="Keep the code of this GPU architecture alone, such as 90.")
@click.option("--part-mib", type=click.IntRange(0), default=0, help="Cut larger files into parts of so many MiB.")
def gpu_kit(output: Path, **how: Any) -> None:
    """Pack what a machine with CUDA and Python, without a network, needs for `bench gpu`.

    Wheels for Linux on x86-64 are downloaded with pip, and a wheel of this checkout is built.

    Example: cascadekit bench gpu-kit -o kit --sm 90 --part-mib 60
    """
    from .gpu.kit import Kit, make_kit

    names = make_kit(output, Kit(**how))
    say(f"wrote {output} ({len(names)} files); on the other machine: python install.py SITE")
