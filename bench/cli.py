"""Commands that measure this package on this machine."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from ..cli.console import complain, note, say, show_table
from ..cli.lazy import LazyGroup
from ..cli.options import PATH, parse_size, parsed
from ..runtime.engines.engine_table import ENGINES as ENGINE_TABLE

if TYPE_CHECKING:
    from . import BenchReport, EnginesReport

UNETS = ("prior", "prior-lite", "decoder", "decoder-lite")
NETWORKS = (*UNETS, "vqgan", "text-encoder")
DTYPES = {"bf16": "BF16", "fp32": "F32"}
VARIANTS = (  # variants of engines, and other programs, which only this command runs
    "onnxruntime-hoisted onnxruntime-traced openvino-bf16-hoisted torch torch-bf16 torch-compile torch-compile-bf16 "
    "diffusers diffusers-bf16"
).split()
ENGINES = (*(name for name, engine in ENGINE_TABLE.items() if "cpu" in engine.devices), *VARIANTS)
DEFAULT_ENGINES = "onnxruntime,openvino,openvino-bf16,torch,torch-bf16"
CASE_COLUMNS = ("measured", "median s", "min s", "max s", "MB/s", "peak MB", "cached", "description")

PARITY_COLUMNS = ("engine", "kind", "stage", "floor", "relative L2", "ratio")

ENGINE_COLUMNS = (
    "engine",
    "median s",
    "min s",
    "max s",
    "CPU s",
    "load s",
    "first s",
    "of GEMM",
    "loaded MB",
    "after MB",
    "relative L2",
    "version",
)

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _network(*names: str) -> Decorator:
    return click.option(
        "--network",
        type=click.Choice([*names, "tiny"]),  # tiny is for tests
        default="prior-lite",
        show_default=True,
        metavar=f"[{'|'.join(names)}]",
        help="Network whose stand-in file is written.",
    )


def runs_option(text: str) -> Decorator:
    return click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, help=text)


def names_option(option: str, names: Sequence[str], default: str) -> Decorator:
    """An option whose value is some of `names`, with commas between them."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
        given = [name.strip() for name in value.split(",")]
        for name in given:
            if name not in names:
                raise click.BadParameter(f"{name!r}: expected some of {', '.join(names)}")
        return given

    text = f"Names with commas between them: {', '.join(names)}."
    return click.option(option, default=default, show_default=True, callback=parse, help=text)


WORK = click.option(
    "--work", type=PATH, default=Path(), help="Folder on the disk to measure.  [default: the current folder]"
)
DTYPE = click.option(
    "--dtype", type=click.Choice([*DTYPES]), default="bf16", show_default=True, help="Dtype of the stand-in file."
)
SOURCE = click.option("--source", type=PATH, help="Measure with this checkpoint, without a stand-in.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=LazyGroup, places={})
def bench() -> None:
    """Measure this package on this machine.

    The reports have figures, and no verdicts.
    """


@bench.command()
@WORK
@_network(*UNETS)
@DTYPE
@SOURCE
@runs_option("Rounds.")
@click.option("--cold", is_flag=True, help="Also measure with the source dropped from the page cache.")
@click.option("--peer", is_flag=True, help="Also measure diffusers' from_single_file and save_pretrained.")
@AS_JSON
def convert(
    work: Path, network: str, dtype: str, source: Path | None, runs: int, cold: bool, peer: bool, as_json: bool
) -> None:
    """Measure conversions of a file of real size, and cp and a cast in memory.

    It needs disk space for the file and one output; both are removed at the end.

    Example: cascadekit bench convert --network prior-lite --runs 5
    """
    from . import bench_convert

    report = bench_convert(
        work, network=network, dtype=DTYPES[dtype], source=source, runs=runs, cold=cold, peer=peer, say=show_progress
    )
    show(report, as_json, _print_report)


@bench.command()
@WORK
@_network(*NETWORKS)
@DTYPE
@SOURCE
@runs_option("Rounds.")
@AS_JSON
def export(work: Path, network: str, dtype: str, source: Path | None, runs: int, as_json: bool) -> None:
    """Measure exports of a file of real size, with linked and with copied weights, and cp.

    It needs disk space for the file and one copy; both are removed at the end.

    Example: cascadekit bench export --network prior-lite --runs 5
    """
    from . import bench_export

    report = bench_export(work, network=network, dtype=DTYPES[dtype], source=source, runs=runs, say=show_progress)
    show(report, as_json, _print_report)


@bench.command()
@WORK
@click.option("--stage", "network", type=click.Choice([*NETWORKS, "tiny"]), default="prior-lite", show_default=True)
@DTYPE
@SOURCE
@names_option("--engines", ENGINES, DEFAULT_ENGINES)
@click.option(
    "--size",
    metavar="WxH",
    default="1024x1024",
    show_default=True,
    callback=parsed(parse_size),
    help="Size of the image.",
)
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="2 for an image with guidance.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Processes of each engine.")
@runs_option("Forwards in each process, after one that is not measured.")
@AS_JSON
def engines(
    work: Path,
    network: str,
    dtype: str,
    source: Path | None,
    engines: list[str],
    size: tuple[int, int],
    batch: int,
    threads: int,
    rounds: int,
    runs: int,
    as_json: bool,
) -> None:
    """Measure engines on one forward of a stage of real size, with random weights.

    In each round every engine has a process of its own, one after the other. The machine's matrix product is measured
    too. torch-compile takes minutes before its first forward; onnxruntime-traced needs torch's exporter.

    Example: cascadekit bench engines --stage prior-lite --engines onnxruntime,openvino-bf16,torch-bf16
    """
    from . import bench_engines

    report = bench_engines(
        work,
        network=network,
        dtype=DTYPES[dtype],
        source=source,
        engines=engines,
        size=size[::-1],
        batch=batch,
        threads=threads,
        rounds=rounds,
        runs=runs,
        say=show_progress,
    )
    show(report, as_json, _print_engines)


