"""A parity report as one HTML file that needs nothing else: no network, no fonts, no script but the image slider's.

The page is the template `data/page.html`; this module computes the words and rows that the template shows.
"""

import math
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from ...schemas.report import Comparison, ParityReport
from ...schemas.stages import Stage
from ..tolerances import QUANTISED_IMAGE
from . import svg
from .charts import depth_charts, histograms, range_charts, step_charts
from .figures import figure, percent, spaced
from .image_slider import compared_images

DATA = files(f"{__package__}.data")
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # the characters that HTML forbids
DASHES = ("none", "7 4", "2 3", "9 3 2 3")  # of a chart's lines, by kind
SHOWN_FAILURES = 8
METER_DECADES = 4  # left of the tolerance; one more lies right of it
METER = Markup(
    '<svg viewBox="0 0 100 14" class="meter" role="img" aria-label="{text}"><title>{text}</title>'
    '<rect x="0" y="4" width="100" height="6" rx="3" class="track"></rect>'
    '<rect x="0" y="4" width="{filled:.1f}" height="6" rx="3" class="{look}"></rect>'
    '<line x1="{mark}" x2="{mark}" y1="0" y2="14"></line></svg>'
)
STAGE_COLUMNS = (
    "stage", "computes in", "comparisons", "worst relative L2", "allowed", "of what is allowed", "max abs",
    "99.9% below", "SNR", "verdict",
)  # fmt: skip
COMPARISON_COLUMNS = (
    "compared", "needs", "allowed", "max abs", "mean abs", "99.9% below", "max relative", "cosine", "SNR, dB",
    "ULP max", "verdict",
)  # fmt: skip


def to_html(report: ParityReport, images: tuple[NDArray[Any], NDArray[Any]] | None = None) -> str:
    """The page as text. `images` are the first final image, found and expected, (B, 3, height, width) in 0..1."""
    page = _templates().get_template("page.html")
    text = page.render(
        report=report,
        summary=_summary(report),
        faults=_faults(report),
        facts=_facts(report),
        stage_columns=STAGE_COLUMNS,
        stage_rows=_stage_rows(report),
        images=compared_images(*images) if images is not None else None,
        step_charts=step_charts(report),
        depth_charts=depth_charts(report),
        histograms=histograms(report),
        range_charts=range_charts(report),
        comparison_columns=COMPARISON_COLUMNS,
        comparison_rows=[_comparison_row(entry) for entry in report.comparisons],
        file_rows=[(f.path, f.role, spaced(f.bytes), f.fingerprint, f.sha256 or "not taken") for f in report.files],
    )
    return CONTROLS.sub("\ufffd", text)


