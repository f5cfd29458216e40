"""The command `doctor`: installed engines, and a check of the GPU."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas.callbacks import ignored
from .console import FAILED, say, say_json, show_table
from .help import HelpfulCommand
from .options import AS_JSON, PATH, volume_options

if TYPE_CHECKING:
    from ..parity.gpu_report import GpuCheck, GpuReport
    from ..runtime.examine_machine import Findings

ENGINE_COLUMNS = ("engine", "device", "version", "builds here", "runs here", "what is lacking")
ANSWERS = {True: "yes", False: "no", None: "-"}


@click.command(cls=HelpfulCommand)
@click.option("--gpu", is_flag=True, help="Build, run, compare and time a tiny cascade on the GPU, and write a report.")
@click.option(
    "-o", "--output", type=PATH, default=Path("gpu-report.json"), show_default=True, help="Report that --gpu writes."
)
@click.option("--force", is_flag=True, help="Replace an existing report.")
@AS_JSON
@volume_options
def doctor(gpu: bool, output: Path, force: bool, as_json: bool) -> None:
    """Show which engines can be built and run here.

    For each that cannot, the line says what to install.

    Example: cascadekit doctor
    With a GPU, everything that needs one, and a report to send back: cascadekit doctor --gpu -o report.json
    """
    from ..runtime.examine_machine import examine

    if gpu:
        _check(output, force=force, as_json=as_json)
        return
    findings = examine()
    if as_json:
        say_json(findings.to_json())
    else:
        _print(findings)


def _print(findings: "Findings") -> None:
    say(f"{findings.system}, Python {findings.python}")
    say(", ".join(f"{name} {version}" for name, version in findings.packages.items()))
    gpu = findings.gpu
    seen = f"{gpu.name}, {gpu.capability}, {gpu.memory / 1e9:.0f} GB, driver {gpu.driver}" if gpu else ""
    say(f"GPU: {'; '.join(part for part in (seen, findings.gpu_problem) if part)}")
    rows = [
        (e.engine, e.device, e.version or "-", ANSWERS[e.builds], ANSWERS[e.runs], e.lacking) for e in findings.engines
    ]
    if show_table("", ENGINE_COLUMNS, rows, optional=["what is lacking"]):
        for engine in findings.engines:
            if engine.lacking:
                say(f"{engine.engine} on {engine.device}: {engine.lacking}")
    for tool, command in findings.lacking_tools.items():
        say(f"for {tool}: {command}")
    for warning in findings.warnings:
        say(f"to mend: {warning}")


def _check(output: Path, *, force: bool, as_json: bool) -> None:
    from ..parity.gpu_check import check_gpu
    from ..storage.atomic_output import staged_output
    from ..storage.output_rules import require_free, require_writable

    require_free(output, force=force)
    require_writable(output)

    def keep(report: "GpuReport") -> None:
        """After every check: a driver that takes the process down leaves what was found until then."""
        with staged_output(output, force=True, files=()) as staged:
            staged.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")

    report = check_gpu(keep, ignored if as_json else _say_check)
    if as_json:
        say_json(report.to_json())
    else:
        for reason, names in report.not_checked.items():
            say(f"not checked, because {reason}: {', '.join(names)}")
        say(f"{report.verdict}; the report to send back: {output}")
    if not report:
        raise SystemExit(FAILED)


def _say_check(check: "GpuCheck") -> None:
    if check.done:
        say(f"{check.name}: {check.result} in {check.seconds:.1f} s{f': {check.detail}' if check.detail else ''}")
