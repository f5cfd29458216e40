"""The charts of a parity report, each with a summary in words."""

from ...schemas.precision import E4M3_MAX, FP16_MAX
from ...schemas.report import Comparison, DepthEntry, ParityReport
from ...schemas.stages import Stage
from .figures import figure, spaced
from .svg import Chart, ChartPoint, Level, Series

LIMITS = (("fp8 e4m3", E4M3_MAX), ("fp16", FP16_MAX), ("bf16 and fp32", 3.39e38))
LIMIT_SHOWN = 100.0  # a limit this many times above all values is left out of a chart


def step_charts(report: ParityReport) -> list[Chart]:
    """Relative L2 over the steps of each sampler, one chart a stage."""
    charts = []
    for stage in _stages(report):
        entries = [e for e in report.comparisons if e.stage is stage and e.step is not None]
        series: dict[str, list[Comparison]] = {}
        for entry in entries:
            series.setdefault(entry.kind, []).append(entry)
        if not entries:
            continue
        worst = max(entries, key=lambda e: e.relative_l2)
        chart = Chart(
            str(stage),
            f"After each step; the largest is {figure(worst.relative_l2)}, {worst.kind}, step {worst.step}.",
            x_label="step",
            y_label="relative L2",
            series=tuple(Series(kind, tuple(map(_step, found))) for kind, found in series.items()),
            levels=_tolerances(entries),
        )
        charts.append(chart)
    return charts


def _step(entry: Comparison) -> ChartPoint:
    assert entry.step is not None
    return ChartPoint(entry.step, entry.relative_l2, f"step {entry.step}", odd=not entry.passed)


def _tolerances(entries: list[Comparison]) -> tuple[Level, ...]:
    """The smallest and the largest tolerance, where there are several."""
    found = [entry.tolerance for entry in entries]
    return tuple(Level(t, f"tolerance {figure(t)}") for t in sorted({min(found), max(found)}))


def depth_charts(report: ParityReport) -> list[Chart]:
    """Error of every part of a graph, one chart for each stage that was bisected."""
    charts = []
    for stage in dict.fromkeys(entry.stage for entry in report.depth):
        parts = [entry for entry in report.depth if entry.stage is stage]
        faulty = [entry.name for entry in parts if entry.faulty]
        named = f"At fault: {', '.join(faulty[:3])}." if faulty else "No part is at fault."
        lines = {
            "own error": [(n, e, e.own) for n, e in enumerate(parts)],
            "error so far": [(n, e, e.accumulated) for n, e in enumerate(parts) if e.accumulated is not None],
            "the precision's own": [(n, e, e.floor) for n, e in enumerate(parts)],
        }
        series = tuple(Series(name, _parts(points, name)) for name, points in lines.items() if points)
        summary = f"{len(parts)} parts, in the order they run. {named}"
        charts.append(Chart(str(stage), summary, "part", "relative L2", series))
    return charts


def _parts(points: list[tuple[int, DepthEntry, float]], name: str) -> tuple[ChartPoint, ...]:
    return tuple(ChartPoint(n, value, e.name, odd=e.faulty and name == "own error") for n, e, value in points)


def histograms(report: ParityReport) -> list[Chart]:
    """Errors of each stage's passes on sample inputs; of all its passes where none is on a sample input."""
    charts = []
    for stage in (*_stages(report), None):
        entries = [e for e in report.comparisons if e.stage is stage]
        entries = [e for e in entries if e.kind == "stage"] or entries
        if any(sum(entry.histogram.counts) for entry in entries):
            charts.append(_histogram(str(stage or "image"), entries))
    return charts


def _histogram(title: str, entries: list[Comparison]) -> Chart:
    edges = entries[0].histogram.edges
    counts = [sum(column) for column in zip(*(e.histogram.counts for e in entries), strict=True)]
    exact = sum(e.histogram.exact for e in entries)
    outside = sum(e.histogram.below + e.histogram.above for e in entries)
    total = sum(counts) + exact + outside
    points = tuple(
        ChartPoint(low, count / total, f"{figure(10**low)} to {figure(10**high)}")
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    )
    most = max(points, key=lambda p: p.y)
    summary = f"{spaced(total)} values, {exact / total:.1%} equal to the bit; most common errors: {most.label}."
    return Chart(
        title,
        summary,
        x_label="error / RMS of the reference",
        y_label="share of the values",
        series=(Series("share", points),),
        levels=(Level(max(e.relative_l2 for e in entries), "RMS of all errors"), *_tolerances(entries)),
        bars=True,
    )


def range_charts(report: ParityReport) -> list[Chart]:
    """The largest magnitude in every block, one chart for each stage that was watched."""
    charts = []
    for stage in dict.fromkeys(entry.stage for entry in report.ranges):
        blocks = [entry for entry in report.ranges if entry.stage is stage]
        largest = max(blocks, key=lambda entry: entry.max_abs)
        shown = [(name, limit) for name, limit in LIMITS if limit < largest.max_abs * LIMIT_SHOWN]
        # bf16 and fp32 reach so far that the axis would hold nothing else
        shown = [item for item in shown if item[1] < 1e30 or largest.max_abs > 1e30]
        odd = [entry.max_abs > FP16_MAX for entry in blocks]
        summary = f"The largest is {figure(largest.max_abs)}, in {largest.name}"
        summary += f"; {sum(odd)} of {len(blocks)} blocks exceed fp16." if any(odd) else "; none exceeds fp16."
        points = tuple(ChartPoint(n, e.max_abs, e.name, odd=odd[n]) for n, e in enumerate(blocks))
        levels = tuple(Level(limit, f"{name}: {figure(limit)}") for name, limit in shown)
        series = (Series("max |x|", points),)
        charts.append(Chart(str(stage), summary, "block", "max |x|", series, levels=levels))
    return charts


def _stages(report: ParityReport) -> list[Stage]:
    return [stage for stage in dict.fromkeys(entry.stage for entry in report.comparisons) if stage is not None]