def _print_engines(report: "EnginesReport") -> None:
    content = report.to_json()
    for line in (*machine_lines(content["machine"]), _source(content["source"])):
        say(line)
    say(f"one forward: {', '.join(f'{name} {size}' for name, size in report.sizes.items())}; {report.threads} threads")
    rates = ", ".join(
        f"{name} {max(each) / 1e9:.0f} (median {median(each) / 1e9:.0f})" for name, each in report.gemm.items()
    )
    say(f"multiply-adds: {report.multiply_adds / 1e9:.1f} billion; billions a second of a matrix product: {rates}")
    say(
        "of GEMM: the share of the best product in the engine's dtype that the median forward reached. first: the "
        "forward before the measured ones, which compiles and packs. loaded, after: memory after loading and after the "
        "forwards, the process's own + pages of files. relative L2: against PyTorch in fp32."
    )
    say("")
    show_table("", ENGINE_COLUMNS, (_engine_row(name, measured) for name, measured in content["engines"].items()))
    for name, why in report.missing.items():
        say(f"{name}: {why}")


def _engine_row(name: str, measured: dict[str, Any]) -> list[str]:
    distance = measured["relative_l2"]
    loaded, after = (
        f"{rss['anonymous'] / 1e6:.0f} + {rss['file'] / 1e6:.0f}"
        for rss in (measured["rss_after_load"], measured["rss_after_runs"])
    )
    return [
        name,
        *seconds([measured["median"], measured["min"], measured["max"], median(measured["cpu_seconds"])]),
        f"{median(measured['load_seconds']):.2f}",
        f"{median(measured['first_seconds']):.2f}",
        f"{measured['fraction_of_gemm']:.0%}",
        loaded,
        after,
        "-" if distance is None else f"{distance:.1e}",
        measured["version"],
    ]


def show_progress(text: str) -> None:
    complain(text)


def show(report: Any, as_json: bool, show_tables: Callable[[Any], None]) -> None:
    if as_json:
        say(json.dumps(report.to_json(), indent=2))
    else:
        show_tables(report)


def _print_report(report: "BenchReport") -> None:
    content = report.to_json()
    for line in _surroundings(content):
        say(line)
    say("")
    show_table("", CASE_COLUMNS, (_case_row(name, case) for name, case in content["cases"].items()))
    say("")
    ratios = report.ratios()
    rounds = max(map(len, ratios.values()))
    columns = ("ratio of seconds", "median", *(f"round {number}" for number in range(1, rounds + 1)))
    show_table("", columns, ([name, *seconds([median(each), *each])] for name, each in ratios.items()))


def _surroundings(content: dict[str, Any]) -> Iterator[str]:
    yield from machine_lines(content["machine"])
    yield _source(content["source"])
    yield (
        "MB/s are of the source; every output is flushed to disk within the time. Peak memory counts mapped files; a "
        f"process that does nothing has {content['floor_rss_bytes'] / 1e6:.0f} MB. "
        "cached: the share of the source in the page cache before."
    )


def machine_lines(machine: dict[str, Any]) -> Iterator[str]:
    load = machine["load_average"]
    yield f"processor: {machine['cpu']}, {machine['cores_usable']} of {machine['cores']} cores usable"
    yield f"memory: {machine['memory_bytes'] / 1e9:.1f} GB; system: {machine['system']}"
    yield f"disk: {machine['file_system']} on {machine['device']}, {machine['free_bytes'] / 1e9:.1f} GB free"
    versions = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    yield f"software: {machine['python']}, {versions}, {machine['cp']}"
    yield f"load average: {load['before']:.2f} before, {load['after']:.2f} after"


def _source(source: dict[str, Any]) -> str:
    return (
        f"source: {source['file']}: {source['component']} ({source['variant']}, {source['layout']} layout), "
        f"{source['dtype']}, {source['tensors']} tensors, {source['bytes'] / 1e6:.1f} MB"
    )


def _case_row(name: str, case: dict[str, Any]) -> list[str]:
    speed = case["megabytes_per_second"]
    cached = [share for share in case["cached"] if share is not None]
    return [
        name,
        *seconds([case["median"], case["min"], case["max"]]),
        f"{speed:.0f}" if speed is not None else "-",
        f"{case['peak_rss_bytes'] / 1e6:.0f}",
        f"{median(cached):.0%}" if cached else "?",
        case["what"],
    ]


def seconds(values: list[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


@bench.command("parity")
@click.option("--networks", type=click.IntRange(1, 100), default=5, show_default=True, help="Random cascades to take.")
@AS_JSON
def parity(networks: int, as_json: bool) -> None:
    """Measure the error of engines, divided by the reference's own error.

    The tolerances of verify are made from these ratios.

    Example: cascadekit bench parity --networks 5
    """
    from dataclasses import asdict

    from .parity import measure_ratios, table_rows

    ratios = measure_ratios(networks, note)
    if as_json:
        say(json.dumps([{**asdict(ratio), "ratio": ratio.ratio} for ratio in ratios], indent=2))
    else:
        show_table("", PARITY_COLUMNS, table_rows(ratios))
