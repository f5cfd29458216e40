"""A parity report as one HTML file that needs nothing else: no network, no fonts, no script but the image slider's."""

import math
from collections.abc import Iterator
from importlib.resources import files
from string import Template
from typing import Any

from numpy.typing import NDArray

from ...schemas.report import ComparisonEntry, ParityReport
from ...schemas.stages import Stage
from .charts import depth_charts, histograms, range_charts, step_charts
from .image_slider import image_section
from .markup import Markup, element, join, table
from .svg import figure, spaced

DATA = files(f"{__package__}.data")
SHOWN_FAILURES = 8
METER_DECADES = 4  # left of the tolerance; one more lies right of it


def to_html(report: ParityReport, images: tuple[NDArray[Any], NDArray[Any]] | None = None) -> str:
    """The page as text. `images` are the first final image, found and expected, (B, 3, height, width) in 0..1."""
    body = join(
        _verdict(report),
        _facts(report),
        _stages(report),
        image_section(report, images),
        *_section(
            "Error along the sampler",
            "Teacher-forced, the engine is given the reference's latents at every step, so that each step shows its "
            "own error alone. On a trajectory of its own, errors feed on one another.",
            step_charts(report),
        ),
        *_section(
            "Error over depth",
            "Every part of the graph in the order they run. Its own error is what it adds when it is given the "
            "reference's values.",
            depth_charts(report),
        ),
        *_section(
            "How errors are spread",
            "Every value of every output, by its error as a part of the reference's root mean square. The tolerance "
            "is what the root mean square (RMS) of all errors may be.",
            histograms(report),
        ),
        *_section(
            "Activation ranges",
            "The largest magnitude in each block, against the largest that types can hold.",
            range_charts(report),
        ),
        _comparisons(report),
        _provenance(report),
        element("footer", f"Written by cascadekit, {report.date}. This file loads nothing from elsewhere."),
    )
    title = f"{'Passed' if report.passed else 'FAILED'}: {report.bundle}, {report.engine} against {report.reference}"
    return Template(_data("page.html")).substitute(
        title=join(title), style=_data("style.css"), script=_data("slider.js"), body=body
    )


def _data(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def _section(title: str, text: str, charts: list[Markup]) -> Iterator[Markup]:
    if charts:
        yield element("h2", title)
        yield element("p", text, class_="quiet")
        yield element("div", *charts, class_="pairs" if len(charts) > 1 else None)


def verdict(passed: bool) -> Markup:
    """Passed or failed, in words, a sign and a colour."""
    return element("span", "✓ passed" if passed else "✗ failed", class_="passed" if passed else "failed")


def _verdict(report: ParityReport) -> Markup:
    failed = [entry for entry in report.comparisons if not entry.passed]
    count = len(report.comparisons)
    if report.passed:
        text = f"{report.engine} gives what {report.reference} gives, within tolerance in all {count} comparisons."
    else:
        text = f"{report.engine} does not give what {report.reference} gives: "
        text += f"{len(failed)} of {count} comparisons failed."
    if report.left_out:
        text += f" {len(report.left_out)} more were left out, listed below."
    items = [f"{entry.name}: {'; '.join(entry.failures)}" for entry in failed[:SHOWN_FAILURES]]
    if len(failed) > SHOWN_FAILURES:
        items.append(f"and {len(failed) - SHOWN_FAILURES} more, listed below")
    if report.image is not None and not report.image.passed:
        found, needed = figure(report.image.psnr_db), figure(report.image.psnr_needed_db)
        items.insert(0, f"final image: PSNR {found} dB, needed {needed} dB")
    faulty = next((entry for entry in report.depth if entry.faulty), None)
    if faulty is not None:
        items.insert(0, f"first part of the graph at fault: {faulty.stage}, {faulty.name}")
    word = "passed" if report.passed else "failed"
    return element(
        "header",
        element("h1", "✓ Passed" if report.passed else "✗ Failed", class_=word),
        element("p", f"Parity of {report.bundle}", class_="eyebrow"),
        element("p", text),
        element("ul", *(element("li", item) for item in items)) if items else None,
        class_=f"verdict {word}",
    )


def _facts(report: ParityReport) -> Markup:
    passed = sum(entry.passed for entry in report.comparisons)
    facts: list[tuple[str, str, str]] = [("comparisons passed", f"{passed} of {len(report.comparisons)}", "")]
    if report.comparisons:
        worst = max(report.comparisons, key=_strain)
        needed = _hopeless(worst) or _percent(_strain(worst))
        facts.append(("most needed of a tolerance", needed, f"by {worst.name}"))
        nonfinite = sum(entry.nonfinite for entry in report.comparisons)
        beyond = sum(entry.beyond_fp16.count for entry in report.comparisons)
        facts.append(("NaN or infinite values", f"{nonfinite}", f"{beyond} beyond fp16's 65 504"))
    if report.image is not None:
        needed = f"needed {report.image.psnr_needed_db:g} dB"
        facts.append(("image PSNR", f"{figure(report.image.psnr_db)} dB", needed))
        if report.image.ssim is not None:
            facts.append(("image SSIM", f"{report.image.ssim:.6f}", "1 when equal"))
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value, element("small", note) if note else None))
            for name, value, note in facts
        ),
        class_="facts",
    )