def _templates() -> Environment:
    """The templates of `data`, which escape everything that they are given."""
    templates = Environment(
        loader=FunctionLoader(lambda name: (DATA / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["px"] = "{:.1f}".format
    templates.globals |= {name: getattr(svg, name) for name in ("HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")}
    templates.globals["DASHES"] = DASHES
    return templates


def _verdict(failures: tuple[str, ...] | None) -> Markup:
    """Passed or failed, in words, a sign and a colour; None stands for passed."""
    if failures is None:
        return Markup('<span class="passed">✓ passed</span>')
    return Markup('<span class="failed">✗ {}</span>').format("; ".join(failures))


def _summary(report: ParityReport) -> str:
    count, failed = len(report.comparisons), sum(not entry.passed for entry in report.comparisons)
    if report.passed:
        text = f"{report.engine} gives what {report.reference} gives, within tolerance in all {count} comparisons."
    else:
        text = f"{report.engine} does not give what {report.reference} gives: {failed} of {count} comparisons failed."
    return text + (f" {len(report.left_out)} more were left out, listed below." if report.left_out else "")


def _faults(report: ParityReport) -> list[str]:
    """The first part at fault, the image, and the first failed comparisons."""
    found = []
    faulty = next((entry for entry in report.depth if entry.faulty), None)
    if faulty is not None:
        found.append(f"first part of the graph at fault: {faulty.stage}, {faulty.name}")
    if report.image is not None and not report.image.passed:
        psnr, needed = figure(report.image.psnr_db), figure(report.image.psnr_needed_db)
        found.append(f"final image: PSNR {psnr} dB, needed {needed} dB")
    failed = [f"{entry.name}: {'; '.join(entry.failures)}" for entry in report.comparisons if not entry.passed]
    found += failed[:SHOWN_FAILURES]
    if len(failed) > SHOWN_FAILURES:
        found.append(f"and {len(failed) - SHOWN_FAILURES} more, listed below")
    return found


def _facts(report: ParityReport) -> list[tuple[str, str, str]]:
    """Name, value and note of each headline figure."""
    passed = sum(entry.passed for entry in report.comparisons)
    facts = [("comparisons passed", f"{passed} of {len(report.comparisons)}", "")]
    if report.comparisons:
        worst = max(report.comparisons, key=_strain)
        facts.append(("most needed of a tolerance", _hopeless(worst) or percent(_strain(worst)), f"by {worst.name}"))
        nonfinite = sum(entry.nonfinite for entry in report.comparisons)
        beyond = sum(entry.beyond_fp16.count for entry in report.comparisons)
        facts.append(("NaN or infinite values", f"{nonfinite}", f"{beyond} beyond fp16's 65 504"))
    if report.image is not None:
        needed = f"needed {report.image.psnr_needed_db:g} dB"
        if any(stage.quantization != "none" for stage in report.stages.values()):
            needed += f". {QUANTISED_IMAGE}"
        facts.append(("image PSNR", f"{figure(report.image.psnr_db)} dB", needed))
        if report.image.ssim is not None:
            facts.append(("image SSIM", f"{report.image.ssim:.6f}", "1 when equal"))
    return facts


def _strain(entry: Comparison) -> float:
    """How much of its tolerance a comparison needs; infinite for outputs that no tolerance makes good."""
    if _hopeless(entry):
        return math.inf
    if entry.relative_l2 == 0:
        return 0.0
    return entry.relative_l2 / entry.tolerance if entry.tolerance and entry.relative_l2 < math.inf else math.inf


def _hopeless(entry: Comparison) -> str:
    """Why no tolerance makes the output good; empty when one may."""
    if entry.nonfinite or entry.reference_nonfinite.count:
        return "not finite"
    return "constant" if entry.constant else ""


def _stage_rows(report: ParityReport) -> list[tuple[str, ...]]:
    groups: dict[Stage | None, list[Comparison]] = {}
    for entry in report.comparisons:
        groups.setdefault(entry.stage, []).append(entry)
    return [_stage_row(report, stage, entries) for stage, entries in groups.items()]


def _stage_row(report: ParityReport, stage: Stage | None, entries: list[Comparison]) -> tuple[str, ...]:
    worst = max(entries, key=_strain)
    facts = report.stages.get(stage) if stage else None
    kinds = [] if facts is None else [facts.precision, *([facts.quantization] if facts.quantization != "none" else [])]
    passed = sum(entry.passed for entry in entries)
    return (
        str(stage or "image"),
        ", ".join(kinds) or "–",
        f"{passed} of {len(entries)}",
        _hopeless(worst) or figure(worst.relative_l2),
        figure(worst.tolerance),
        _meter(worst),
        figure(max(e.max_abs for e in entries)),
        figure(max(e.p999_abs for e in entries)),
        f"{figure(min(e.snr_db for e in entries))} dB",
        _verdict(None if passed == len(entries) else ("failed",)),
    )


def _meter(entry: Comparison) -> Markup:
    """The needed tolerance as a bar over decades, with a mark at the one allowed."""
    strain = _strain(entry)
    decades = math.log10(strain) if 0 < strain < math.inf else (math.inf if strain else -math.inf)
    mark = 100 * METER_DECADES / (METER_DECADES + 1)
    filled = min(max(mark + decades * 100 / (METER_DECADES + 1), 1), 100)
    text = _hopeless(entry) or f"{percent(strain)} of the tolerance"
    return METER.format(text=text, filled=filled, mark=mark, look="fill over" if strain > 1 else "fill")


def _comparison_row(e: Comparison) -> tuple[str, ...]:
    return (
        f"{e.name} {list(e.shape)}",
        _hopeless(e) or figure(e.relative_l2),
        figure(e.tolerance),
        figure(e.max_abs),
        figure(e.mean_abs),
        figure(e.p999_abs),
        figure(e.max_rel),
        f"{e.cosine:.8f}",
        figure(e.snr_db),
        "–" if e.ulp_max is None else f"{e.ulp_max} {e.ulp_of}",
        _verdict(None if e.passed else e.failures),
    )
