"""A parity report as JUnit XML, which build servers show: a suite for every stage, a case for every comparison.

Inputs that were left out are the skipped cases of a suite of their own."""

import re
from collections import defaultdict
from collections.abc import Sequence
from xml.etree import ElementTree

from ...schemas.report import Comparison, ParityReport

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML 1.0


def to_junit(report: ParityReport) -> str:
    """The report as text. There are no times, as a comparison has none of its own."""
    suites: dict[str, list[Comparison]] = defaultdict(list)
    for entry in report.comparisons:
        suites[str(entry.stage or "image")].append(entry)
    root = ElementTree.Element("testsuites", _counted(report.comparisons, report), name="cascadekit parity")
    for name, entries in suites.items():
        suite = ElementTree.SubElement(root, "testsuite", _counted(entries), name=name, timestamp=report.date[:19])
        properties = ElementTree.SubElement(suite, "properties")
        for key in ("engine", "reference", "bundle", "command"):
            ElementTree.SubElement(properties, "property", name=key, value=_clean(getattr(report, key)))
        for entry in entries:
            _case(suite, f"cascadekit.parity.{name}", entry.name, "; ".join(entry.failures), _figures(entry))
    if report.image is not None:
        failed = "" if report.image.passed else f"PSNR {report.image.psnr_db:.1f} dB"
        figures = f"PSNR {report.image.psnr_db:.2f} dB, needed {report.image.psnr_needed_db:.2f} dB"
        counts = {"tests": "1", "failures": str(int(bool(failed))), "errors": "0"}
        suite = ElementTree.SubElement(root, "testsuite", counts, name="final image", timestamp=report.date[:19])
        _case(suite, "cascadekit.parity.image", "final image", failed, figures)
    if report.left_out:
        skipped = str(len(report.left_out))
        counts = {"tests": skipped, "failures": "0", "errors": "0", "skipped": skipped}
        suite = ElementTree.SubElement(root, "testsuite", counts, name="left out", timestamp=report.date[:19])
        for what in report.left_out:
            case = ElementTree.SubElement(suite, "testcase", classname="cascadekit.parity.left_out", name=_clean(what))
            ElementTree.SubElement(case, "skipped", message=_clean(f"{report.engine} was built for other sizes"))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counted(entries: Sequence[Comparison], report: ParityReport | None = None) -> dict[str, str]:
    image = report.image if report else None
    skipped = len(report.left_out) if report else 0
    failures = sum(not entry.passed for entry in entries) + (image is not None and not image.passed)
    tests = len(entries) + (image is not None) + skipped
    return {"tests": str(tests), "failures": str(failures), "errors": "0", "skipped": str(skipped)}


def _case(suite: ElementTree.Element, group: str, name: str, failure: str, figures: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_clean(group), name=_clean(name))
    if failure:
        ElementTree.SubElement(case, "failure", message=_clean(failure), type="parity").text = _clean(figures)
    ElementTree.SubElement(case, "system-out").text = _clean(figures)


def _figures(entry: Comparison) -> str:
    return (
        f"needs a tolerance of {entry.relative_l2:.3e}, has {entry.tolerance:.3e}; max abs {entry.max_abs:.3e}, "
        f"mean abs {entry.mean_abs:.3e}, cosine {entry.cosine:.8f}, SNR {entry.snr_db:.1f} dB"
    )


def _clean(text: str) -> str:
    return FORBIDDEN.sub("\ufffd", text)