def _strain(entry: ComparisonEntry) -> float:
    """How much of its tolerance a comparison needs; no tolerance is enough for what is not finite, or constant."""
    if _hopeless(entry):
        return math.inf
    if entry.relative_l2 == 0:
        return 0.0
    return entry.relative_l2 / entry.tolerance if entry.tolerance and entry.relative_l2 < math.inf else math.inf


def _hopeless(entry: ComparisonEntry) -> str:
    """What no tolerance makes up for."""
    if entry.nonfinite or entry.reference_nonfinite.count:
        return "not finite"
    return "constant" if entry.constant else ""


def _percent(part: float) -> str:
    return f"{part:.3%}" if part < 0.01 else f"{part:.0%}" if part < 10 else f"{figure(part)} times"


def _stages(report: ParityReport) -> Markup:
    groups: dict[Stage | None, list[ComparisonEntry]] = {}
    for entry in report.comparisons:
        groups.setdefault(entry.stage, []).append(entry)
    head = (
        "stage", "computes in", "comparisons", "worst relative L2", "allowed", "of what is allowed", "max abs",
        "99.9% below", "SNR", "verdict",
    )  # fmt: skip
    rows = []
    for stage, entries in groups.items():
        worst = max(entries, key=_strain)
        facts = report.stages.get(stage) if stage else None
        kind = "" if facts is None else str(facts.precision)
        if facts is not None and facts.quantization != "none":
            kind += f", {facts.quantization}"
        rows.append(
            (
                str(stage or "image"),
                kind or "–",
                f"{sum(e.passed for e in entries)} of {len(entries)}",
                _hopeless(worst) or figure(worst.relative_l2),
                figure(worst.tolerance),
                _meter(worst),
                figure(max(e.max_abs for e in entries)),
                figure(max(e.p999_abs for e in entries)),
                f"{figure(min(e.snr_db for e in entries))} dB",
                verdict(all(e.passed for e in entries)),
            )
        )
    note = "Each stage's worst comparison. The bar is logarithmic; its mark is the tolerance."
    return join(element("h2", "Stages"), element("p", note, class_="quiet"), table(head, rows, class_="cards"))


def _meter(entry: ComparisonEntry) -> Markup:
    """The needed tolerance as a bar over decades, with a mark at the one allowed."""
    strain = _strain(entry)
    decades = math.log10(strain) if 0 < strain < math.inf else (math.inf if strain else -math.inf)
    width, mark = 100, 100 * METER_DECADES / (METER_DECADES + 1)
    filled = min(max(mark + decades * width / (METER_DECADES + 1), 1), width)
    text = _hopeless(entry) or f"{_percent(strain)} of the tolerance"
    return element(
        "svg",
        element("title", text),
        element("rect", x=0, y=4, width=width, height=6, rx=3, class_="track"),
        element("rect", x=0, y=4, width=f"{filled:.1f}", height=6, rx=3, class_="fill over" if strain > 1 else "fill"),
        element("line", x1=mark, x2=mark, y1=0, y2=14),
        viewBox=f"0 0 {width} 14",
        class_="meter",
        role="img",
        aria_label=text,
    )


def _comparisons(report: ParityReport) -> Markup:
    head = (
        "compared", "needs", "allowed", "max abs", "mean abs", "99.9% below", "max relative", "cosine", "SNR, dB",
        "ULP max", "verdict",
    )  # fmt: skip
    rows = [
        (
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
            verdict(True) if e.passed else element("span", "✗ " + "; ".join(e.failures), class_="failed"),
        )
        for e in report.comparisons
    ]
    return join(
        element("h2", "Every comparison"),
        element(
            "p",
            "“Needs” is the relative L2 error, ‖x − r‖ / ‖r‖: the tolerance with which it passes. Relative errors "
            "leave out values whose reference is zero.",
            class_="quiet",
        ),
        element("details", element("summary", f"All {len(rows)} comparisons"), table(head, rows, class_="cards")),
        *_left_out(report),
    )


def _left_out(report: ParityReport) -> Iterator[Markup]:
    if report.left_out:
        yield element("p", f"Left out, since {report.engine} was built for other sizes:")
        yield element("ul", *(element("li", what) for what in report.left_out))


def _provenance(report: ParityReport) -> Markup:
    hashes = [
        (file.path, file.role, spaced(file.bytes), file.fingerprint, file.sha256 or "not taken")
        for file in report.files
    ]
    return join(
        element("h2", "How to repeat this"),
        element("pre", element("code", report.command)),
        element("h2", "Environment"),
        table(("what", "value"), list(report.environment.items()), class_="words"),
        element("h2", "Files") if hashes else None,
        element(
            "details",
            element("summary", f"Hashes of {len(hashes)} files"),
            table(("file", "of", "bytes", "fingerprint", "SHA-256"), hashes, class_="words"),
        )
        if hashes
        else None,
    )
